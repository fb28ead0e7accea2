"""Painting with pipelines of diffusers: tiny ones, through the code that loads real ones."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgead.cli import cli
from edgead.runtime.errors import EngineError, InputError, OutOfMemoryError
from edgead.runtime.image import encode_png, read_image
from edgead.server_side.kka.config import Paint
from edgead.server_side.kka.inpainting_masks import drawn_mask
from edgead.server_side.kka.painters import open_painter
from edgead.server_side.kka.records import Image
from edgead.server_side.kka.seams import UndrawableCaptionError
from edgead.server_side.kka.work import WorkFolder
from edgead.server_side.painting import paint_part
from edgead.server_side.part_finder import find_part

pytest.importorskip("diffusers", reason="pipelines need edgead[server]")

CAPTION = "a large dark red stain near the upper left corner, clearly visible"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Folders of tiny pipelines by name, each made when it is first asked for."""
    import importlib.util

    path = Path(__file__).with_name("tiny_pipelines.py")
    spec = importlib.util.spec_from_file_location("edgead_tests_tiny_pipelines", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("pipelines")
    kinds = {
        "plain": {},
        "inpaint": {"inpainting": True, "wide": True},
        "black": {"spoiled": "black"},
        "nan": {"spoiled": "nan"},
    }

    def made(name: str) -> Path:
        if not (folder / name).exists():
            module.save_pipeline(folder / name, **kinds[name])
        return folder / name

    import torch

    # So little work is done fastest by one thread, above all beside other work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    rng = np.random.default_rng(3)
    return (np.array([128, 122, 116]) + rng.normal(0, 6, (90, 130, 3))).clip(0, 255).astype(np.uint8)


def settings(painter: str, model: Path | str, **more: object) -> Paint:
    return Paint(painter=painter, model=str(model), **({"steps": 2, "size": 64} | more))  # type: ignore[arg-type]


def test_a_text_to_image_pipeline_paints_a_whole_picture_from_caption_and_seed(
    pipelines: Callable[[str], Path],
) -> None:
    painter = open_painter(settings("text-to-image", pipelines("plain"), size=72))
    first, again, other = (painter.paint(CAPTION, None, seed=seed) for seed in (1, 1, 2))
    assert first.mask is None
    assert first.image.shape == (64, 64, 3)  # 72 pixels, to the nearest multiple of 16
    assert first.image.dtype == np.uint8
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.image, painter.paint("a hole", None, seed=1).image)
    assert (painter.kind, painter.name, painter.needs_normal) == ("text-to-image", "plain", False)
    assert len(painter.digest) == 64


@pytest.mark.parametrize("pipeline", ["inpaint", "plain"])
def test_inpainting_changes_nothing_outside_its_mask(
    pipelines: Callable[[str], Path], photo: np.ndarray, pipeline: str
) -> None:
    """A pipeline that was trained to inpaint, and one of text to image that inpaints."""
    painter = open_painter(settings("inpainting", pipelines(pipeline)))
    first, again, other = (painter.paint(CAPTION, photo, seed=seed) for seed in (1, 1, 2))
    assert first.mask is not None
    assert other.mask is not None
    assert first.image.shape == photo.shape
    assert set(np.unique(first.mask)) == {0, 255}
    changed = (first.image != photo).any(2)
    assert not changed[first.mask == 0].any()
    assert changed[first.mask > 0].mean() > 0.5
    rows, columns = np.nonzero(first.mask)
    assert rows.mean() < 50
    assert columns.mean() < 70
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.mask, other.mask)


def test_a_pipeline_paints_on_the_part_and_not_on_its_background(pipelines: Callable[[str], Path]) -> None:
    flange = paint_part("flange", rng=np.random.default_rng(2), size=128).image
    part = find_part(flange)
    assert not part.all()
    caption = "a large stain near the upper left corner"
    for within in ("part", "frame"):
        painter = open_painter(settings("inpainting", pipelines("inpaint"), within=within))
        painted = painter.paint(caption, flange, seed=1)
        assert painted.mask is not None
        assert (painted.image != flange).any(2)[painted.mask > 0].any()
        assert not (painted.image != flange).any(2)[painted.mask == 0].any()
        assert (painted.mask > 0)[~part].any() == (within == "frame")


def test_a_large_photograph_is_painted_at_its_own_resolution_and_a_grey_one_stays_grey(
    pipelines: Callable[[str], Path],
) -> None:
    grain = np.random.default_rng(0).integers(90, 140, (300, 420, 1)).astype(np.uint8)
    photo = np.repeat(grain, 3, axis=2)
    painted = open_painter(settings("inpainting", pipelines("inpaint"))).paint(
        "a tiny red spot in the middle", photo, seed=0
    )
    assert painted.mask is not None
    assert painted.image.shape == photo.shape
    assert (painted.image == painted.image[..., :1]).all()
    assert (painted.image != photo).any()
    assert 0 < (painted.mask > 0).mean() < 0.05


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_a_strength_that_leaves_no_step_is_told(
    pipelines: Callable[[str], Path], photo: np.ndarray, strength: float
) -> None:
    painter = open_painter(settings("inpainting", pipelines("inpaint"), strength=strength))
    if strength == 1.0:
        painter.paint(CAPTION, photo, seed=0)
        return
    with pytest.raises(EngineError, match="strength"):
        painter.paint(CAPTION, photo, seed=0)


