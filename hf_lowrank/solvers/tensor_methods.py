"""The methods that decompose matrices of many layers together, by name."""

from dataclasses import dataclass

from hf_lowrank.solvers.data_aware_svd import TwoSidedSVD, WeightedSVD


@dataclass(frozen=True)
class TensorMethod:
    """A method of this kind.

    Args:
        kind: Row of `hf_lowrank.tensors.KINDS`.
        needs: Kinds of statistics it looks at; see `hf_lowrank.statistics.collection.KINDS`.
        ranks: Its ranks where the name says them: then it takes no budget.
    """

    kind: str
    needs: frozenset[str] = frozenset()
    ranks: tuple[int, ...] | None = None


# `tucker-III-d` and `tucker-IV-l-d` are the models of Ren et al. (ICLR 2022): l matrices in the bank, d wide.
TENSOR_METHODS: dict[str, TensorMethod] = {
    "tucker": TensorMethod("tucker"),
    "whitened_tucker": TensorMethod("tucker", needs=frozenset({"input_moment"})),
    "tensor_train": TensorMethod("tensor_train"),
    "whitened_tensor_train": TensorMethod("tensor_train", needs=frozenset({"input_moment"})),
    "shared_tensor_train": TensorMethod("shared_tensor_train"),
    "kronecker_sum": TensorMethod("kronecker_sum"),
    "autoencoder": TensorMethod("autoencoder", needs=TwoSidedSVD.needs),
    "separated_autoencoder": TensorMethod("separated_autoencoder", needs=TwoSidedSVD.needs),
    "offline_autoencoder": TensorMethod("offline_autoencoder"),
    "separated_offline_autoencoder": TensorMethod("separated_offline_autoencoder"),
    "fisher_autoencoder": TensorMethod("fisher_autoencoder", needs=WeightedSVD.needs),
    "nonlinear_autoencoder": TensorMethod("nonlinear_autoencoder"),
    "separated_nonlinear_autoencoder": TensorMethod("separated_nonlinear_autoencoder"),
    "tucker-III-64": TensorMethod("tucker", ranks=(64, 64)),
    "tucker-III-384": TensorMethod("tucker", ranks=(384, 384)),
    "tucker-IV-72-384": TensorMethod("tucker", ranks=(72, 384, 384)),
    "tucker-IV-36-256": TensorMethod("tucker", ranks=(36, 256, 256)),
    "tucker-IV-36-128": TensorMethod("tucker", ranks=(36, 128, 128)),
}
