"""Painters over the pipelines of `diffusers`: text to image, and inpainting on photographs of normal parts.

A pipeline is a folder with `model_index.json` and weights as safetensors, or the hub's name of one. It is loaded when
the first picture is painted, once in each process, and does not travel when the painter is sent to another one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import EngineError, InputError, OutOfMemoryError, missing_dependency
from edgead.server_side.hub import digest_of, find_model
from edgead.server_side.kka.config import Paint
from edgead.server_side.kka.inpainting_masks import drawn_mask
from edgead.server_side.kka.places import part_of
from edgead.server_side.kka.procedural import as_grey_as
from edgead.server_side.kka.seams import Frame, Painted, UndrawableCaptionError, seed_of

_MULTIPLE = 16
"""Sides of what is painted are multiples of it, in pixels: two latent cells of the usual 8."""
_BLACK = 3 / 255
"""Brightest value of a picture, of 1, up to which it is black: what a pipeline gives that refused or overflowed."""
_TRIES = 3
"""Seeds after which a caption is given up whose pictures the pipeline's own checker withholds."""
_FEATHER = 3.0
"""Pixels inside the mask over which the painted goes over into the photograph."""


class _PipelinePainter:
    """What both painters share: loading, calling, and what may come back."""

    kind = ""
    auto = ""
    """Class of `diffusers` that finds the pipeline for the task."""
    takes: tuple[str, ...] = ()
    """Arguments that the pipeline must have."""
    uses_gpu = True
    """A worker of a cluster gets a GPU of its own, where there are any."""

    def __init__(self, settings: Paint) -> None:
        self._settings = settings
        option = "paint.model = DIR"
        source, self._here = find_model(
            settings.model, what="a diffusers pipeline", next_step=option, probe="model_index.json"
        )
        self._source = source
        folder = Path(source)
        self.name = folder.name if folder.is_dir() else source
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise InputError(
                wanted=f"a diffusers pipeline in {folder}",
                got="a folder without model_index.json",
                next_step=f"Name the folder that save_pretrained wrote: {option}",
            )

    def __getstate__(self) -> dict[str, Any]:
        # Gigabytes of weights stay at home: each process loads its own.
        return {name: value for name, value in self.__dict__.items() if name not in ("_pipeline", "_folder")}

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the pipeline's files."""
        return digest_of(self._folder)

    @functools.cached_property
    def _folder(self) -> Path:
        if Path(self._source).is_dir():
            return Path(self._source)
        diffusers = _diffusers()
        try:
            return Path(
                diffusers.DiffusionPipeline.download(
                    self._source, local_files_only=self._here, use_safetensors=True, trust_remote_code=False
                )
            )
        except Exception as error:  # whatever the hub's client raises
            raise self._unusable(error) from error

    @functools.cached_property
    def _pipeline(self) -> Any:
        import torch

        diffusers = _diffusers()
        gpu = torch.cuda.is_available()
        number = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32
        options = {"dtype": number, "local_files_only": True, "use_safetensors": True}
        try:
            try:
                pipeline = getattr(diffusers, self.auto).from_pretrained(str(self._folder), **options)
            except ValueError:
                # A pipeline of a family that has no entry in the table of tasks: as its own file names it.
                pipeline = diffusers.DiffusionPipeline.from_pretrained(str(self._folder), **options)
            pipeline.set_progress_bar_config(disable=True)
            pipeline = pipeline.to("cuda" if gpu else "cpu")
        except Exception as error:  # diffusers raises whatever its layers raise
            if _of_memory(error):
                raise self._no_memory(error) from error
            raise self._unusable(error) from error
        missing = [name for name in self.takes if name not in inspect.signature(pipeline.__call__).parameters]
        if missing:
            raise InputError(
                wanted=f"a pipeline for {self.kind} in {self.name}",
                got=f"{type(pipeline).__name__}, which takes no {' and no '.join(missing)}",
                next_step="Name another one as paint.model, or another paint.painter.",
            )
        return pipeline

    def check(self, caption: str) -> None:
        """Refuse a caption without words; what a pipeline makes of the others is seen when it paints.

        Raises:
            UndrawableCaptionError: nothing to draw.
        """
        if not any(letter.isalpha() for letter in caption):
            raise UndrawableCaptionError(
                wanted="a caption in words", got=repr(caption[:80]), next_step="Write what is to be seen."
            )

    def _painted(self, caption: str, seed: int, **more: Any) -> Frame:
        """A picture uint8 RGB [h, w, 3] of the pipeline; another seed where its checker withholds one."""
        for attempt in range(_TRIES):
            image, withheld = self._called(caption, seed if not attempt else seed_of(seed, "again", attempt), more)
            if withheld:
                continue
            if not np.isfinite(image).all() or float(image.max()) <= _BLACK:
                raise EngineError(
                    wanted=f"a picture from {self.name} for {caption[:80]!r}",
                    got="a black one" if np.isfinite(image).all() else "values that are no numbers",
                    next_step="Its weights may not stand the precision of this machine; try another pipeline.",
                )
            return np.asarray(np.clip(image * 255.0 + 0.5, 0, 255), dtype=np.uint8)
        raise UndrawableCaptionError(
            wanted=f"a picture from {self.name}",
            got=f"none that its own checker lets pass, of {_TRIES}, for {caption[:80]!r}",
            next_step="Say it in other words.",
        )

    def _called(self, caption: str, seed: int, more: dict[str, Any]) -> tuple[NDArray[np.float32], bool]:
        """Picture float [h, w, 3] in 0..1, and whether the pipeline withheld it."""
        import torch

        pipeline, settings = self._pipeline, self._settings
        arguments = {
            "prompt": settings.prompt.replace("{caption}", caption),
            "negative_prompt": settings.negative_prompt or None,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            # On the CPU on every machine, so that the noise does not depend on the card.
            "generator": torch.Generator("cpu").manual_seed(seed),
            "output_type": "np",
            **more,
        }
        known = inspect.signature(pipeline.__call__).parameters
        try:
            result = pipeline(
                **{name: value for name, value in arguments.items() if name in known and value is not None}
            )
        except Exception as error:  # diffusers raises whatever its layers raise
            if _of_memory(error):
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                raise self._no_memory(error) from error
            raise EngineError(
                wanted=f"a picture from {self.name} for {caption[:80]!r}",
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                next_step="Look at [paint] in the configuration: size, steps, strength, guidance.",
            ) from error
        return _picture_of(result, self.name)

    def _no_memory(self, error: BaseException) -> OutOfMemoryError:
        settings = self._settings
        return OutOfMemoryError(
            wanted=f"memory to paint {settings.size} x {settings.size} pixels with {self.name}",
            got=" ".join(str(error).split())[:200] or type(error).__name__,
            next_step=f"Set paint.size below {settings.size} (or fewer paint.steps, or a smaller pipeline) in a new "
            "run, or go on on a machine with more memory; what was painted is kept.",
        )

    def _unusable(self, error: Exception) -> InputError:
        return InputError(
            wanted=f"a pipeline of diffusers with weights as safetensors in {self._source}",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            next_step="Name a folder that save_pretrained wrote: paint.model = DIR",
        )


