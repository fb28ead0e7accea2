"""ONNX -> what TensorRT takes: checked source and recipe for the device, or plans built ahead of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from edgead.runtime.engines.tensorrt_build import (
    Backend,
    build_plan,
    check_capabilities,
    check_parses,
    load_backend,
)
from edgead.runtime.engines.tensorrt_plans import PARTS, RECIPE, Recipe, Shapes
from edgead.runtime.errors import DetectorError, EngineError, MissingDependencyError
from edgead.runtime.spec import DetectorSpec, DeviceMatch, Port, canonical_json

_TABLE = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike
    Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace
    DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
    GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool
    Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow
    QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    Relu Reshape Resize ReverseSequence RoiAlign Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid
    Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor"""
OPERATORS = frozenset(_TABLE.split())
"""What the parser of TensorRT 10.3 (JetPack 6) supports: onnx-tensorrt's table of operators as of 9.2, and
DeformConv, the one that its changelog adds up to 10.3."""

_MOVES = frozenset({"Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that move values without computing: a cast before them is the same as one behind."""


@dataclass(frozen=True)
class TensorRtFiles:
    """What was written for one engine.

    Attributes:
        made_with: library and version that made the files that run, or `onnx` for a recipe.
        match: what plans were built for; None for a recipe.
        recipe: whether the device has to build the plans.
        checked_with: the library whose parser took the models; None if none is installed.
    """

    made_with: str
    match: DeviceMatch | None
    recipe: bool
    checked_with: str | None


def tensorrt_from_onnx(
    *,
    trunk: Path,
    head: Path,
    spec: DetectorSpec,
    folder: Path,
    capacity: Mapping[str, int],
    compute_capabilities: Sequence[str] = (),
) -> TensorRtFiles:
    """Write `trunk.onnx`, `head.onnx` and `recipe.json`, and with `compute_capabilities` the plans.

    Args:
        trunk: ONNX whose types are the wanted precision.
        head: ONNX in float32.
        spec: the detector's ports.
        folder: an existing, empty folder.
        capacity: rows that each bank is padded to.
        compute_capabilities: such as '8.6': TensorRT for RTX builds plans ahead of time for these.

    Raises:
        DetectorError: an operator that TensorRT does not support; names the node.
        EngineError: the library failed to build.
        InputError: a compute capability that the library does not know.
        MissingDependencyError: plans are wanted and TensorRT for RTX is not installed.
    """
    backend = _backend(compute_capabilities)
    profiles = {part: shapes_of(part, spec, capacity) for part in PARTS}
    for part, source in (("trunk", trunk), ("head", head)):
        target = folder / f"{part}.onnx"
        _save(prepared(onnx.load(str(source)), part), target, external=_data(source).is_file())
        if backend is not None:
            _parses(backend, target, part)
            if compute_capabilities:
                model: bytes | Path = target if _data(target).is_file() else target.read_bytes()
                plan, _ = build_plan(backend, model, profiles[part], part=part, capabilities=compute_capabilities)
                (folder / f"{part}.plan").write_bytes(plan)
    (folder / RECIPE).write_bytes(canonical_json(Recipe(1, profiles)))
    checked = backend.made_with if backend is not None else None
    if backend is not None and compute_capabilities:
        match = DeviceMatch(backend.library, backend.version, ",".join(compute_capabilities))
        return TensorRtFiles(backend.made_with, match, recipe=False, checked_with=checked)
    return TensorRtFiles(f"onnx {onnx.__version__}", None, recipe=True, checked_with=checked)


def shapes_of(part: str, spec: DetectorSpec, capacity: Mapping[str, int]) -> dict[str, Shapes]:
    """Smallest, usual and largest shape of each input with free sizes.

    The batch goes from 1 to the number of tiles in a frame. Banks have their capacity and nothing else, so
    that shapes never change while knowledge does, and a captured graph stays valid.
    """
    tiles = spec.preprocessing.tiles
    batch = tiles.columns * tiles.rows if tiles is not None else 1
    sizes: dict[str, tuple[int, int, int]] = {"B": (1, batch, batch)}
    for bank in spec.knowledge:
        if bank.name in capacity:
            for symbol in (size for size in bank.shape if isinstance(size, str)):
                sizes[symbol] = (capacity[bank.name],) * 3
    inputs: tuple[Port, ...] = (spec.image,) if part == "trunk" else spec.head_inputs()
    found: dict[str, Shapes] = {}
    for port in inputs:
        if any(isinstance(size, str) for size in port.shape):
            smallest, usual, largest = (
                tuple(sizes.get(size, (1, 256, 4096))[n] if isinstance(size, str) else size for size in port.shape)
                for n in range(3)
            )
            found[port.name] = (smallest, usual, largest)
    return found


def prepared(model: ModelProto, part: str) -> ModelProto:
    """`model` as TensorRT takes it: only operators that it has, and uint8 inputs cast before anything else.

    Raises:
        DetectorError: names the node that cannot be had.
    """
    check_operators(model.graph, part)
    # Noted types of values in between may change below.
    del model.graph.value_info[:]
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            _cast_first(model.graph, value.name, part)
    return model


def check_operators(graph: GraphProto, part: str) -> None:
    """Check every node against `OPERATORS`, those of inner graphs too.

    Raises:
        DetectorError: names the first node that TensorRT does not support.
    """
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise DetectorError(
                wanted=f"a {part} of operators that TensorRT 10.3 supports",
                got=f"{name} (node '{node.name}', which gives '{', '.join(node.output)}')",
                next_step="Write that step of the module with other operations, or take another target.",
            )
        for attribute in node.attribute:
            if attribute.HasField("g"):
                check_operators(attribute.g, part)


def _cast_first(graph: GraphProto, name: str, part: str) -> None:
    """Cast the uint8 input `name` right away: TensorRT has uint8 at the border only.

    Pixels usually take another order first and are cast then. The cast moves up through such steps.
    """
    to: int | None = None
    reached, chain = [name], []
    while reached:
        value = reached.pop()
        for node in graph.node:
            if value not in node.input:
                continue
            if node.op_type == "Cast" and to in (None, _cast_type(node)):
                to = _cast_type(node)
                chain.append(node)
            elif node.op_type in _MOVES and node.input[0] == value:
                reached.append(node.output[0])
            elif node.op_type == "Shape":
                continue  # the batch's size: it is that of the cast pixels too
            else:
                raise DetectorError(
                    wanted=f"a {part} that casts uint8 pixels to one float type before computing with them",
                    got=f"{node.op_type} (node '{node.name}') on uint8",
                    next_step="Begin the module with image.permute(0, 3, 1, 2).float(), or take another target.",
                )
    if to is None:
        return
    for node in chain:
        node.op_type = "Identity"
        del node.attribute[:]
    early = f"{name}.cast"
    for node in graph.node:
        for place, value in enumerate(node.input):
            if value == name:
                node.input[place] = early
    graph.node.insert(0, helper.make_node("Cast", [name], [early], name=early, to=to))


def _cast_type(node: NodeProto) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == "to")


def _backend(compute_capabilities: Sequence[str]) -> Backend | None:
    """The library to build or check with; without compute capabilities it may be absent."""
    if compute_capabilities:
        backend = load_backend("tensorrt_rtx")
        check_capabilities(backend, compute_capabilities)
        return backend
    try:
        return load_backend("tensorrt_rtx")
    except (MissingDependencyError, EngineError):
        return None


def _parses(backend: Backend, path: Path, part: str) -> None:
    try:
        check_parses(backend, path if _data(path).is_file() else path.read_bytes(), part)
    except EngineError as error:
        raise DetectorError(wanted=error.wanted, got=error.got, next_step=error.next_step) from error


def _data(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _save(model: ModelProto, path: Path, *, external: bool) -> None:
    from edgead.exporter.onnx_from_torch import save_onnx

    save_onnx(model, path.parent, path.name, external_bytes=0 if external else 2**31 - 2**20)
