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
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("uvicorn")
    from edgead.server_side.ota.status_store import StatusStore

    monkeypatch.syspath_prepend(str(EXAMPLES))
    rows = importlib.import_module("fleet_update").main(tmp_path / "plant")
    # On Wednesday the pilot camera alone had the third release at first.
    said = capsys.readouterr().out
    assert "pilot first: flange-3 flange-2 flange-2" in said
    assert said.count("north died with 139 and is started again") >= 3
    assert [(row.device, row.release) for row in rows] == [
        ("pilot", "flange-5"),
        ("north", "flange-3"),
        ("south", "flange-5"),
    ]
    early = {1: "confirmed", 2: "confirmed", 3: "confirmed", 4: "rejected"}
    for row in rows:
        assert row.frames > 36
        assert (row.lost, row.mixed) == (0, 0)
        # The fourth, under which nothing would alarm, was refused by each of them; under the fifth one of them died.
        dead = row.device == "north"
        assert row.refused == 1 + dead
        assert row.told == early | {5: "rolled back" if dead else "confirmed"}
        longer = 3 if dead else 4
        assert row.verdicts == {
            "good-0": ["OK", "OK", "OK", "OK"][:longer],
            "good-1": ["OK", "OK", "OK", "OK"][:longer],
            "code-0": ["NG", "OK", "OK", "OK"][:longer],
            "dent-0": ["OK", "OK", "NG", "NG"][:longer],
            "dent-1": ["OK", "OK", "NG", "NG"][:longer],
        }
    # What the publisher sees of it, as a table and as a page.
    assert "3 cameras heard of" in said
    assert "flange 5 rolled back: 3 starts without a confirmation" in said
    assert "to look at: 1 of 3 cameras" in said
    page = (tmp_path / "plant" / "fleet.html").read_text()
    assert "3 starts without a confirmation" in page
    # Every status came, each once; a death may cost a number, never a status.
    with StatusStore(str(tmp_path / "plant" / "fleet.db"), create=False) as store:
        for row in rows:
            numbers = [one.status.sequence for one in store.history(row.device)]
            deaths = said.count(f"{row.device} died")
            assert len(set(numbers)) == len(numbers) >= numbers[-1] - deaths
