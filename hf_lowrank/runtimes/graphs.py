"""Which graphs a model is exported as: the file of each, what it reads and says by name, and which sizes may vary."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from hf_lowrank.hosts.dummy_inputs import dummy_inputs
from hf_lowrank.hosts.outputs import Batch

# Sizes of the two examples that tell which axes vary: rows, and tokens read.
_EXAMPLES = ((4, 12), (6, 9))
_AXES = {4: "batch_size", 12: "sequence_length"}
_PAST = ("key", "value")
_BOTH = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")

PAST = "past_key_values"
Tensors = dict[str, torch.Tensor]


class Graph(nn.Module):
    """A model, or a part of one, as a function of tensors in a fixed order that returns a tuple of tensors.

    Args:
        stem: Name of its file, without the ending.
        model: What it runs.
    """

    def __init__(self, stem: str, model: Any) -> None:
        super().__init__()
        self.stem = stem
        self.model = model
        self.outputs: tuple[str, ...] = ()

    def read(self, batch: Batch, turn: int = 0) -> Tensors:
        """What the graph is given for a batch, by name and in order.

        Args:
            turn: With an odd one, what can have a past has none.
        """
        raise NotImplementedError

    def heard(self, batch: Batch, turn: int = 0) -> Batch:
        """The part of a batch that the first output speaks of."""
        return batch

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self._said(dict(zip(self.names, values, strict=True)))
        self.outputs = tuple(found)
        return tuple(found.values())

    def _said(self, given: Tensors) -> Tensors:
        raise NotImplementedError

    def examples(self, whole: Any) -> tuple[Tensors, Tensors]:
        """Two inputs that differ in every size that may vary.

        Args:
            whole: The model it is of.
        """
        first, second = (self.read(dummy_inputs(whole, *sizes)) for sizes in _EXAMPLES)
        if all(value.dim() == 3 and not value.is_floating_point() for value in second.values()):  # of choices
            second = {name: torch.cat([value, value[:, :1]], dim=1) for name, value in second.items()}
        self.names = tuple(first)
        return first, second

    def axes(self, first: Tensors, second: Tensors) -> dict[str, dict[int, str]]:
        """Of every input and output the axes that vary, and their names."""
        with torch.no_grad():
            pairs = [(name, first[name], second[name]) for name in first]
            said = self(*first.values()), self(*second.values())
            pairs += zip(self.outputs, *said, strict=True)
        return {
            name: {
                axis: _AXES.get(size, f"{name}_{axis}")
                for axis, (size, other) in enumerate(zip(one.shape, two.shape, strict=True))
                if size != other
            }
            for name, one, two in pairs
        }


class WholeGraph(Graph):
    """A model without a cache: what it reads, and all it says."""

    def read(self, batch: Batch, turn: int = 0) -> Tensors:
        given = {name: value for name, value in batch.items() if name != "labels"}
        if "input_ids" in given and _has_types(self.model):
            given.setdefault("token_type_ids", torch.zeros_like(given["input_ids"]))
        return given

    def _said(self, given: Tensors) -> Tensors:
        cached = {"use_cache": False} if "use_cache" in _taken(self.model) else {}
        found = _tensors(self.model(**given, **cached))
        if "last_hidden_state" in found:
            found.pop("pooler_output", None)
        return found


class DecoderGraph(Graph):
    """A causal language model: new tokens, and keys and values of what was before, of any length or none."""

    def read(self, batch: Batch, turn: int = 0) -> Tensors:
        ids, start = batch["input_ids"], self._start(batch, turn)
        mask = batch.get("attention_mask", torch.ones_like(ids))
        before = max(start, 1)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            cache = self.model(input_ids=ids[:, :before], attention_mask=mask[:, :before], use_cache=True)
        given = {"input_ids": ids[:, start:], "attention_mask": mask}
        if "position_ids" in _taken(self.model):
            given["position_ids"] = places[:, start:]
        kept = [
            values[:, :, :start] for layer in cache.past_key_values.layers for values in (layer.keys, layer.values)
        ]
        return given | _numbered(PAST, kept, _PAST)

    def heard(self, batch: Batch, turn: int = 0) -> Batch:
        start = self._start(batch, turn)
        return {name: value[:, start:] for name, value in batch.items() if name in ("input_ids", "attention_mask")}

    def _start(self, batch: Batch, turn: int) -> int:
        return 0 if turn % 2 else batch["input_ids"].shape[1] // 2

    def _said(self, given: Tensors) -> Tensors:
        past = [given.pop(name) for name in [*given] if name.startswith(PAST)]
        found = self.model(**given, past_key_values=_cache(past, 2, 0), use_cache=True)
        return {"logits": found.logits} | _numbered("present", _kept(found.past_key_values), _PAST)


class SecondDecoderGraph(Graph):
    """The decoder of an encoder-decoder, with the past of both attentions or, at first, without."""

    def __init__(self, stem: str, model: Any, has_past: bool) -> None:
        super().__init__(stem, model)
        self.has_past = has_past

    def read(self, batch: Batch, turn: int = 0) -> Tensors:
        source = batch[self.model.main_input_name]
        mask = batch.get("attention_mask", torch.ones(source.shape[:2], dtype=torch.long))
        with torch.no_grad():
            states = self.model.get_encoder()(source, attention_mask=mask).last_hidden_state
            ids, start = batch["decoder_input_ids"], self._start(batch)
            given = {"encoder_attention_mask": mask, "input_ids": ids[:, start:]}
            if not self.has_past:
                return given | {"encoder_hidden_states": states}
            past = self._run({**given, "input_ids": ids[:, :start], "encoder_hidden_states": states}).past_key_values
        pairs = zip(_pairs(past.self_attention_cache), _pairs(past.cross_attention_cache), strict=True)
        return given | _numbered(PAST, [one for own, cross in pairs for one in (*own, *cross)], _BOTH)

    def heard(self, batch: Batch, turn: int = 0) -> Batch:
        return {"input_ids": batch["decoder_input_ids"][:, self._start(batch) :]}

    def _start(self, batch: Batch) -> int:
        return batch["decoder_input_ids"].shape[1] // 2 if self.has_past else 0

    def _run(self, given: Tensors, past: Any = None) -> Any:
        states = given.get("encoder_hidden_states")
        if states is None:  # the attention to it is cached: only its length is asked for
            width = self.model.config.get_text_config().hidden_size
            states = given["encoder_attention_mask"][..., None].expand(-1, -1, width).to(self.model.dtype)
        return self.model(
            attention_mask=given["encoder_attention_mask"],
            decoder_input_ids=given["input_ids"],
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            past_key_values=past,
            use_cache=True,
        )

    def _said(self, given: Tensors) -> Tensors:
        past = [given[name] for name in given if name.startswith(PAST)]
        found = self._run(given, EncoderDecoderCache(_cache(past, 4, 0), _cache(past, 4, 2)) if past else None)
        kept = found.past_key_values
        if self.has_past:
            return {"logits": found.logits} | _numbered("present", _kept(kept.self_attention_cache), _BOTH[:2])
        pairs = zip(_pairs(kept.self_attention_cache), _pairs(kept.cross_attention_cache), strict=True)
        return {"logits": found.logits} | _numbered(
            "present", [one for own, cross in pairs for one in (*own, *cross)], _BOTH
        )


def make_graphs(model: Any) -> list[Graph]:
    """The graphs of a model: one, or those that optimum looks for of an encoder-decoder that writes."""
    if model.can_generate() and model.config.is_encoder_decoder:
        encoder = WholeGraph("encoder_model", model.get_encoder())
        decoders = {"decoder_model": False, "decoder_with_past_model": True}
        return [encoder, *(SecondDecoderGraph(stem, model, has_past) for stem, has_past in decoders.items())]
    return [DecoderGraph("model", model) if _has_past(model) else WholeGraph("model", model)]


@torch.no_grad()
def _has_past(model: Any) -> bool:
    """Whether a model keeps keys and values of all its layers, and nothing else, of what it has read."""
    if not model.can_generate() or "past_key_values" not in _taken(model):
        return False
    cache = getattr(model(**dummy_inputs(model), use_cache=True), "past_key_values", None)
    return isinstance(cache, DynamicCache) and all(getattr(layer, "keys", None) is not None for layer in cache.layers)


def _has_types(model: Any) -> bool:
    return "token_type_ids" in _taken(model) and getattr(model.config, "type_vocab_size", 0) > 1


def _taken(model: Any) -> Any:
    return inspect.signature(model.forward).parameters


def _tensors(output: Any) -> Tensors:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def _cache(past: Sequence[torch.Tensor], step: int, start: int) -> DynamicCache:
    """The keys and values at `start` and after it of every `step` tensors."""
    return DynamicCache(list(zip(past[start::step], past[start + 1 :: step], strict=True)))


def _pairs(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _kept(cache: Any) -> list[torch.Tensor]:
    return [values for pair in _pairs(cache) for values in pair]


def _numbered(stem: str, values: Sequence[torch.Tensor], kinds: Sequence[str]) -> Tensors:
    """As optimum names them: `stem.LAYER.KIND`."""
    names = [f"{stem}.{layer}.{kind}" for layer in range(len(values) // len(kinds)) for kind in kinds]
    return dict(zip(names, values, strict=True))
