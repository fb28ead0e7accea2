"""Backbones by name, the embedded network's budget, and the errors on the way."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from edgead.runtime.errors import BackboneError
from edgead.server_side.backbones import (
    EmbeddedBackbone,
    embedded_card,
    list_backbones,
    load_backbone,
    multiply_adds,
)
from edgead.server_side.backbones.cli import backbone as command
from edgead.server_side.backbones.embedded import EMBEDDED_WEIGHTS
from edgead.server_side.backbones.inverted_residuals import EXPANSIONS

REPOSITORY = Path(__file__).resolve().parents[2]
TEACHER = REPOSITORY.parent / "shared" / "weights" / "mobilenet_v2_1.0_224_quant.tflite"
needs_teacher = pytest.mark.skipif(not TEACHER.is_file(), reason="the teacher's file is not beside the project")


def picture(height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_the_default_backbone_is_embedded_and_needs_no_download() -> None:
    model = load_backbone()
    assert (model.name, model.strides) == ("embedded", (8, 16))
    maps = model(picture(96, 64))
    assert [tuple(m.shape) for m in maps] == [(1, model.channels[0], 12, 8), (1, model.channels[1], 6, 4)]
    assert all(torch.isfinite(m).all() for m in maps)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_the_embedded_backbone_keeps_its_budget() -> None:
    model = load_backbone()
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert multiply_adds(model, 256, 256) <= 350_000_000
    assert EMBEDDED_WEIGHTS.stat().st_size <= 4_000_000
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_multiply_adds_are_counted_as_by_hand() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    assert multiply_adds(layers, 32, 32) == 16 * 16 * (3 * 9 * 8 + 9 * 8)


def test_the_card_describes_the_packaged_weights() -> None:
    card = embedded_card()
    model = load_backbone()
    assert card["weights"]["sha256"] == hashlib.sha256(EMBEDDED_WEIGHTS.read_bytes()).hexdigest()
    assert card["architecture"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["architecture"]["multiply_adds_256x256"] == multiply_adds(model)
    assert card["teacher"]["licence"] == "Apache-2.0"
    assert card["validation"]["scores"]


def test_maps_do_not_depend_on_the_rest_of_the_batch() -> None:
    model = load_backbone()
    one, two = picture(seed=1), picture(seed=2)
    for alone, together in zip(model(one), model(torch.cat([one, two])), strict=True):
        torch.testing.assert_close(alone, together[:1], rtol=1e-4, atol=1e-4)


def test_cells_of_both_maps_are_centred_on_their_pixels() -> None:
    """A mirrored picture gives nearly the mirrored maps: no drift to one side."""
    model = load_backbone()
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((1, 3, 16, 16), dtype=np.float32))
    image = nn.functional.interpolate(coarse, (256, 256), mode="bilinear")
    for straight, mirrored in zip(model(image), model(image.flip(3)), strict=True):
        difference = (straight - mirrored.flip(3)).square().mean()
        assert difference < 0.5 * straight.var(dim=(2, 3)).mean()


def test_the_embedded_backbone_passes_torch_export_unchanged() -> None:
    model = load_backbone()
    image = picture()
    program = torch.export.export(model, (image,))
    for traced, plain in zip(program.module()(image), model(image), strict=True):
        torch.testing.assert_close(traced, plain)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "norm" in name or ".pad" in name]


def test_random_weights_depend_on_the_seed_alone() -> None:
    image = picture()
    first, again, other = (load_backbone("random", seed=seed)(image)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert load_backbone("random").name == "random"


def test_layers_of_the_embedded_backbone_are_its_strides() -> None:
    model = load_backbone(layers=("8",))
    assert model.strides == (8,)
    assert len(model(picture())) == 1
    with pytest.raises(BackboneError, match="by stride"):
        load_backbone(layers=(4,))
    with pytest.raises(BackboneError, match="numbers as layers"):
        load_backbone(layers=("layer2",))


@pytest.mark.parametrize(("name", "near"), [("embeded", "embedded"), ("resnet19", "resnet18")])
def test_an_unknown_name_is_refused_with_near_ones(name: str, near: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(BackboneError) as caught:
        load_backbone(name)
    assert f"'{name}'" in caught.value.got
    assert near in caught.value.next_step


def test_missing_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no such file"):
        load_backbone(weights=tmp_path / "absent.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not tensors")
    with pytest.raises(BackboneError, match="does not load"):
        load_backbone(weights=damaged)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(BackboneError, match="does not fit"):
        load_backbone(weights=foreign)


def test_pickled_code_in_a_weights_file_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (trap,))  # type: ignore[return-value]

    file = tmp_path / "weights.pth"
    torch.save({"state_dict": Payload()}, file)
    with pytest.raises(BackboneError, match="without pickled code"):
        load_backbone(weights=file)
    assert not trap.exists()


def test_weights_of_plain_tensors_load_from_pth_too(tmp_path: Path) -> None:
    source = load_backbone("random", seed=5)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": source.state_dict()}, file)
    image = picture()
    assert torch.equal(load_backbone(weights=file)(image)[1], source(image)[1])


def test_a_timm_model_gives_the_maps_of_strides_8_and_16_by_default() -> None:
    pytest.importorskip("timm")
    model = load_backbone("resnet18:random", seed=1)
    assert (model.strides, model.channels) == ((8, 16), (128, 256))
    assert [m.shape[1:] for m in model(picture())] == [(128, 8, 8), (256, 4, 4)]
    again = load_backbone("timm:resnet18:random", seed=1)
    assert torch.equal(model(picture())[0], again(picture())[0])
    assert load_backbone("resnet18:random", layers=("layer1", 4)).strides == (4, 32)
    with pytest.raises(BackboneError, match="layer1"):
        load_backbone("resnet18:random", layers=("layer9",))


def test_timm_weights_load_from_a_local_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    whole = timm.create_model("resnet18", pretrained=False)
    file = tmp_path / "resnet18.safetensors"
    save_file(whole.state_dict(), file)
    model = load_backbone("resnet18", weights=file)
    state = dict(model.named_parameters())
    assert torch.equal(state["model.layer2.0.conv1.weight"], whole.layer2[0].conv1.weight)
    with pytest.raises(BackboneError, match="does not fit"):
        load_backbone("resnet34", weights=file)


def test_without_a_network_pretrained_weights_fail_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("edgead.server_side.backbones.timm_backbone._cached", lambda _: None)
    with pytest.raises(BackboneError) as caught:
        load_backbone("resnet18")
    assert "timm/resnet18" in caught.value.wanted
    assert "--backbone-weights FILE" in caught.value.next_step


def test_importing_the_package_loads_neither_timm_nor_openvino() -> None:
    code = (
        "import sys, edgead.server_side.backbones\n"
        "sys.exit(' '.join({'timm', 'openvino', 'huggingface_hub'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_teacher
def test_the_teacher_agrees_with_openvino_on_its_inner_layers() -> None:
    openvino = pytest.importorskip("openvino")
    model = load_backbone("mobilenet_v2_tflite", TEACHER)
    assert (model.strides, model.channels) == ((8, 16), (192, 576))
    graph = openvino.Core().read_model(TEACHER)
    clamps = [node for node in graph.get_ordered_ops() if node.get_type_name() == "Clamp"]
    # Block 6 keeps its grid up to its strided depthwise layer, so its expansion is the last of this shape;
    # blocks 11 and 12 have the shape of block 13's expansion too, which again is the last.
    wanted = [
        [node for node in clamps if list(node.output(0).shape) == shape][-1]
        for shape in ([1, 192, 28, 28], [1, 576, 14, 14])
    ]
    graph.add_outputs([node.output(0) for node in wanted])
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (28, 28, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    run = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = list(run(image[None]).values())[-2:]
    maps = model(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    for theirs, mine in zip(results, maps, strict=True):
        a, b = theirs.ravel(), mine.numpy().ravel()
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98


def test_the_teacher_without_its_file_or_with_another_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(BackboneError, match="no weights"):
        load_backbone("mobilenet_v2_tflite")
    other = tmp_path / "other.tflite"
    other.write_bytes(b"0" * 100)
    with pytest.raises(BackboneError, match="TensorFlow Lite"):
        load_backbone("mobilenet_v2_tflite", other)
    with pytest.raises(BackboneError, match="blocks"):
        load_backbone("mobilenet_v2_tflite", other, layers=(2,))


def test_names_are_listed_and_shown() -> None:
    assert {"embedded", "random", "mobilenet_v2_tflite"} <= set(list_backbones())
    shown = CliRunner().invoke(command, ["show"])
    assert shown.exit_code == 0, shown.output
    assert embedded_card()["weights"]["sha256"] in shown.output
    assert "mobilenet_v2_tflite" in shown.output
    as_json = CliRunner().invoke(command, ["show", "--json"])
    assert as_json.output.startswith("{")


def test_taps_are_where_the_trunk_says() -> None:
    model = EmbeddedBackbone()
    assert all(stride in {stride for stride, _ in EXPANSIONS.values()} for stride in model.strides)
