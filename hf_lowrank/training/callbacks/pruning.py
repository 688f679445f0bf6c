"""Unstructured pruning of the matrices of a model's blocks while it is trained, and the ranks of what is left."""

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix, dense_weight
from hf_lowrank.hosts.targets import Patterns, find_matrices, select_matrices
from hf_lowrank.options import checked
from hf_lowrank.training.callbacks.schedules import Span, cubic
from hf_lowrank.training.options import IMPORTANCES

logger = logging.getLogger(__name__)

_SCORED = ("sensitivity", "movement")
_MEMORY = 0.95  # of sensitivities: the last twenty steps weigh most
_ENERGY = 0.9


@dataclass(frozen=True)
class MatrixRank:
    """What pruning has made of one matrix.

    Args:
        kept: Fraction of its entries that are not zero.
        rank: Number of singular values that are not zero.
        energy_rank: Least rank that holds 90 % of the squared singular values.
        full_rank: `min(O, I)`.
    """

    kept: float
    rank: int
    energy_rank: int
    full_rank: int


def measure_rank(weight: torch.Tensor) -> MatrixRank:
    """The ranks of a matrix (O, I), by the eigenvalues of its smaller Gram matrix in float64."""
    wide = weight.detach().double()
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    squares = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0)
    # What the rounding of the weights' own type leaves of a zero singular value.
    floor = (max(weight.shape) * torch.finfo(weight.dtype).eps) ** 2 * squares[0]
    share = squares.cumsum(0) / squares.sum()
    return MatrixRank(
        kept=float((weight != 0).float().mean()),
        rank=int((squares > floor).sum()),
        energy_rank=int((share < _ENERGY).sum()) + 1,
        full_rank=len(squares),
    )


class PruningMask(nn.Module):
    """Parametrization `W * M` of a weight `W` by a mask `M` that is set from outside.

    With scores `S` of the weight's shape the gradient passes straight through the mask: `dL/dS = dL/d(W * M) * W`,
    also where the mask is zero, so that pruned entries can come back (Sanh et al., NeurIPS 2020).
    """

    def __init__(self, weight: torch.Tensor, is_scored: bool) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight)) if is_scored else None
        self.mask: torch.Tensor
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool), persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.scores is None:
            return weight * self.mask
        return weight * (self.mask + self.scores - self.scores.detach())  # scores cancel to an exact zero


class Pruner:
    """Prunes the matrices of a model's blocks; `FirstOrderPruningCallback` drives one through a training.

    Args:
        importance: `sensitivity` (gathered scores), `movement` (learned ones), `magnitude` or `random`.
        is_global: Whether the entries of all matrices compete, instead of those of each.
        seed: Of the random importances.

    Raises:
        InputError: If there is nothing to prune.
    """

    def __init__(
        self, model: PreTrainedModel, matrices: Iterable[DenseMatrix], importance: str, is_global: bool, seed: int
    ) -> None:
        self._matrices = list(matrices)
        self._is_global = is_global
        self._generator = torch.Generator().manual_seed(seed)
        self.masks: dict[str, PruningMask] = {}
        self._drawn: dict[str, torch.Tensor] = {}
        for matrix in self._matrices:
            weight: Any = matrix.module.weight
            mask = PruningMask(weight.detach(), importance in _SCORED).to(weight.device)
            parametrize.register_parametrization(matrix.module, "weight", mask)
            self.masks[matrix.name] = mask
            if importance == "random":
                self._drawn[matrix.name] = torch.rand(weight.shape, generator=self._generator).to(weight.device)

    @property
    def scores(self) -> list[nn.Parameter]:
        """Scores of all matrices."""
        return [mask.scores for mask in self.masks.values() if mask.scores is not None]

    @torch.no_grad()
    def gather_sensitivities(self) -> None:
        """Each score becomes the running mean of its gradients' absolute values, and no optimizer sees those."""
        for score in self.scores:
            if score.grad is not None:
                score.lerp_(score.grad.abs(), 1 - _MEMORY)
                score.grad = None

    @torch.no_grad()
    def keep(self, fraction: float) -> None:
        """Mask all entries but the `fraction` of largest importance."""
        importances = {matrix.name: self._importance(matrix) for matrix in self._matrices}
        if self._is_global:
            flat = torch.cat([importance.flatten() for importance in importances.values()])
            sizes = [importance.numel() for importance in importances.values()]
            for name, part in zip(importances, _largest(flat, fraction).split(sizes), strict=True):
                self.masks[name].mask.copy_(part.view_as(self.masks[name].mask))
            return
        for name, importance in importances.items():
            self.masks[name].mask.copy_(_largest(importance.flatten(), fraction).view_as(importance))

    def _importance(self, matrix: DenseMatrix) -> torch.Tensor:
        mask = self.masks[matrix.name]
        if mask.scores is not None:
            return mask.scores.detach()
        module: Any = matrix.module
        own: torch.Tensor = module.parametrizations.weight.original
        return self._drawn.get(matrix.name, own.detach().abs())

    def ranks(self) -> dict[str, MatrixRank]:
        """The ranks of every matrix as it is now."""
        return {matrix.name: measure_rank(dense_weight(matrix.module)) for matrix in self._matrices}

    def finish(self) -> None:
        """Leave dense matrices with zeros, and nothing else."""
        for matrix in self._matrices:
            if parametrize.is_parametrized(matrix.module, "weight"):
                parametrize.remove_parametrizations(matrix.module, "weight", leave_parametrized=True)


