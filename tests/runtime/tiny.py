"""A detector small enough to reason about, as real ONNX graphs that real engines run.

Frames are 16 x 16; a patch is the mean colour of 4 x 4 pixels; its distance is that to the nearest bank row in
RGB; the map repeats each patch's distance over its pixels. So the score of a plain frame can be said in one line.
Two pixels upset it on purpose: a white patch makes NaN, a first red value of 7 makes the engine raise. If it is made
so, a first red value of 13 makes the engine loop for ever in its own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle, golden_files, write_bundle
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.spec import (
    CONTRACT,
    Calibration,
    DetectorSpec,
    EngineRecord,
    KnowledgePort,
    Port,
    Preprocessing,
    fingerprint_of,
)

SIDE = 16
POISON = 7
"""First red value at which the engine raises."""
HANG = 13
"""First red value at which an engine that is made so never comes back."""
GREY = 100
"""Every channel of a good part."""


def detector(preprocessing: Preprocessing | None = None) -> DetectorSpec:
    preprocessing = preprocessing or Preprocessing(SIDE, SIDE)
    features = (Port("patches", "float32", ("B", 16, 3)),)
    return DetectorSpec(
        contract=CONTRACT,
        method="mean-colour",
        preprocessing=preprocessing,
        features=features,
        knowledge=(KnowledgePort("bank.normal", "float32", ("N", 3), rows="bank.normal.rows"),),
        outputs=(
            Port("score", "float32", ("B",)),
            Port("anomaly_map", "float32", ("B", SIDE, SIDE)),
            Port("nearest_row", "int32", ("B", 16)),
        ),
        fingerprint=fingerprint_of(weights=b"\0" * 32, preprocessing=preprocessing, features=features),
    )


def pack(
    rows: Sequence[Sequence[float]] = ((GREY,) * 3,),
    *,
    product: str = "part",
    threshold: float = 30.0,
    map_threshold: float | None = 30.0,
    spec: DetectorSpec | None = None,
    first_id: int = 1,
) -> Pack:
    return new_pack(
        product=product,
        fingerprint=(spec or detector()).fingerprint,
        calibration=Calibration(threshold=threshold, map_threshold=map_threshold),
        arrays={"bank.normal": np.array(rows, np.float32)},
        first_id=first_id,
    )


def frame(level: int = GREY, *, size: tuple[int, int] = (SIDE, SIDE)) -> NDArray[np.uint8]:
    """A plain grey frame; `size` is width and height."""
    return np.full((size[1], size[0], 3), level, np.uint8)


def bundle(
    path: Path,
    packs: Sequence[Pack] | None = None,
    *,
    spec: DetectorSpec | None = None,
    slow: int = 0,
    hangs: bool = False,
    targets: Sequence[str] = ("onnx",),
) -> Bundle:
    """Write the detector as a bundle. `slow` puts so many products of 1400 x 1400 matrices into the trunk, `hangs` a
    loop without an end, which frames whose first red value is `HANG` enter."""
    spec = spec or detector()
    packs = [pack(spec=spec)] if packs is None else packs
    graphs = {"trunk": trunk_graph(slow, hangs), "head": head_graph()}
    records, files = [], {}
    for target in targets:
        name = f"{target}-fp32"
        suffix = {"onnx": "onnx", "openvino": "xml"}[target]
        for part, data in graphs.items():
            if target == "onnx":
                files[f"engines/{name}/{part}.onnx"] = data
            else:
                files |= {f"engines/{name}/{part}.{end}": body for end, body in _openvino(data, path).items()}
        where = f"engines/{name}/{{}}.{suffix}"
        records.append(EngineRecord(name, target, "fp32", where.format("trunk"), where.format("head"), "a test"))
    golden, pictures = golden_files(np.stack([frame(), frame(200)]), [0.0, 100.0], [False, True])
    return write_bundle(
        path,
        name="tiny",
        detector=spec,
        engines=records,
        packs={item.product: item for item in packs},
        golden=golden,
        files=files | pictures,
    )


def _openvino(model: bytes, beside: Path) -> dict[str, bytes]:
    import openvino

    beside.parent.mkdir(parents=True, exist_ok=True)
    source = beside.parent / "convert.onnx"
    source.write_bytes(model)
    openvino.save_model(openvino.convert_model(source), source.with_suffix(".xml"), compress_to_fp16=False)
    return {end: source.with_suffix(f".{end}").read_bytes() for end in ("xml", "bin")}


def trunk_graph(slow: int = 0, hangs: bool = False) -> bytes:
    from onnx import TensorProto, helper

    def ints(name: str, values: Sequence[int]) -> object:
        return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)

    def floats(name: str, values: Sequence[float]) -> object:
        return helper.make_tensor(name, TensorProto.FLOAT, [len(values)], values)

    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        node("AveragePool", ["planes"], ["means"], kernel_shape=[4, 4], strides=[4, 4]),
        node("Reshape", ["means", "flat"], ["columns"]),
        node("Transpose", ["columns"], ["colours"], perm=[0, 2, 1]),
        # x / x is 1 but for white, where it is 0 / 0
        node("Sub", ["colours", "white"], ["room"]),
        node("Div", ["room", "room"], ["one"]),
        node("Mul", ["colours", "one"], ["sane"]),
        # an index outside of its array if the first red value is POISON
        node("Slice", ["pixels", "zeros", "ones"], ["first"]),
        node("Equal", ["first", "poison"], ["poisoned"]),
        node("Cast", ["poisoned"], ["flag"], to=TensorProto.INT64),
        node("Mul", ["flag", "far"], ["index"]),
        node("Gather", ["nothing", "index"], ["trap"]),
        node("ReduceSum", ["trap"], ["trapped"], keepdims=0),
        node("Add", ["sane", "trapped"], ["slow0"]),
    ]
    constants = [
        ints("flat", [0, 3, 16]),
        floats("white", [255.0]),
        ints("zeros", [0, 0, 0, 0]),
        ints("ones", [1, 1, 1, 1]),
        floats("poison", [float(POISON)]),
        ints("far", [99]),
        floats("nothing", [0.0]),
    ]
    last = "slow0"
    if slow:
        constants += [ints("side", [1400, 1400]), ints("all", [0]), floats("tiny", [1e-30]), floats("nil", [0.0])]
        nodes += [
            node("ReduceMean", ["sane"], ["mean"], keepdims=0),
            node("Mul", ["mean", "tiny"], ["small"]),
            node("Expand", ["small", "side"], ["work0"]),
        ]
        for step in range(slow):
            nodes.append(node("MatMul", [f"work{step}", f"work{step}"], [f"work{step + 1}"]))
        nodes += [
            node("ReduceMax", [f"work{slow}"], ["effort"], keepdims=0),
            node("Mul", ["effort", "nil"], ["no_effort"]),
            node("Add", ["slow0", "no_effort"], ["patches_slow"]),
        ]
        last = "patches_slow"
    if hangs:
        value = helper.make_tensor_value_info
        body = helper.make_graph(
            [node("Identity", ["again"], ["still"]), node("Identity", ["was"], ["is"])],
            "for_ever",
            [value("turn", TensorProto.INT64, []), value("again", TensorProto.BOOL, []), value("was", 1, [])],
            [value("still", TensorProto.BOOL, []), value("is", 1, [])],
        )
        constants += [floats("hang", [float(HANG)]), helper.make_tensor("start", TensorProto.FLOAT, [], [0.0])]
        nodes += [
            node("Equal", ["first", "hang"], ["hung"]),
            node("Squeeze", ["hung"], ["for_ever_if"]),
            node("Loop", ["", "for_ever_if", "start"], ["end"], body=body),
            node("Add", [last, "end"], ["patches_late"]),
        ]
        last = "patches_late"
    nodes.append(node("Identity", [last], ["patches"]))
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", SIDE, SIDE, 3])
    patches = helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["B", 16, 3])
    return _model(nodes, [image], [patches], constants)


def head_graph() -> bytes:
    from onnx import TensorProto, helper

    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["patches", "two"], ["p"]),
        node("Sub", ["p", "bank.normal"], ["difference"]),
        node("Mul", ["difference", "difference"], ["squares"]),
        node("ReduceSum", ["squares", "last"], ["sums"], keepdims=0),
        node("Sqrt", ["sums"], ["distances"]),
        # The bank is exact on a CPU; adding its count times nought keeps the input alive.
        node("Cast", ["bank.normal.rows"], ["count"], to=TensorProto.FLOAT),
        node("Mul", ["count", "nought"], ["nothing"]),
        node("ReduceMin", ["distances"], ["least"], axes=[2], keepdims=0),
        node("Add", ["least", "nothing"], ["distance"]),
        node("ArgMin", ["distances"], ["nearest"], axis=2, keepdims=0),
        node("Cast", ["nearest"], ["nearest_row"], to=TensorProto.INT32),
        node("ReduceMax", ["distance"], ["score"], axes=[1], keepdims=0),
        node("Reshape", ["distance", "grid"], ["coarse"]),
        node("Resize", ["coarse", "", "scales"], ["fine"], mode="nearest"),
        node("Squeeze", ["fine", "one"], ["anomaly_map"]),
    ]
    constants = [
        helper.make_tensor("two", TensorProto.INT64, [1], [2]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("last", TensorProto.INT64, [1], [3]),
        helper.make_tensor("nought", TensorProto.FLOAT, [1], [0.0]),
        helper.make_tensor("grid", TensorProto.INT64, [4], [0, 1, 4, 4]),
        helper.make_tensor("scales", TensorProto.FLOAT, [4], [1.0, 1.0, 4.0, 4.0]),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("patches", TensorProto.FLOAT, ["B", 16, 3]),
        value("bank.normal", TensorProto.FLOAT, ["N", 3]),
        value("bank.normal.rows", TensorProto.INT32, [1]),
    ]
    outputs = [
        value("score", TensorProto.FLOAT, ["B"]),
        value("anomaly_map", TensorProto.FLOAT, ["B", SIDE, SIDE]),
        value("nearest_row", TensorProto.INT32, ["B", 16]),
    ]
    return _model(nodes, inputs, outputs, constants)


def _model(nodes: object, inputs: object, outputs: object, constants: object) -> bytes:
    from onnx import checker, helper

    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data
