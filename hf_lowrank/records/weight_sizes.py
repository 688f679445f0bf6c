"""What the parameters of a model take, in its folder and in memory."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from hf_lowrank.remote_code.lowrank_packed import packed_bytes


@dataclass(frozen=True)
class WeightSizes:
    """What a model's parameters take.

    Args:
        saved: Bytes of all in the file of the weights.
        memory: Bytes of all as numbers of their type.
        bits: What a number of each rounded one takes in the file.
    """

    saved: int
    memory: int
    bits: dict[str, float]


def weight_sizes(model: PreTrainedModel) -> WeightSizes:
    """The sizes of a compressed model."""
    packed, parameters = packed_bytes(model), dict(model.named_parameters())
    full = {name: p.numel() * p.element_size() for name, p in parameters.items()}
    # Beside rounded ones, the others are kept in half precision.
    others = {name: 2 * p.numel() if packed else full[name] for name, p in parameters.items() if name not in packed}
    bits = {name: 8 * size / parameters[name].numel() for name, size in packed.items()}
    return WeightSizes(sum(packed.values()) + sum(others.values()), sum(full.values()), bits)