def _largest(values: torch.Tensor, fraction: float) -> torch.Tensor:
    """A mask of the `round(fraction n)` largest of (n) values; of equal ones, exactly as many as are needed."""
    count = max(1, round(fraction * len(values)))
    if values.device.type == "cpu":  # a partition takes a quarter of the time of torch's topk
        wide = values if values.dtype.itemsize >= 4 else values.float()  # numpy has no bfloat16
        places = torch.from_numpy(np.argpartition(wide.numpy(), -count)[-count:])
    else:
        places = values.topk(count, sorted=False).indices
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, places, True)


class FirstOrderPruningCallback(TrainerCallback):
    """Prunes while a `Trainer` trains: `Trainer(..., callbacks=[FirstOrderPruningCallback(keep=0.15)])`.

    Entry `ij` has a score, and the largest stay. By `sensitivity` that is the running mean of `|dL/dW_ij W_ij|`, what
    the loss would change to first order if the entry were zero, taken at pruned entries too. By `movement` it is
    learned and gathers `-sum_t lr_t (dL/dW_ij W_ij)_t`: which entries grow, not which are large. Movement starts from
    nothing and suits long trainings of a model that still has to learn its task.

    The fraction that stays falls from 1 to `keep` as a cubic over `start` to `end`; after that the mask still follows
    the scores. Scores are parameters of the model while it is trained, so that checkpoints hold them and a training
    goes on exactly where it was; those of movement are stepped by the Trainer's own optimizer, at
    `score_learning_rate` on the Trainer's schedule and without weight decay. At the end dense matrices with zeros
    remain.

    Token embeddings and heads are not touched. `ranks` and an entry of the log per epoch say what each matrix has
    become. Not for DeepSpeed, whose flat optimizers hide gradients and give no parameter a rate of its own for a step.

    Reference: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019 (sensitivity); Sanh, Wolf
    and Rush, Movement Pruning, NeurIPS 2020.

    Args:
        keep: Fraction of the entries that stay, in (0, 1].
        importance: `sensitivity` or `movement`, or the baselines `magnitude` and `random`.
        start: When pruning begins: a share of the training below 1, else a step.
        end: When `keep` is reached, the same way.
        score_learning_rate: Of movement scores, peak; a hundred to a thousand times that of the weights.
        is_global: Whether entries of all matrices compete; one matrix may then lose everything.
        target_modules: As in `CompressOptions`; default: all linear layers of the blocks.
        exclude_modules: The same, taken away.

    Raises:
        InputError: If an option is out of its range.
    """

    @checked
    def __init__(
        self,
        keep: float,
        *,
        importance: str = "sensitivity",
        start: float = 0.1,
        end: float = 0.7,
        score_learning_rate: float = 1e-2,
        is_global: bool = False,
        target_modules: Patterns | None = None,
        exclude_modules: Patterns | None = None,
    ) -> None:
        if not 0 < keep <= 1:
            raise InputError(f"keep must be above 0 and at most 1, got {keep:g}.")
        if importance not in IMPORTANCES:
            raise InputError(f"importance must be one of {', '.join(IMPORTANCES)}, got {importance!r}.")
        if not 0 <= score_learning_rate < math.inf:
            raise InputError(f"score_learning_rate must be a number of at least 0, got {score_learning_rate:g}.")
        self._keep = keep
        self._importance = importance
        self._span = Span(start, end)
        self._score_learning_rate = score_learning_rate
        self._is_global = is_global
        self._patterns = (target_modules, exclude_modules)
        self._set_aside: list[tuple[dict[str, Any], list[Any]]] = []
        self.pruner: Pruner | None = None
        self.ranks: dict[str, MatrixRank] = {}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        matrices = select_matrices(find_matrices(model), {"block"}, *self._patterns)
        self.pruner = Pruner(model, matrices, self._importance, self._is_global, args.seed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner is None:
            raise InputError("Pruning must be there when the Trainer is made. Give it in callbacks=.")
        self._span.steps(state.max_steps)
        self._mask(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner is None:
            return
        if self._importance == "sensitivity":
            self.pruner.gather_sensitivities()
            return
        # For this step alone: outside of it the groups are those the Trainer made, which is what checkpoints hold.
        groups, scores = kwargs["optimizer"].param_groups, {id(score) for score in self.pruner.scores}
        factor = self._score_learning_rate / args.learning_rate
        for group in list(groups):
            own = group["params"]
            theirs = [parameter for parameter in own if id(parameter) in scores]
            self._set_aside.append((group, own))
            group["params"] = [parameter for parameter in own if id(parameter) not in scores]
            if theirs:
                groups.append({**group, "params": theirs, "lr": group["lr"] * factor, "weight_decay": 0.0})

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        groups = kwargs["optimizer"].param_groups
        for group, own in self._set_aside:
            group["params"] = own
        del groups[len(self._set_aside) or len(groups) :]
        self._set_aside = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mask(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner is None:
            return
        self.ranks = self.pruner.ranks()
        means = {
            f"pruning_{name}": sum(getattr(found, name) for found in self.ranks.values()) / len(self.ranks)
            for name in ("kept", "rank", "energy_rank", "full_rank")
        }
        state.log_history.append({**means, "epoch": state.epoch, "step": state.global_step})
        logger.info("%s", {name: asdict(found) for name, found in self.ranks.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner is not None:
            self.ranks = self.pruner.ranks()
            self.pruner.finish()

    def _mask(self, state: TrainerState) -> None:
        if self.pruner is not None:
            progress = self._span.progress(state.global_step, state.max_steps)
            self.pruner.keep(cubic(1.0, self._keep, progress))
