"""The demo from end to end, small: everything it promises is there, and an interruption leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.demo_data import KINDS, PRODUCTS, DataOptions, paint_data
from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import InputError, OutputExistsError
from edgead.runtime.image import list_images, read_image
from edgead.runtime.knowledge import check_fits, read_pack
from edgead.server_side import datasets


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    paint_data(folder, DataOptions(images=6, pixels=64, seed=3))
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """Folder, figures and log of a demo that is as small as it can be."""
    from edgead.demo_run import DemoOptions, run_demo

    output = tmp_path_factory.mktemp("demo") / "out"
    log: list[str] = []
    options = DemoOptions(images=6, size=64, seconds=0.2)
    return output, run_demo(output, options, log=log.append), log


def test_painted_data_is_a_data_set_in_the_mvtec_layout_with_exact_masks(painted: Path) -> None:
    for product in PRODUCTS:
        assert len(datasets.normal_images(painted / product)) == 6
        samples = datasets.test_samples(painted / product)
        assert {sample.kind for sample in samples} == {"good", *KINDS}
        for sample in samples:
            frame = read_image(sample.path)
            assert frame.shape == (64, 64, 3)
            assert datasets.read_mask(sample, frame.shape).any() == sample.anomalous


def test_the_same_seed_paints_the_same_files_and_another_seed_others(painted: Path, tmp_path: Path) -> None:
    for seed, folder in ((3, "same"), (4, "other")):
        paint_data(tmp_path / folder, DataOptions(images=6, pixels=64, seed=seed))
    picture = Path("fabric/test/scratch/001.jpg")
    assert (tmp_path / "same" / picture).read_bytes() == (painted / picture).read_bytes()
    assert (tmp_path / "other" / picture).read_bytes() != (painted / picture).read_bytes()


@pytest.mark.slow
def test_the_report_is_one_page_with_every_section_and_asks_nobody_for_anything(
    demo: tuple[Path, dict[str, Any], list[str]],
) -> None:
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert len(page) < 5_000_000
    for heading in (
        "a supplier begins to engrave a code",
        "The update, frame by frame",
        "A real defect beside the code",
        "What it sees",
        "Where it is wrong",
        "How good it is",
        "Engines on this machine",
        "What is in the bundle",
        "Now with your own photographs",
    ):
        assert heading in page, heading
    for command in ("edgead export --normal", "edgead run", "edgead evaluate"):
        assert command in page
    assert "<script" not in page
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?!data:)[a-z]*:?//""", page)
    assert all(match.startswith("data:image/jpeg;base64,") for match in re.findall(r'src="([^"]{0,40})', page))
    assert page.count("<img") >= 2 * (len(KINDS) + 1) * len(PRODUCTS) + 4
    assert page.count("<svg") >= 6
    _Balanced().feed(page)


@pytest.mark.slow
def test_the_update_lost_and_mixed_no_frame_and_the_bundle_is_as_it_was(
    demo: tuple[Path, dict[str, Any], list[str]],
) -> None:
    output, figures, _ = demo
    update = figures["update"]
    assert update["frames"] > 10
    assert update["frames_lost"] == 0
    assert update["frames_mixed"] == 0
    assert 0 < update["row_bytes"] < update["pack_bytes"]
    bundle = open_bundle(output / "parts.bundle")
    taught = read_pack(output / "knowledge" / "flange-new-batch.safetensors")
    check_fits(taught, bundle.manifest.detector)
    old, new = bundle.pack("flange").arrays["bank.normal"], taught.arrays["bank.normal"]
    assert len(new) == len(old) + update["rows_added"]
    assert np.array_equal(new[: len(old)], old)


@pytest.mark.slow
def test_both_products_share_one_bundle_and_every_engine_agrees(
    demo: tuple[Path, dict[str, Any], list[str]],
) -> None:
    output, figures, log = demo
    assert open_bundle(output / "parts.bundle").products == PRODUCTS
    ran = {name: engine for name, engine in figures["engines"].items() if engine["parity"] is not None}
    assert "onnx-fp32" in ran
    for engine in ran.values():
        assert engine["milliseconds"]["total"] > 0
        assert engine["parity"]["map"] < 0.05
    assert json.loads((output / "figures.json").read_text())["update"] == figures["update"]
    assert any("report.html" in line for line in log)
    assert len(list_images(output / "data")) > 60


def test_an_output_that_exists_is_kept_and_a_size_that_no_engine_takes_is_refused(tmp_path: Path) -> None:
    from edgead.demo_run import DemoOptions, run_demo

    (tmp_path / "mine").write_text("keep")
    with pytest.raises(OutputExistsError):
        run_demo(tmp_path, DemoOptions())
    with pytest.raises(InputError, match="multiple of 32"):
        run_demo(tmp_path / "new", DemoOptions(size=100))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "edgead", "demo", "-o", str(tmp_path / "out"), "--images", "200"]
    # A job in the background of a shell starts with SIGINT ignored, and so would its children; a terminal's do not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.jpg")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.rglob("*.jpg")), "the demo did not begin to paint"
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert b"interrupted" in errors
    assert list(tmp_path.iterdir()) == []


class _Balanced(HTMLParser):
    """Fails on a closing tag that closes nothing or something else."""

    EMPTY = frozenset({"meta", "img", "br", "line", "rect", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag, f"</{tag}>"
