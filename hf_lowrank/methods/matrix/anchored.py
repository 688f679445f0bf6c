"""The matrix that gives the dense model's outputs on the compressed model's inputs, from two streamed moments."""

from dataclasses import dataclass

import torch

from hf_lowrank.methods.metric import Metric, moment_metric, shrinkage_strength

_SHRINKAGE = 0.01


class AnchoredMoments:
    """Sums, in float64, over the tokens of what a matrix is given in the compressed model and what is then missing.

    With `x` the input in the dense model and `x^` the one in the compressed model, `e = W (x - x^) + s` is what the
    dense weight's output on `x^` falls short of the target; `s` is the residual term of `anchor_`, or zero.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        rows, columns = weight.shape
        self.num_tokens = 0
        self._inputs = weight.new_zeros(columns, dtype=torch.float64)  # sum of x^
        self._missing = weight.new_zeros(rows, dtype=torch.float64)  # sum of e
        self._moment = weight.new_zeros(columns, columns, dtype=torch.float64)  # sum of x^ x^T
        self._cross = weight.new_zeros(rows, columns, dtype=torch.float64)  # sum of e x^T

    def add(self, inputs: torch.Tensor, missing: torch.Tensor) -> None:
        """Count in the tokens of one batch: `x^` (N, I) and `e` (N, O)."""
        self.num_tokens += len(inputs)
        self._inputs += inputs.sum(dim=0)
        self._missing += missing.sum(dim=0)
        self._moment += inputs.T @ inputs
        self._cross += missing.T @ inputs

    def target(self, weight: torch.Tensor, is_centred: bool) -> "AnchoredTarget":
        """The regularized least-squares answer at full rank.

        Args:
            weight: (O, I), dense.
            is_centred: Whether a bias takes care of the means, so that only deviations from them count.
        """
        count = max(self.num_tokens, 1)
        inputs, missing = self._inputs / count, self._missing / count
        if not is_centred:
            inputs, missing = torch.zeros_like(inputs), torch.zeros_like(missing)
        moment = self._moment / count - torch.outer(inputs, inputs)
        cross = self._cross / count - torch.outer(missing, inputs)
        metric = moment_metric(moment, count, _SHRINKAGE)
        share = 1 - shrinkage_strength(len(moment), count, _SHRINKAGE)
        return AnchoredTarget(weight.double() + share * metric.solve(cross.T).T, metric, inputs, missing)


@dataclass(frozen=True)
class AnchoredTarget:
    """The minimum over all `W'`, of any rank, of what an anchored solve minimizes.

    That is `(1 - a) E||W x + s - W' x^||_G^2 + a m ||W' - W||_G^2`, for every output metric `G`, with `m` the mean
    square of an input and `a` of `shrinkage_strength`: few tokens pull the answer towards the dense weight. It is
    `W + (1 - a) E[e x^T] M^-1` with `M = (1 - a) E[x^ x^T] + a m I`, and any other `W'` costs `||weight - W'||^2` in
    the metrics `G` and `M` more. So the best of rank `R` is its truncation in these: AA-SVD (2026), with a residual
    term, two-sided and with a prior.

    Args:
        weight: (O, I), float64; the dense weight itself where nothing before it has changed.
        input_metric: `M`.
        input_mean: `E[x^]` if a bias takes care of means, else zero, (I).
        missing_mean: `E[e]` if a bias takes care of means, else zero, (O).
    """

    weight: torch.Tensor
    input_metric: Metric
    input_mean: torch.Tensor
    missing_mean: torch.Tensor

    def rows(self, start: int, stop: int) -> "AnchoredTarget":
        """The same of some of the outputs."""
        kept = slice(start, stop)
        return AnchoredTarget(self.weight[kept], self.input_metric, self.input_mean, self.missing_mean[kept])

    def bias_change(self, weight: torch.Tensor, approximation: torch.Tensor) -> torch.Tensor:
        """What to add to the bias so that outputs are right on average: `E[e] + (W - W') E[x^]`, (O)."""
        return self.missing_mean + (weight.double() - approximation.double()) @ self.input_mean
