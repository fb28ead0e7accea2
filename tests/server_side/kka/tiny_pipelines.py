"""Pipelines of `diffusers` from configurations, a few thousand weights each, saved like real ones."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def _tokenizer(folder: Path) -> Any:
    """Letters, each alone and as the end of a word: every caption has tokens."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)


def save_pipeline(folder: Path, *, inpainting: bool = False, wide: bool = False, spoiled: str = "") -> Path:
    """Write a tiny Stable Diffusion.

    Args:
        folder: where to.
        inpainting: as an inpainting pipeline.
        wide: with the nine input channels of a network that was trained to inpaint.
        spoiled: 'black' or 'nan': what its decoder gives.
    """
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder.parent / f"{folder.name}-tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=9 if wide else 4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    )
    if spoiled:
        last = vae.decoder.conv_out
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, float("nan") if spoiled == "nan" else -1.0)
    make = StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline
    pipeline = make(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(num_train_timesteps=100, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
