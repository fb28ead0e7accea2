"""The options of `edgead fit`, which `edgead export --normal` shares."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edgead.runtime.errors import InputError
from edgead.runtime.image import list_images
from edgead.runtime.spec import Preprocessing, Region, Tiling

MEMORY_BANK = "memory-bank"
LANGUAGE_METHODS = {
    "winclip": "winclip",
    "april-gan": "april_gan",
    "alfa": "alfa",
    "anomalous-few-shot": "anomalous_few_shot",
    "cmda": "cmda",
    "normality": "normality",
}
"""Methods that rest on sentences -> their module in `edgead.server_side.detectors`."""
TRAINS_PROJECTIONS = ("april-gan", "normality")
"""Those that train projections where no file of them is given."""
TRAINED_METHODS = {
    "deep-sad": "deep_sad",
    "simplenet": "simplenet",
    "recontrast": "recontrast",
    "efficientad": "efficientad",
    "padim": "padim",
    "ssd": "ssd",
}
"""Methods that train a small network, or statistics, on good parts and anomalies -> their module, as above."""
_STATISTICS = ("padim", "ssd")
"""Those that take no steps and learn nothing from anomalies."""
_LEARNS_STEPWISE = tuple(name for name in TRAINED_METHODS if name not in _STATISTICS)
METHODS = (MEMORY_BANK, *TRAINED_METHODS, *LANGUAGE_METHODS)
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "backbone_weights": (MEMORY_BANK, *TRAINED_METHODS),
    "rows": (MEMORY_BANK,),
    "neighbours": (MEMORY_BANK,),
    "anomalous": (MEMORY_BANK, *_LEARNS_STEPWISE, "anomalous-few-shot"),
    "layers": (MEMORY_BANK, *TRAINED_METHODS, *TRAINS_PROJECTIONS),
    "steps": _LEARNS_STEPWISE,
    "device": (*TRAINED_METHODS, "cmda"),
    **dict.fromkeys(("teacher", "generic", "precision", "start"), ("efficientad",)),
    "projections": TRAINS_PROJECTIONS,
    "auxiliary": TRAINS_PROJECTIONS,
    "score": ("april-gan",),
    "shots": ("winclip", "april-gan", "alfa", "anomalous-few-shot"),
    **{name: tuple(LANGUAGE_METHODS) for name in ("model", "model_weights", "class_name", "prompts")},
}
"""Options that not every method has a use for -> those that have."""

DEFAULT_SIZE = "256"

Command = TypeVar("Command", bound=Callable[..., Any])


def fit_options(command: Command) -> Command:
    """Add the options that say how to fit to a click command."""
    options = [
        click.option(
            "--method", default=MEMORY_BANK, show_default=True, metavar="METHOD", help=f"One of {', '.join(METHODS)}."
        ),
        click.option("--product", default="part", show_default=True, help="Name of the product."),
        click.option(
            "--backbone",
            default="embedded",
            show_default=True,
            help="Feature network: embedded, or any timm model such as resnet18.",
        ),
        click.option("--backbone-weights", type=click.Path(path_type=Path), help="Local weights for it."),
        click.option("--layers", help="Layers to compare, comma-separated; the method's own choice if left out."),
        click.option("--size", help="Engine frame: SIDE or WIDTHxHEIGHT; 256, or the image size of --model."),
        click.option("--roi", help="Region of interest in pixels of the rotated frame: X,Y,WIDTH,HEIGHT."),
        click.option("--tiles", help="Tiles over the region of interest: COLUMNSxROWS."),
        click.option("--overlap", default=0.1, show_default=True, help="Share that neighbouring tiles overlap."),
        click.option("--rotate", type=click.Choice(["0", "90", "180", "270"]), default="0", show_default=True),
        click.option("--rows", type=click.IntRange(1), help="Rows of the memory bank; 1 % of all if left out."),
        click.option(
            "--neighbours",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Neighbour re-weighting of the paper (its b, 9); 0 for none.",
        ),
        click.option(
            "--false-alarms",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            default=0.01,
            show_default=True,
            help="Wanted share of normal frames called NG.",
        ),
        click.option(
            "--anomalous",
            type=click.Path(path_type=Path),
            help="Pictures of known defects; masks beside them as NAME_mask.png.",
        ),
        click.option(
            "--skip-unreadable",
            is_flag=True,
            help="Leave pictures out that cannot be read, and name each with its reason; an error if not given.",
        ),
        click.option("--seed", default=0, show_default=True),
        click.option(
            "--steps",
            type=click.IntRange(1),
            help="Trained methods: most steps of training; the method's own number if left out.",
        ),
        click.option(
            "--device",
            help="Trained methods and cmda: where to train: cpu, cuda, cuda:1 or auto, a GPU if there is one; auto if "
            "left out.",
        ),
        click.option(
            "--teacher",
            type=click.Path(path_type=Path),
            help="efficientad: file of a teacher, of an earlier fit or a published one of PDN-S (.pth). Where there is "
            "none, it is distilled and kept there for other parts.",
        ),
        click.option(
            "--generic",
            type=click.Path(path_type=Path),
            help="efficientad: folder of pictures of anything but the part, for teacher and penalty; painted ones if "
            "left out.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["float32", "bfloat16"]),
            help="efficientad: of its training; bfloat16 takes half the time on processors and GPUs that know it, "
            "and is refused on others.",
        ),
        click.option(
            "--start",
            type=click.Choice(["closed", "random"]),
            help="efficientad: where its student begins: with closed forms that describe the part in a minute (the "
            "default), or with random weights as in the paper, which want its 70,000 --steps and a GPU.",
        ),
        click.option(
            "--model",
            help="Methods with sentences: open_clip model, such as MobileCLIP-S1 or ViT-B-16-plus-240, or a JSON "
            "configuration.",
        ),
        click.option("--model-weights", help="Its pretrained tag, a local checkpoint, or random:SEED."),
        click.option("--class", "class_name", help="What the part is, as a word in sentences: carpet, metal nut."),
        click.option("--domain", default="industrial", show_default=True, help="Kind of picture, for sentences."),
        click.option(
            "--prompts",
            type=click.Path(path_type=Path),
            help="Prompt set of `edgead prompts`; the method's own curated one if left out.",
        ),
        click.option(
            "--shots",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Good parts that become reference banks; 0 for sentences alone.",
        ),
        click.option(
            "--score",
            type=click.Choice(["text", "map"]),
            help="Image score of april-gan: that of the whole image's embedding (text, the default), or the map's "
            "maximum, as NAND takes it.",
        ),
        click.option(
            "--projections",
            type=click.Path(path_type=Path),
            help="File of `edgead projections` (april-gan, normality).",
        ),
        click.option(
            "--auxiliary",
            type=click.Path(path_type=Path),
            help="Data set with masks to train projections on; painted parts if left out.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def parse_layers(text: str | None) -> tuple[str | int, ...] | None:
    """'6,10' or 'layer2,layer3' -> a tuple; numbers become numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def parse_tower_layers(text: str | None) -> tuple[int, ...] | None:
    """'6,12' -> (6, 12).

    Raises:
        InputError: something else than numbers from 1.
    """
    numbers = [layer for layer in parse_layers(text) or () if isinstance(layer, int) and layer > 0]
    if text is not None and (not numbers or len(numbers) != len(parse_layers(text) or ())):
        raise InputError(wanted="layers as numbers from 1", got=f"--layers {text}", next_step="Write them like 6,12.")
    return tuple(numbers) or None


