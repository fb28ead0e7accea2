"""A traced graph (`torch.export`) -> ONNX: plain, typed, deterministic, and no more than TensorRT 10.3 parses."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnx import ModelProto
from torch.export import ExportedProgram

from edgead.runtime.errors import DetectorError
from edgead.runtime.spec import Port, Precision

OPSET = 18
"""The lowest that torch's exporter writes without conversion; TensorRT 10.3 parses opsets 9 to 20."""
IR_VERSION = 9
"""What came with opset 18..20; onnxruntime 1.18 reads up to 10, so older runtimes read it too."""
EXTERNAL_BYTES = 1_500_000_000
"""Weights above this lie beside the model: a protocol buffer ends at 2 GiB."""

TENSORRT_OPERATORS = frozenset(
    """Abs Acos Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast Ceil Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace Div Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater
    GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity If InstanceNormalization
    LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop MatMul Max MaxPool Mean Min
    Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow QuantizeLinear DequantizeLinear Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size
    Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh TopK Transpose Trilu
    Unsqueeze Where Xor""".split()
)
"""ONNX operators that the parser of TensorRT 10.3 supports (its operator list), without the exotic ones."""


def onnx_from_torch(
    program: ExportedProgram,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    *,
    precision: Precision = "fp32",
) -> ModelProto:
    """Convert one graph.

    The same program gives the same bytes: names of values come from the graph, and whatever torch notes about
    source lines is dropped, because it holds paths of the machine that exported.

    Args:
        program: positional tensors in, a tuple of tensors out.
        inputs: its inputs in order; their names become those of the ONNX graph.
        outputs: its outputs in order.
        precision: 'fp16' types weights and arithmetic as float16 and keeps inputs and outputs as they are.

    Raises:
        DetectorError: an operator has no ONNX form, or one that TensorRT 10.3 does not parse.
    """
    with _quiet():
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[port.name for port in inputs],
                output_names=[port.name for port in outputs],
                external_data=False,
                optimize=True,
            )
        except Exception as error:  # the exporter has no error tree of its own
            raise DetectorError(
                wanted="a graph of operators that ONNX has",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                next_step="Replace that operation in the module; --debug shows where it is.",
            ) from error
    if converted is None:
        raise DetectorError(wanted="an ONNX model from torch", got="none", next_step="Run with --debug.")
    model = converted.model_proto
    _check_operators(model)
    if precision == "fp16":
        model = _half(model)
    _clean(model, inputs, outputs)
    return model


def save_onnx(
    model: ModelProto, folder: Path, name: str, *, external_bytes: int = EXTERNAL_BYTES
) -> list[str]:
    """Write a model into `folder` and check it; returns the names of the files written.

    Weights of more than `external_bytes` in all go to `<name>.data`, so no model is too large.
    """
    path = folder / name
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > external_bytes:
        onnx.save_model(
            model, str(path), save_as_external_data=True, location=f"{name}.data", size_threshold=1024
        )
        onnx.checker.check_model(str(path))
        return [name, f"{name}.data"]
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return [name]


def _check_operators(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in TENSORRT_OPERATORS:
            raise DetectorError(
                wanted="operators that TensorRT 10.3 parses",
                got=f"{node.domain + '::' if node.domain else ''}{node.op_type} (node '{node.name}')",
                next_step="Write that step of the module with other operations.",
            )


def _half(model: ModelProto) -> ModelProto:
    """The model with float16 weights and arithmetic; borders keep their types."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        half: ModelProto = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=False)
    return half


def _clean(model: ModelProto, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    """Drop what differs between two exports or leaks the exporting machine; name the free dimensions."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "edgead", "", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "edgead", ""
    for values in (graph.input, graph.output, graph.initializer, graph.node):
        for value in values:
            value.doc_string = ""
            del value.metadata_props[:]
    del graph.metadata_props[:]
    # Shapes in between are inferred by every engine; torch's symbols for them are not stable.
    del graph.value_info[:]
    for ports, values in ((inputs, graph.input), (outputs, graph.output)):
        for port, value in zip(ports, values, strict=True):
            dims = value.type.tensor_type.shape.dim
            for size, dim in zip(port.shape, dims, strict=True):
                if isinstance(size, str):
                    dim.dim_param = size
                else:
                    dim.dim_value = size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's notes to developers away from edgead's users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