@pytest.mark.parametrize(("name", "words"), [("black", "a black one"), ("nan", "no numbers")])
def test_a_black_picture_or_one_that_is_none_is_an_error(
    pipelines: Callable[[str], Path], name: str, words: str
) -> None:
    painter = open_painter(settings("text-to-image", pipelines(name)))
    with pytest.raises(EngineError, match=words):
        painter.paint(CAPTION, None, seed=0)


def test_a_picture_that_memory_does_not_hold_says_what_to_lower(pipelines: Callable[[str], Path]) -> None:
    # The noise alone has 17 TB: no machine of the tests has them, and the allocator says so at once.
    painter = open_painter(settings("text-to-image", pipelines("plain"), size=2**21))
    with pytest.raises(OutOfMemoryError, match=r"paint\.size below 2097152"):
        painter.paint(CAPTION, None, seed=0)


def test_a_painter_travels_without_its_weights(pipelines: Callable[[str], Path]) -> None:
    painter = open_painter(settings("text-to-image", pipelines("plain")))
    before = painter.paint(CAPTION, None, seed=3)
    sent = pickle.dumps(painter)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).paint(CAPTION, None, seed=3).image, before.image)


def test_what_is_no_pipeline_is_refused(tmp_path: Path, pipelines: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"model_index\.json"):
        open_painter(settings("text-to-image", tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="safetensors"):
        open_painter(settings("text-to-image", tmp_path)).paint(CAPTION, None, seed=0)
    with pytest.raises(InputError, match="no such folder"):
        open_painter(settings("inpainting", "./not here"))
    painter = open_painter(settings("inpainting", pipelines("inpaint")))
    with pytest.raises(UndrawableCaptionError):
        painter.check("--- 17 ---")
    with pytest.raises(InputError, match="photograph"):
        painter.paint(CAPTION, None, seed=0)


def test_a_name_of_a_hub_that_cannot_be_reached_gives_one_clear_line(tmp_path: Path, photographs: Path) -> None:
    config = tmp_path / "hub.toml"
    config.write_text(
        f'normals = "{photographs}"\ncaptions = 2\n[representatives]\nclusters = 2\n'
        '[paint]\npainter = "inpainting"\nmodel = "nobody-at-all/no-such-pipeline"\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "edgead", "kka", "run", str(config)],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("no-such-pipeline") == 1
    assert "pass its folder: paint.model = DIR" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("painter", "pipeline"), [("text-to-image", "plain"), ("inpainting", "inpaint")])
def test_the_paint_stage_runs_end_to_end_from_the_command_line(
    painter: str, pipeline: str, tmp_path: Path, photographs: Path, pipelines: Callable[[str], Path]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'normals = "{photographs}"\ncaptions = 3\n[representatives]\nclusters = 2\n'
        f'[paint]\npainter = "{painter}"\nmodel = "{pipelines(pipeline)}"\nsteps = 2\nsize = 64\n'
    )
    for stage in ("describe", "representatives", "imagine", "paint"):
        result = CliRunner().invoke(cli, ["kka", stage, str(config), "-o", str(tmp_path / "work")])
        assert result.exit_code == 0, result.output
    work = WorkFolder(tmp_path / "work")
    images = work.records(Image, 0)
    assert len(images) == 3
    for record in images:
        assert record.made.by == painter
        assert record.made.model == pipeline
        assert len(record.made.digest) == 64
        assert read_image(work.path / record.file).shape == (64, 64, 3)
        assert bool(record.mask) == (painter == "inpainting")
        assert record.visible > 0 or painter == "text-to-image"


def test_masks_follow_the_caption_where_it_says_something(tmp_path: Path) -> None:
    def area(caption: str) -> list[float]:
        return [
            float((drawn_mask((200, 260), caption, np.random.default_rng(seed), least=6) > 0).mean())
            for seed in range(12)
        ]

    assert np.mean(area("a small stain")) * 4 < np.mean(area("a large stain")) < np.mean(area("a huge stain"))
    assert np.mean(area("a large scratch")) < 0.5 * np.mean(area("a large stain"))
    assert min(area("something odd")) > 0
    assert len(set(area("something odd"))) == 12
    spread = [
        drawn_mask((200, 260), "a small hole near the right edge", np.random.default_rng(s), least=6) for s in (1, 2)
    ]
    assert all(np.nonzero(mask)[1].min() > 130 for mask in spread)
    (tmp_path / "mask.png").write_bytes(encode_png(np.repeat(spread[0][..., None], 3, axis=2)))
    assert read_image(tmp_path / "mask.png").shape == (200, 260, 3)


def test_a_picture_that_the_pipelines_own_checker_withholds_is_known() -> None:
    from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

    from edgead.server_side.kka.diffusion import _picture_of

    black = np.zeros((1, 8, 8, 3), np.float32)
    for images, flags, withheld in ((black, [True], True), (black, [False], False), ([], [True], True)):
        assert _picture_of(StableDiffusionPipelineOutput(images, flags), "p")[1] is withheld
    assert not _picture_of(StableDiffusionPipelineOutput(black, None), "p")[1]
    with pytest.raises(EngineError, match="an answer without one"):
        _picture_of(StableDiffusionPipelineOutput(None, None), "p")
