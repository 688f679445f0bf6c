"""The table of structures: in a saved folder only those its plan needs, with what their files hold.

A structure is a module class with
    SIZES                          names of the whole numbers its spec holds
    OPTIONAL_SIZES                 names of those it holds where they are not the usual ones, if there are any
    HOSTS                          "linear" or "embedding": what it can replace
    like(dense, device, **sizes)   an instance of the shape and dtype of a dense module, its numbers still to come
    multiply_adds()                for one token
    to_dense()                     the weight it stands for, (O, I)
    reset_parameters(std)          a random start whose weight has standard deviation `std`
It may have `OPTIONS`: fields its spec can hold besides, each with the words allowed, the default first.
One that stands by itself at a given rank, or in as many numbers, also counts these without the bias,
`num_weights(O, I, rank=R)`. A linear one also gives the bias it stands for (`dense_bias`). An embedding names the
linear structure of a head tied to it (`TIED_HEAD`, `tied_head_sizes`) and which of the head's parameters are which of
its own (`TIED_PARAMETERS`); that structure names where its bias lives (`BIAS`), and may take more than parameters from
the table (`follow_`). What stands at a token embedding or a head can be resized (`resize_`); if that changes what its
spec holds, `sizes` are those it has.

A structure may need a part that it shares with others, of the class it names (`SHARES`): its `like` then takes
`shared`. A shared part is a module class with `SIZES`, `like(dense_members, device, **sizes)`, `multiply_adds`,
`reset_parameters` and, for reports, `shape`. It stands in the model at a name of its own; what uses it refers to it
and does not register it, so that its parameters appear once in the state dict, where every wrapper finds them.

A name and its class are one line each, and an import of a file is one line: code that is saved along is this text
without the lines of what is not needed.
"""

from typing import Any

from .lowrank_autoencoder import AutoencoderEmbedding, AutoencoderHead
from .lowrank_autoencoder_linear import AutoencoderLinear, LinearDecoder, NonlinearAutoencoderLinear, NonlinearDecoder
from .lowrank_joint import JointLinear, SharedDown
from .lowrank_kronecker import KroneckerLinear
from .lowrank_linear import LowRankEmbedding, LowRankLinear
from .lowrank_nonlinear_table import NonlinearAutoencoderEmbedding, NonlinearAutoencoderHead
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
}

SHARED_PARTS: dict[str, Any] = {
    "shared_down": SharedDown,
    "linear_decoder": LinearDecoder,
    "nonlinear_decoder": NonlinearDecoder,
    "tucker_basis": TuckerBasis,
    "tucker_bank": TuckerBank,
    "central_core": CentralCore,
}
