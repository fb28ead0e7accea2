"""The inspector on real engines: one version per frame, answers in time, and no frame that ends the stream."""

from __future__ import annotations

import importlib.util
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import BundleError, ImageError, InputError, KnowledgeError
from edgead.runtime.inspection import STAGES, Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack
from edgead.runtime.spec import Calibration, Preprocessing, Region, Tiling

ROOT3 = 3**0.5


@pytest.fixture
def inspector(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector(tiny_bundle, threads=1) as made:
        yield made


def engines() -> list[str]:
    return ["onnx", *(["openvino"] if importlib.util.find_spec("openvino") else [])]


def test_a_frame_is_ng_exactly_if_its_score_is_greater_than_the_threshold(
    tiny: ModuleType, inspector: Inspector
) -> None:
    at = inspector.inspect(tiny.frame(tiny.GREY + 10)).score
    assert at is not None
    assert at == pytest.approx(10 * ROOT3, rel=1e-6)
    inspector.swap(tiny.pack(threshold=at))
    assert inspector.inspect(tiny.frame(tiny.GREY + 10)).verdict is Verdict.OK
    inspector.swap(tiny.pack(threshold=float(np.nextafter(at, 0))))
    assert inspector.inspect(tiny.frame(tiny.GREY + 10)).verdict is Verdict.NG


def test_an_inspection_says_all_that_it_rests_on(tiny: ModuleType, inspector: Inspector) -> None:
    inspection = inspector.inspect(tiny.frame(200))
    pack = inspector.knowledge()
    assert inspection.product == "part"
    assert inspection.knowledge == pack.version
    assert inspection.threshold == pack.calibration.threshold
    assert inspection.normalised == pack.calibration.normalise(inspection.score)
    assert list(inspection.timings) == list(STAGES)
    parts = sum(value for stage, value in inspection.timings.items() if stage != "total")
    assert parts <= inspection.timings["total"]
    assert inspection.reason is None
    assert not inspection.passes


def test_the_map_of_an_inspection_outlives_the_next_frame(tiny: ModuleType, tmp_path: Path) -> None:
    made = tiny.bundle(tmp_path / "b", targets=engines())
    for engine in engines():
        with Inspector(made, target=engine, threads=1) as inspector:
            first = inspector.inspect(tiny.frame(110)).anomaly_map
            assert first is not None
            before = first.copy()
            inspector.inspect(tiny.frame(240))
            np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("engine", engines())
def test_two_threads_answer_as_one_does(tiny: ModuleType, tmp_path: Path, engine: str) -> None:
    made = tiny.bundle(tmp_path / "b", targets=engines())
    seen = []
    for threads in (1, 2):
        with Inspector(made, target=engine, threads=threads) as inspector:
            assert inspector.threads == threads
            seen.append([inspector.inspect(tiny.frame(level)) for level in (110, 240)])
    for one, two in zip(*seen, strict=True):
        assert two.score == pytest.approx(one.score, rel=1e-6)
        np.testing.assert_allclose(two.anomaly_map, one.anomaly_map, rtol=1e-6)


@pytest.mark.parametrize(
    ("said", "threads"), [("1", 1), ("1,4", 1), ("4096", None), ("", None), ("0", None), ("all", None)]
)
def test_whoever_limits_openmp_limits_an_inspector(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, said: str, threads: int | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with Inspector(tiny_bundle) as inspector:
        there = inspector.threads
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    with Inspector(tiny_bundle) as inspector:
        assert inspector.threads == (threads or there)


@pytest.mark.parametrize("engine", engines())
def test_a_swap_at_full_speed_mixes_no_versions_and_loses_no_frame(
    tiny: ModuleType, tmp_path: Path, engine: str
) -> None:
    # Score and threshold both differ between versions, so half of one and half of another would show.
    packs = [tiny.pack([[level] * 3], threshold=float(level)) for level in (20, 40, 60, 80, 100)]
    made = tiny.bundle(tmp_path / "b", [packs[0]], targets=engines())
    frame = tiny.frame(120)
    truth = {}
    for pack in packs:
        with Inspector(made, target=engine, threads=1, packs=[pack]) as alone:
            result = alone.inspect(frame)
            truth[result.knowledge] = (result.score, result.threshold, result.verdict)
    assert len(set(truth.values())) == len(packs)
    results, frames = [], 250
    with Inspector(made, target=engine, threads=1) as inspector:
        ended = threading.Event()
        swapped = []

        def swap() -> None:
            turn = 0
            while not ended.is_set():
                turn += 1
                swapped.append(inspector.swap(packs[turn % len(packs)]))

        thread = threading.Thread(target=swap)
        thread.start()
        for _ in range(frames):
            results.append(inspector.inspect(frame))
        ended.set()
        thread.join()
        final = inspector.inspect(frame).knowledge
    assert len(results) == frames
    for result in results:
        assert (result.score, result.threshold, result.verdict) == truth[result.knowledge]
    assert len({result.knowledge for result in results}) > 1
    assert all(one[1] == other[0] for one, other in itertools.pairwise(swapped))
    assert final == swapped[-1][1]


def test_frames_of_several_threads_take_their_turns_and_swaps_do_not_disturb_them(
    tiny: ModuleType, inspector: Inspector
) -> None:
    packs = [tiny.pack([[level] * 3]) for level in (50, 100)]
    expected = {packs[0].version: 50, packs[1].version: 100}
    wrong: list[object] = []

    def work(level: int) -> None:
        for _ in range(60):
            result = inspector.inspect(tiny.frame(level), deadline_ms=60_000 if level % 2 else None)
            if result.score != pytest.approx(abs(level - expected[result.knowledge]) * ROOT3, rel=1e-5):
                wrong.append(result)

    inspector.swap(packs[0])
    threads = [threading.Thread(target=work, args=(level,)) for level in (110, 121, 130)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        inspector.swap(packs[1])
        inspector.swap(packs[0])
    assert not wrong


def test_an_old_head_is_closed_once_no_frame_holds_it(tiny: ModuleType, slow_bundle: Path) -> None:
    with Inspector(slow_bundle, threads=1) as inspector:
        old = inspector._active["part"]
        answers = []
        frame = threading.Thread(target=lambda: answers.append(inspector.inspect(tiny.frame())))
        frame.start()
        while not old.users:
            time.sleep(0.001)
        inspector.swap(tiny.pack([[50] * 3]))
        assert old.retired
        assert old.users == 1
        frame.join()
        assert answers[0].knowledge == old.version
        assert answers[0].verdict is Verdict.OK
        assert old.users == 0
        with pytest.raises(Exception, match="closed"):
            old.head.infer({port.name: np.zeros(port.shape, port.dtype) for port in old.head.inputs})


def test_the_same_knowledge_again_changes_nothing(tiny: ModuleType, inspector: Inspector) -> None:
    head = inspector._active["part"].head
    version = inspector.knowledge().version
    assert inspector.swap(tiny.pack()) == (version, version)
    assert inspector._active["part"].head is head


def test_knowledge_that_does_not_fit_leaves_the_old_in_place(tiny: ModuleType, inspector: Inspector) -> None:
    version = inspector.knowledge().version
    good = tiny.pack()
    foreign = Pack("part", "f" * 64, good.calibration, good.arrays)
    narrow = tiny.pack([[1.0, 2.0]])
    for pack in (foreign, narrow):
        with pytest.raises(KnowledgeError):
            inspector.swap(pack)
    assert inspector.inspect(tiny.frame()).knowledge == version


def test_a_head_that_cannot_be_built_leaves_the_old_in_place(tiny: ModuleType, tmp_path: Path) -> None:
    made = tiny.bundle(tmp_path / "b")
    with Inspector(made, threads=1) as inspector:
        version = inspector.knowledge().version
        (tmp_path / "b" / "engines" / "onnx-fp32" / "head.onnx").write_bytes(b"rot")
        with pytest.raises(BundleError):
            inspector.swap(tiny.pack([[50] * 3]))
        result = inspector.inspect(tiny.frame())
    assert (result.knowledge, result.verdict) == (version, Verdict.OK)


def test_products_share_the_trunk_and_keep_their_own_knowledge(tiny: ModuleType, tmp_path: Path) -> None:
    made = tiny.bundle(tmp_path / "b", [tiny.pack(product="bolt"), tiny.pack([[200] * 3], product="nut")])
    with Inspector(made, threads=1) as inspector:
        assert inspector.products == ("bolt", "nut")
        assert inspector.inspect(tiny.frame(100)).product == "bolt"
        assert inspector.inspect(tiny.frame(100), product="bolt").verdict is Verdict.OK
        assert inspector.inspect(tiny.frame(100), product="nut").verdict is Verdict.NG
        assert inspector.inspect(tiny.frame(200), product="nut").verdict is Verdict.OK
        assert inspector.swap(tiny.pack([[7] * 3], product="washer"))[0] is None
        assert inspector.inspect(tiny.frame(8), product="washer").verdict is Verdict.OK
        with pytest.raises(InputError, match="bolt, nut, washer"):
            inspector.inspect(tiny.frame(), product="bol")
    with Inspector(made, threads=1, products=["nut"]) as inspector:
        assert inspector.products == ("nut",)
        assert inspector.inspect(tiny.frame(200)).product == "nut"


def test_a_frame_that_makes_nan_is_not_inspected_and_the_next_one_is(tiny: ModuleType, inspector: Inspector) -> None:
    result = inspector.inspect(tiny.frame(255))
    assert result.verdict is Verdict.NOT_INSPECTED
    assert result.score is None
    assert not result.passes
    assert "not a number" in str(result.reason)
    assert inspector.inspect(tiny.frame()).verdict is Verdict.OK


@pytest.mark.parametrize("deadline_ms", [None, 60_000])
def test_a_frame_on_which_the_engine_raises_is_not_inspected_and_the_next_one_is(
    tiny: ModuleType, inspector: Inspector, deadline_ms: float | None
) -> None:
    result = inspector.inspect(tiny.frame(tiny.POISON), deadline_ms=deadline_ms)
    assert result.verdict is Verdict.NOT_INSPECTED
    assert str(result.reason).startswith("engine: ")
    assert inspector.inspect(tiny.frame(), deadline_ms=deadline_ms).verdict is Verdict.OK
    assert inspector._active["part"].users == 0


def test_a_late_frame_is_answered_by_its_deadline_and_the_engine_recovers(tiny: ModuleType, slow_bundle: Path) -> None:
    with Inspector(slow_bundle, threads=1) as inspector:
        usual = inspector.inspect(tiny.frame()).timings["total"]
        deadline = usual / 4
        start = time.perf_counter()
        late = inspector.inspect(tiny.frame(), deadline_ms=deadline)
        waited = (time.perf_counter() - start) * 1e3
        assert late.verdict is Verdict.NOT_INSPECTED
        assert str(late.reason).startswith("deadline")
        assert deadline <= waited < usual
        # The engine is still busy with the late frame: this one's turn does not come in time either.
        assert inspector.inspect(tiny.frame(), deadline_ms=deadline).verdict is Verdict.NOT_INSPECTED
        # Patience enough for the late frame and its own.
        patient = inspector.inspect(tiny.frame(), deadline_ms=60_000)
        assert patient.verdict is Verdict.OK
        assert patient.timings["total"] < 60_000
        assert inspector._active["part"].users == 0


def test_a_frame_within_its_deadline_has_the_same_answer_as_without(tiny: ModuleType, inspector: Inspector) -> None:
    free, timed = inspector.inspect(tiny.frame(140)), inspector.inspect(tiny.frame(140), deadline_ms=60_000)
    assert (free.score, free.regions, free.evidence) == (timed.score, timed.regions, timed.evidence)


def test_a_bad_frame_is_the_callers_mistake(inspector: Inspector) -> None:
    for bad in (np.zeros((16, 16), np.uint8), np.zeros((16, 16, 3), np.float32), np.zeros((0, 16, 3), np.uint8)):
        with pytest.raises(ImageError):
            inspector.inspect(bad)
    assert inspector._active["part"].users == 0


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_a_region_lies_where_the_defect_is_in_the_source_frame(tiny: ModuleType, tmp_path: Path, rotate: int) -> None:
    # The region of interest is declared in the rotated frame, which is 128 x 160 or 160 x 128.
    roi = Region(16, 32, 64, 64)
    spec = tiny.detector(Preprocessing(16, 16, rotate=rotate, roi=roi))
    made = tiny.bundle(tmp_path / "b", [tiny.pack(spec=spec)], spec=spec)
    # A defect that fills one patch of the engine's frame, in the rotated frame and turned back.
    turned = tiny.frame(size=(160, 128) if rotate in (0, 180) else (128, 160))
    turned[48:64, 48:64] = 220
    frame = np.ascontiguousarray(np.rot90(turned, rotate // 90))
    defect = np.argwhere(frame[..., 0] == 220)
    (top, left), (bottom, right) = defect.min(0), defect.max(0)
    with Inspector(made, threads=1) as inspector:
        result = inspector.inspect(frame)
    assert result.verdict is Verdict.NG
    (region,) = result.regions
    assert (region.box.x, region.box.y) == (left, top)
    assert (region.box.x + region.box.width - 1, region.box.y + region.box.height - 1) == (right, bottom)
    assert region.area == 16 * 16
    assert region.peak == pytest.approx(120 * ROOT3, rel=1e-5)
    assert left <= region.point[0] <= right
    assert top <= region.point[1] <= bottom


def test_tiles_are_one_batch_whose_worst_decides_and_whose_map_is_one(tiny: ModuleType, tmp_path: Path) -> None:
    spec = tiny.detector(Preprocessing(16, 16, tiles=Tiling(3, 2, overlap=0.25)))
    rows = np.float32([[tiny.GREY] * 3, [250, 0, 0], [150, 80, 80], [120, 60, 90], [180, 40, 70], [60, 60, 160]])
    made = tiny.bundle(tmp_path / "b", [tiny.pack(rows, spec=spec, first_id=41)], spec=spec)
    frame = tiny.frame(size=(160, 112))
    with Inspector(made, threads=1) as inspector:
        assert inspector.inspect(frame).verdict is Verdict.OK
        frame[90:106, 130:150] = (20, 10, 230)
        result = inspector.inspect(frame)
        patches = inspector.embed(frame)["patches"]
    assert patches.shape == (6, 16, 3)
    assert result.verdict is Verdict.NG
    assert result.anomaly_map is not None
    assert result.anomaly_map.shape[1] > result.anomaly_map.shape[0] > 16
    assert result.score == result.anomaly_map.max()
    box = result.regions[0].box
    assert box.x < 150
    assert box.x + box.width > 130
    assert box.y < 106
    assert box.y + box.height > 90
    # The row is that of the worst patch, in whichever tile it lies.
    distances = np.linalg.norm(patches[:, :, None] - rows, axis=-1)
    worst = np.unravel_index(distances.min(-1).argmax(), distances.shape[:2])
    row = int(distances[worst].argmin())
    assert row != 0
    assert worst[0] > 0
    assert (result.evidence[0].bank, result.evidence[0].row, result.evidence[0].row_id) == (
        "bank.normal",
        row,
        41 + row,
    )
    assert result.evidence[0].point is not None
    assert box.x <= result.evidence[0].point[0] < box.x + box.width
    assert box.y <= result.evidence[0].point[1] < box.y + box.height


def test_each_region_names_the_row_that_it_was_compared_with(tiny: ModuleType, tmp_path: Path) -> None:
    rows = [[tiny.GREY] * 3, [255, 0, 0], [0, 0, 255]]
    made = tiny.bundle(tmp_path / "b", [tiny.pack(rows, first_id=5)])
    frame = tiny.frame()
    frame[0:4, 0:4] = (200, 0, 0)
    frame[12:16, 12:16] = (0, 0, 180)
    with Inspector(made, threads=1) as inspector:
        result = inspector.inspect(frame)
    assert [(item.row, item.row_id, item.point) for item in result.evidence] == [(2, 7, (14, 14)), (1, 6, (2, 2))]
    assert [region.point for region in result.regions] == [(12, 12), (0, 0)]


def test_knowledge_without_a_map_threshold_still_shows_where(tiny: ModuleType, inspector: Inspector) -> None:
    inspector.swap(tiny.pack(map_threshold=None))
    frame = tiny.frame()
    frame[4:8, 8:12] = 200
    (region,) = inspector.inspect(frame).regions
    assert region.box == Region(8, 4, 4, 4)


def test_enrolment_features_are_copies(tiny: ModuleType, inspector: Inspector) -> None:
    first = inspector.embed(tiny.frame(50))["patches"]
    inspector.embed(tiny.frame(200))
    assert first.shape == (1, 16, 3)
    assert (first == 50).all()


def test_a_closed_inspector_says_so_and_closes_twice(tiny: ModuleType, tiny_bundle: Path) -> None:
    inspector = Inspector(open_bundle(tiny_bundle), threads=1)
    inspector.close()
    inspector.close()
    with pytest.raises(InputError, match="closed"):
        inspector.inspect(tiny.frame())
    with pytest.raises(InputError, match="closed"):
        inspector.swap(tiny.pack([[50] * 3]))


def test_calibration_alone_is_new_knowledge(tiny: ModuleType, inspector: Inspector) -> None:
    pack = inspector.knowledge()
    stricter = Pack(pack.product, pack.fingerprint, Calibration(threshold=1.0), pack.arrays)
    frame = tiny.frame(tiny.GREY + 5)
    before = inspector.inspect(frame)
    assert inspector.swap(stricter) == (pack.version, stricter.version)
    after = inspector.inspect(frame)
    assert before.score == after.score
    assert (before.verdict, after.verdict) == (Verdict.OK, Verdict.NG)
