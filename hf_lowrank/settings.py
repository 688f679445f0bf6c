"""What `compress` can be asked for, in one place for Python, the command line and the record in `config.json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.budgets import Budget, make_budget
from hf_lowrank.remote_code.lowrank_plan import closest_name
from hf_lowrank.solvers import SOLVERS
from hf_lowrank.solvers.stacking import GROUPS
from hf_lowrank.solvers.tensor_methods import TENSOR_METHODS, TensorMethod
from hf_lowrank.solvers.token_tables import EMBEDDING_OBJECTIVES, TABLE_NEEDS
from hf_lowrank.targets import Patterns

EMBEDDINGS = ("low_rank", "autoencoder", "dense")
STORAGES = ("low_rank", "pivoted")
# Up to here, pivoted rows are as fast as two factors of the same size (examples/benchmark_speed.py).
_LARGEST_PIVOTED_FRACTION = 0.65
_REFINE_PASSES = 2
_FAST_SHARE = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    """How to compress. Exactly one of the six budgets must be given, none where the method's name holds its ranks.

    Args:
        keep_params: Fraction of the whole model's parameters that stay, tied ones counted once.
        keep_targets: Fraction of the parameters of the replaced matrices that stay.
        target_size: Size on disk of everything `save_pretrained` writes: `"100MB"`, `"95MiB"` or bytes.
        keep_latency: Fraction of the whole model's latency that stays, as measured here: of 8 x 128 tokens, on the
            machine and with the threads `compress` runs on. Only linear layers are replaced.
        rank: The rank of every replaced matrix; of a tensor method, each of its ranks but the bank's.
        ranks: The ranks of a tensor method: (left, right) of `tucker` and trains, (bank, left, right) of `tucker`, or
            the one of `kronecker_sum` and autoencoders.
        rank_pattern: Rank by module name or last part of it; these matrices are outside the budget's sharing.
        method: Solver that finds the numbers; see `SOLVERS`, and `TENSOR_METHODS` for those that take the matrices of
            all layers together.
        allocation: How the budget is shared among the matrices; see `ALLOCATIONS`. Default: `measured` for a method
            that looks at text (`first_order` with `fast`), `energy` for one that does not.
        storage: Structure that holds a low-rank linear layer: `low_rank` (two factors) or `pivoted` (more rank in the
            same size). Default: `pivoted` for a `target_size` and for fractions up to 0.65, where it is as fast as two
            factors of the same size and better; above, two factors are some percent faster.
        group: Matrices of the blocks that a tensor method takes: `attention`, `feed_forward` or `both`.
        target_modules: Names, last parts of names, a regular expression or `"all-linear"`, as in PEFT. Default: the
            linear layers of the blocks, and for `keep_params` and `target_size` the embeddings too.
        exclude_modules: The same, taken away again.
        embeddings: `"low_rank"`, `"autoencoder"` (longer codes for frequent tokens; see `AutoencoderEmbedding`) or
            `"dense"`, overriding the default for the token embedding and the untied head.
        embedding_objective: What an autoencoder's errors count by: `"loss"` (lowest perplexity), `"direction"`
            (lowest cosine error over all rows alike), `"published"` (trained; see `PublishedTraining`) or
            `"nonlinear"` (trained, with a non-linear decoder; see `NonlinearTable`).
        dtype: Type of the compressed model's weights, such as `"bfloat16"`; None keeps the model's.
        device: Where to decompose; None is where the weights are.
        num_calibration_samples: Sequences of text to look at.
        max_seq_length: Tokens a sequence may have; longer ones are cut.
        batch_size: Sequences run at once.
        text_column: Column of a data set that holds the text.
        seed: Of every draw: samples, masked tokens, synthetic tokens and labels.
        anchored: Whether to solve once more, in the order of the model, on what the compressed model before each
            matrix gives; see `anchor_`. Default: where there is text and ranks are measured on it, unless compressing
            in place.
        refine_block_passes: Passes over the text of a short training of one block after the other; see
            `refine_blocks_`.
        refine_passes: Passes over the text of a short training towards the dense model; see `refine_`. Default:
            2 where `anchored` is by default; else 0.
        refine_learning_rate: Of that training.
        bias_correction: Add to each bias what its replaced weight loses on the mean input, so that the mean output on
            the text is that of the dense layer.
        fast: A quarter of the text, ranks by prediction (`first_order`) instead of measurement, and no refinement.
        cache_dir: Folder where statistics, decompositions and measurements are kept, so that the same model and text
            are looked at once whatever the budget, and a killed run goes on where it was. Without it they are in the
            system's temporary folder while they are needed. They take several times the room of the model's weights.

    Raises:
        InputError: Naming the option, the rule and the value.
    """

    keep_params: float | None = None
    keep_targets: float | None = None
    target_size: str | int | None = None
    keep_latency: float | None = None
    rank: int | None = None
    ranks: Sequence[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    method: str = "two_sided_svd"
    allocation: str | None = None
    storage: str | None = None
    group: str = "both"
    target_modules: Patterns | None = None
    exclude_modules: Patterns | None = None
    embeddings: str | None = None
    embedding_objective: str = "loss"
    dtype: str | None = None
    device: str | None = None
    num_calibration_samples: int = 384
    max_seq_length: int = 128
    batch_size: int = 8
    text_column: str | None = None
    seed: int = 0
    anchored: bool | None = None
    refine_block_passes: int = 0
    refine_passes: int | None = None
    refine_learning_rate: float = 1e-4
    bias_correction: bool = False
    fast: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        _check_choice("method", self.method, [*SOLVERS, *TENSOR_METHODS])
        _check_choice("group", self.group, list(GROUPS))
        if self.allocation is not None:
            _check_choice("allocation", self.allocation, list(ALLOCATIONS))
        if self.storage is not None:
            _check_choice("storage", self.storage, list(STORAGES))
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, list(DTYPES))
        for name in ("num_calibration_samples", "max_seq_length", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.embeddings is not None:
            _check_choice("embeddings", self.embeddings, list(EMBEDDINGS))
        _check_choice("embedding_objective", self.embedding_objective, list(EMBEDDING_OBJECTIVES))
        _ = self.budget
        if self.tensor_method is not None:
            self._check_suits_tensors()
        elif self.ranks is not None:
            raise InputError(f"ranks belong to the methods {', '.join(TENSOR_METHODS)}, got method={self.method}.")

    def _check_suits_tensors(self) -> None:
        learning = ["anchored", "refine_block_passes", "refine_passes", "bias_correction", "fast"]
        given = [name for name in ["rank_pattern", "keep_latency", "allocation", *learning] if getattr(self, name)]
        given += ["storage"] * (self.storage not in (None, "low_rank")) + ["embeddings"] * (
            self.embeddings not in (None, "dense")
        )
        if given:
            raise InputError(
                f"{given[0]} does not go with method={self.method}, which takes the matrices of the blocks together. "
                "Leave it out."
            )

    @property
    def budget(self) -> Budget:
        """The one budget that was given."""
        method = self.tensor_method
        ranks = self.ranks or (None if method is None else method.ranks)
        sizes = (self.keep_params, self.keep_targets, self.target_size)
        return make_budget(*sizes, self.keep_latency, self.rank, ranks)

    @property
    def tensor_method(self) -> TensorMethod | None:
        """The tensor method asked for; None for a solver of one matrix after the other."""
        return TENSOR_METHODS.get(self.method)

    @property
    def given_ranks(self) -> Sequence[int] | None:
        """The ranks of a tensor method, where they and not a size were given."""
        if self.rank is not None:
            return self.rank, self.rank
        return self.ranks or (None if self.tensor_method is None else self.tensor_method.ranks)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type asked for."""
        return None if self.dtype is None else DTYPES[self.dtype]

    @property
    def chosen_allocation(self) -> str:
        """The allocation asked for; by default what suits the method, and the time there is."""
        looks = self.needs and self.tensor_method is None
        suits = ("first_order" if self.fast else "measured") if looks else "energy"
        return self.allocation or suits

    @property
    def chosen_storage(self) -> str:
        """The storage asked for; by default what is best among the fastest."""
        budget = self.budget
        is_small = budget.kind in ("keep_params", "keep_targets") and budget.value <= _LARGEST_PIVOTED_FRACTION
        return self.storage or ("pivoted" if is_small or budget.kind == "target_size" else "low_rank")

    @property
    def num_samples(self) -> int:
        """Sequences of text to look at."""
        return max(2, self.num_calibration_samples // _FAST_SHARE) if self.fast else self.num_calibration_samples

    def passes(self, has_text: bool, inplace: bool) -> int:
        """Passes of refinement: those asked for, or what is worth its time."""
        if self.refine_passes is not None:
            return self.refine_passes
        return _REFINE_PASSES if self._can_learn(has_text, inplace) else 0

    def anchors(self, has_text: bool, inplace: bool) -> bool:
        """Whether matrices are solved a second time: if that is asked for, or worth its time."""
        return self._can_learn(has_text, inplace) if self.anchored is None else self.anchored

    def _can_learn(self, has_text: bool, inplace: bool) -> bool:
        return has_text and not inplace and not self.fast and self.chosen_allocation == "measured"

    @property
    def looks_at_text(self) -> bool:
        """Whether the model has to be run: for statistics, to measure ranks, or to learn from it."""
        shares = self.rank is None and ALLOCATIONS[self.chosen_allocation].errors == "probes"
        return bool(self.needs or self.anchored or self.refine_block_passes or self.refine_passes) or shares

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of statistics; see `hf_lowrank.statistics.collection.KINDS`."""
        if self.tensor_method is not None:
            return self.tensor_method.needs
        for_tables = TABLE_NEEDS if self.embeddings == "autoencoder" else frozenset()
        return SOLVERS[self.method].needs | for_tables | ({"input_moment"} if self.bias_correction else set())

    @property
    def roles(self) -> set[str]:
        """Which matrices are candidates when `target_modules` does not say."""
        is_whole_model = self.budget.is_whole_model and self.tensor_method is None
        with_embeddings = is_whole_model if self.embeddings is None else self.embeddings != "dense"
        return {"block", "embedding", "head"} if with_embeddings else {"block"}

    def to_dict(self) -> dict[str, Any]:
        """The settings that were given, as plain JSON."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


def make_settings(options: dict[str, Any]) -> CompressionSettings:
    """Settings from keyword arguments.

    Raises:
        InputError: If one of them does not exist, naming the closest that does.
    """
    known = [f.name for f in fields(CompressionSettings)]
    for name in options:
        if name not in known:
            raise InputError(f"There is no option {name!r}. Closest: {closest_name(name, known)!r}.")
    return CompressionSettings(**options)


def _check_choice(option: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise InputError(f"{option} must be one of {', '.join(known)}, got {value!r}.")
