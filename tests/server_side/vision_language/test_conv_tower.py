"""MobileCLIP's towers: the head of the model over cells and windows of its last map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgead.runtime.errors import BackboneError
from edgead.server_side.vision_language import VisionLanguageModel, VisionTower, load_model, tower_of


def enliven(module: nn.Module) -> None:
    """Statistics and layer scales as after training; fresh ones would hide mistakes in the fusion of branches."""
    generator = torch.Generator().manual_seed(4)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        elif name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith("gamma"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5)


@pytest.fixture(scope="module")
def mobile() -> VisionLanguageModel:
    model = load_model("MobileCLIP-S1", "random:0")
    enliven(model.module.visual)  # type: ignore[arg-type]
    return model


@pytest.fixture(scope="module")
def tower(mobile: VisionLanguageModel) -> VisionTower:
    return tower_of(mobile)


@pytest.fixture(scope="module")
def image(mobile: VisionLanguageModel) -> torch.Tensor:
    return torch.randint(0, 256, (2, *mobile.size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def test_the_pooled_embedding_is_open_clips(
    mobile: VisionLanguageModel, tower: VisionTower, image: torch.Tensor
) -> None:
    module: Any = mobile.module
    with torch.inference_mode():
        # MobileCLIP takes plain pixels: mean 0, deviation 1.
        wanted = module.encode_image(image.permute(0, 3, 1, 2).float() / 255.0)
        got = tower(image).pooled
    assert wanted.std() > 1e-3
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_windows_and_cells_are_means_of_the_last_map_through_the_models_head(
    mobile: VisionLanguageModel, tower: VisionTower, image: torch.Tensor
) -> None:
    visual: Any = mobile.module.visual
    with torch.inference_mode():
        output = tower(image, windows=(2, 8), taps=(4, 1), values=True)
        last, stages = visual.trunk.forward_intermediates(tower_pixels(image))
        head = visual.trunk.head.fc
        for y, x in ((0, 0), (3, 6), (6, 2)):
            window = head(last[:, :, y : y + 2, x : x + 2].mean(dim=(2, 3)))
            torch.testing.assert_close(output.windows[0][:, y * 7 + x], window, atol=1e-4, rtol=0)
            torch.testing.assert_close(output.patches[:, y * 8 + x], head(last[:, :, y, x]), atol=1e-4, rtol=0)
    torch.testing.assert_close(output.windows[1][:, 0], output.pooled, atol=1e-5, rtol=0)
    assert output.values is not None
    torch.testing.assert_close(output.values.mean(dim=1), output.pooled, atol=1e-5, rtol=0)
    for got, stage, level in zip(output.layers, (stages[3], stages[0]), (4, 1), strict=True):
        assert got.shape[1:] == (tower.layer_grids[level - 1][0] ** 2, tower.layer_widths[level - 1])
        difference = (got - stage.flatten(2).transpose(1, 2)).abs().max()
        assert difference < 1e-4 * stage.abs().max()
    assert tower.layer_grids == ((64, 64), (32, 32), (16, 16), (8, 8))
    assert (tower.grid, tower.embed_dim, tower.width, tower.depth) == ((8, 8), 512, 512, 4)


def test_engines_agree_with_torch_for_any_batch(
    tower: VisionTower, agree_in_engines: Callable[[VisionTower, Sequence[int], Sequence[int], bool], None]
) -> None:
    agree_in_engines(tower, (2, 3), (2, 3), True)


def test_the_tower_leaves_the_model_as_it_was(mobile: VisionLanguageModel) -> None:
    before = {key: tensor.clone() for key, tensor in mobile.module.state_dict().items()}
    tower_of(mobile)
    after = mobile.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_head_that_is_not_linear_is_applied_after_the_mean(tiny_config: Callable[..., Path]) -> None:
    vision = {"timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    model = load_model(str(tiny_config("convnext", vision=vision)), "random:0")
    tower = tower_of(model)
    module: Any = model.module
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = tower.encode(noise, (2,), (), False)
        torch.testing.assert_close(output.pooled, module.encode_image(noise), atol=1e-4, rtol=0)
    assert output.windows[0].shape == (2, 1, 48)
    torch.testing.assert_close(output.windows[0][:, 0], output.pooled, atol=1e-4, rtol=0)


def test_a_tower_of_timm_with_another_pooling_is_refused(tiny_config: Callable[..., Path]) -> None:
    vision = {"timm_model_name": "resnet18", "timm_pool": "rot_attn", "timm_proj": "", "image_size": 224}
    with pytest.raises(BackboneError, match="an image tower that edgead can take apart"):
        tower_of(load_model(str(tiny_config("rot", vision=vision)), "random:0"))


def tower_pixels(image: torch.Tensor) -> torch.Tensor:
    return image.permute(0, 3, 1, 2).float() / 255.0
