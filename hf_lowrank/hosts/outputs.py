"""What a model says, in a form that two models can be compared in, whatever their head."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.pooling import pooled, pooling_of

Batch = Mapping[str, torch.Tensor]

IGNORED_LABEL = -100
# Of logits, whose softmaxes would otherwise be held several times for a whole batch.
_ROWS_AT_ONCE = 64
_UNBOUNDED = 1 << 20


@dataclass(frozen=True)
class Said:
    """The output of a model at the places that count.

    Args:
        kind: One of `OUTPUTS`.
        rows: (N, V), a row for each thing that is said.
    """

    kind: str
    rows: torch.Tensor

    def distance(self, reference: "Said") -> torch.Tensor:
        """How far each row is from the reference's, (N); see `OUTPUTS`.

        Raises:
            InputError: If there are other rows: what the model says is as long as its weights make it.
        """
        if self.rows.shape != reference.rows.shape:
            raise InputError(
                f"The model's outputs are {tuple(self.rows.shape)} with changed weights and "
                f"{tuple(reference.rows.shape)} without, so they cannot be compared. Compress with method svd."
            )
        return OUTPUTS[self.kind].distance(self.rows, reference.rows)

    def random_gradient_loss(self, generator: torch.Generator) -> torch.Tensor:
        """A random scalar whose gradient has the second moment of the Gauss-Newton matrix of `distance`.

        For predictions: the loss of labels drawn from the model's own, so that no labels are needed (the Fisher
        matrix). For embeddings: the product with standard normal directions.
        """
        return OUTPUTS[self.kind].random_gradient_loss(self.rows, generator)


class _Divergence(torch.autograd.Function):
    """KL(wanted || found) of each row of logits, (N, V) twice -> (N), a few rows at a time.

    The gradient, `softmax(found) - softmax(wanted)`, is formed anew: softmaxes of a whole batch, kept for it, would
    take several times the memory of the logits.
    """

    @staticmethod
    def forward(ctx: Any, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(found, wanted)
        rows = []
        for some, others in _parts(found, wanted):
            says, should = F.log_softmax(some, dim=-1), F.log_softmax(others, dim=-1)
            rows.append((should.exp() * (should - says)).sum(dim=-1))
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        found, wanted = ctx.saved_tensors
        gradient = torch.empty_like(found)
        for (some, others), into, scale in zip(
            _parts(found, wanted), gradient.split(_ROWS_AT_ONCE), gradients[0].split(_ROWS_AT_ONCE), strict=True
        ):
            into.copy_((some.softmax(dim=-1) - others.softmax(dim=-1)) * scale[:, None])
        return gradient, None


def _parts(found: torch.Tensor, wanted: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(found.split(_ROWS_AT_ONCE), wanted.split(_ROWS_AT_ONCE), strict=True)


def _divergence(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    divergence: torch.Tensor = _Divergence.apply(found, wanted)  # type: ignore[no-untyped-call]  # torch's
    return divergence


def _loss_of_drawn_class(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    probabilities = F.softmax(rows.detach().float(), dim=-1).cpu()
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(rows.device)
    return F.cross_entropy(rows, labels, reduction="sum")


def _label_divergence(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    should = wanted.sigmoid()
    both = [F.binary_cross_entropy_with_logits(rows, should, reduction="none") for rows in (found, wanted)]
    return (both[0] - both[1]).sum(dim=-1)


def _loss_of_drawn_labels(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    labels = torch.bernoulli(rows.detach().float().sigmoid().cpu(), generator=generator).to(rows)
    return F.binary_cross_entropy_with_logits(rows, labels, reduction="sum")


def _half_square(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found - wanted).square().sum(dim=-1) / 2


def _one_minus_cosine(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return 1 - (found * wanted).sum(dim=-1)


def _along_normals(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    directions = torch.randn(rows.shape, generator=generator, dtype=torch.float32)
    return (rows * directions.to(rows)).sum()


@dataclass(frozen=True)
class Kind:
    """A way in which models speak.

    Args:
        distance: Of two rows, (N, V) twice -> (N).
        random_gradient_loss: See `Said`.
        has_temperature: Whether rows are logits, which distillation divides by its temperature.
    """

    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    random_gradient_loss: Callable[[torch.Tensor, torch.Generator], torch.Tensor]
    has_temperature: bool


# distribution: logits of classes or tokens, KL(reference || this)
# labels: logits of labels of which several can be true, the sum of their KL(reference || this)
# number: values of a regression or a ranking, half the squared difference: KL of normals with variance 1
# embedding: unit vectors, 1 - cosine
OUTPUTS = {
    "distribution": Kind(_divergence, _loss_of_drawn_class, has_temperature=True),
    "labels": Kind(_label_divergence, _loss_of_drawn_labels, has_temperature=True),
    "number": Kind(_half_square, _along_normals, has_temperature=False),
    "embedding": Kind(_one_minus_cosine, _along_normals, has_temperature=False),
}


def run(model: PreTrainedModel, batch: Batch) -> Said:
    """Run a batch and take from its output what is to be compared.

    A token head speaks at the masked tokens where the batch has labels, else at every token that is no padding; a
    sequence head once per sequence, by classes, labels or a number; a question-answering head once for the start and
    once for the end, a multiple-choice head once per batch; a model without a head by its pooled last hidden states
    (see `pooling_of`), as unit vectors.
    """
    cached = {"use_cache": False} if _has_cache(model) else {}
    return said(model, model(**inputs_of(model, batch), **cached), batch)


def inputs_of(model: Any, batch: Batch) -> Batch:
    """What a model reads of a batch; to a multiple-choice head its sequences are the choices."""
    is_choice = type(model).__name__.endswith("ForMultipleChoice")
    return {name: value[None] if is_choice else value for name, value in batch.items() if name != "labels"}


def said(model: Any, output: Any, batch: Batch) -> Said:
    """What is to be compared of the output a model has given for a batch; see `run`."""
    if getattr(output, "start_logits", None) is not None:
        return Said("distribution", torch.cat([output.start_logits, output.end_logits]))
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = getattr(output, "prediction_logits", None)
    if logits is None:
        return Said("embedding", _embeddings(model, output, batch))
    if logits.dim() == 2:
        return Said(kind_of_head(model), logits)
    if logits.dim() == 4:  # classes of pixels, (B, V, H, W)
        return Said("distribution", logits.flatten(2).mT.flatten(0, 1))
    return Said("distribution", logits[speaking_places(logits, batch)])


def _embeddings(model: Any, output: Any, batch: Batch) -> torch.Tensor:
    """The unit vectors of a model without logits: of texts and images, of hidden states, or of all it says first."""
    pairs = [getattr(output, name, None) for name in ("text_embeds", "image_embeds", "audio_embeds")]
    if any(vectors is not None for vectors in pairs):
        return torch.cat([F.normalize(vectors, dim=-1) for vectors in pairs if vectors is not None])
    hidden_states = getattr(output, "last_hidden_state", None)
    if hidden_states is not None:
        return pooled(hidden_states, _mask_of(hidden_states, batch), pooling_of(model))
    first = next(value for value in output.values() if isinstance(value, torch.Tensor) and value.dim() > 1)
    return F.normalize(first.flatten(1), dim=-1)


def kind_of_head(model: Any) -> str:
    """What a head says that speaks once for a sequence: `number` where it has one output, which no softmax can use."""
    if type(model).__name__.endswith("ForMultipleChoice"):
        return "distribution"
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        return "labels"
    return "number" if problem == "regression" or model.config.num_labels == 1 else "distribution"


@torch.no_grad()
def mean_distance(model: PreTrainedModel, reference: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean distance of a model's outputs from another's on some text; see `Said.distance`."""
    distances = []
    for batch in batches:
        placed = {name: value.to(model.device) for name, value in batch.items()}
        distances.append(run(model, placed).distance(run(reference, placed)))
    return float(torch.cat(distances).mean())


