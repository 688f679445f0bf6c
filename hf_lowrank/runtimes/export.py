"""The verb `export`: files that run a compressed model without torch."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_lowrank.errors import InputError, one_line
from hf_lowrank.extras import load_part
from hf_lowrank.files.scratch import workshop
from hf_lowrank.hosts.loading import find_tokenizer
from hf_lowrank.hosts.outputs import Batch
from hf_lowrank.options import checked, settle
from hf_lowrank.remote_code.lowrank_structures import named_structures
from hf_lowrank.runtimes.check import Check, check, check_batches
from hf_lowrank.runtimes.graphs import make_graphs
from hf_lowrank.runtimes.options import FLOAT, STORED, Draft, ExportOptions
from hf_lowrank.runtimes.plain import plain_copy
from hf_lowrank.runtimes.stored import stored_grids
from hf_lowrank.sharing.saving import load_compressed

_REMEDY = "Choose another precision, or look at the file all the same (--force)."


@dataclass(frozen=True)
class ExportedFile:
    """One graph in the form of a runtime.

    Args:
        path: Of the file that the runtime is given.
        size_bytes: Of it and of what lies beside it with its weights.
        check: How it compares with the model in torch.
    """

    path: str
    size_bytes: int
    check: Check


@dataclass(frozen=True)
class Export:
    """What came of an export.

    Args:
        ok: Whether every file passed its check, or was forced; else nothing was written.
        message: One line: what was found.
        notes: What the runtime was given in another form than was asked for, by name.
    """

    ok: bool
    message: str
    files: tuple[ExportedFile, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers and names."""
        return asdict(self)


@checked
def export(folder: str | Path, tokenizer: Any = None, **options: Any) -> Export:
    """Write the files by which a runtime runs a compressed model, into its folder, where the ecosystem looks for them.

    ONNX Runtime: `onnx/model.onnx`, `onnx/model_qint8_avx512_vnni.onnx` and their like; OpenVINO:
    `openvino/openvino_model.xml`. Batch size and length are free; causal models and decoders have a past, by the names
    that optimum gives. Every file is compared with the torch model on text before it appears: float32 to 1e-4, rounded
    ones by agreement or cosine.

    Args:
        folder: Of a saved compressed model.
        tokenizer: What reads the text; None takes the one in the folder.
        options: See `ExportOptions`.

    Raises:
        InputError: If the folder holds no compressed model, a runtime is missing, or the model cannot be a graph.
    """
    chosen = settle(ExportOptions, options, "export")
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder} is not a folder. Give the folder of a saved compressed model.")
    writer = load_part(f"hf_lowrank.runtimes.{chosen.runtime}_files", chosen.runtime)
    model = load_compressed(path)
    if experts := [name for name, structure in named_structures(model) if structure.HOSTS == "experts"]:
        raise InputError(f"{experts[0]} holds experts, which tokens choose: no fixed graph does. Run it in torch.")
    batches = check_batches(model, find_tokenizer(model, tokenizer), chosen.text)
    with workshop(path / chosen.runtime) as shop:
        files, notes = _drafts(model, writer, chosen, shop, batches)
        failed = [one for one in files if not one.check.is_within]
        if failed and not chosen.force:
            return Export(False, f"{_told(failed[0])}: refused. {_REMEDY}", (), notes)
        placed = tuple(_placed(one, shop, path / chosen.runtime) for one in files)
    return Export(True, "; ".join(map(_told, placed)), placed, notes)


def _drafts(
    model: Any, writer: Any, chosen: ExportOptions, shop: Path, batches: Sequence[Batch]
) -> tuple[list[ExportedFile], tuple[str, ...]]:
    """Every file of a model, written where nobody sees it, and checked."""
    is_stored = chosen.precision == STORED
    plain, stored = plain_copy(model, is_stored), stored_grids(model) if is_stored else []
    files, notes = [], []
    for graph, reference in zip(make_graphs(plain), make_graphs(model), strict=True):
        place = shop / graph.stem
        place.mkdir()
        try:
            written = writer.write(graph, plain, Draft(chosen.precision, place, batches, stored))
        except (RuntimeError, TypeError) as error:  # tracers raise their own
            raise InputError(f"{type(model).__name__} cannot be traced as a graph: {one_line(error)}") from error
        notes += written.notes
        session = writer.session(written.path)
        found = check(reference, session, batches, model, chosen.precision != FLOAT)
        size = sum(one.stat().st_size for one in place.iterdir())
        files.append(ExportedFile(str(written.path), size, found))
    return files, tuple(notes)


def _placed(file: ExportedFile, shop: Path, folder: Path) -> ExportedFile:
    """Move a draft to where it is looked for: its weights first."""
    folder.mkdir(exist_ok=True)
    draft = Path(file.path)
    for path in sorted(draft.parent.iterdir(), key=lambda one: one == draft):
        shutil.move(path, folder / path.name)
    return ExportedFile(str(folder / draft.name), file.size_bytes, file.check)


def _told(file: ExportedFile) -> str:
    scores = ", ".join(f"{name} {value:.4f}" for name, value in file.check.agreement.items())
    return f"{Path(file.path).name} {file.size_bytes / 1e6:.1f} MB, difference {file.check.difference:.1e}, {scores}"
