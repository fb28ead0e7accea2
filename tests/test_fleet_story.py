"""The week of a plant: publisher, server and cameras as processes, and what the books say at its end."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "edge_examples"


def test_a_week_of_updates_reaches_every_camera_and_costs_no_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("tuf")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    rows = importlib.import_module("fleet_update").main(tmp_path / "plant")
    # On Wednesday the pilot camera alone had the third release at first.
    assert "pilot first: flange-3 flange-2 flange-2" in capsys.readouterr().out
    assert [row.device for row in rows] == ["pilot", "north", "south"]
    for row in rows:
        # The fourth, under which nothing would alarm, was refused by each of them.
        assert (row.release, row.rejected) == ("flange-3", 1)
        assert row.frames > 36
        assert (row.lost, row.mixed) == (0, 0)
        assert row.verdicts == {
            "good-0": ["OK", "OK", "OK"],
            "good-1": ["OK", "OK", "OK"],
            "code-0": ["NG", "OK", "OK"],
            "dent-0": ["OK", "OK", "NG"],
            "dent-1": ["OK", "OK", "NG"],
        }
