"""The page of a run: whole, whatever the run came to, and without a request to anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgead.runtime.image import read_image
from edgead.server_side.kka import report
from edgead.server_side.kka.records import Image
from edgead.server_side.kka.report import report_html, write_report
from edgead.server_side.kka.rounds import run
from edgead.server_side.kka.work import WorkFolder


@pytest.fixture(scope="module")
def finished(begun: Callable[..., WorkFolder], makers_of_tests: ModuleType) -> WorkFolder:
    work = begun(name="reported")
    run(work, makers_of_tests.makers())
    return work


def test_the_page_shows_rounds_captions_distances_and_costs(finished: WorkFolder) -> None:
    page = write_report(finished).read_text()
    for number in range(3):
        assert page.count(f"KKA({number})") >= 4
    assert "a tiny spot" in page
    assert "&nbsp;x&nbsp;limit" in page
    assert "paint, s" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def test_a_run_without_a_round_has_a_page_too(begun: Callable[..., WorkFolder]) -> None:
    assert "No round is judged yet" in report_html(begun(name="empty"))


def test_words_of_an_author_are_never_html(begun: Callable[..., WorkFolder], makers_of_tests: ModuleType) -> None:
    class Hostile(makers_of_tests.SizeAuthor):  # type: ignore[misc,name-defined]
        def write(self, prompts: list[str], seeds: list[int]) -> list[str]:
            return ["a large spot & <b>bold words</b>"] * len(prompts)

    work = begun(name="hostile", rounds=0)
    run(work, makers_of_tests.makers(author=Hostile()))
    assert "<b>bold" not in report_html(work)


def test_what_sets_are_worth_is_shown_where_it_was_measured(
    begun: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = begun(name="worth", rounds=0)
    run(work, makers_of_tests.makers())
    found = {"no anomalies": 0.81, "KKA(0)": 0.9}
    (work.round_folder(0) / "auroc.json").write_text(json.dumps(found))
    page = report_html(work)
    assert "0.900" in page
    assert "+0.090" in page


def test_an_image_that_is_gone_costs_its_picture_alone(
    begun: Callable[..., WorkFolder], makers_of_tests: ModuleType, tmp_path: Path
) -> None:
    work = begun(name="gone", rounds=0)
    run(work, makers_of_tests.makers())
    for image in work.records(Image, 0)[:12]:
        (work.path / image.file).unlink()
    write_report(work, tmp_path / "page.html")
    assert "No such file" in (tmp_path / "page.html").read_text()


def test_costs_are_in_the_order_of_the_work_and_summed(finished: WorkFolder) -> None:
    page = report_html(finished)
    head = page[page.index("<h2>Cost</h2>") :]
    named = [
        head.index(f"{stage}, s") for stage in ("describe", "imagine", "paint", "judge", "together", "for an image")
    ]
    assert named == sorted(named)


def test_a_line_goes_around_what_was_painted_and_the_picture_itself_is_left_alone(finished: WorkFolder) -> None:
    image = finished.records(Image, 0)[0]
    frame, mask = read_image(finished.path / image.file), read_image(finished.path / image.mask)[..., 0] > 0
    before = frame.copy()
    found = report._outlined(frame, finished, image)
    assert np.array_equal(frame, before)
    changed = (found != frame).any(2)
    assert changed.any()
    assert not (changed & mask).any()
    rows, columns = np.nonzero(changed)
    inside = np.argwhere(mask)
    assert rows.min() < inside[:, 0].min()
    assert columns.max() > inside[:, 1].max()


def test_axes_have_few_round_numbers() -> None:
    assert report._log_ticks(-0.4, 0.62) == pytest.approx([0.5, 1, 2])
    for low, high in ((-6, 4), (-0.1, 0.1), (-1.2, 1.3)):
        found = report._log_ticks(low, high)
        assert 1 <= len(found) <= 8
        assert found == sorted(found)