class TextToImagePainter(_PipelinePainter):
    """Any text-to-image pipeline: a whole picture for each caption, without a mask."""

    kind = "text-to-image"
    auto = "AutoPipelineForText2Image"
    takes = ("prompt",)
    needs_normal = False

    def paint(self, caption: str, normal: Frame | None, *, seed: int) -> Painted:
        """Paint `paint.size` squared pixels, rounded to a multiple of 16; `normal` is not looked at.

        Raises:
            UndrawableCaptionError: the pipeline's checker withholds what it painted.
            OutOfMemoryError: memory does not suffice.
            EngineError: the pipeline failed, or painted black.
        """
        self.check(caption)
        side = _rounded(self._settings.size)
        return Painted(self._painted(caption, seed, height=side, width=side), None)


class InpaintingPainter(_PipelinePainter):
    """Any inpainting pipeline, on photographs of normal parts.

    The mask is drawn by the seed (`inpainting_masks`), on the part unless `paint.within` says otherwise. The pipeline
    sees a cut-out around it: `paint.size` pixels of the photograph, or twice the mask's extent where that is more, so
    that a small defect on a large photograph is as sharp as what surrounds it. Outside the mask no pixel changes.
    """

    kind = "inpainting"
    auto = "AutoPipelineForInpainting"
    takes = ("prompt", "image", "mask_image")
    needs_normal = True

    def paint(self, caption: str, normal: Frame | None, *, seed: int) -> Painted:
        """Paint one anomaly on a photograph uint8 RGB [H, W, 3].

        Raises:
            InputError: no photograph.
            UndrawableCaptionError: the pipeline's checker withholds what it painted.
            OutOfMemoryError: memory does not suffice.
            EngineError: the pipeline failed, or painted black.
        """
        from PIL import Image

        self.check(caption)
        if normal is None:
            raise InputError(wanted="a photograph of a normal part to paint on", got="none")
        side = self._settings.size
        least = _MULTIPLE * min(1.0, max(normal.shape[:2]) / side)
        mask = drawn_mask(
            (normal.shape[0], normal.shape[1]),
            caption,
            np.random.default_rng(seed_of(seed, "mask")),
            least=least,
            part=part_of(normal, self._settings.within),
        )
        rows, columns = _cut_out(mask, side)
        seen, hidden = normal[rows, columns], mask[rows, columns]
        scale = side / max(hidden.shape)
        height, width = (_rounded(scale * length) for length in hidden.shape)
        image = Image.fromarray(cv2.resize(seen, (width, height), interpolation=cv2.INTER_CUBIC))
        mask_image = Image.fromarray(cv2.resize(hidden, (width, height), interpolation=cv2.INTER_NEAREST))
        made = self._painted(
            caption,
            seed,
            image=image,
            mask_image=mask_image,
            height=height,
            width=width,
            strength=self._settings.strength,
        )
        shrunk = made.shape[0] > hidden.shape[0]
        way = cv2.INTER_AREA if shrunk else cv2.INTER_CUBIC
        fitted = np.asarray(cv2.resize(made, hidden.shape[::-1], interpolation=way), dtype=np.uint8)
        result = normal.copy()
        result[rows, columns] = _joined(seen, fitted, hidden)
        return Painted(as_grey_as(normal, result, mask), mask)


