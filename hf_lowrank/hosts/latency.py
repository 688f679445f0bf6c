"""What a model does: how fast it runs, and how its sentence embeddings compare with another's."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_lowrank.hosts.dummy_inputs import dummy_inputs
from hf_lowrank.hosts.outputs import longest_input
from hf_lowrank.hosts.pooling import pooled

_WARM_UP_ROUNDS = 2
_TYPICAL = 128


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass, over several rounds.

    Args:
        lower_quartile: A quarter of the rounds were faster.
        upper_quartile: A quarter of the rounds were slower.
        speed_up: How many times faster than the first model measured with it: the median, over the rounds, of the
            ratio of the two times in one round.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    speed_up: float


def measure_latency(
    models: dict[str, Any], batch_size: int = 8, sequence_length: int = 128, rounds: int = 9
) -> dict[str, Latency]:
    """Time the models against each other, one forward pass of each in every round.

    Interleaved, so that whatever else the machine does meets all of them alike; compare ratios, not runs.

    Args:
        models: Name -> model; the first is what the others are compared with.

    Raises:
        ValueError: If there is no model or no round.
    """
    if not models or rounds < 1:
        raise ValueError(f"measure_latency needs at least one model and one round, got {len(models)} and {rounds}.")
    times: dict[str, list[float]] = {name: [] for name in models}
    inputs = {name: typical_inputs(model, batch_size, sequence_length) for name, model in models.items()}
    was_training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    with torch.inference_mode():
        for turn in range(_WARM_UP_ROUNDS + rounds):
            for name, model in models.items():
                seconds = _time_forward(model, inputs[name])
                if turn >= _WARM_UP_ROUNDS:
                    times[name].append(seconds)
    for name, model in models.items():
        model.train(was_training[name])
    first = times[next(iter(times))]
    return {name: _summarize(seconds, first) for name, seconds in times.items()}


def typical_length(model: Any, sequence_length: int = _TYPICAL) -> int:
    """`sequence_length`, or half of the positions the model has if that is less; 0 where it reads no tokens."""
    reads_tokens = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return min(sequence_length, longest_input(model) // 2 + 1) if reads_tokens else 0


def typical_inputs(model: Any, batch_size: int, sequence_length: int) -> dict[str, torch.Tensor]:
    """What a forward pass is measured on: tokens without padding, images, or sounds of so many frames."""
    inputs = dummy_inputs(model, batch_size, sequence_length or _TYPICAL)
    if "attention_mask" in inputs:  # with padding, other kernels may run
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _time_forward(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    _wait_for(model.device)
    start = time.perf_counter()
    model(**inputs)
    _wait_for(model.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summarize(seconds: Sequence[float], reference: Sequence[float]) -> Latency:
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    ratios = [theirs / ours for theirs, ours in zip(reference, seconds, strict=True)]
    return Latency(quartiles[1], quartiles[0], quartiles[2], statistics.median(ratios))


@torch.inference_mode()
def embed_sentences(model: Any, tokenizer: Any, sentences: Sequence[str]) -> torch.Tensor:
    """One unit vector a sentence, (N, D): of the mean of the last hidden states over the tokens the mask keeps."""
    batch = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt").to(model.device)
    return pooled(model(**batch).last_hidden_state, batch["attention_mask"])


def mean_cosine(dense: Any, compressed: Any, tokenizer: Any, sentences: Sequence[str]) -> float:
    """Mean cosine between the two models' embeddings of each sentence; 1 where compression changed nothing."""
    theirs, ours = (embed_sentences(model, tokenizer, sentences).double() for model in (dense, compressed))
    return float(torch.nn.functional.cosine_similarity(theirs, ours.to(theirs.device)).mean())
