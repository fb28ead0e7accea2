"""ONNX becomes what TensorRT takes; plans are built here for real, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from edgead.detector_file import FittedDetector
from edgead.exporter.export import export_bundle
from edgead.exporter.onnx_from_torch import onnx_from_torch, save_onnx
from edgead.exporter.tensorrt_from_onnx import check_operators, prepared, shapes_of
from edgead.runtime.bundle import open_bundle
from edgead.runtime.engines.tensorrt_build import build_plan, check_capabilities, check_parses, load_backend
from edgead.runtime.engines.tensorrt_plans import read_recipe
from edgead.runtime.errors import DetectorError, EngineError, InputError
from edgead.runtime.spec import Preprocessing, Tiling

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds plans without a GPU")


@pytest.fixture(scope="module")
def trunk(bank: FittedDetector) -> onnx.ModelProto:
    return onnx_from_torch(bank.trunk, (bank.spec.image,), bank.spec.features, part="trunk")


def test_plans_are_built_ahead_of_time_for_two_generations_of_gpus(bank: FittedDetector, tmp_path: Path) -> None:
    bundle = export_bundle(bank, tmp_path / "bundle", ["tensorrt", "tensorrt:fp16"], compute_capabilities=["8.6,8.9"])
    for engine in bundle.manifest.engines:
        assert engine.match is not None
        assert engine.match.library == "tensorrt_rtx"
        assert engine.match.library_version == rtx.__version__
        assert engine.match.compute_capability == "8.6,8.9"
        assert engine.match.gpu is None
        assert not engine.recipe
        assert engine.capacity["bank.normal"] >= len(bank.pack.arrays["bank.normal"])
        for path in (engine.trunk, engine.head):
            assert path.endswith(".plan")
            assert len(bundle.read(path)) > 10_000
        # The source goes along, so that a machine with another GPU can build its own.
        assert read_recipe(bundle, engine).profiles["head"]["bank.normal"][0][0] >= 1024
    full, half = bundle.manifest.engines
    assert len(bundle.read(half.trunk)) != len(bundle.read(full.trunk))


def test_without_compute_capabilities_the_device_gets_source_and_recipe(
    tensorrt_bundle: Path, bank: FittedDetector
) -> None:
    bundle = open_bundle(tensorrt_bundle)
    engine = bundle.engine("tensorrt:fp16")
    assert engine.recipe
    assert engine.match is None
    assert engine.parity is None
    trunk = onnx.load_from_string(bundle.read(engine.trunk))
    assert {tensor.data_type for tensor in trunk.graph.initializer if len(tensor.dims) == 4} == {TensorProto.FLOAT16}
    head = onnx.load_from_string(bundle.read(engine.head))
    assert TensorProto.FLOAT16 not in {tensor.data_type for tensor in head.graph.initializer}
    recipe = read_recipe(bundle, engine)
    rows = engine.capacity["bank.normal"]
    assert recipe.profiles["head"]["bank.normal"] == tuple([(rows, bank.spec.features[0].shape[-1])] * 3)


def test_the_source_of_a_plan_is_held_against_torch_even_where_no_gpu_is(tensorrt_bundle: Path) -> None:
    report = msgspec.json.decode(open_bundle(tensorrt_bundle).read("parity.json"))
    source = report["engines"]["tensorrt-fp16"]["source"]
    assert 0 < source["parity"]["map"] < 1e-2
    # Banks are padded to the capacity there, and padded rows change nothing.
    assert source["head"]["map"] < 1e-5


def test_pixels_are_cast_before_anything_else_and_the_answer_stays(
    trunk: onnx.ModelProto, bank: FittedDetector
) -> None:
    def run(model: onnx.ModelProto) -> np.ndarray:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        answer: np.ndarray = session.run(None, {"image": bank.golden[:2]})[0]
        return answer

    before = run(trunk)
    copy = onnx.ModelProto()
    copy.CopyFrom(trunk)
    ready = prepared(copy, "trunk")
    users = [node.op_type for node in ready.graph.node if "image" in node.input]
    assert users == ["Cast"]
    assert np.array_equal(run(ready), before)
    # As it came from torch, the parser refuses it: uint8 exists at the border only.
    backend = load_backend("tensorrt_rtx")
    check_parses(backend, ready.SerializeToString(), "trunk")
    with pytest.raises(EngineError, match=r"Transpose .node"):
        check_parses(backend, trunk.SerializeToString(), "trunk")


def test_arithmetic_on_uint8_is_refused_by_name(make_detector: Callable[..., FittedDetector]) -> None:
    class Inverted(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor]:
            pixels = torch.maximum(image, image.flip(2)).float().mean((1, 2))
            return (pixels.unsqueeze(1).expand(-1, 4, -1).contiguous(),)

    detector = make_detector(trunk=Inverted())
    model = onnx_from_torch(detector.trunk, (detector.spec.image,), detector.spec.features, part="trunk")
    with pytest.raises(DetectorError, match=r"casts uint8 pixels .* got Max"):
        prepared(model, "trunk")


def test_an_operator_that_tensorrt_lacks_is_named_with_its_node(
    make_detector: Callable[..., FittedDetector], tmp_path: Path
) -> None:
    class Volume(nn.Module):
        def forward(self, patches: Tensor, normal: Tensor, rows: Tensor) -> tuple[Tensor]:
            square = patches[:, :3] + 0 * normal.sum() + 0 * rows.sum()
            return (torch.linalg.det(square),)

    detector = make_detector(head=Volume())
    with pytest.raises(DetectorError, match=r"TensorRT 10.3 supports; got Det .node '\w+', which gives 'score'"):
        export_bundle(detector, tmp_path / "bundle", ["tensorrt"])
    assert not list(tmp_path.iterdir())


def test_operators_inside_branches_are_checked_too() -> None:
    inner = onnx.helper.make_graph([onnx.helper.make_node("Unique", ["x"], ["y"], name="deep")], "g", [], [])
    node = onnx.helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    with pytest.raises(DetectorError, match=r"Unique .node 'deep'"):
        check_operators(onnx.helper.make_graph([node], "outer", [], []), "head")


def test_the_batch_goes_up_to_the_tiles_of_a_frame(bank: FittedDetector) -> None:
    tiled = msgspec.structs.replace(bank.spec, preprocessing=Preprocessing(64, 64, tiles=Tiling(columns=3, rows=2)))
    capacity = {"bank.normal": 2048, "bank.anomalous": 1024}
    assert [shape[0] for shape in shapes_of("trunk", tiled, capacity)["image"]] == [1, 6, 6]
    head = shapes_of("head", tiled, capacity)
    assert [shape[0] for shape in head["bank.anomalous"]] == [1024] * 3
    assert "anomalous.weight" not in head


def test_an_unknown_compute_capability_is_answered_with_the_known_ones(colours: FittedDetector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"8\.6, 8\.9.* got '9\.9'"):
        export_bundle(colours, tmp_path / "bundle", ["tensorrt"], compute_capabilities=["9.9"])
    with pytest.raises(InputError):
        check_capabilities(load_backend("tensorrt_rtx"), ["8"])


def test_weights_beside_the_model_reach_the_plan(trunk: onnx.ModelProto, tmp_path: Path) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(trunk)
    save_onnx(prepared(copy, "trunk"), tmp_path, "trunk.onnx", external_bytes=1000)
    assert (tmp_path / "trunk.onnx.data").is_file()
    size = tuple(dim.dim_value for dim in trunk.graph.input[0].type.tensor_type.shape.dim)[1:]
    shape = (1, *size)
    plan, cache = build_plan(
        load_backend("tensorrt_rtx"),
        tmp_path / "trunk.onnx",
        {"image": (shape, shape, shape)},
        part="trunk",
        capabilities=["12.0"],
    )
    assert len(plan) > 10_000
    assert cache == b""
