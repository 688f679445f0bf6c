"""Write docs/reference.md from the signatures and docstrings of the public names.

pip install '.[dev]'
python docs/make_reference.py
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference.md"
# heading -> names under it; public ones of the package, and with a dot those of its modules
CONTENTS = {
    "Compressing": [
        "compress",
        "decompress",
        "compression.settings.CompressOptions",
        "convert_storage_",
        "compression.conversion.as_two_factors",
        "compression.adapters.merge_adapter_",
        "reduce_vocabulary",
    ],
    "Looking first, and comparing": [
        "analyze",
        "studies.analysis_report.Analysis",
        "compare",
        "studies.comparison_report.Comparison",
    ],
    "Measuring": [
        "evaluate",
        "evaluation.evaluation.Evaluation",
        "record_evaluation",
        "make_report",
        "saved_report",
        "records.report.CompressionReport",
    ],
    "Training": [
        "recover",
        "training.options.RecoveryOptions",
        "training.options.TrainingOptions",
        "lpaf",
        "training.options.LPAFOptions",
        "DistillationTrainer",
        "MixedRankCallback",
        "MixedRank",
        "FirstOrderPruningCallback",
        "RankScheduleCallback",
        "StableRankPenaltyCallback",
        "CardCallback",
    ],
    "Sharing": ["push_to_hub", "sharing.hub.Push", "sharing.verification.verify", "sharing.verification.Verification"],
    "Running elsewhere": [
        "export",
        "runtimes.options.ExportOptions",
        "runtimes.export.Export",
        "runtimes.check.Check",
    ],
    "Methods": [
        "register_method",
        "methods.table.MethodRow",
        "methods.problem.Method",
        "methods.problem.Problem",
        "methods.problem.Solved",
        "methods.together.TensorMethod",
        "methods.matrix.method.MatrixMethod",
        "methods.matrix.svd.SVD",
        "methods.matrix.data_aware_svd.WhitenedSVD",
        "methods.matrix.data_aware_svd.TwoSidedSVD",
        "methods.matrix.data_aware_svd.WeightedSVD",
        "methods.matrix.element_weighted_svd.ElementWeightedSVD",
        "methods.matrix.sparsity_aware_svd.SparsityAwareSVD",
        "methods.matrix.sparsity_aware_svd.ImportanceAwareSVD",
        "methods.tucker.tucker.tucker",
        "methods.trains.tensor_train.tensor_train",
        "methods.trains.tensor_train.shared_tensor_trains",
        "methods.kronecker.kronecker_sum",
        "methods.tables.banded.TableObjective",
        "methods.tables.trained_table.PublishedTraining",
        "methods.rows.row_autoencoder.RowAutoencoder",
        "methods.rows.nonlinear_autoencoder.RowTraining",
        "methods.tables.nonlinear_table.NonlinearTable",
        "compression.anchoring.anchor_",
        "compression.refinement.refine_",
        "compression.block_refinement.refine_blocks_",
        "planning.allocation.uniform",
        "planning.allocation.least_error",
    ],
    "Structures": [
        "remote_code.lowrank_linear.LowRankLinear",
        "remote_code.lowrank_linear.LowRankEmbedding",
        "remote_code.lowrank_joint.JointLinear",
        "remote_code.lowrank_pivoted.PivotedLinear",
        "remote_code.lowrank_autoencoder.AutoencoderEmbedding",
        "remote_code.lowrank_autoencoder.AutoencoderHead",
        "remote_code.lowrank_nonlinear_table.NonlinearAutoencoderEmbedding",
        "remote_code.lowrank_nonlinear_table.NonlinearAutoencoderHead",
        "remote_code.lowrank_autoencoder_linear.AutoencoderLinear",
        "remote_code.lowrank_autoencoder_linear.NonlinearAutoencoderLinear",
        "remote_code.lowrank_tucker.TuckerLinear",
        "remote_code.lowrank_tucker.BankedTuckerLinear",
        "remote_code.lowrank_tensor_train.TensorTrainLinear",
        "remote_code.lowrank_tensor_train.SharedTensorTrainLinear",
        "remote_code.lowrank_kronecker.KroneckerLinear",
        "remote_code.lowrank_experts.LowRankExperts",
    ],
    "Errors": ["InputError", "PlanError"],
}
_HEAD = """<!-- Written from the docstrings by docs/make_reference.py; change those, and run it again. -->

