"""The painter that a configuration names."""

from __future__ import annotations

from edgead.server_side.kka.config import Paint
from edgead.server_side.kka.seams import Painter


def open_painter(settings: Paint) -> Painter:
    """The painter of `[paint]`.

    Raises:
        InputError: a pipeline that is neither on this machine nor to be had from the hub.
        MissingDependencyError: a package of `edgead[server]` is absent.
    """
    if settings.painter == "procedural":
        from edgead.server_side.kka.procedural import ProceduralPainter

        return ProceduralPainter(within=settings.within)
    from edgead.server_side.kka.diffusion import InpaintingPainter, TextToImagePainter

    return (InpaintingPainter if settings.painter == "inpainting" else TextToImagePainter)(settings)


__all__ = ["open_painter"]
