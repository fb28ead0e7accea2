"""The compiling room: a fitted detector in, a checked bundle out. Knows no detection method by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgead.exporter.export import export_bundle, parse_target

__all__ = ["export_bundle", "parse_target"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edgead.exporter' has no attribute '{name}'")
    return getattr(importlib.import_module("edgead.exporter.export"), name)
