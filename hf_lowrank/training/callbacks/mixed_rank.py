"""Training factorized layers that now and then still use their full-rank weight."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.hosts.matrices import dense_weight
from hf_lowrank.hosts.outputs import said
from hf_lowrank.options import checked
from hf_lowrank.remote_code.lowrank_structures import named_structures
from hf_lowrank.training.callbacks.schedules import Span, compressed_model


class _MixedRank(nn.Module):
    """Mixed into a linear structure: some draws of the batch take the full-rank weight while it is trained."""

    full_rank: nn.Parameter  # (O, I)
    support: torch.Tensor  # (O, I), bool: pruned entries stay zero
    draws: tuple[bool, ...] = (False,)  # one for each equal part of the batch

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or not any(self.draws):
            return self._low(hidden_states)
        if all(self.draws):
            return self._full(hidden_states)
        parts = zip(self.draws, hidden_states.chunk(len(self.draws)), strict=True)
        return torch.cat([self._full(part) if is_full else self._low(part) for is_full, part in parts])

    def _low(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(hidden_states)
        return found

    def _full(self, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = self.dense_bias()  # type: ignore[operator]  # the structure's
        return F.linear(hidden_states, self.full_rank * self.support, bias)


class MixedRank:
    """The full-rank weights of a compressed model's layers, and who uses them in which step.

    In step `t` each layer takes its full-rank weight with probability `p (1 - progress(t))`, which is 0 from `end` on.
    The draws follow from seed, step and layer alone: all processes, all parts of an accumulated step, a recomputation
    by gradient checkpointing and a resumed training make the same ones. In evaluation mode every layer is low-rank.

    Without a `Trainer`:

        mixed = MixedRank(small, pruned, max_steps=1000)  # before the optimizer is made and the model is prepared
        for step, batch in enumerate(batches):
            mixed.draw(step)
            ...
        mixed.finish()

    Full-rank weights are parameters beside the factors, trained with them, masked where they were zero. Until they are
    gone they and what the optimizer keeps of them take as much memory as training the dense matrices: with AdamW in
    float32 16 bytes an entry and 1 for the mask.

    Args:
        model: A compressed model, or what PEFT makes of one.
        dense: The model the factors were found from, or its folder or Hub id.
        probability: `p`, in (0, 1].
        span: When the probability falls.
        consistency: Weight of the symmetric KL divergence between two draws, added to the model's loss; the batch is
            then run twice at once. Needs labels.
        seed: Of the draws.

    Raises:
        InputError: If the model is not factorized, or the dense one is another.
    """

    @checked
    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel | str | Path,
        *,
        max_steps: int | None = None,
        probability: float = 0.5,
        span: Span | None = None,
        consistency: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 < probability <= 1:
            raise InputError(f"probability must be above 0 and at most 1, got {probability:g}.")
        if not 0 <= consistency < math.inf:
            raise InputError(f"consistency must be a number of at least 0, got {consistency:g}.")
        self.max_steps = max_steps
        self.loss_share = 1.0  # of a sum over processes and accumulated batches that one loss is
        self._probability = probability
        self._span = span or Span(0, 0.7)
        if max_steps is not None:
            self._span.steps(max_steps)
        self._consistency = consistency
        self._seed = seed
        self._layers = _install_(model, load_dense(dense))
        self._hooks = self._add_hooks(model) if consistency else []

    def draw(self, step: int) -> None:
        """Decide for each layer which weight it takes in this step (0 is the first)."""
        if self.max_steps is None:
            raise InputError("MixedRank needs the number of steps. Give max_steps.")
        chance = self._probability * (1 - self._span.progress(step, self.max_steps))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        drawn = torch.rand(2, len(self._layers), generator=generator) < chance
        for first, second, layer in zip(*drawn.tolist(), self._layers, strict=True):
            layer.draws = (first, second) if self._consistency else (first,)

    def finish(self) -> None:
        """Leave a plain compressed model.

        A sharded one (FSDP2) is to be gathered now: a run of it would bring the full-rank shards back.
        """
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            if isinstance(layer, _MixedRank):
                layer.__class__ = type(layer).__mro__[2]
                del layer.full_rank, layer.support
                layer.__dict__.pop("draws", None)

    def _add_hooks(self, model: PreTrainedModel) -> list[Any]:
        target: Any = compressed_model(model)
        return [
            target.register_forward_pre_hook(_doubled_inputs, with_kwargs=True),
            target.register_forward_hook(self._with_consistency, with_kwargs=True),
        ]

    def _with_consistency(self, model: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not model.training:
            return output
        if output.loss is None:
            raise InputError("The consistency loss is added to the model's own, which needs labels. Give labels.")
        halves = [_half(output, index) for index in range(2)]
        first, second = (said(model, half, _half_of(kwargs, index)) for index, half in enumerate(halves))
        divergence = (first.distance(second).mean() + second.distance(first).mean()) / 2
        share = self.loss_share if kwargs.get("num_items_in_batch") is not None else 1.0
        halves[0].loss = output.loss + self._consistency * share * divergence
        return halves[0]


def _install_(model: PreTrainedModel, dense: PreTrainedModel) -> list[Any]:
    compressed: Any = compressed_model(model)
    structures = [] if compressed is None else named_structures(compressed.base_model)
    linear: list[tuple[str, Any]] = [(name, module) for name, module in structures if module.HOSTS == "linear"]
    if not linear:
        raise InputError(f"{type(model).__name__} is not factorized; mixed ranks need factors. Compress it first.")
    known: dict[str, Any] = dict(dense.base_model.named_modules())
    for name, structure in linear:
        shape = (structure.out_features, structure.in_features)
        if name not in known or tuple(dense_weight(known[name]).shape) != shape:
            raise InputError(f"The dense model has no {shape[0]} x {shape[1]} matrix {name!r}. Give the one it was.")
    for name, structure in linear:
        factor = next(structure.parameters())
        weight = dense_weight(known[name]).to(factor).clone()
        structure.register_parameter("full_rank", nn.Parameter(weight, requires_grad=_learns(structure)))
        structure.register_buffer("support", weight != 0, persistent=False)
        structure.__class__ = type("MixedRank" + type(structure).__name__, (_MixedRank, type(structure)), {})
    return [structure for _, structure in linear]


def _recomputes(args: TrainingArguments) -> bool:
    # Under both names it has had in transformers 5.
    return any(vars(args).get(f"{kind}_checkpointing") for kind in ("activation", "gradient"))


def _learns(structure: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in structure.parameters())


def _doubled_inputs(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The batch twice, one copy after the other, and as many more items."""
    if not model.training:
        return args, kwargs
    doubled = {
        name: torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in kwargs.items()
    }
    if kwargs.get("num_items_in_batch") is not None:
        doubled["num_items_in_batch"] = 2 * kwargs["num_items_in_batch"]
    return args, doubled


