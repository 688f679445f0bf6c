"""The table of structures; in a saved folder, those its plan needs with what else is in their files.

A name and its class are one line each, and so is an import: what is saved along is this text without some lines.
"""

from typing import Any

from .lowrank_autoencoder import AutoencoderEmbedding, AutoencoderHead
from .lowrank_autoencoder_linear import AutoencoderLinear, LinearDecoder, NonlinearAutoencoderLinear, NonlinearDecoder
from .lowrank_experts import LowRankExperts
from .lowrank_joint import JointLinear, SharedDown
from .lowrank_kronecker import KroneckerLinear
from .lowrank_linear import LowRankEmbedding, LowRankLinear
from .lowrank_nonlinear_table import NonlinearAutoencoderEmbedding, NonlinearAutoencoderHead
from .lowrank_packed import Packing
from .lowrank_pivoted import PivotedLinear
from .lowrank_tensor_train import CentralCore, SharedTensorTrainLinear, TensorTrainLinear
from .lowrank_tucker import BankedTuckerLinear, TuckerLinear
from .lowrank_tucker_factors import TuckerBank, TuckerBasis

STRUCTURES: dict[str, Any] = {
    "low_rank": LowRankLinear,
    "low_rank_embedding": LowRankEmbedding,
    "pivoted": PivotedLinear,
    "joint_low_rank": JointLinear,
    "autoencoder_embedding": AutoencoderEmbedding,
    "autoencoder_head": AutoencoderHead,
    "nonlinear_autoencoder_embedding": NonlinearAutoencoderEmbedding,
    "nonlinear_autoencoder_head": NonlinearAutoencoderHead,
    "autoencoder": AutoencoderLinear,
    "nonlinear_autoencoder": NonlinearAutoencoderLinear,
    "tucker": TuckerLinear,
    "banked_tucker": BankedTuckerLinear,
    "tensor_train": TensorTrainLinear,
    "shared_tensor_train": SharedTensorTrainLinear,
    "kronecker_sum": KroneckerLinear,
    "low_rank_experts": LowRankExperts,
}

SHARED_PARTS: dict[str, Any] = {
    "shared_down": SharedDown,
    "linear_decoder": LinearDecoder,
    "nonlinear_decoder": NonlinearDecoder,
    "tucker_basis": TuckerBasis,
    "tucker_bank": TuckerBank,
    "central_core": CentralCore,
}

# How rounded weights are kept.
CODES: dict[str, Any] = {
    "grid": Packing,
}
