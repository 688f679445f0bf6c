"""One report of a compressed model feeds every table, log and card."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.hosts.loading import held_compressed_model
from hf_lowrank.hosts.multiply_adds import count_multiply_adds, dense_multiply_adds, multiplying
from hf_lowrank.hosts.targets import is_in_block
from hf_lowrank.hosts.untouched import Untouched
from hf_lowrank.records.latency import LatencyReport
from hf_lowrank.records.module_reports import ModuleReport, dense_modules, replaced_modules
from hf_lowrank.records.origin import Origin
from hf_lowrank.records.weight_sizes import weight_sizes
from hf_lowrank.records.wording import MUCH_LACKING, vocabulary_in_words
from hf_lowrank.remote_code.lowrank_materialize import Materializing
from hf_lowrank.remote_code.lowrank_structures import token_table

# Parts of the provenance that have a place of their own in the report; trainings of ours with what did them.
_TRAININGS = {"recovery": "recover", "lpaf": "lpaf"}
_ELSEWHERE = (
    "relative_errors",
    "rounding_errors",
    "kept_dense",
    "untouched",
    "experts_with_few_tokens",
    "training",
    *_TRAININGS,
    "origin",
)

# Of the blocks' parameters: where less is looked at, that is said first.
_ENOUGH = 0.5


@dataclass(frozen=True)
class QualityReport:
    """What the model scored on one set of data.

    Args:
        dataset: Name of a file and its folder, or Hub id of a data set.
        config: Of a Hub data set; `split` likewise.
        is_on_hub: Whether `dataset` is a Hub id.
        sha256: Of the file.
        metric: The score that counts, one of `scores`.
        options: Of the task, so that the numbers can be had again.
        scores: Of the compressed model; with a dense one beside it, agreement with that too.
        dense_scores: Empty where the dense model was not evaluated.
        date: When, as `2026-11-21`.
    """

    task: str
    dataset: str
    config: str | None
    split: str | None
    is_on_hub: bool
    sha256: str | None
    metric: str
    higher_is_better: bool
    options: dict[str, Any]
    scores: dict[str, float]
    dense_scores: dict[str, float]
    date: str


@dataclass(frozen=True)
class CompressionReport:
    """A compressed model against the dense one it came from; tied parameters are counted once.

    Args:
        size_bytes: Of all parameters in their own types; what the weights file holds, and memory with structures that
            decode in each forward pass.
        materialized_bytes: What memory holds beside that where they decode once; see `set_materialize_`.
        embedding_parameters: Of them those of the token embedding; `dense_embedding_parameters` is what they were.
        multiply_adds: Of all matrix products with weights, for one token; attention scores not counted.
        modules: The candidates, replaced or not.
        untouched: What of the blocks was none, empty for a folder of an older version.
        provenance: Method, budget, text and versions, as stored in `config.json`.
        training: What was trained after compression, one entry a run; empty if nothing was. `by` names ours.
        origin: The dense model.
        tags: Of the user, for the card.
        latency: None until it is measured.
        quality: What was evaluated, in that order.
    """

    architecture: str
    dense_parameters: int
    parameters: int
    dense_size_bytes: int
    size_bytes: int
    dense_multiply_adds: int
    multiply_adds: int
    modules: tuple[ModuleReport, ...]
    provenance: dict[str, Any]
    training: tuple[dict[str, Any], ...] = ()
    origin: Origin = field(default_factory=Origin)
    tags: tuple[str, ...] = ()
    latency: LatencyReport | None = None
    quality: tuple[QualityReport, ...] = ()
    materialized_bytes: int = 0
    dense_embedding_parameters: int = 0
    embedding_parameters: int = 0
    untouched: tuple[Untouched, ...] = ()

    @property
    def method(self) -> str:
        """`lpaf` or `rounding` if that made the model, else what its matrices were replaced by."""
        if any(run.get("by") == "lpaf" for run in self.training):
            return "lpaf"
        if self.bits and all(module.structure == "dense" for module in self.modules):
            return "rounding"
        return str(self.provenance.get("settings", {}).get("method", ""))

    @property
    def bits(self) -> list[float]:
        """What numbers of the rounded matrices take, the fewest first; empty where nothing is rounded."""
        return sorted(module.bits for module in self.modules if module.bits is not None)

    @property
    def matrices_in_words(self) -> str:
        """How many matrices were replaced, left dense and only rounded, and how many parts several share."""
        bits_of_dense = [module.bits for module in self.modules if module.structure == "dense"]
        left, shared = bits_of_dense.count(None), sum(not module.dense_parameters for module in self.modules)
        rounded = len(bits_of_dense) - left
        said = f"{len(self.modules) - len(bits_of_dense) - shared} matrices replaced, {left} left dense"
        said += f", {rounded} only rounded" if rounded else ""
        return said + (f", {shared} shared by several" if shared else "")

    @property
    def kept_fraction(self) -> float:
        """Parameters that stayed, as a fraction of the whole dense model's."""
        return self.parameters / self.dense_parameters

    @property
    def kept_targets_fraction(self) -> float:
        """Parameters that stayed, as a fraction of those of the matrices that were candidates."""
        return sum(m.parameters for m in self.modules) / max(sum(m.dense_parameters for m in self.modules), 1)

    @property
    def looked_at_fraction(self) -> float:
        """Parameters of the candidates in the blocks, as a fraction of all of two and more dimensions there."""
        looked_at = sum(m.dense_parameters for m in self.modules if is_in_block(m.name))
        return looked_at / max(looked_at + sum(one.parameters for one in self.untouched if is_in_block(one.name)), 1)

    @property
    def warning(self) -> str:
        """A line where less than half of the blocks was looked at or a table knows too little text, else empty."""
        if self.looked_at_fraction >= _ENOUGH or not self.untouched:
            seen = self.provenance.get("vocabulary_seen")
            if seen is None or seen["lacking"] < MUCH_LACKING:
                return ""
            return f"warning: of the token table {vocabulary_in_words(seen)}"
        largest = max((one for one in self.untouched if is_in_block(one.name)), key=lambda one: one.parameters)
        return (
            f"warning: only {self.looked_at_fraction:.0%} of the parameters in the blocks were looked at; the others "
            f"stay dense, such as {largest.name} ({largest.reason})"
        )

    @property
    def kept_encoder_fraction(self) -> float:
        """The same of all but the token embedding, as papers that compress an encoder count."""
        before, now = self.parts["outside the token embedding"]
        return now / max(before, 1)

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """What papers count, by name: parameters before and now."""
        replaced = [module for module in self.modules if module.structure != "dense"]
        outside = (
            self.dense_parameters - self.dense_embedding_parameters,
            self.parameters - self.embedding_parameters,
        )
        inside = (sum(m.dense_parameters for m in replaced), sum(m.parameters for m in replaced))
        return {"outside the token embedding": outside, "in the replaced matrices": inside}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        fractions = ("kept_fraction", "kept_encoder_fraction", "kept_targets_fraction", "looked_at_fraction")
        return {**asdict(self), **{name: getattr(self, name) for name in fractions}}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "CompressionReport":
        """The report that `to_dict` gave.

        Raises:
            TypeError: If a field is missing; `KeyError` likewise.
        """
        known = {each.name: stored[each.name] for each in fields(cls) if each.name in stored}
        latency = stored["latency"]
        known |= {
            "modules": tuple(
                ModuleReport(**{**module, "shape": tuple(module["shape"])}) for module in stored["modules"]
            ),
            "untouched": tuple(
                Untouched(**{**one, "shape": tuple(one["shape"])}) for one in stored.get("untouched", ())
            ),
            "training": tuple(stored["training"]),
            "origin": Origin.from_dict(stored["origin"]),
            "tags": tuple(stored["tags"]),
            "latency": None if latency is None else LatencyReport.from_dict(latency),
            "quality": tuple(QualityReport(**entry) for entry in stored["quality"]),
        }
        return cls(**known)


