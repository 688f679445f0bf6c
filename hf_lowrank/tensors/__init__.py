"""From dense matrices to structures that share a tensor: one file a kind, one row of `KINDS` each."""

from hf_lowrank.tensors.autoencoder import AutoencoderKind
from hf_lowrank.tensors.kronecker import KroneckerSumKind
from hf_lowrank.tensors.nonlinear_autoencoder import NonlinearAutoencoderKind
from hf_lowrank.tensors.problem import TensorKind
from hf_lowrank.tensors.tensor_train import TensorTrainKind
from hf_lowrank.tensors.tucker import TuckerKind

KINDS: dict[str, TensorKind] = {
    "tucker": TuckerKind(),
    "tensor_train": TensorTrainKind(),
    "shared_tensor_train": TensorTrainKind(shares=True),
    "kronecker_sum": KroneckerSumKind(),
    "autoencoder": AutoencoderKind("two_sided_svd"),
    "separated_autoencoder": AutoencoderKind("two_sided_svd", is_separate=True),
    "offline_autoencoder": AutoencoderKind(None),
    "separated_offline_autoencoder": AutoencoderKind(None, is_separate=True),
    "fisher_autoencoder": AutoencoderKind("weighted_svd"),
    "nonlinear_autoencoder": NonlinearAutoencoderKind(None),
    "separated_nonlinear_autoencoder": NonlinearAutoencoderKind(None, is_separate=True),
}
