"""What `compress` can be asked for, in one place for Python, the command line and the record in `config.json`."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hf_lowrank.errors import InputError
from hf_lowrank.methods.table import METHOD_NAMES, OF_MATRICES, OF_TENSORS, MethodRow, find_method, method_name
from hf_lowrank.options import LARGEST_SEED, MOST_PASSES, Options, option
from hf_lowrank.planning.budgets import BUDGETS, Budget, make_budget

ALLOCATION_NAMES = ("uniform", "energy", "first_order", "measured")
STORAGES = ("low_rank", "pivoted")
EMBEDDINGS = ("low_rank", "autoencoder", "dense")
EMBEDDING_OBJECTIVES = ("loss", "direction", "published", "nonlinear")
GROUP_NAMES = ("attention", "feed_forward", "both")
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
# With these, an option asks for nothing that any method would not do.
_ASKS_NOTHING: dict[str, Any] = {
    "rank_pattern": {},
    "storage": "low_rank",
    "embeddings": "dense",
    "anchored": False,
    "refine_passes": 0,
}
# At most so many sequences, so long: more than any text that is worth looking at.
_MOST_TEXT = 10_000_000
# From here on nothing is rounded: half precision takes as much.
MOST_BITS = 16
_METHOD = "two_sided_svd"


# What is looked at and compared where no budget is given.
ANALYZED, COMPARED = (0.8, 0.6, 0.4, 0.25), (0.8, 0.6, 0.4)


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Options):
    """How to compress. Exactly one budget must be given, none where the method's name holds its ranks.

    Args:
        keep_params: Fraction of the whole model's parameters that stay, tied ones counted once.
        keep_targets: Fraction of the parameters of the replaced matrices that stay.
        target_size: Size on disk of everything `save_pretrained` writes: `"100MB"`, `"95MiB"` or bytes.
        keep_latency: Fraction of the whole model's latency that stays, as measured here: of 8 x 128 tokens, on the
            machine and with the threads `compress` runs on. Only linear layers are replaced.
        bits: What a number of a matrix takes in the file, in the mean, with all that belongs to it. Alone, no rank is
            cut; beside another budget, that one says what is cut. Default: numbers are of the usual type, but for a
            `target_size` that names no method and no structure: then there are as many bits as it has room for,
            and ranks where these do less harm. What `target_modules` does not name, or `exclude_modules` does, is not
            rounded. 16 rounds nothing.
        rank: The rank of every replaced matrix; of a tensor method, each of its ranks but the bank's.
        ranks: The ranks of a tensor method: (left, right) of `tucker` and trains, (bank, left, right) of `tucker`, or
            the one of `kronecker_sum` and autoencoders.
        rank_pattern: Rank by module name or last part of it; these matrices are outside the budget's sharing.
        method: How the numbers are found; see `METHODS`.
        allocation: How the budget is shared among the matrices; see `ALLOCATIONS`. Default: `measured` for a method
            that looks at text, `energy` for one that does not.
        storage: Structure that holds a low-rank linear layer: `low_rank` (two factors) or `pivoted` (more rank in the
            same size). Default: `pivoted` where the budget counts parameters or bytes: it keeps more of the model in
            them. Two factors are faster above 0.65, and what to have where another quantizer is to round the numbers.
        group: Matrices of the blocks that a tensor method takes: `attention`, `feed_forward` or `both`.
        target_modules: Names, last parts of names, a regular expression or `"all-linear"`, as in PEFT. Default: the
            linear layers of the blocks, and for `keep_params` and `target_size` the embeddings too.
        exclude_modules: The same, taken away again.
        embeddings: `"low_rank"`, `"autoencoder"` (longer codes for frequent tokens; see `AutoencoderEmbedding`) or
            `"dense"` for the token embedding and the untied head. Default: with `keep_params` and `target_size`
            whichever does the whole model the least damage, of what the method's statistics can tell; else dense.
        embedding_objective: What errors of an `autoencoder` count by: `"loss"` (lowest perplexity), `"direction"`
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
        memory: What a model may take, such as `"6GB"`: one that needs more is compressed block by block, its weights
            left in their files; see `stream_`. Default: four fifths of what this machine has free.
        fast: A quarter of the text, no anchoring and no refinement.
        cache_dir: Folder where statistics, decompositions and measurements are kept, so that the same model and text
            are looked at once whatever the budget, and a killed run goes on where it was. Without it they are in the
            system's temporary folder while they are needed. They take several times the room of the model's weights.

    Raises:
        InputError: Naming the option, the rule and the value.
    """

    keep_params: float | None = option(None, metavar="F", flags="budget")
    keep_targets: float | None = option(None, metavar="F", flags="budget")
    target_size: str | float | None = option(None, metavar="SIZE", flags="budget")
    keep_latency: float | None = option(None, metavar="F", of=[OF_MATRICES], flags="budget")
    rank: int | None = option(None, flags="budget")
    bits: float | None = option(None, above=0, at_most=MOST_BITS, metavar="B", flags="choice")
    ranks: Sequence[int] | None = option(None, of=[OF_TENSORS], flags="budget")
    rank_pattern: Mapping[str, int] | None = option(
        None, at_least=1, metavar="NAME=R", of=[OF_MATRICES], flags="choice"
    )
    method: str = option(_METHOD, choices=METHOD_NAMES, flags="choice")
    allocation: str | None = option(None, choices=ALLOCATION_NAMES, of=[OF_MATRICES])
    storage: str | None = option(None, choices=STORAGES, of=[OF_MATRICES])
    group: str = option("both", choices=GROUP_NAMES, of=[OF_TENSORS])
    target_modules: str | Sequence[str] | None = option(None, metavar="NAME", flags="choice")
    exclude_modules: str | Sequence[str] | None = option(None, metavar="NAME", flags="choice")
    embeddings: str | None = option(None, choices=EMBEDDINGS, of=[OF_MATRICES], flags="choice")
    embedding_objective: str = option("loss", choices=EMBEDDING_OBJECTIVES, of=[OF_MATRICES])
    dtype: str | None = option(None, choices=DTYPE_NAMES, flags="choice")
    device: str | None = option(None, flags="choice")
    num_calibration_samples: int = option(384, at_least=1, at_most=_MOST_TEXT)
    max_seq_length: int = option(128, at_least=1, at_most=_MOST_TEXT)
    batch_size: int = option(8, at_least=1, at_most=_MOST_TEXT)
    text_column: str | None = option(None, metavar="NAME", flags="text")
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
    anchored: bool | None = option(None, of=[OF_MATRICES])
    refine_block_passes: int = option(0, at_least=0, at_most=MOST_PASSES, of=[OF_MATRICES])
    refine_passes: int | None = option(None, at_least=0, at_most=MOST_PASSES, of=[OF_MATRICES])
    refine_learning_rate: float = option(1e-4, above=0, at_most=1, of=[OF_MATRICES])
    bias_correction: bool = option(False, of=[OF_MATRICES])
    memory: str | float | None = option(None, metavar="SIZE", flags="text")
    fast: bool = option(False, of=[OF_MATRICES], flags="text")
    cache_dir: str | Path | None = option(None, metavar="DIR", flags="text")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "method", method_name(self.method))
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", str(self.cache_dir))
        for field in fields(self):
            if not self.takes(field.name) and self._asks(field.name):
                raise InputError(
                    f"{field.name} does not go with method={self.method}. Leave it out, or take another method."
                )
        _ = self.budget

    def takes(self, name: str) -> bool:
        """Whether an option goes with the method."""
        of = self.__dataclass_fields__[name].metadata["of"]
        return not of or self.row.takes in of or self.method in of

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded."""
        if self.bits is not None:
            return self.bits < MOST_BITS
        asks = self.method != _METHOD, self.storage, self.embeddings, self.rank_pattern
        return self.target_size is not None and not any(asks)

    @property
    def cuts(self) -> bool:
        """Whether ranks are cut."""
        return not (self.budget.kind == "bits" or (self.rounds and self.bits is None))

    @property
    def own(self) -> dict[str, Any]:
        """The options that name the method as one they go with, for its solver."""
        return {f.name: getattr(self, f.name) for f in fields(self) if self.method in f.metadata["of"]}

    def _asks(self, name: str) -> bool:
        value, default = getattr(self, name), self.__dataclass_fields__[name].default
        return value not in (default, _ASKS_NOTHING.get(name, default))

    @property
    def row(self) -> MethodRow:
        """The row of the method."""
        return find_method(self.method)

    @property
    def budget(self) -> Budget:
        """The one budget that was given, or that the method's name says."""
        given: dict[str, Any] = {kind: getattr(self, kind) for kind in BUDGETS}
        return make_budget(**given | {"ranks": self.ranks or self.row.ranks})

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, as plain JSON."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


