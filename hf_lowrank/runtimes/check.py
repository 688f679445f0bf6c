"""Whether an exported file says what the model says, on text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from hf_lowrank.data.batches import make_batches, reads_media
from hf_lowrank.data.target_texts import reads_targets, with_targets
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation.base import Agreement
from hf_lowrank.hosts.dummy_inputs import dummy_inputs
from hf_lowrank.hosts.outputs import Batch, longest_input, said
from hf_lowrank.runtimes.graphs import Graph, Tensors

# Of float32, as a part of the largest output, or of 1 where all are smaller.
MOST_DIFFERENCE = 1e-4
# Below these a rounded file is refused.
GATES = {"cosine": 0.95, "top1_agreement": 0.9, "label_agreement": 0.9, "pearson": 0.95}
_LENGTH, _BATCH, _SAMPLES = 64, 4, 32
# Sizes of inputs made up for a model that has no text.
_MADE_UP = ((3, 8), (1, 5), (4, 11))

_CHECKED_ON = (
    "A cat sleeps on the warm windowsill.",
    "The central bank raised interest rates by a quarter of a point, and the shares of several lenders fell.",
    "How do I reset my password?",
    "Water boils at a lower temperature on high mountains, because the air presses less on its surface.",
    "It is a film that never finds its feet, and yet the last ten minutes are among the best of the year.",
    "The train to Lyon leaves from platform seven.",
    "Photosynthesis turns light into chemical energy, which plants keep as sugar and animals live on.",
    "def add(a, b): return a + b",
    "The patient complained of a persistent headache and nausea, but the scan showed nothing unusual.",
    "Our refund policy covers purchases within thirty days.",
    "The striker scored twice in extra time after the goalkeeper had been sent off.",
    "A dull, lifeless and predictable sequel.",
    "The court dismissed the appeal for lack of standing; the minister called the ruling a mistake.",
    "A strong earthquake shook the coast before dawn.",
    "I loved every minute of it.",
    "Neural networks learn features from data; how many they need is decided by the person who builds them.",
    "The recipe calls for two eggs, a cup of milk and a pinch of salt.",
    "Migratory birds navigate by the stars and by magnetic fields.",
    "The battery lasts about nine hours on a single charge, or six with the screen at its brightest.",
    "He apologised for the delay and offered a discount.",
    "Yes.",
    "In 1969 two people walked on the moon while a third went round it and waited for them to come back.",
    "The battery is terrible and the screen broke within a week, so I sent it back.",
    "She plays the violin in a chamber orchestra.",
)


@dataclass(frozen=True)
class Check:
    """What was found of one file.

    Args:
        difference: Largest one of any output, as a part of the largest output.
        agreement: How alike the first outputs are: `cosine`, `top1_agreement` and the like, as in `evaluate`.
        is_within: Whether that is enough.
    """

    difference: float
    agreement: dict[str, float]
    is_within: bool


def check_batches(model: Any, tokenizer: Any, text: Any) -> list[Batch]:
    """What files are checked on: text, or inputs made up where a model reads none."""
    made_up: list[Batch] = [dummy_inputs(model, *sizes) for sizes in _MADE_UP]
    if text is None and (tokenizer is None or reads_media(tokenizer)):
        return made_up
    batches = make_batches(
        list(_CHECKED_ON) if text is None else text,
        tokenizer,
        num_calibration_samples=_SAMPLES,
        max_seq_length=min(_LENGTH, longest_input(model)),
        batch_size=_BATCH,
        pack=False,
    )
    batches = with_targets(batches, model) if reads_targets(model) else batches
    return batches if {*made_up[0]} <= {*batches[0]} else made_up


@torch.no_grad()
def check(
    graph: Graph, run: Callable[[Tensors], Tensors], batches: Sequence[Batch], model: Any, is_rounded: bool
) -> Check:
    """Compare a file with the graph of the torch model it was made from.

    Args:
        graph: Of the model as it is saved.
        run: The file in its runtime.
        model: Whose head tells what is compared.
        is_rounded: Whether alike is enough; else outputs must be equal to `MOST_DIFFERENCE`.

    Raises:
        InputError: If the file does not take inputs of other sizes than those it was traced with.
    """
    agreement, difference = Agreement(), 0.0
    for turn, batch in enumerate(batches):
        given = graph.read(batch, turn)
        graph.names = tuple(given)
        values = graph(*given.values())
        wanted = dict(zip(graph.outputs, values, strict=True))
        try:
            found = run(given)
        except Exception as error:  # runtimes raise their own
            shapes = {name: tuple(value.shape) for name, value in given.items()}
            raise InputError(f"{graph.stem} does not run on {shapes} as a graph: {error!r:.200}") from error
        for name, value in wanted.items():
            scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
            gap = float((found[name] - value).abs().max()) if value.numel() else 0.0
            difference = max(difference, gap / scale)
        heard = graph.heard(batch, turn)
        agreement.add(*(said(model, output_of(values), heard) for values in (found, wanted)))
    result = {name.removesuffix("_to_dense").removesuffix("_from_dense"): v for name, v in agreement.result().items()}
    is_like = all(result[name] >= least for name, least in GATES.items() if name in result)
    return Check(difference, result, is_like if is_rounded else difference <= MOST_DIFFERENCE)


class _Output(SimpleNamespace):
    """What a graph says, as a model's output."""

    def values(self) -> list[torch.Tensor]:
        return [*vars(self).values()]


def output_of(values: Tensors) -> Any:
    """What a graph says, as a model's output, without what it keeps."""
    return _Output(**{name: value for name, value in values.items() if not name.startswith("present.")})