def parse_preprocessing(
    size: str | None, roi: str | None, tiles: str | None, overlap: float, rotate: str
) -> Preprocessing:
    """The declared preprocessing from the words of the command line.

    Args:
        size: SIDE or WIDTHxHEIGHT; 256 if None.
        roi, tiles, overlap, rotate: see the options' help.

    Raises:
        InputError: a text that is not of the form the option's help gives, or a number outside its range.
    """
    sides = _numbers("--size", size or DEFAULT_SIZE, "x", (1, 2), "256 or 320x256", lowest=32)
    width, height = sides[0], sides[-1]
    if width % 32 or height % 32 or max(width, height) > 4096:
        raise InputError(
            wanted="an engine frame whose sides are multiples of 32 up to 4096",
            got=f"--size {size}",
            next_step="Try 256, 320 or 512; use --tiles for large pictures.",
        )
    region = None
    if roi is not None:
        x, y, roi_width, roi_height = _numbers("--roi", roi, ",", (4,), "100,50,640,480", lowest=0)
        region = Region(x, y, roi_width, roi_height)
        if not region.width or not region.height:
            raise InputError(wanted="a region of interest with pixels", got=f"--roi {roi}")
    tiling = None
    if tiles is not None:
        columns, rows = _numbers("--tiles", tiles, "x", (2,), "3x2", lowest=1)
        if columns > 64 or rows > 64 or not 0 <= overlap <= 0.5:
            raise InputError(wanted="at most 64x64 tiles that overlap by 0 to 0.5", got=f"{tiles}, overlap {overlap}")
        tiling = Tiling(columns, rows, overlap)
    return Preprocessing(width, height, int(rotate), region, tiling)  # type: ignore[arg-type]


def _numbers(
    option: str, text: str, separator: str, counts: tuple[int, ...], example: str, lowest: int
) -> tuple[int, ...]:
    parts = text.split(separator)
    if len(parts) not in counts or not all(part.strip().isdecimal() for part in parts):
        raise InputError(wanted=f"{option} such as {example}", got=f"'{text}'", next_step="Write it like that.")
    numbers = tuple(int(part) for part in parts)
    if min(numbers) < lowest or max(numbers) > 65536:
        raise InputError(wanted=f"{option} with numbers from {lowest} to 65536", got=f"'{text}'")
    return numbers


def check_method(method: str) -> None:
    """Refuse a method that does not exist.

    Raises:
        InputError: unknown; near names are suggested.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=2, cutoff=0.3)
        raise InputError(
            wanted=f"one of the methods {', '.join(METHODS)}",
            got=f"'{method}'",
            next_step=f"Did you mean {' or '.join(near)}?" if near else "Name one of these.",
        )


def anomalous_samples(folder: Path | None) -> list[tuple[Path, Path | None]]:
    """Pictures of defects in a folder, each with its mask NAME_mask.png or None.

    Raises:
        InputError: no such folder, no pictures, or a mask without its picture.
    """
    if folder is None:
        return []
    images = list_images(folder)
    masks = {path.stem.removesuffix("_mask"): path for path in images if path.stem.endswith("_mask")}
    pictures = [path for path in images if not path.stem.endswith("_mask")]
    alone = sorted(set(masks) - {path.stem for path in pictures})
    if alone:
        raise InputError(
            wanted=f"the picture that {masks[alone[0]]} is the mask of",
            got="no file of that name",
            next_step="Put the picture beside its mask, or remove the mask.",
        )
    return [(path, masks.get(path.stem)) for path in pictures]
