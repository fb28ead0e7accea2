"""The heavy room: fitting detectors, calibrating them, measuring them, and the embedded backbone's recipe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgead.server_side.backbones import load_backbone
    from edgead.server_side.calibration import calibrate
    from edgead.server_side.evaluation import evaluate_bundle
    from edgead.server_side.fitting import FitOptions, fit_memory_bank
    from edgead.server_side.painting import paint_defect

_HOME = {
    "FitOptions": "fitting",
    "calibrate": "calibration",
    "evaluate_bundle": "evaluation",
    "fit_memory_bank": "fitting",
    "load_backbone": "backbones",
    "paint_defect": "painting",
}

__all__ = ["FitOptions", "calibrate", "evaluate_bundle", "fit_memory_bank", "load_backbone", "paint_defect"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgead.server_side' has no attribute '{name}'")
    return getattr(importlib.import_module(f"edgead.server_side.{_HOME[name]}"), name)
