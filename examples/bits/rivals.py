"""What other people's quantizers make of a sentence encoder: the bytes of its weights, and what it then says."""

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Encode = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
_NAMES = ("input_ids", "attention_mask")
_OPSET = 21


@dataclass(frozen=True)
class Encoder:
    """A model as a file.

    Args:
        encode: Gives the last hidden states (N, T, D) of token ids and their mask, (N, T) each.
        num_bytes: Of the file of the weights.
        folder_bytes: Of that and all that is needed beside it, but for the tokenizer; None where that is nothing else.
    """

    encode: Encode
    num_bytes: int
    folder_bytes: int | None = None


class _Bare(nn.Module):
    """An encoder that takes and gives tensors by place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def in_torch(model: nn.Module) -> Encode:
    """A model of transformers as it is."""
    bare = _Bare(model).eval()
    return lambda inputs: bare(*(inputs[name] for name in _NAMES)).float()


def float16(model: Any, folder: Path) -> Encoder:
    """Saved in half precision; computes in float32, as most CPUs have to."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    saved = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    return Encoder(in_torch(saved), (folder / "model.safetensors").stat().st_size)


def torch_dynamic(model: Any, folder: Path) -> Encoder:
    """Linear layers in 8 bits, their inputs while they run."""
    small = torch.ao.quantization.quantize_dynamic(_Bare(model).eval(), {nn.Linear}, dtype=torch.qint8)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(small.state_dict(), folder / "model.pt")
    return Encoder(in_torch(small.model), (folder / "model.pt").stat().st_size)


def openvino(model: Any, folder: Path, **options: Any) -> Encoder:
    """Weights rounded by NNCF, run by OpenVINO.

    Args:
        options: Of `nncf.compress_weights`, its mode by name.
    """
    import nncf
    import openvino as ov

    example = {name: torch.ones(2, 8, dtype=torch.long) for name in _NAMES}
    graph = ov.convert_model(_Bare(model).eval(), example_input=example)
    mode = nncf.CompressWeightsMode[options.pop("mode")]
    file = folder / "model.xml"
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(nncf.compress_weights(graph, mode=mode, **options), file)
    # In float32: what processors with bfloat16 do by default is no part of the rounding.
    compiled = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    size = file.with_suffix(".bin").stat().st_size
    return Encoder(_by_arrays(lambda arrays: compiled(arrays)[0]), size, size + file.stat().st_size)


def onnx_dynamic(model: Any, folder: Path, per_channel: bool) -> Encoder:
    """Weights in 8 bits, inputs while it runs, by ONNX Runtime."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_onnx(model, folder), folder / "int8.onnx", per_channel=per_channel, weight_type=QuantType.QInt8)
    return _in_onnx(folder / "int8.onnx")


def onnx_4bit(model: Any, folder: Path) -> Encoder:
    """Matrices and tables in 4 bits, groups of 32, by ONNX Runtime."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    kinds = {"op_types_to_quantize": ("MatMul", "Gather"), "quant_axes": (("MatMul", 0), ("Gather", 1))}
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, **kinds)
    quantizer = MatMulNBitsQuantizer(onnx.load(_onnx(model, folder)), algo_config=config, **kinds)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "int4.onnx"))
    return _in_onnx(folder / "int4.onnx")


def _onnx(model: Any, folder: Path) -> Path:
    file = folder / "model.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    example = tuple(torch.ones(2, 8, dtype=torch.long) for _ in _NAMES)
    shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        _Bare(model).eval(), example, file, input_names=_NAMES, dynamic_shapes=(shape, shape), opset_version=_OPSET,
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    return file


def _in_onnx(file: Path) -> Encoder:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    return Encoder(_by_arrays(lambda arrays: session.run(None, arrays)[0]), file.stat().st_size)


def _by_arrays(run: Callable[[dict[str, Any]], Any]) -> Encode:
    return lambda inputs: torch.tensor(run({name: inputs[name].numpy() for name in _NAMES}))


_INT4 = {"mode": "INT4_ASYM", "ratio": 1.0, "all_layers": True}
_SYMMETRIC = _INT4 | {"mode": "INT4_SYM"}
# row -> packages it needs, what makes it of a model and a folder, and options
RIVALS: dict[str, tuple[tuple[str, ...], Callable[..., Encoder], dict[str, Any]]] = {
    "float16": ((), float16, {}),
    "torch dynamic int8, linear layers": ((), torch_dynamic, {}),
    "OpenVINO int8 weights": (("openvino", "nncf"), openvino, {"mode": "INT8_ASYM"}),
    "OpenVINO int4, groups of 32": (("openvino", "nncf"), openvino, _INT4 | {"group_size": 32}),
    "OpenVINO int4, groups of 32, symmetric": (("openvino", "nncf"), openvino, _SYMMETRIC | {"group_size": 32}),
    "OpenVINO int4, groups of 128": (("openvino", "nncf"), openvino, _INT4 | {"group_size": 128}),
    "OpenVINO int4, per channel": (("openvino", "nncf"), openvino, _INT4 | {"group_size": -1}),
    "ONNX Runtime dynamic int8": (("onnxruntime", "onnxscript"), onnx_dynamic, {"per_channel": False}),
    "ONNX Runtime dynamic int8, per channel": (("onnxruntime", "onnxscript"), onnx_dynamic, {"per_channel": True}),
    "ONNX Runtime 4 bits, groups of 32": (("onnxruntime", "onnxscript"), onnx_4bit, {}),
}


def missing(name: str) -> list[str]:
    """Packages a row needs that are not installed."""
    return [package for package in RIVALS[name][0] if importlib.util.find_spec(package) is None]


def make_rival(name: str, model: Any, folder: Path) -> Encoder:
    """The encoder of a row, its files in that folder."""
    _, make, options = RIVALS[name]
    return make(model, folder, **options)
