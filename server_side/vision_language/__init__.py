"""Vision-language models (CLIP and its kin): loading, the image tower in plain operators, text tables.

    from edgead.server_side.vision_language import encode_texts, load_model, tower_of
    model = load_model("ViT-B-16-plus-240", "laion400m_e32")
    rows = encode_texts(model, ["a photo of a flawless bottle."])   # [1, E], L2-normalised
    tower = tower_of(model)                                           # uint8 frames -> TowerOutput
"""

from edgead.server_side.vision_language.models import VisionLanguageModel, load_model
from edgead.server_side.vision_language.text import encode_texts
from edgead.server_side.vision_language.tower import TowerOutput, VisionTower, window_patches
from edgead.server_side.vision_language.towers import tower_of

__all__ = [
    "TowerOutput",
    "VisionLanguageModel",
    "VisionTower",
    "encode_texts",
    "load_model",
    "tower_of",
    "window_patches",
]
