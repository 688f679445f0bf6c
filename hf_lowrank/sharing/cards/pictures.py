"""Pictures made of letters: they need no file, no library and no browser, and a diff of two shows what changed."""

import re
from collections.abc import Sequence

from hf_lowrank.records.module_reports import ModuleReport
from hf_lowrank.remote_code.lowrank_table import STRUCTURES

_BLOCKS = "▁▂▃▄▅▆▇█"
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # the number inside `encoder.layer.3.output.dense`
_FEW = 48  # layers in one line
_FULL_BITS = 8
LEGEND = "one block a layer, first to last; ▁ little kept, ▇ much kept, █ left dense, · shared by others"
LEGEND_OF_BITS = "one block a layer, first to last; ▁ a bit, ▇ eight and more"


def rank_picture(modules: Sequence[ModuleReport]) -> str:
    """What each kind of matrix kept in each layer, one line a kind; with the ranks, smallest to largest."""
    kinds: dict[str, list[ModuleReport]] = {}
    for module in modules:
        kinds.setdefault(_LAYER.sub("*", module.name), []).append(module)
    for group in kinds.values():
        group.sort(key=lambda module: int((_LAYER.search(module.name) or ["0"])[0]))
    bars = {kind: "".join(_block(module) for module in group[:_FEW]) for kind, group in kinds.items()}
    name_width, bar_width = max(map(len, kinds), default=0), max(map(len, bars.values()), default=0)
    return "\n".join(
        f"{kind:{name_width}}  {bars[kind]:{bar_width}}  {_ranks(group)}".rstrip() for kind, group in kinds.items()
    )


def _block(module: ModuleReport) -> str:
    if module.structure == "dense" and module.bits is not None:
        return _BLOCKS[min(int(module.bits / _FULL_BITS * (len(_BLOCKS) - 1)), len(_BLOCKS) - 2)]
    if module.structure == "dense":
        return _BLOCKS[-1]
    if not module.dense_parameters:
        return "·"
    return _BLOCKS[min(int(module.parameters / module.dense_parameters * (len(_BLOCKS) - 1)), len(_BLOCKS) - 2)]


def _ranks(group: Sequence[ModuleReport]) -> str:
    ranks = sorted({module.rank for module in group if module.rank is not None})
    full = min(_full_rank(module) for module in group)
    bits = sorted(module.bits for module in group if module.bits is not None)
    if not ranks and bits:
        return f"{bits[0]:.1f} to {bits[-1]:.1f} bits" if len(bits) > 1 else f"{bits[0]:.1f} bits"
    if not ranks:
        return "dense" if all(module.structure == "dense" for module in group) else group[0].structure
    spread = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"rank {spread} of {full}"


def _full_rank(module: ModuleReport) -> int:
    """The rank at which nothing is lost."""
    full: int = getattr(STRUCTURES.get(module.structure), "largest_rank", lambda *shape: min(shape))(*module.shape)
    return full
