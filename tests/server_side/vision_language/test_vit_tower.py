"""The written-out transformer gives what open_clip's own modules give, window by window and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgead.runtime.errors import BackboneError
from edgead.server_side.vision_language import (
    VisionLanguageModel,
    VisionTower,
    load_model,
    tower_of,
    window_patches,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "class-token": {},
    "quick-gelu": {"quick_gelu": True},
    "custom-text": {"custom_text": True},
    "mean-pool": {"vision": {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True}},
    "mean-pool-norm-first": {"vision": {"pool_type": "avg"}},
    "layer-scale": {"vision": {"ls_init_value": 0.3}},
    "oblong": {"vision": {"image_size": [64, 96]}},
}


def pixels_of(tower: VisionTower, image: Tensor) -> Tensor:
    return (image.permute(0, 3, 1, 2).float() / 255.0 - tower.mean) / tower.deviation


def image_for(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def slow_windows(model: VisionLanguageModel, pixels: Tensor, scale: int) -> Tensor:
    """WinCLIP's windows one by one, through open_clip's modules alone: [B, W, E]."""
    module: Any = model.module
    visual = module.visual
    found = []
    with torch.inference_mode():
        tokens = visual._embeds(pixels)
        for patches in window_patches(visual.grid_size, scale):
            chosen = tokens[:, [0, *(patch + 1 for patch in patches)]]
            pooled, _ = visual._pool(visual.transformer(chosen))
            found.append(pooled @ visual.proj)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pooled_embedding_and_windows_are_open_clips(variant: str, tiny_config: Callable[..., Path]) -> None:
    model = load_model(str(tiny_config(variant, **VARIANTS[variant])), "random:2")
    tower = tower_of(model)
    image = image_for(model.size)
    module: Any = model.module
    with torch.inference_mode():
        output = tower(image, windows=(1, 2, 3))
        wanted = module.encode_image(pixels_of(tower, image))
    torch.testing.assert_close(output.pooled, wanted, atol=1e-5, rtol=0)
    for scale, got in zip((1, 2, 3), output.windows, strict=True):
        assert got.shape[1] == tower.window_count(scale)
        torch.testing.assert_close(got, slow_windows(model, pixels_of(tower, image), scale), atol=1e-5, rtol=0)


def test_patches_are_those_that_open_clip_gives_beside_the_pooled_embedding(tiny_config: Callable[..., Path]) -> None:
    model = load_model(str(tiny_config("with-tokens", vision={"output_tokens": True})), "random:2")
    visual: Any = model.module.visual
    image = image_for(model.size)
    tower = tower_of(load_model(str(tiny_config("tiny")), "random:2"))
    with torch.inference_mode():
        _, wanted = visual(pixels_of(tower, image))
        torch.testing.assert_close(tower(image).patches, wanted, atol=1e-5, rtol=0)


def test_tapped_layers_are_the_residual_stream_without_the_class_token(tiny_model: VisionLanguageModel) -> None:
    tower = tower_of(tiny_model)
    image = image_for(tiny_model.size)
    visual: Any = tiny_model.module.visual
    with torch.inference_mode():
        got = tower(image, taps=(3, 1)).layers
        tokens = visual._embeds(pixels_of(tower, image))
        wanted = []
        for block in visual.transformer.resblocks:
            tokens = block(tokens)
            wanted.append(tokens[:, 1:])
    torch.testing.assert_close(got[0], wanted[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1], wanted[0], atol=1e-5, rtol=0)
    assert tower.layer_grids == ((4, 4),) * 3
    assert tower.layer_widths == (64,) * 3


def test_values_are_maskclips_in_float64(tiny_model: VisionLanguageModel) -> None:
    tower = tower_of(tiny_model)
    image = image_for(tiny_model.size)
    visual: Any = tiny_model.module.visual
    with torch.inference_mode():
        got = tower(image, values=True).values
        tokens = visual._embeds(pixels_of(tower, image))
        for block in visual.transformer.resblocks[:-1]:
            tokens = block(tokens)
    assert got is not None
    last = visual.transformer.resblocks[-1]

    def array(tensor: Tensor) -> Any:
        return tensor.detach().double().numpy()

    def norm(x: Any, layer: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps)
        return centred / spread * array(layer.weight) + array(layer.bias)

    value = norm(array(tokens[:, 1:]), last.ln_1) @ array(last.attn.in_proj_weight)[128:].T
    value = value + array(last.attn.in_proj_bias)[128:]
    value = value @ array(last.attn.out_proj.weight).T + array(last.attn.out_proj.bias)
    np.testing.assert_allclose(got.numpy(), norm(value, visual.ln_post) @ array(visual.proj), atol=1e-5)


@pytest.mark.parametrize("variant", ["class-token", "mean-pool", "quick-gelu"])
def test_engines_agree_with_torch_for_any_batch(
    variant: str,
    tiny_config: Callable[..., Path],
    agree_in_engines: Callable[[VisionTower, Sequence[int], Sequence[int], bool], None],
) -> None:
    tower = tower_of(load_model(str(tiny_config(variant, **VARIANTS[variant])), "random:3"))
    agree_in_engines(tower, (2, 3), (1, 3), True)


def test_winclips_own_architecture_gives_its_225_patches() -> None:
    model = load_model("ViT-B-16-plus-240", "random:0")
    tower = tower_of(model)
    image = image_for(model.size, 1)
    module: Any = model.module
    with torch.inference_mode():
        output = tower(image, windows=(2, 3), taps=(6,))
        wanted = module.encode_image(pixels_of(tower, image))
    torch.testing.assert_close(output.pooled, wanted, atol=1e-5, rtol=0)
    assert output.patches.shape == (1, 225, 896)
    assert [window.shape for window in output.windows] == [(1, 196, 640), (1, 169, 640)]
    assert output.layers[0].shape == (1, 225, 896)


def test_the_tower_leaves_the_model_as_it_was(tiny_model: VisionLanguageModel) -> None:
    before = {key: tensor.clone() for key, tensor in tiny_model.module.state_dict().items()}
    tower_of(tiny_model)
    after = tiny_model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("windows", "taps"), [((5,), ()), ((0,), ()), ((), (0,)), ((), (4,))])
def test_windows_and_layers_that_are_not_there_are_refused(
    tiny_model: VisionLanguageModel, windows: Sequence[int], taps: Sequence[int]
) -> None:
    with pytest.raises(BackboneError, match=r"windows of 1 to 4|layers 1 to 3"):
        tower_of(tiny_model)(image_for(tiny_model.size), windows=windows, taps=taps)


@pytest.mark.parametrize(
    ("vision", "got"),
    [({"attentional_pool": True, "attn_pooler_heads": 4}, "attentional pool"), ({"qk_norm": True}, "custom attention")],
)
def test_towers_of_another_kind_are_refused_with_those_that_work(
    tiny_config: Callable[..., Path], vision: dict[str, Any], got: str
) -> None:
    model = load_model(str(tiny_config("other", vision=vision)), "random:0")
    with pytest.raises(BackboneError, match=rf"MobileCLIP-S1.*{got}"):
        tower_of(model)
