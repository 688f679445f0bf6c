"""A model that is not in memory, run stage by stage: one block on all batches, then the next one."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError, one_line
from hf_lowrank.files.processes import my_share
from hf_lowrank.files.scratch import write_file
from hf_lowrank.hosts.blocks import Reached, hidden_states, left_at, replayed_outputs
from hf_lowrank.hosts.disk.offloaded import offloaded
from hf_lowrank.hosts.outputs import Batch, run
from hf_lowrank.remote_code.lowrank_structures import token_table

# How far a run by stages may be from one in one go: the order of sums is the same, and what is not is not.
_TOLERANCE = 1e-4
# More than so many would be most of what is in memory: each is there several times, with its gradient and its softmax.
_MOST_LOGITS = 1 << 24
ALL = slice(None)


class Stages:
    """One model on the same batches: stage `k` goes from what block `k - 1` returned to what block `k` returns.

    The first begins with the inputs, the last ends with what the model says. What blocks return, and the gradients
    that come back to it, are on disk between stages, a file for each batch.

    Args:
        names: Of the blocks, in the order they run.
        folder: Of those files.

    Attributes:
        indices: Of the batches that are this process's.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], batches: Sequence[Batch], folder: Path) -> None:
        self.model = model
        self.names = names
        self.batches = batches
        self.indices = my_share(range(len(batches)))
        self._folder = folder

    def __len__(self) -> int:
        return len(self.names) + 1

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Within, the weights of a stage come once for all batches, and stay for gradients."""
        away = offloaded(self.model)
        with ExitStack() as stack:
            if away is not None:
                stack.enter_context(away.staying())
            yield

    def placed(self, index: int, rows: slice = ALL) -> Batch:
        """A batch, or some of its sequences, where the model is."""
        return {name: value[rows].to(self.model.device) for name, value in self.batches[index].items()}

    def parts(self, index: int) -> list[slice]:
        """All sequences of a batch at once, or one by one where they have a large head's logits."""
        batch, head = self.batches[index], self.model.get_output_embeddings()
        size = len(next(iter(batch.values())))
        if head is None or "input_ids" not in batch:
            return [ALL]
        num_logits = batch["input_ids"].numel() * head.weight.shape[0]
        return [slice(row, row + 1) for row in range(size)] if num_logits > _MOST_LOGITS else [ALL]

    def run(
        self, stage: int, index: int, needs_gradient: bool = False, rows: slice = ALL
    ) -> tuple[torch.Tensor | None, Any]:
        """The hidden states that a stage begins with, None at the first, and what it ends with."""
        start: torch.Tensor | None = None
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(needs_gradient))
            if stage:
                size = len(next(iter(self.batches[index].values())))
                before = tree_map(partial(_of_rows, rows, size), self._read(self._output(stage - 1, index)))
                start = hidden_states(before).requires_grad_(needs_gradient)
                passed = self.names[:stage]
                stack.enter_context(replayed_outputs(self.model, passed, dict.fromkeys(passed, before)))
                stack.enter_context(_without_look_up(self.model))
            if stage == len(self.names):
                return start, run(self.model, self.placed(index, rows))
            stack.enter_context(left_at(self.model, self.names[stage], None))
            try:
                run(self.model, self.placed(index, rows))
            except Reached as reached:
                return start, reached.output
        raise RuntimeError(f"{self.names[stage]} was not run.")

    def advance(self, stage: int, index: int) -> None:
        """Run a batch forward through a block, if that is not done."""
        if not self._output(stage, index).is_file():
            self.keep(stage, index, self.run(stage, index)[1])

    def keep(self, stage: int, index: int, end: Any) -> None:
        """Keep what a block returned; of what the model says nothing is needed."""
        if stage < len(self.names):
            _require_numbers(hidden_states(end), self.names[stage])
            write_file(self._output(stage, index), lambda draft: torch.save(end, draft))

    def gradient(self, stage: int, index: int) -> torch.Tensor:
        """The one that came back to what a block returned."""
        found: torch.Tensor = self._read(self._gradient(stage, index))
        return found

    def keep_gradient(self, stage: int, index: int, parts: Sequence[torch.Tensor]) -> None:
        """Keep what came back to the start of a stage, of some sequences after the others."""
        gradient = torch.cat(list(parts))
        _require_numbers(gradient, self.names[stage - 1])
        write_file(self._gradient(stage - 1, index), lambda draft: torch.save(gradient, draft))

    def forget(self, stage: int) -> None:
        """Remove what a stage, and all after it, no longer need."""
        for index in self.indices:
            for path in (self._output(stage, index), self._gradient(stage, index)):
                path.unlink(missing_ok=True)

    def _output(self, stage: int, index: int) -> Path:
        return self._folder / f"{stage}-{index}.pt"

    def _gradient(self, stage: int, index: int) -> Path:
        return self._folder / f"{stage}-{index}.gradient.pt"

    def _read(self, path: Path) -> Any:
        # A block may return any object, and the file is our own.
        return torch.load(path, map_location=self.model.device, weights_only=False)


def _of_rows(rows: slice, size: int, kept: Any) -> Any:
    """What a block returned for some sequences of a batch; what is the same for all of them stays."""
    return kept[rows] if isinstance(kept, torch.Tensor) and kept.dim() and len(kept) == size else kept


def _require_numbers(hidden: torch.Tensor, name: str) -> None:
    if not bool(hidden.isfinite().all()):
        raise InputError(f"What {name} returns, or its gradient, is not finite. Give other text, or take method svd.")


def require_stages(stages: Stages, blocks: Sequence[str]) -> None:
    """Check on the first batch that a model can be run by stages.

    Args:
        blocks: That hold what will be looked at.

    Raises:
        InputError: If its blocks hand on more than hidden states, each to the next, once a run.
    """
    why = "its outputs are others then"
    if {*blocks} != {*stages.names}:
        why = f"{min({*blocks} - {*stages.names})} is not run once"
    else:
        try:
            if _runs_the_same(stages):
                return
        except Exception as error:  # hosts of all families, each with errors of its own
            why = one_line(error)
    raise InputError(
        f"{type(stages.model).__name__} cannot be run block by block: {why}. Raise memory, so that it is held whole, "
        "or take method svd, which runs nothing."
    )


@torch.no_grad()
def _runs_the_same(stages: Stages) -> bool:
    index, first = stages.indices[0], slice(0, 1)  # the logits of a whole batch may be more than all else in memory
    for stage in range(len(stages.names)):
        stages.advance(stage, index)
    whole = run(stages.model, stages.placed(index, first)).rows
    found = stages.run(len(stages.names), index, rows=first)[1].rows
    return found.shape == whole.shape and bool(torch.allclose(found, whole, _TOLERANCE, _TOLERANCE))


@contextmanager
def _without_look_up(model: PreTrainedModel) -> Iterator[None]:
    """Within, a token table is looked up without being read: of what it gives only the shape is used."""
    table: Any = token_table(model)
    if table is None or not hasattr(table, "embedding_dim"):
        yield
        return

    def shape_only(ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros((), dtype=table.weight.dtype, device=ids.device).expand(*ids.shape, table.embedding_dim)

    own = vars(table).get("forward")
    vars(table)["forward"] = shape_only
    try:
        yield
    finally:
        vars(table).pop("forward") if own is None else vars(table).update(forward=own)
