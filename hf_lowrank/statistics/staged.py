"""Statistics of a model that is not in memory, gathered one block after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hf_lowrank.files.digests import digest_of
from hf_lowrank.files.processes import rank_and_count, told_by_first, wait_for_all
from hf_lowrank.hosts.blocks import block_name, calls_in_order, find_blocks, frozen, hidden_states
from hf_lowrank.hosts.disk.stages import ALL, Stages, require_stages
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.hosts.targets import BLOCK_ROLES
from hf_lowrank.statistics.collection import Collector, draws_of, needs_gradients, random_loss
from hf_lowrank.statistics.evidence import Evidence
from hf_lowrank.statistics.moments import FORMAT, Statistics, make_metadata
from hf_lowrank.statistics.running_sums import RunningSums
from hf_lowrank.version import __version__


@dataclass(eq=False)
class StagedEvidence(Evidence):
    """What is known of a model that is not in memory; see `Evidence`.

    Forward, one block after the other is run on the whole text, and what each returns kept on disk. Backward, each is
    run again from there, and the gradient that the block after it left is taken through it: two runs forward and one
    backward of every block in all, with the weights of one block and the activations of one batch in memory. What a
    stage needed is removed after it. Several processes share out the batches, and what is found of each is summed.

    Args:
        solver: Name of what the statistics are for, which may forget moments.
    """

    solver: str = ""

    @cached_property
    def stages(self) -> Stages:
        """The model on the text, by stages."""
        blocks = calls_in_order(self.model, find_blocks(self.model, self.watched), self.calibration.probes[0])
        return Stages(self.model, blocks, self.calibration.batches, self._place / "states")

    def collect(self, finish: Callable[[Sequence[DenseMatrix]], None], forgets: bool) -> None:
        """Gather the statistics of all stages.

        Args:
            finish: Does what is to be done with the matrices of a stage, of which everything is known then.
            forgets: Whether moments are not needed after that.
        """
        stages, backward = self.stages, needs_gradients(self.kinds)
        order = list(reversed(range(len(stages)))) if backward else list(range(len(stages)))
        with frozen(self.model):
            if not self._own(order[0]).is_file():
                self._run_forward(order[:0:-1] if backward else [])
            for place, stage in enumerate(self.progress(order, "collecting statistics")):
                if not self._own(stage).is_file():
                    self._collect_stage(stage)
                wait_for_all()
                known = [path for one in order[: place + 1] for path in self._files(one)]
                vars(self)["_statistics"] = Statistics.load(*known)
                finish(self._matrices_of(stage))
                wait_for_all()
                if forgets and 0 < stage < len(stages) - 1:  # a table is known from both ends
                    Statistics.load(self._own(stage)).forget_moments()
                stages.forget(stage if backward else stage - 1)

    def _run_forward(self, order: Sequence[int]) -> None:
        require_stages(self.stages, find_blocks(self.model, self.watched))
        for stage in self.progress(order, "running blocks"):
            with self.stages.weights():
                for index in self.stages.indices:
                    self.stages.advance(stage, index)

    def _collect_stage(self, stage: int) -> None:
        stages, matrices = self.stages, self._matrices_of(stage)
        is_last = stage == len(stages) - 1
        tables = [m for m in self.watched if m.role not in BLOCK_ROLES] if is_last else []
        names = [part.name for matrix in {m.name: m for m in (*matrices, *tables)}.values() for part in matrix.parts]
        about = {"format": FORMAT, "fingerprint": self.identity, "names": names, "batches": list(stages.indices)}
        with RunningSums(self._own(stage), about) as sums:
            collector = Collector(self.kinds, sums, **sums.notes)
            with stages.weights(), collector.watching(self.model, matrices, tables):
                for index in stages.indices[sums.num_batches :]:
                    self._see(collector, stage, index)
                    sums.commit()
            sums.save(make_metadata(names, collector.inputs, self.identity))

    def _see(self, collector: Collector, stage: int, index: int) -> None:
        """Run one batch through a stage, and take its gradient back."""
        stages, backward, draws = self.stages, collector.needs_gradients, draws_of(self.text.seed, index)
        is_last = stage == len(stages) - 1
        gradients = []
        for rows in stages.parts(index) if is_last else [ALL]:
            with collector.looking_at(stages.placed(index, rows)):
                start, end = stages.run(stage, index, backward, rows)
                if backward and is_last:
                    random_loss(self.model, end, draws).backward()
                elif backward and hidden_states(end).requires_grad:
                    hidden_states(end).backward(stages.gradient(stage, index))
            if start is not None and backward:
                gradients.append(torch.zeros_like(start) if start.grad is None else start.grad)
        if gradients:
            stages.keep_gradient(stage, index, gradients)
        if not backward:
            stages.keep(stage, index, end)

    def _matrices_of(self, stage: int) -> list[DenseMatrix]:
        """Those that are run in a stage: a table with the first block, a head after the last."""
        places = {name: index for index, name in enumerate(self.stages.names)}
        places |= {"embedding": 0, "head": len(places)}
        return [m for m in self.watched if places[block_name(m.path) if m.role in BLOCK_ROLES else m.role] == stage]

    def _files(self, stage: int) -> list[Path]:
        """The sums of each process."""
        count = rank_and_count()[1]
        return [self._place / f"{stage}-{rank}-of-{count}.safetensors" for rank in range(count)]

    def _own(self, stage: int) -> Path:
        return self._files(stage)[rank_and_count()[0]]

    @cached_property
    def folder(self) -> Path:
        """See `Evidence`; that of the first process."""
        return told_by_first(super().folder)

    @cached_property
    def _place(self) -> Path:
        return self.folder / f"staged-{self.solver}-{'-'.join(sorted(self.kinds))}-{self.identity}"

    @cached_property
    def _model_identity(self) -> str:
        """Of a model whose weights are not read for it: its configuration, and when their files were written."""
        source = Path(str(getattr(self.model.config, "_name_or_path", "")))
        files = [path.stat() for path in sorted(source.glob("*.safetensors"))] if source.is_dir() else []
        weights = [[status.st_size, status.st_mtime_ns] for status in files]
        about = [__version__, [m.name for m in self.matrices], type(self.model).__name__, self.model.config.to_dict()]
        return digest_of([*about, weights])[:16]
