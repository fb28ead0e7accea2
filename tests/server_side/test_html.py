"""Self-contained pages: whatever goes in is text, and a plot says what its numbers are."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest

from edgead.server_side.html import data_uri, figure, page, svg_histogram, svg_roc, table, ticks

NASTY = '<script>alert("x & y")</script>'


def test_titles_cells_and_captions_are_escaped() -> None:
    frame = np.zeros((4, 4, 3), np.uint8)
    text = page(NASTY, table([NASTY], [[NASTY]]) + figure(frame, NASTY), NASTY)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 5


def test_a_page_asks_nothing_of_the_network() -> None:
    text = page("t", svg_roc({"a": [(0, 0), (0, 1), (1, 1)]}, "ROC") + figure(np.zeros((4, 4, 3), np.uint8), "c"))
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "http" not in text
    assert "@import" not in text


@pytest.mark.parametrize(("shape", "wanted"), [((100, 50, 3), (40, 20)), ((10, 20, 3), (10, 20))])
def test_pictures_are_embedded_and_only_ever_shrunk(shape: tuple[int, ...], wanted: tuple[int, int]) -> None:
    uri = data_uri(np.full(shape, (200, 30, 30), np.uint8), side=40)
    data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert picture.shape[:2] == wanted
    assert picture[0, 0, 2] > 150 > picture[0, 0, 0], "red stays red"


def test_a_histogram_is_well_formed_and_its_bars_and_threshold_stand_where_the_scores_are() -> None:
    text = svg_histogram({"good": [0.0, 0.0, 1.0], "<odd>": [8.0, 10.0]}, 5.0, "Scores", bins=10)
    tree = ElementTree.fromstring(text)
    bars = [r for r in tree.iter("rect") if r.get("stroke") is None]
    assert len(bars) == 4
    left = sorted(float(bar.get("x", "")) for bar in bars)
    (line,) = [item for item in tree.iter("line") if item.get("stroke-dasharray")]
    at = float(line.get("x1", ""))
    assert left[0] < left[1] < at < left[2] < left[3]
    tall = {float(bar.get("x", "")): float(bar.get("height", "")) for bar in bars}
    assert tall[left[0]] == pytest.approx(2 * tall[left[1]])


def test_a_histogram_of_one_value_and_a_curve_of_two_points_are_drawn() -> None:
    ElementTree.fromstring(svg_histogram({"good": [3.0]}, 3.0, "Scores"))
    ElementTree.fromstring(svg_roc({"a": [(0.0, 0.0), (1.0, 1.0)], "b & c": [(0.0, 1.0), (1.0, 1.0)]}, "ROC"))


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(5.76, 16.0, [6, 8, 10, 12, 14, 16]), (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3e-5, 3e-5, None)],
)
def test_ticks_are_round_and_inside(low: float, high: float, wanted: list[float] | None) -> None:
    found = ticks(low, high)
    assert wanted is None or found == wanted
    assert 3 <= len(found) <= 8
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
