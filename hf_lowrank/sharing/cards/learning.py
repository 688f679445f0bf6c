"""What was done after the first solution, in sentences: anchoring, block by block, all together."""

from collections.abc import Iterator
from typing import Any


def learning_lines(provenance: dict[str, Any]) -> Iterator[str]:
    """One sentence a step, each with what it brought on text that nothing was solved or trained on."""
    if anchoring := provenance.get("anchoring"):
        kept, refused = len(anchoring["accepted"]), len(anchoring["refused"])
        yield (
            f"Anchored: {kept} of {kept + refused} blocks solved again on what the compressed blocks before them give"
            f"{_distances(anchoring)}."
        )
    if blocks := provenance.get("block_refinement"):
        kept = sum(block["passes"] > 0 for block in blocks.values())
        first, last = next(iter(blocks.values())), list(blocks.values())[-1]
        ends = {"before": first["before"], "after": last["after"]}
        yield f"Trained block by block: {kept} of {len(blocks)} blocks gained{_distances(ends)}."
    if refinement := provenance.get("refinement"):
        passes, rate = refinement["passes"], refinement["learning_rate"]
        kept_state = f"{passes} passes at a rate of {rate:g}" if passes else "no pass helped, so none was kept"
        yield f"Refined towards the dense model: {kept_state}{_distances(refinement)}."


def _distances(step: dict[str, Any]) -> str:
    return f"; distance of the outputs on text set aside {step['before']:.4g} -> {step['after']:.4g}"
