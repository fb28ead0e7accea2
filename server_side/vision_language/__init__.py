"""Vision-language models (CLIP and its kin): loading, the image tower in plain operators, text tables.

from edgead.server_side.vision_language import encode_texts, load_model, tower_of
model = load_model("ViT-B-16-plus-240", "laion400m_e32")
rows = encode_texts(model, ["a photo of a flawless bottle."])   # [1, E], L2-normalised
tower = tower_of(model)                                         # uint8 frames -> TowerOutput
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgead.server_side.vision_language.models import VisionLanguageModel, load_model
    from edgead.server_side.vision_language.table import (
        TextTable,
        check_table,
        make_table,
        make_table_file,
        read_table,
        write_table,
    )
    from edgead.server_side.vision_language.text import encode_texts
    from edgead.server_side.vision_language.tower import TowerOutput, VisionTower, window_patches
    from edgead.server_side.vision_language.towers import tower_of

# Torch comes with most of these, and the command line's help shall not wait for it.
_HOME = {
    "TextTable": "table",
    "TowerOutput": "tower",
    "VisionLanguageModel": "models",
    "VisionTower": "tower",
    "check_table": "table",
    "encode_texts": "text",
    "load_model": "models",
    "make_table": "table",
    "make_table_file": "table",
    "read_table": "table",
    "tower_of": "towers",
    "window_patches": "tower",
    "write_table": "table",
}

__all__ = [
    "TextTable",
    "TowerOutput",
    "VisionLanguageModel",
    "VisionTower",
    "check_table",
    "encode_texts",
    "load_model",
    "make_table",
    "make_table_file",
    "read_table",
    "tower_of",
    "window_patches",
    "write_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgead.server_side.vision_language' has no attribute '{name}'")
    return getattr(importlib.import_module(f"edgead.server_side.vision_language.{_HOME[name]}"), name)
