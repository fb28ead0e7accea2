"""A traced graph (`torch.export`) -> ONNX: plain operators, typed, the same bytes every time."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnx import GraphProto, ModelProto
from torch.export import ExportedProgram

from edgead.exporter.contract import check_border
from edgead.exporter.onnx_float16 import to_float16
from edgead.runtime.errors import DetectorError
from edgead.runtime.spec import Port, Precision

OPSET = 18
"""The lowest that torch's exporter writes without a second conversion. ONNX Runtime reads it since 1.14,
TensorRT 10.3 parses opsets 9 to 20, so nothing older is won by going lower."""
IR_VERSION = 8
"""The file format that came with opset 18; nothing written here needs a newer one."""
EXTERNAL_BYTES = 1_500_000_000
"""Weights above this lie beside the model: a protocol buffer ends at 2 GiB."""
_SMALLEST_EXTERNAL = 1024
"""Bytes; smaller tensors (shapes, axes) stay in the model, where parsers want them."""


def onnx_from_torch(
    program: ExportedProgram,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    *,
    part: str = "graph",
    precision: Precision = "fp32",
) -> ModelProto:
    """Convert one graph.

    The same program gives the same bytes: whatever torch notes about source lines is dropped, because it
    holds paths of the machine that exported.

    Args:
        program: positional tensors in, a tuple of tensors out.
        inputs: its inputs in order; their names become those of the ONNX graph.
        outputs: its outputs in order.
        part: 'trunk' or 'head', for messages.
        precision: 'fp16' types weights and arithmetic as float16 and keeps inputs and outputs as they are.

    Raises:
        DetectorError: the graph's border differs from the ports, or an operation has no ONNX form.
    """
    check_border(program, inputs, outputs, part)
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
            if converted is None:
                raise RuntimeError("torch gave no model")
            model = converted.model_proto
        except Exception as error:  # the exporter has no error tree of its own
            raise DetectorError(
                wanted=f"a {part} whose operations ONNX has",
                got=_root(error),
                next_step="Replace that operation in the module; --debug shows where it is.",
            ) from error
        _check_domains(model, part)
        _clean(model, inputs, outputs)
        return to_float16(model) if precision == "fp16" else model


def save_onnx(model: ModelProto, folder: Path, name: str, *, external_bytes: int = EXTERNAL_BYTES) -> list[str]:
    """Check a model and write it into `folder`.

    Args:
        model: what to write; what it notes of values in between is dropped, and its weights are moved out of
            it if they go beside it.
        folder: an existing folder.
        name: the file's name, such as 'trunk.onnx'.
        external_bytes: weights of more than this in all go to `<name>.data`.

    Returns:
        the names of the files written.
    """
    path = folder / name
    # Every engine infers types in between for itself.
    del model.graph.value_info[:]
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > external_bytes:
        onnx.save_model(
            model,
            str(path),
            save_as_external_data=True,
            location=f"{name}.data",
            size_threshold=_SMALLEST_EXTERNAL,
        )
        onnx.checker.check_model(str(path))
        return [name, f"{name}.data"]
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return [name]


def _check_domains(model: ModelProto, part: str) -> None:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise DetectorError(
                wanted=f"a {part} of standard ONNX operators",
                got=f"{node.domain}::{node.op_type} (node '{node.name}')",
                next_step="Write that step of the module with other operations.",
            )


def _clean(model: ModelProto, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    """Drop what differs between two exports or leaks the exporting machine; name the free dimensions."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "edgead", "", ""
    del model.metadata_props[:]
    model.graph.name = "edgead"
    _strip(model.graph)
    for ports, values in ((inputs, model.graph.input), (outputs, model.graph.output)):
        for port, value in zip(ports, values, strict=True):
            dims = value.type.tensor_type.shape.dim
            for size, dim in zip(port.shape, dims, strict=True):
                if isinstance(size, str):
                    dim.dim_param = size
                else:
                    dim.dim_value = size


def _strip(graph: GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    # Types in between are needed for a conversion to float16; torch's symbols for shapes are not stable.
    for value in graph.value_info:
        value.type.tensor_type.ClearField("shape")
    for values in (graph.input, graph.output, graph.value_info, graph.initializer, graph.node):
        for value in values:
            value.doc_string = ""
            del value.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            attribute.doc_string = ""
            if attribute.HasField("g"):
                _strip(attribute.g)


def _root(error: BaseException) -> str:
    """The first line of what went wrong at the bottom of a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


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
