"""What a device tests before a release becomes active: engine test, release test, shadow replay; and its frames."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from edgead.runtime.bundle import golden_files, open_bundle, write_bundle
from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import EngineError, SelfTestError
from edgead.runtime.frames import FrameRing
from edgead.runtime.golden import golden_inspections, golden_scores
from edgead.runtime.inspection import Verdict
from edgead.runtime.knowledge import Pack
from edgead.runtime.release import Release, digest_of
from edgead.runtime.self_test import Shadow, engine_test, release_test, shadow_replay
from edgead.runtime.spec import EngineRecord

BRIGHT = 100.0 * 3**0.5
"""Distance of the golden defect from the tiny detector's one row."""


def made(
    path: Path, tiny: ModuleType, bright: float, *, graphs: tuple[bytes, bytes] | None = None, golden: bool = True
) -> Path:
    trunk, head = graphs or (tiny.trunk_graph(), tiny.head_graph())
    records, pictures = golden_files(np.stack([tiny.frame(), tiny.frame(200)]), [0.0, bright], [False, True])
    where = "engines/onnx-fp32/{}.onnx"
    write_bundle(
        path,
        name="tiny",
        detector=tiny.detector(),
        engines=[EngineRecord("onnx-fp32", "onnx", "fp32", where.format("trunk"), where.format("head"), "a test")],
        packs={"part": tiny.pack()},
        golden=records if golden else (),
        files={where.format("trunk"): trunk, where.format("head"): head, **(pictures if golden else {})},
    )
    return path


@pytest.fixture(scope="module")
def bundle(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("tested") / "tiny.edgead", tiny, BRIGHT)


def release(bundle: Path, pack: Pack, **fields: Any) -> Release:
    found = golden_inspections(bundle, [pack])["part"]
    data = bundle.read_bytes()
    honest = Release(
        schema=1,
        name="part-2",
        counter=2,
        fingerprint=pack.fingerprint,
        engine=digest_of(data),
        product_packs={"part": pack.digest},
        sizes={digest_of(data): len(data), pack.digest: 1},
        scores={"part": golden_scores(found)},
        must_alarm={"part": tuple(path for path, item in found.items() if item.verdict is Verdict.NG)},
        tolerance=0.1,
    )
    return msgspec.structs.replace(honest, **fields)


def test_an_intact_engine_passes_its_test(bundle: Path) -> None:
    assert engine_test(bundle) == 2
    assert engine_test(open_bundle(bundle), target="onnx", threads=1) == 2


def test_row_32_an_engine_that_gives_other_scores_fails_its_test(tiny: ModuleType, tmp_path: Path) -> None:
    off = made(tmp_path / "off.edgead", tiny, BRIGHT * 1.1)
    with pytest.raises(SelfTestError, match=r"golden/001\.png in the engine test"):
        engine_test(off)


def test_row_32_an_engine_whose_head_has_another_unit_fails_its_test(tiny: ModuleType, tmp_path: Path) -> None:
    import onnx

    head = onnx.load_from_string(tiny.head_graph())
    next(node for node in head.graph.node if node.op_type == "Sqrt").op_type = "Abs"
    squared = made(tmp_path / "squared.edgead", tiny, BRIGHT, graphs=(tiny.trunk_graph(), head.SerializeToString()))
    with pytest.raises(SelfTestError, match="engine test"):
        engine_test(squared)


def test_row_32_an_engine_that_the_library_refuses_is_an_error_of_the_engine(tiny: ModuleType, tmp_path: Path) -> None:
    broken = made(tmp_path / "broken.edgead", tiny, BRIGHT, graphs=(b"no graph", tiny.head_graph()))
    with pytest.raises(EngineError):
        engine_test(broken)


def test_a_bundle_without_golden_images_has_nothing_to_test(tiny: ModuleType, tmp_path: Path) -> None:
    assert engine_test(made(tmp_path / "none.edgead", tiny, BRIGHT, golden=False)) == 0


def test_a_release_that_says_what_this_machine_finds_passes(bundle: Path, tiny: ModuleType) -> None:
    pack = tiny.pack([(100, 100, 100), (110, 110, 110)], threshold=25.0)
    assert release_test(bundle, release(bundle, pack), {"part": pack}) == 2


