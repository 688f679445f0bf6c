"""What of a model a training of ours changes, and how it is left."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from hf_lowrank.remote_code.lowrank_structures import token_table

# Up to here the plain products are faster backwards than the fused kernel in 16 bits on a CPU: 3.5 times at 128 and 4
# times at 30 tokens; far above, they need more memory than they are worth.
_SHORT = 128


@contextmanager
def fast_attention(accelerator: Accelerator, num_tokens: int) -> Iterator[None]:
    """What short rows are attended in where the fused kernel is slow: backwards, in 16 bits on a CPU."""
    is_16_bit_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    if not (torch.is_grad_enabled() and is_16_bit_cpu and num_tokens <= _SHORT):
        yield
        return
    switches = torch.backends.cuda  # whatever their name says, they hold on a CPU
    was_allowed = switches.fp16_bf16_reduction_math_sdp_allowed()
    switches.allow_fp16_bf16_reduction_math_sdp(True)  # or the plain products are made in float32: twice the time
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        switches.allow_fp16_bf16_reduction_math_sdp(was_allowed)


@contextmanager
def prepared(model: PreTrainedModel) -> Iterator[None]:
    """Everything but dense embedding tables can learn; afterwards the model has its own mode, cache and precision.

    A table is read a few rows a step, and the optimizer would touch all of it: half the parameters of a small encoder.
    """
    was_training, uses_cache = model.training, getattr(model.config, "use_cache", None)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    embedding = token_table(model)
    if isinstance(embedding, nn.Embedding):
        embedding.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for parameter in model.parameters():
            parameter.grad = None
        extract_model_from_parallel(model, keep_fp32_wrapper=False)  # Accelerate's casts would stay
        if uses_cache is not None:
            model.config.use_cache = uses_cache
        model.train(was_training)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """No dropout within, in training mode too: none of the layers', and none that modules keep as a number."""
    rates = [
        (module, name, rate)
        for module in model.modules()
        for name, rate in vars(module).items()
        if isinstance(rate, float) and ("dropout" in name or (name == "p" and isinstance(module, _DropoutNd)))
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
