"""Collecting statistics: one forward and, where gradients are wanted, one backward pass over the text."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.blocks import frozen
from hf_lowrank.hosts.matrices import DenseMatrix, ExpertMatrices
from hf_lowrank.hosts.outputs import Batch, Said, real_rows, run, speaking_places
from hf_lowrank.hosts.targets import is_tied
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.statistics.experts import Split, experts_watched
from hf_lowrank.statistics.moments import FORMAT, Statistics, make_metadata, names_of_expert
from hf_lowrank.statistics.panels import gram_panels
from hf_lowrank.statistics.running_sums import RunningSums

# `input_moment` brings the mean of the inputs along.
STATISTICS = ("input_moment", "output_moment", "fisher", "row_weights")

# A token whose gradient is many times the average one would decide the moment alone.
_LARGEST_GRADIENT = 10.0

# A moment of gradients needs as many draws; where a model speaks once a text, a text is drawn for several times.
_ENOUGH_DRAWS, _MOST_DRAWS = 384, 16


def collect_statistics(
    model: PreTrainedModel,
    matrices: Sequence[DenseMatrix],
    batches: Sequence[Batch],
    kinds: frozenset[str],
    *,
    path: Path,
    fingerprint: str,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Statistics:
    """The statistics of the given kinds, streamed over the batches into a file; padding counts for nothing.

    Gradients are those of `Said.random_gradient_loss`: of labels drawn from the model's own predictions, so that no
    labels are needed. Every sum is kept in float64 on disk; no activation outlives its batch. A run that was killed
    goes on after its last whole batch, and ends with the same numbers.

    Args:
        matrices: Those of `find_matrices(model)` that will be solved for.
        kinds: Out of `STATISTICS`.
        path: The file to write.
        fingerprint: Of the model and the text; what was left by a run on others is not gone on with.
        seed: Of the drawn labels.
    """
    names = [part.name for matrix in matrices for part in matrix.parts]
    about = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "kinds": sorted(kinds),
        "names": names,
        "seed": seed,
        "num_batches": len(batches),
    }
    with RunningSums(path, about) as sums:
        collector = Collector(kinds, sums, **sums.notes)
        with frozen(model), collector.watching(model, matrices, matrices):
            for index in progress(range(sums.num_batches, len(batches)), "collecting statistics"):
                collector.see(model, batches[index], draws_of(seed, index), len(batches))
                sums.commit()
        sums.save(make_metadata(names, collector.inputs, fingerprint))
    return Statistics.load(path)


def draws_of(seed: int, index: int) -> torch.Generator:
    """Draws of their own for each batch, so that it does not matter where a killed run goes on."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {index}").getrandbits(63))


def needs_gradients(kinds: frozenset[str]) -> bool:
    """Whether batches are run backwards too."""
    return bool(kinds & {"output_moment", "fisher"})