class _Spellings(Collection[str]):
    """What `compare` is told of methods: names, each with more after a colon or not."""

    def __iter__(self) -> Iterator[str]:
        return iter(METHOD_NAMES)

    def __len__(self) -> int:
        return len(METHOD_NAMES)

    def __contains__(self, spelling: object) -> bool:
        return str(spelling).partition(":")[0] in METHOD_NAMES


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(Options):
    """What `compare` compares, and how, beside what `compress` can be told.

    Args:
        methods: Each a name of `METHODS`, optionally with an allocation, a storage and passes of refinement:
            `two_sided_svd`, `whitened_svd:uniform`, `two_sided_svd:measured:pivoted:0`, `svd::pivoted`. What is left
            out is what `compress` does by default.
        budgets: Fractions of the parameters of the replaced matrices that stay (`keep_targets`), the same for all.
        baseline: Method whose `g` the others' is divided by. None is `STANDARD` if that is among the methods.
        max_examples: Examples or blocks to score on at most, drawn by the task's seed.
        work_dir: Folder for finished cells, statistics and measurements: what is there is not done again. None keeps
            nothing.
    """

    methods: str | Sequence[str] = option(MISSING, choices=_Spellings(), metavar="METHOD")
    budgets: Sequence[float] = option(COMPARED, above=0, at_most=1)
    baseline: str | None = option(None)
    max_examples: int | None = option(None, at_least=1)
    work_dir: str | Path | None = option(None, metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or not self.budgets:
            raise InputError("There is nothing to compare. Give at least one method and one budget.")
