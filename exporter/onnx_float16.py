"""An ONNX graph typed in float16, border in float32: strongly typed engines take their precision from it."""

from __future__ import annotations

import logging

from onnx import GraphProto, ModelProto, NodeProto

FULL_PRECISION = frozenset(
    {
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LpNormalization",
        "Pow",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
    }
)
"""Operators that stay in float32: sums over many values leave float16's range (65,504) or lose its 11 bits."""


def to_float16(model: ModelProto) -> ModelProto:
    """`model` with weights and arithmetic in float16; inputs and outputs keep their types.

    Uint8 pixels are exact in float16, so colour scaling inside the graph loses nothing before its first
    rounding. Values beyond float16's range are clamped to it. `model` itself is changed and of no use
    afterwards.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    # The conversion tells float32 values from others by the graph's value_info; a model of more than
    # 2 GiB cannot be sent through ONNX's own inference, and torch's exporter has noted the types already.
    noted = {value.name for values in (model.graph.value_info, model.graph.output) for value in values}
    known = all(name in noted for node in model.graph.node for name in node.output if name)
    logger = logging.getLogger("onnxruntime")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        half: ModelProto = convert_float_to_float16(
            model,
            keep_io_types=True,
            disable_shape_infer=known,
            op_block_list=sorted(FULL_PRECISION | set(DEFAULT_OP_BLOCK_LIST)),
        )
    finally:
        logger.setLevel(level)
    _sort(half.graph)
    return half


def _sort(graph: GraphProto) -> None:
    """Put nodes behind those that they need, as ONNX asks; the conversion appends its casts at the end."""
    waiting: list[NodeProto] = list(graph.node)
    ready = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    ordered: list[NodeProto] = []
    while waiting:
        later = []
        for node in waiting:
            if all(name in ready for name in node.input):
                ordered.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ValueError(f"node '{later[0].name}' needs a value that nothing gives")
        waiting = later
    del graph.node[:]
    graph.node.extend(ordered)