def make_report(model: PreTrainedModel) -> CompressionReport:
    """The report of a compressed model, from its modules and the provenance in its configuration.

    Raises:
        InputError: If the model is not compressed.
    """
    model = held_compressed_model(model, "report")
    plan = model.config.plan
    provenance = dict(plan.get("provenance", {}))
    sizes = weight_sizes(model)
    modules = [*replaced_modules(model, provenance, sizes.bits), *dense_modules(model, provenance, sizes.bits)]
    parameters = sum(p.numel() for p in model.parameters())
    itemsize = next(model.parameters()).element_size()
    # A tied head is the embedding's second use: its multiply-adds count, its parameters do not.
    saved = sum(m.dense_parameters - m.parameters for m in modules)
    table: Any = token_table(model)
    embedding = table if hasattr(table, "num_embeddings") else nn.Embedding(0, 0)  # images and sounds have none
    multiply_adds = count_multiply_adds(model)
    saved_multiply_adds = sum(
        dense_multiply_adds(structure) - structure.multiply_adds() for structure in multiplying(model)
    )
    decoded = sum(m.materialized_bytes for m in model.modules() if isinstance(m, Materializing))
    return CompressionReport(
        architecture=type(model).__name__,
        dense_parameters=parameters + saved,
        parameters=parameters,
        dense_size_bytes=provenance.get("dense_size_bytes", sizes.memory + saved * itemsize),
        size_bytes=sizes.saved,
        materialized_bytes=sizes.memory - sizes.saved + decoded,
        dense_multiply_adds=multiply_adds + saved_multiply_adds,
        multiply_adds=multiply_adds,
        modules=tuple(modules),
        provenance={key: value for key, value in provenance.items() if key not in _ELSEWHERE},
        training=_training(provenance),
        origin=Origin.from_dict(provenance.get("origin", {})),
        tags=tuple(model.model_tags or ()),
        dense_embedding_parameters=embedding.num_embeddings * embedding.embedding_dim,
        embedding_parameters=sum(p.numel() for p in embedding.parameters()),
        untouched=tuple(
            Untouched(name, tuple(shape), why) for name, (shape, why) in provenance.get("untouched", {}).items()
        ),
    )


def _training(provenance: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """What was trained after compression, without what is told matrix by matrix."""
    ours = [{"by": name, **provenance[key]} for key, name in _TRAININGS.items() if key in provenance]
    runs = [*provenance.get("training", ()), *ours]
    return tuple({name: value for name, value in run.items() if not _is_nested(value)} for run in runs)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values())