# Reference

The public names of `hf_lowrank`, and the parts they are made of. `O` and `I` are the outputs and inputs of a matrix,
`R` its rank, `B` the batch, `T` tokens, `V` the vocabulary, `D` the width. Weights are (O, I). What the commands take:
`hf-lowrank COMMAND --help`.
"""
_WIDEST = 100


def main() -> None:
    """Write it."""
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE)


def reference() -> str:
    """The whole page."""
    package: Any = griffe.load("hf_lowrank", search_paths=[ROOT], docstring_parser="google")
    parts = [_HEAD]
    for heading, names in CONTENTS.items():
        parts.append(f"## {heading}\n")
        parts += ["\n".join(_entry(name, _found(package, name))) for name in names]
    return "\n".join(parts).rstrip() + "\n"


def _found(package: Any, name: str) -> Any:
    """The object itself, where a public name is imported from its home."""
    found = package[name]
    return found.final_target if found.is_alias else found


def _entry(name: str, found: Any) -> Iterator[str]:
    yield f"### {name.rpartition('.')[2]}\n"
    module = found.module.path
    imported = found.name if "." in name else f"from hf_lowrank import {found.name}"
    yield f"`{imported}`\n" if "." not in name else f"`from {module} import {found.name}`\n"
    yield f"```text\n{_signature(found)}\n```\n"
    yield from _documentation(found)
    for member in _methods(found):
        yield f"#### {found.name}.{member.name}\n"
        yield f"```text\n{_signature(member)}\n```\n"
        yield from _documentation(member)


def _methods(found: Any) -> Iterable[Any]:
    """What a class of the front page can do, beside what it overrides."""
    if not found.is_class or "remote_code" in found.path or "solvers" in found.path:
        return []
    members = [member for member in found.members.values() if not member.name.startswith("_")]
    return [member for member in members if member.is_function and member.docstring is not None]


def _signature(found: Any) -> str:
    parameters = found.parameters if not found.is_attribute else []
    shown = list(_parameters(parameters))
    returns = f" -> {found.returns}" if found.is_function and found.returns is not None else ""
    line = f"{found.name}({', '.join(shown)}){returns}"
    if len(line) <= _WIDEST:
        return line
    body = "".join(f"    {parameter},\n" for parameter in shown)
    return f"{found.name}(\n{body}){returns}"


def _parameters(parameters: Any) -> Iterator[str]:
    is_named = False
    for parameter in parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind.value
        if kind == "keyword-only" and not is_named:
            is_named = True
            yield "*"
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        is_named |= stars == "*"
        annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
        value = re.sub(r"^option\((.*?)(, \w+=.*)?\)$", r"\1", str(parameter.default))  # of a field of options
        default = f" = {value}" if parameter.default is not None and not stars else ""
        yield f"{stars}{parameter.name}{annotation}{default}"


def _documentation(found: Any) -> Iterator[str]:
    for section in found.docstring.parsed if found.docstring is not None else []:
        yield from _SECTIONS[section.kind.value](section)


def _text(section: Any) -> Iterator[str]:
    yield f"{section.value}\n"


def _named(section: Any) -> Iterator[str]:
    yield "| argument | meaning |\n|---|---|"
    for item in section.value:
        yield f"| `{item.name}` | {_cell(item.description)} |"
    yield ""


def _returned(section: Any) -> Iterator[str]:
    for item in section.value:
        yield f"**Returns:** {_cell(item.description)}\n"


def _raised(section: Any) -> Iterator[str]:
    for item in section.value:
        yield f"**Raises** `{item.annotation}`: {_cell(item.description)}\n"


def _titled(section: Any) -> Iterator[str]:
    yield f"**{section.title}**\n\n```text\n{section.value.contents}\n```\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# kind of a section -> what it looks like
_SECTIONS = {
    "text": _text,
    "parameters": _named,
    "other parameters": _named,
    "returns": _returned,
    "raises": _raised,
    "admonition": _titled,
}

if __name__ == "__main__":
    main()
