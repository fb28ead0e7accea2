"""The card of embedded-backbone weights: what they are, how they were made, how they scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from edgead.runtime.files import write_file
from edgead.server_side.backbones.distillation import Distillation
from edgead.server_side.backbones.embedded import DOWN_KERNEL, TAPS, load_embedded, multiply_adds


def make_card(run: Distillation, weights: Path, teacher: Path, command: str) -> dict[str, Any]:
    """Describe the weights that `run` wrote to `weights`.

    Args:
        run: the run, finished or stopped.
        weights: its output.
        teacher: the teacher's file.
        command: the command line that repeats the run.
    """
    model = load_embedded(weights)
    return {
        "name": "embedded",
        "architecture": {
            "trunk": f"MobileNetV2 inverted residuals up to the expansion of block {TAPS[-1]}",
            "taps": [f"expansion of block {tap}" for tap in TAPS],
            "stride_2_kernel": DOWN_KERNEL,
            "outputs": "one 1x1 projection per tap",
            "strides": list(model.strides),
            "channels": list(model.channels),
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds_256x256": multiply_adds(model),
            "input": "float RGB in 0..1, sides divisible by 32",
        },
        "teacher": {
            "file": teacher.name,
            "sha256": hashlib.sha256(teacher.read_bytes()).hexdigest(),
        },
        "training": {
            "images": len(run.paths),
            "left_out": list(run.leave_out),
            "config": dataclasses.asdict(run.config),
            "steps": run.step,
            "seconds": round(run.seconds),
            "unexplained_variance": run.losses[-1][1:] if run.losses else None,
            "torch": torch.__version__,
            "device": run.device,
            "command": command,
        },
        "weights": {
            "file": weights.name,
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
    }


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Write `card` as JSON.

    Raises:
        StorageError: the file system refused.
    """
    write_file(path, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


def card_text(card: dict[str, Any]) -> str:
    """The card for people."""
    architecture, training = card["architecture"], card["training"]
    maps = ", ".join(
        f"{channels} channels at stride {stride}"
        for channels, stride in zip(architecture["channels"], architecture["strides"], strict=True)
    )
    lines = [
        f"{card['name']}: {architecture['trunk']}",
        f"  maps        {maps}",
        f"  size        {architecture['parameters'] / 1e6:.2f} M parameters, "
        f"{card['weights']['bytes'] / 1e6:.2f} MB, "
        f"{architecture['multiply_adds_256x256'] / 1e9:.3f} G multiply-adds at 256x256",
        f"  teacher     {card['teacher']['file']}",
        f"  training    {training['steps']} steps on {training['images']} images, {training['seconds'] / 60:.0f} min",
        f"  sha256      {card['weights']['sha256']}",
    ]
    validation = card.get("validation")
    if validation:
        lines.append(f"  validation  {validation['measure']}")
        lines += [f"    {row['mean_image_auroc']:.3f}  {row['backbone']}" for row in validation["scores"]]
    return "\n".join(lines)