def _cut_out(mask: NDArray[np.uint8], side: int) -> tuple[slice, slice]:
    """Rows and columns of a square around the mask, at least `side` pixels, cut to the picture."""
    found = np.nonzero(mask)
    extent = max(int(np.ptp(places)) + 1 for places in found)
    length = max(side, 2 * extent)
    cuts = []
    for places, whole in zip(found, mask.shape, strict=True):
        middle = (int(places.min()) + int(places.max()) + 1) // 2
        start = min(max(0, middle - length // 2), max(0, whole - length))
        cuts.append(slice(start, min(whole, start + length)))
    return cuts[0], cuts[1]


def _joined(seen: Frame, made: Frame, mask: NDArray[np.uint8]) -> Frame:
    """The painted inside the mask, going over into the photograph at its border; outside nothing changes."""
    framed = cv2.copyMakeBorder((mask > 0).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    share = np.clip(depth / _FEATHER, 0.0, 1.0)[..., None]
    mixed = seen * (1.0 - share) + made * share
    return np.asarray(np.where(mask[..., None] > 0, mixed + 0.5, seen), dtype=np.uint8)


def _picture_of(result: Any, name: str) -> tuple[NDArray[np.float32], bool]:
    """The one picture [h, w, 3] of a pipeline's answer, and whether its checker withheld it."""
    images = getattr(result, "images", None)
    flagged = getattr(result, "nsfw_content_detected", None)
    withheld = bool(flagged and flagged[0])
    if images is None or not len(images):
        if flagged is None:
            raise EngineError(wanted=f"a picture from {name}", got="an answer without one")
        return np.zeros((1, 1, 3), np.float32), True
    image = np.asarray(images[0], dtype=np.float32)
    if image.ndim != 3 or image.shape[2] != 3:
        raise EngineError(wanted=f"a picture [h, w, 3] from {name}", got=f"{list(image.shape)}")
    return image, withheld


def _rounded(side: float) -> int:
    return max(_MULTIPLE, round(side / _MULTIPLE) * _MULTIPLE)


def _of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error).lower()


def _diffusers() -> Any:
    try:
        diffusers: Any = importlib.import_module("diffusers")
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or "diffusers", "server", "painting with a pipeline") from error
    # Bars and advice of the libraries would fall into the run's own progress.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return diffusers


__all__ = ["InpaintingPainter", "TextToImagePainter"]
