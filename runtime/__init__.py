"""The light room: what runs on a camera. numpy, OpenCV, one engine; never torch.

    from edgead.runtime import Inspector
    inspector = Inspector("part.bundle")
    inspection = inspector.inspect(frame)      # uint8 RGB [H, W, 3]
    inspector.swap(pack)                       # new knowledge between two frames

Names are imported when they are first used, so that asking for an error class does not load an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgead.runtime.bundle import Bundle, open_bundle, write_bundle
    from edgead.runtime.deltas import Delta, apply_delta, make_delta, read_delta
    from edgead.runtime.engines import Engine, Session, open_engine
    from edgead.runtime.image import read_image
    from edgead.runtime.inspection import DefectRegion, Inspection, Verdict
    from edgead.runtime.inspector import Inspector
    from edgead.runtime.isolation import IsolatedInspector
    from edgead.runtime.knowledge import Pack, decode_pack, encode_pack, new_pack, read_pack, write_pack
    from edgead.runtime.preprocess import prepare

_HOME = {
    "Bundle": "bundle",
    "open_bundle": "bundle",
    "write_bundle": "bundle",
    "Delta": "deltas",
    "apply_delta": "deltas",
    "make_delta": "deltas",
    "read_delta": "deltas",
    "Engine": "engines",
    "Session": "engines",
    "open_engine": "engines",
    "prepare": "preprocess",
    "read_image": "image",
    "DefectRegion": "inspection",
    "Inspection": "inspection",
    "Verdict": "inspection",
    "Inspector": "inspector",
    "IsolatedInspector": "isolation",
    "Pack": "knowledge",
    "decode_pack": "knowledge",
    "encode_pack": "knowledge",
    "new_pack": "knowledge",
    "read_pack": "knowledge",
    "write_pack": "knowledge",
}

__all__ = [
    "Bundle",
    "DefectRegion",
    "Delta",
    "Engine",
    "Inspection",
    "Inspector",
    "IsolatedInspector",
    "Pack",
    "Session",
    "Verdict",
    "apply_delta",
    "decode_pack",
    "encode_pack",
    "make_delta",
    "new_pack",
    "open_bundle",
    "open_engine",
    "prepare",
    "read_delta",
    "read_image",
    "read_pack",
    "write_bundle",
    "write_pack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgead.runtime' has no attribute '{name}'")
    return getattr(importlib.import_module(f"edgead.runtime.{_HOME[name]}"), name)