def test_row_32_scores_beyond_the_tolerance_fail_the_release_test(bundle: Path, tiny: ModuleType) -> None:
    pack = tiny.pack()
    good = release(bundle, pack).scores["part"]
    for shift, passes in ((0.09, True), (-0.09, True), (0.11, False), (-0.11, False)):
        scores = {"part": {path: score + shift for path, score in good.items()}}
        told = release(bundle, pack, scores=scores)
        if passes:
            assert release_test(bundle, told, {"part": pack}) == 2
        else:
            with pytest.raises(SelfTestError, match="release test"):
                release_test(bundle, told, {"part": pack})


def test_row_32_a_golden_defect_that_no_longer_alarms_fails_the_release_test(bundle: Path, tiny: ModuleType) -> None:
    # Somebody taught the camera that the defect is normal.
    pack = tiny.pack([(100, 100, 100), (200, 200, 200)])
    told = release(bundle, pack, must_alarm={"part": ("golden/001.png",)})
    with pytest.raises(SelfTestError, match=r"golden/001\.png to alarm"):
        release_test(bundle, told, {"part": pack})


def test_a_release_without_scores_cannot_be_tested_and_fails(bundle: Path, tiny: ModuleType) -> None:
    pack = tiny.pack()
    with pytest.raises(SelfTestError, match="scores of golden images"):
        release_test(bundle, release(bundle, pack, scores={}), {"part": pack})


def test_a_shadow_replay_names_the_frames_that_are_judged_differently(bundle: Path, tiny: ModuleType) -> None:
    old, new = tiny.pack(threshold=30.0), tiny.pack([(100, 100, 100), (150, 150, 150)], threshold=10.0)
    frames = [(str(level), tiny.frame(level)) for level in (100, 112, 150, 200)]
    shadow = shadow_replay(frames, (bundle, old), (bundle, new))
    assert shadow.frames == 4
    assert [(item.frame, item.before, item.after) for item in shadow.changed] == [
        ("112", Verdict.OK, Verdict.NG),
        ("150", Verdict.NG, Verdict.OK),
    ]
    assert shadow.changed[1].score_before == pytest.approx(50.0 * 3**0.5)
    assert shadow.changed[1].score_after == pytest.approx(0.0)
    assert shadow_replay([], (bundle, old), (bundle, new)) == Shadow(0)


def test_a_ring_keeps_the_last_frames_at_a_bounded_rate(tiny: ModuleType, tmp_path: Path) -> None:
    ring = FrameRing(tmp_path / "frames", keep=3, every_s=10.0)
    kept = [ring.add(tiny.frame(level), now=float(level)) for level in range(0, 100, 4)]
    assert sum(kept) == 9  # 0, 12, 24, ..., 96
    assert [int(frame[0, 0, 0]) for _, frame in ring.read()] == [72, 84, 96]
    again = FrameRing(tmp_path / "frames", keep=3, every_s=10.0)
    assert again.add(tiny.frame(120), now=0.0)
    assert [int(frame[0, 0, 0]) for _, frame in again.read()] == [84, 96, 120]
    assert [name for name, _ in again.read(2)] == ["000000008.png", "000000009.png"]
    assert len(list((tmp_path / "frames").iterdir())) == 3


def test_a_frame_that_is_damaged_on_the_disk_is_left_out(tiny: ModuleType, tmp_path: Path) -> None:
    ring = FrameRing(tmp_path, every_s=0.0)
    for level in (10, 20, 30):
        ring.add(tiny.frame(level), float(level))
    (tmp_path / "000000001.png").write_bytes(b"\0" * 50)
    (tmp_path / "notes.png").write_bytes(b"")
    assert [int(frame[0, 0, 0]) for _, frame in ring.read()] == [10, 30]


def test_a_disk_that_refuses_costs_the_frame_alone(tiny: ModuleType, tmp_path: Path) -> None:
    class Full(RealDisk):
        def write(self, path: Path, chunks: Any) -> None:
            raise OSError(28, "No space left on device")

    ring = FrameRing(tmp_path / "frames", every_s=0.0, disk=Full())
    assert not ring.add(tiny.frame(), 0.0)
    assert ring.read() == []
