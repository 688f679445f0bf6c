"""Collecting statistics: one forward and, where gradients are wanted, one backward pass over the text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.blocks import frozen
from hf_lowrank.outputs import Batch, real_tokens, run
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.statistics.moments import Statistics
from hf_lowrank.targets import DenseMatrix

# `input_moment` brings the mean of the inputs along.
KINDS = ("input_moment", "output_moment", "fisher", "row_weights")

# A token whose gradient is many times the average one would decide the moment alone.
_LARGEST_GRADIENT = 10.0


def collect_statistics(
    model: PreTrainedModel,
    matrices: Sequence[DenseMatrix],
    batches: Sequence[Batch],
    kinds: frozenset[str],
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Statistics:
    """The statistics of the given kinds, streamed over the batches; padding counts for nothing.

    Gradients are those of `Said.random_gradient_loss`: of labels drawn from the model's own predictions, so that no
    labels are needed. Every sum is kept in float64; no activation outlives its batch.

    Args:
        matrices: Those of `find_matrices(model)` that will be solved for.
        kinds: Out of `KINDS`.
        seed: Of the drawn labels.
    """
    generator = torch.Generator().manual_seed(seed)
    collector = _Collector(kinds)
    needs_gradients = bool(kinds & {"output_moment", "fisher"})
    # With frozen weights the gradient flows through the activations alone, from the embedding on.
    embedding: nn.Module = model.get_input_embeddings()
    hooks = [embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(needs_gradients))]
    hooks += [matrix.module.register_forward_hook(collector.watch(matrix)) for matrix in matrices]
    try:
        with frozen(model), torch.set_grad_enabled(needs_gradients):
            for batch in progress(batches, "collecting statistics"):
                placed = {name: value.to(model.device) for name, value in batch.items()}
                collector.start(placed)
                said = run(model, placed)
                if needs_gradients:
                    said.random_gradient_loss(generator).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return collector.finish([matrix.name for matrix in matrices])


@dataclass
class _Collector:
    """Sums while the model runs."""

    kinds: frozenset[str]
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    num_tokens: int = 0
    real: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    last_input: tuple[str, torch.Tensor] | None = None

    def start(self, batch: Batch) -> None:
        self.real = real_tokens(batch)
        self.num_tokens += int(self.real.sum())
        self.last_input = None
        self.input_ids = batch["input_ids"]

    def watch(self, matrix: DenseMatrix) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if matrix.role == "embedding":
                self._count_rows(matrix)
            elif "input_moment" in self.kinds:
                self._add_input(matrix.name, inputs[0])
            if output.requires_grad and self.kinds & {"output_moment", "fisher"}:
                output.register_hook(lambda gradient: self._add_gradient(matrix, inputs[0], gradient))

        return hook

    def _count_rows(self, matrix: DenseMatrix) -> None:
        if "row_weights" in self.kinds:
            counts = torch.bincount(self.input_ids[self.real], minlength=matrix.shape[0])
            self._add(f"row_weights/{matrix.name}", counts)

    def _add_input(self, name: str, hidden_states: torch.Tensor) -> None:
        # Query, key and value are called with the very same tensor: their moment and mean are summed once.
        if self.last_input is not None and self.last_input[1] is hidden_states:
            self.inputs[name] = self.last_input[0]
            return
        self.last_input = (name, hidden_states)
        self.inputs[name] = name
        rows = self._rows(hidden_states.detach())
        self._add_moment(f"input_moment/{name}", rows)
        self._add(f"input_mean/{name}", rows.sum(dim=0, dtype=torch.float64))

    def _add_gradient(self, matrix: DenseMatrix, hidden_states: torch.Tensor, gradient: torch.Tensor) -> None:
        if "fisher" in self.kinds and matrix.role != "embedding":
            # Per sample: dL/dW = sum over its tokens of g x^T.
            per_sample = torch.einsum("bto,bti->boi", gradient.float(), hidden_states.detach().float())
            self._add(f"fisher/{matrix.name}", per_sample.square_().sum(dim=0))
        if "output_moment" not in self.kinds:
            return
        rows = self._rows(gradient)
        lengths = rows.norm(dim=1, keepdim=True)  # (N, 1)
        limit = _LARGEST_GRADIENT * lengths.mean()
        rows = rows * (lengths.clamp(max=limit) / lengths.clamp_min(torch.finfo(rows.dtype).tiny))
        # An embedding's gradient weights the columns of its table: it is a moment of what goes in, seen from there.
        kind = "input_moment" if matrix.role == "embedding" else "output_moment"
        self._add_moment(f"{kind}/{matrix.name}", rows)

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(*self.real.shape, -1)[self.real].float()  # (B, T, n) or (B T, n) -> (N, n)

    def _add_moment(self, key: str, rows: torch.Tensor) -> None:
        self._add(key, rows.T @ rows)

    def _add(self, key: str, value: torch.Tensor) -> None:
        if key in self.sums:
            self.sums[key] += value
        else:
            self.sums[key] = value.double()

    def finish(self, names: list[str]) -> Statistics:
        count = max(self.num_tokens, 1)
        tensors = {key: value.div_(count) for key, value in self.sums.items()}
        return Statistics(self.num_tokens, tuple(names), self.inputs, tensors)