def real_tokens(batch: Batch, side: str = "") -> torch.Tensor | None:
    """Which tokens, or samples of a sound, are no padding, (B, T), bool; None where there are none, as of images.

    Args:
        side: `decoder_` asks for what an encoder-decoder is to write instead of what it reads.
    """
    mask, ids = batch.get(f"{side}attention_mask"), batch.get(f"{side}input_ids")
    if mask is None:
        return None if ids is None else torch.ones_like(ids, dtype=torch.bool)
    return mask.bool()


def token_masks(batch: Batch) -> list[torch.Tensor]:
    """See `real_tokens`: of what is read and of what is to be written, where there are any."""
    return [mask for mask in map(partial(real_tokens, batch), ("", "decoder_")) if mask is not None]


def real_rows(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The rows of hidden states, (B, T, n) or (B T, n), that are of no padding, (N, n); a copy only if need be.

    What an encoder-decoder reads and what it writes differ in length (`hf_lowrank.data.target_texts`), so that the
    number of rows tells whose they are.
    """
    rows = values.reshape(-1, values.shape[-1])
    mask = _mask_of(values, batch)
    return rows if mask is None or bool(mask.all()) else rows[mask.flatten()]


def sees_all(values: torch.Tensor, batch: Batch) -> bool:
    """Whether what a module is given are all tokens, patches or frames, not those that were routed to it."""
    num_rows = values.numel() // values.shape[-1]
    return values.dim() > 2 or any(mask.numel() == num_rows for mask in token_masks(batch))


def _mask_of(values: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    """Which of the rows of `values` are real, in their order; None where all are."""
    num_rows, read = values.numel() // max(values.shape[-1], 1), real_tokens(batch)
    for mask in token_masks(batch):
        if mask.numel() == num_rows:
            return mask.T if values.shape[:2] == mask.T.shape != mask.shape else mask  # (T, B, n) as of XLNet
    if read is None or values.dim() != 3 or len(values) != len(read) or "pixel_values" in batch:
        return None
    length = values.shape[1]
    if length > read.shape[1]:  # filled up by the host, to whole windows
        return F.pad(read, (0, length - read.shape[1]))
    ends = (torch.arange(length, device=read.device) + 1) * read.shape[1] // length - 1
    return read[:, ends]  # shortened by the host: a row is real if all that went into it is


def longest_input(model: Any) -> int:
    """The most tokens a model reads at once; two of its positions are left out, which RoBERTa keeps for padding."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _UNBOUNDED
    return (int(most) if most > 0 else _UNBOUNDED) - 2  # XLNet says -1


def speaking_places(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Where the predictions (B, T, V) count, (B, T), bool: at token labels if there are any, else at real tokens."""
    labels = batch.get("labels")
    if labels is not None and labels.shape == logits.shape[:2]:
        return labels != IGNORED_LABEL
    mask = _mask_of(logits, batch)
    return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask


def _has_cache(model: Any) -> bool:
    return model.can_generate() and getattr(model.config, "use_cache", False)
