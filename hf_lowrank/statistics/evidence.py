"""What is known of a dense model: the text it is watched on, statistics, probes, and where all that is kept."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from transformers import PreTrainedModel

from hf_lowrank.data.calibration import Calibration, Text, described_text, make_calibration
from hf_lowrank.errors import InputError
from hf_lowrank.files.checkpoint import NOT_KEPT, Checkpoint
from hf_lowrank.files.digests import fingerprint, model_digest, weights_digest
from hf_lowrank.files.scratch import scratch_folder
from hf_lowrank.hosts.blocks import every_call
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.planning.probes import Probe
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.statistics.collection import collect_statistics
from hf_lowrank.statistics.moments import MatrixStatistics, Statistics
from hf_lowrank.statistics.token_counts import count_tokens, occurrences
from hf_lowrank.version import __version__

T = TypeVar("T")


@dataclass(eq=False)
class Evidence:
    """What is known of the matrices of one dense model.

    Nothing is read, run or computed before it is asked for, and nothing twice: with `cache_dir`, not even in a later
    run on the same model and text. What is found is kept on disk, in that folder or in one that goes when this does,
    and read a matrix at a time.

    Args:
        source: Calibration text, or None for synthetic tokens; see `make_calibration`.
        kinds: Of statistics; see `hf_lowrank.statistics.collection.STATISTICS`.
        watched: Matrices that they are wanted of.
        unreached: Matrices that were left out; see `leave_out_unreached`.
    """

    model: PreTrainedModel
    matrices: Sequence[DenseMatrix]
    text: Text = field(default_factory=Text)
    source: Any = None
    tokenizer: Any = None
    kinds: frozenset[str] = frozenset()
    watched: Sequence[DenseMatrix] = ()
    cache_dir: str | None = None
    progress: Progress = no_progress
    unreached: Sequence[DenseMatrix] = ()
    _known: dict[str, Any] = field(default_factory=dict)

    def known(self, matrix: DenseMatrix, device: torch.device) -> MatrixStatistics | None:
        """What the text says about one matrix; None where no statistics are wanted."""
        found = None if self._statistics is None else self._statistics.get(matrix.name)
        return None if found is None else found.to(device)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made when it is first asked for by that name."""
        if name not in self._known:
            self._known[name] = make()
        found: T = self._known[name]
        return found

    def checkpoint(self, method: str, small: PreTrainedModel | None = None) -> Checkpoint:
        """Where a computation from `small` and the text, or from the dense weights alone, keeps what it has done."""
        if self.cache_dir is None:
            return NOT_KEPT
        start = self._model_identity if small is None else f"{self.identity}-{weights_digest(small)}"
        return Checkpoint(self.folder / f"learned-{method}-{start}-{self.text.seed}")

    def described_text(self) -> dict[str, Any]:
        """What the model was watched on, for the record."""
        return described_text(self.source, [*self.calibration.batches, *self.calibration.probes])

    def leave_out_unreached(self) -> None:
        """Keep only matrices that are run: what reads images is not where a model is given text alone.

        Raises:
            InputError: If none is.
        """
        paths = [matrix.path for matrix in self.matrices if matrix.role == "block"]
        called = set(every_call(self.model, paths, self.calibration.probes[0]))
        self.unreached = [m for m in self.matrices if m.role == "block" and m.path not in called]
        self.matrices = [matrix for matrix in self.matrices if matrix not in self.unreached]
        self.watched = [matrix for matrix in self.watched if matrix not in self.unreached]
        if not self.matrices:
            raise InputError("Nothing that was looked at reaches the modules to be compressed. Give data that does.")

    @property
    def inputs(self) -> Mapping[str, str] | None:
        """Which matrices were seen to read the same input; see `Statistics.inputs`; None where nobody looked."""
        return None if self._statistics is None else self._statistics.inputs

    @property
    def experts_with_few_tokens(self) -> dict[str, int]:
        """By matrices of experts, how many of these saw fewer tokens than they have inputs; those with any."""
        if (found := self._statistics) is None:
            return {}
        few = {
            m.name: sum(found.count(part.name) < m.shape[1] for part in m.parts)
            for m in self.watched
            if m.kind == "experts"
        }
        return {name: count for name, count in few.items() if count}

    @cached_property
    def calibration(self) -> Calibration:
        """The text the model is watched on."""
        return make_calibration(self.model, self.source, self.tokenizer, self.text)

    @cached_property
    def probe(self) -> Probe:
        """What cutting matrices does to the whole model, on text that no statistics are of."""
        return Probe(self.model, self.matrices, self.calibration.probes)

    @cached_property
    def token_counts(self) -> torch.Tensor | None:
        """How often tokens occur in the whole text but the probes; None where there is none, or no tokenizer.

        What is made for rows by their frequency would look better on text it was made for than it is.
        """
        text = self.text
        counts = count_tokens(self.source, self.tokenizer, self._num_tokens, text.text_column, text.seed)
        return None if counts is None else (counts - self._probed_tokens).clamp_min(0)

    @cached_property
    def vocabulary_seen(self) -> dict[str, float] | None:
        """Of the vocabulary: how many tokens the text holds, of how many, and what share of the probes it lacks."""
        if self.source is None:
            return None
        counts = self.token_counts
        if counts is None:
            counts = occurrences(self.calibration.batches, self._num_tokens)
        probed = self._probed_tokens
        lacking = float(probed[counts == 0].sum() / probed.sum())
        return {"tokens": int(counts.count_nonzero()), "of": len(counts), "lacking": lacking}

    @property
    def _num_tokens(self) -> int:
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.num_embeddings)

    @cached_property
    def _probed_tokens(self) -> torch.Tensor:
        return occurrences(self.calibration.probes, self._num_tokens)

    @cached_property
    def folder(self) -> Path:
        """Where what is found is kept: the cache, or a folder that goes when this does."""
        if self.cache_dir is None:
            return scratch_folder(self)
        folder = Path(self.cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def identity(self) -> str:
        """A short hash of the model, the text and the seed: all that statistics depend on."""
        text = fingerprint([*self.calibration.batches, *self.calibration.probes])
        return hashlib.sha256(f"{self._model_identity} {text} {self.text.seed}".encode()).hexdigest()[:16]

    @property
    def identity_of_solutions(self) -> str:
        """The same of all that decompositions depend on: without statistics, no text."""
        return self.identity if self.kinds else self._model_identity

    @cached_property
    def _model_identity(self) -> str:
        """A short hash of the model and of which matrices are looked at."""
        about = f"{__version__} {[matrix.name for matrix in self.matrices]} {model_digest(self.model)}"
        return hashlib.sha256(about.encode()).hexdigest()[:16]

    @cached_property
    def _statistics(self) -> Statistics | None:
        if not self.kinds:
            return None
        file = self.folder / f"statistics-{'-'.join(sorted(self.kinds))}-{self.identity}.safetensors"
        with FileLock(file.with_suffix(".lock")):  # two runs would add to the same sums
            if file.is_file():
                return Statistics.load(file)
            return collect_statistics(
                self.model,
                self.watched,
                self.calibration.batches,
                self.kinds,
                path=file,
                fingerprint=self.identity,
                seed=self.text.seed,
                progress=self.progress,
            )