@dataclass
class Collector:
    """Adds up what hooks see while the model runs.

    Args:
        inputs: As in `Statistics`.
    """

    kinds: frozenset[str]
    sums: RunningSums
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def needs_gradients(self) -> bool:
        """See `needs_gradients`."""
        return needs_gradients(self.kinds)

    @contextmanager
    def watching(
        self, model: PreTrainedModel, matrices: Sequence[DenseMatrix], tables: Sequence[DenseMatrix]
    ) -> Iterator[None]:
        """Within, what the matrices are given and what comes back is added up.

        Args:
            tables: Of these the one that is the model's head is watched as such.
        """
        # A table that is tied to others is looked up in each of them.
        hooks: list[Any] = [
            module.register_forward_hook(self._hook(matrix))
            for matrix in matrices
            for module in (_lookups(model, matrix) if matrix.role == "embedding" else [matrix.module])
        ]
        hooks += self._head_hooks(model, tables)
        try:
            with torch.set_grad_enabled(self.needs_gradients), experts_watched(matrices, self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def see(self, model: PreTrainedModel, batch: Batch, draws: torch.Generator, num_batches: int) -> None:
        """Run one of so many batches; labels for the gradients are drawn by `draws`."""
        placed = {name: value.to(model.device) for name, value in batch.items()}
        with self.looking_at(placed):
            said = run(model, placed)
            num_draws = _num_draws(said, batch, num_batches) if self.needs_gradients else 0
            for left in reversed(range(num_draws)):
                (random_loss(model, said, draws) / math.sqrt(num_draws)).backward(retain_graph=left > 0)

    @contextmanager
    def looking_at(self, batch: Batch) -> Iterator[None]:
        """Within, what is run is that batch, where the model is."""
        self._batch = batch
        self._last_input: tuple[str, torch.Tensor] | None = None
        yield
        self._last_input = None
        self.sums.notes = {"inputs": self.inputs}

    def _hook(self, matrix: DenseMatrix) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if matrix.role == "embedding":
                self._count_rows(matrix, inputs[0])
            else:
                self.sums.add(f"count/{matrix.name}", torch.tensor([len(real_rows(output.detach(), self._batch))]))
            if matrix.role != "embedding" and "input_moment" in self.kinds:
                self._add_input(matrix.name, inputs[0])
            if self.needs_gradients:
                output = _with_gradient(output)
            if not output.requires_grad:  # the host runs this part without gradients
                return output
            if "output_moment" in self.kinds and matrix.role != "head":
                output.register_hook(lambda gradient: self._add_gradient(matrix, self.real_rows(gradient)))
            if "fisher" in self.kinds and matrix.role != "embedding":
                hidden_states = inputs[0].detach()  # held until the gradient arrives
                output.register_hook(lambda gradient: self._add_fisher(matrix.name, hidden_states, gradient))
            return output

        return hook

    def see_routing(self, matrix: ExpertMatrices, num_tokens: int) -> None:
        """See `Watcher`."""
        self.sums.add(f"routed/{matrix.name}", torch.tensor([num_tokens]))

    def see_experts(self, split: Split, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """See `Watcher`; sums are kept of each expert, and of all together."""
        for part, rows in split(inputs.detach()):
            names = names_of_expert(part.name)
            for name in names:
                self.sums.add(f"count/{name}", torch.tensor([len(rows)]))
            if "input_moment" in self.kinds:
                self._add_moment([f"input_moment/{name}" for name in names], rows.float())
        if self.needs_gradients:
            output = _with_gradient(output)
            output.register_hook(lambda gradient: self._see_gradients(split, inputs.detach(), gradient))
        return output

    def _see_gradients(self, split: Split, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        for (part, rows), (_, gradients) in zip(split(inputs), split(gradient), strict=True):
            if "output_moment" in self.kinds:
                self._add_gradient(part, gradients.float(), names_of_expert(part.name))
            if "fisher" in self.kinds:  # of tokens: which are of one sample is not known here
                self.sums.add(f"fisher/{part.name}", gradients.float().square().T @ rows.float().square())

    def _head_hooks(self, model: PreTrainedModel, matrices: Sequence[DenseMatrix]) -> list[Any]:
        head: Any = model.get_output_embeddings()
        role = "embedding" if is_tied(model) else "head"
        table = next((matrix for matrix in matrices if matrix.role == role), None)
        if head is None or table is None or "output_moment" not in self.kinds:
            return []
        return [head.register_forward_hook(lambda module, inputs, logits: self._add_head(table, inputs[0], logits))]

    @torch.no_grad()
    def _add_head(self, table: DenseMatrix, hidden_states: torch.Tensor, logits: torch.Tensor) -> None:
        """The curvature of the cross-entropy at a head: `sum_v p_v (1 - p_v) dE_v h h^T dE_v^T` for each token.

        A moment of outputs would have as many rows as the vocabulary; of `diag(p) - p p^T` the diagonal is kept.
        """
        places = speaking_places(logits, self._batch)
        for hidden, scores, counts in zip(hidden_states, logits, places, strict=True):  # one sequence at a time
            chances = scores[counts].float().softmax(dim=-1)  # (T, V)
            weights, rows = chances * (1 - chances), hidden[counts].float()  # (T, V), (T, D)
            if table.role == "head":
                self.sums.add(f"row_weights/{table.name}", weights.sum(dim=0))
                continue
            self._add_moment([f"input_moment/{table.name}"], rows * weights.sum(dim=1, keepdim=True).sqrt())
            self.sums.add(f"head_weights/{table.name}", weights.T @ rows.square().sum(dim=1))

    def _count_rows(self, matrix: DenseMatrix, input_ids: torch.Tensor) -> None:
        ids = real_rows(input_ids[..., None], self._batch)[:, 0]
        self.sums.add(f"count/{matrix.name}", torch.tensor([len(ids)]))
        if "row_weights" in self.kinds:
            self.sums.add(f"row_weights/{matrix.name}", torch.bincount(ids, minlength=matrix.shape[0]))

    def _add_input(self, name: str, hidden_states: torch.Tensor) -> None:
        # Query, key and value are called with the very same tensor: their moment and mean are summed once.
        if self._last_input is not None and self._last_input[1] is hidden_states:
            self.inputs[name] = self._last_input[0]
            return
        self._last_input = (name, hidden_states)
        self.inputs[name] = name
        rows = self.real_rows(hidden_states.detach())
        self._add_moment([f"input_moment/{name}"], rows)
        self.sums.add(f"input_mean/{name}", rows.sum(dim=0, dtype=torch.float64))

    def real_rows(self, values: torch.Tensor) -> torch.Tensor:
        """See `Watcher`."""
        return real_rows(values, self._batch).float()

    def _add_gradient(self, matrix: DenseMatrix, rows: torch.Tensor, names: Sequence[str] = ()) -> None:
        if not len(rows):
            return
        lengths = rows.norm(dim=1, keepdim=True)  # (N, 1)
        limit = _LARGEST_GRADIENT * lengths.mean()
        scales = lengths.clamp(max=limit) / lengths.clamp_min(torch.finfo(rows.dtype).tiny)
        # An embedding's gradient weights the columns of its table: it is a moment of what goes in, seen from there.
        kind = "input_moment" if matrix.role == "embedding" else "output_moment"
        self._add_moment([f"{kind}/{name}" for name in names or [matrix.name]], rows, scales.square())

    def _add_fisher(self, name: str, hidden_states: torch.Tensor, gradient: torch.Tensor) -> None:
        size = len(next(iter(self._batch.values())))
        gradients, inputs = (values.reshape(size, -1, values.shape[-1]) for values in (gradient, hidden_states))
        squares = torch.zeros(gradients.shape[-1], inputs.shape[-1], device=gradient.device)  # (O, I)
        for outer, inner in zip(gradients, inputs, strict=True):
            squares += (outer.float().T @ inner.float()).square_()  # a sample's dL/dW = sum over its tokens of g x^T
        self.sums.add(f"fisher/{name}", squares)

    def _add_moment(self, keys: Sequence[str], rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        for start, panel in gram_panels(rows, weights):
            for key in keys:
                self.sums.add(f"{key}/{start}", panel)


def random_loss(model: PreTrainedModel, said: Said, draws: torch.Generator) -> torch.Tensor:
    """See `Said.random_gradient_loss`.

    Raises:
        InputError: If no gradient comes back from it.
    """
    if not said.rows.requires_grad:  # Reformer runs its blocks in a way of its own
        raise InputError(
            f"No gradient comes back from the outputs of {type(model).__name__}. Take a method that needs none: "
            "whitened_svd, or svd."
        )
    return said.random_gradient_loss(draws)


def _num_draws(said: Said, batch: Batch, num_batches: int) -> int:
    """How often to draw for a batch: once, or more where too few texts are each spoke of once."""
    if len(said.rows) > len(next(iter(batch.values()))):
        return 1
    return min(math.ceil(_ENOUGH_DRAWS / max(1, len(said.rows) * num_batches)), _MOST_DRAWS)


def _with_gradient(output: torch.Tensor) -> torch.Tensor:
    """What a matrix gives, with a gradient: weights are frozen, and only activations hand it on.

    A copy, for the host may go on in its place.
    """
    return output if output.requires_grad else output.requires_grad_().clone()


def _lookups(model: PreTrainedModel, matrix: DenseMatrix) -> list[nn.Module]:
    """The modules that look up the rows of a table: one, or several that are tied to each other."""
    weight = matrix.module.weight
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