def _half_of(values: Mapping[str, Any], index: int) -> dict[str, Any]:
    return _map(lambda tensor: tensor.chunk(2)[index], values)


def _half(output: Any, index: int) -> Any:
    return type(output)(**_half_of(output, index))


def _map(change: Callable[[torch.Tensor], torch.Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    def changed(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim():
            return change(value)
        is_tensors = isinstance(value, tuple) and all(isinstance(part, torch.Tensor) for part in value)
        return tuple(map(changed, value)) if is_tensors else value

    return {name: changed(value) for name, value in values.items()}


class MixedRankCallback(TrainerCallback):
    """Mixed-rank training with a `Trainer`: `Trainer(small, callbacks=[MixedRankCallback(dense=pruned)])`.

    See `MixedRank` for what it does and what memory it takes. Checkpoints of the training hold the full-rank weights,
    and a resumed training ends as an uninterrupted one; after the training none of them is left.

    Not for `DistillationTrainer` with `consistency`, which runs each batch twice. In several processes a layer's
    unused weight must be allowed to have no gradient: with gradient checkpointing set
    `ddp_find_unused_parameters=True`.

    Reference: Ren and Zhu, Low-Rank Prune-And-Factorize, LREC-COLING 2024.

    Args:
        dense: The model the factors were found from, or its folder or Hub id.
        probability: Of a layer to take its full-rank weight, at first.
        start: When it begins to fall: a share of the training below 1, else a step.
        end: When it is 0, the same way.
        consistency: Weight of the consistency loss.

    Raises:
        InputError: If an option is out of its range, the model is not factorized, or the schedule is too long.
    """

    @checked
    def __init__(
        self,
        dense: PreTrainedModel | str | Path,
        *,
        probability: float = 0.5,
        start: float = 0.0,
        end: float = 0.7,
        consistency: float = 0.0,
    ) -> None:
        self._dense = dense
        self._options: dict[str, Any] = {
            "probability": probability, "span": Span(start, end), "consistency": consistency,
        }  # fmt: skip
        self.mixed: MixedRank | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        finds_unused = args.ddp_find_unused_parameters
        if args.world_size > 1 and finds_unused is not True and (_recomputes(args) or finds_unused is False):
            raise InputError("Mixed ranks in several processes leave weights unused. Set ddp_find_unused_parameters.")
        self.mixed = MixedRank(kwargs["model"], self._dense, seed=args.seed, **self._options)
        parts = args.world_size if args.average_tokens_across_devices else 1
        self.mixed.loss_share = 1 / (args.gradient_accumulation_steps * parts)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.mixed is None:
            raise InputError("Mixed ranks must be there when the Trainer is made. Give them in callbacks=.")
        self.mixed.max_steps = state.max_steps
        self._options["span"].steps(state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.mixed is not None:
            self.mixed.draw(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.mixed is not None:
            self.mixed.finish()
