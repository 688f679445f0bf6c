"""From dense matrices to structures that share a tensor: one file a kind, one row of `KINDS` each."""

from hf_lowrank.tensors.problem import TensorKind
from hf_lowrank.tensors.tensor_train import TensorTrainKind
from hf_lowrank.tensors.tucker import TuckerKind

KINDS: dict[str, TensorKind] = {
    "tucker": TuckerKind(),
    "tensor_train": TensorTrainKind(),
    "shared_tensor_train": TensorTrainKind(shares=True),
}
