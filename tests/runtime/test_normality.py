"""What a sentence makes normal: the rule, and the inspector on real engines before, while and after it is said."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle
from edgead.runtime.engines import Session
from edgead.runtime.errors import EngineError, InputError, KnowledgeError
from edgead.runtime.inspection import STAGES, Inspection, Verdict, decode_line, encode_line, result_line
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack
from edgead.runtime.normality import is_due, suppress_map, suppress_score, suppression_map
from edgead.runtime.overlay import overlay
from edgead.runtime.sinks import text_line
from edgead.runtime.sources import Capture, Source
from edgead.runtime.spec import Calibration, Preprocessing, Tiling
from edgead.runtime.stream import Stream

ENGINES = ["onnx", *(["openvino"] if importlib.util.find_spec("openvino") else [])]


@pytest.fixture(scope="session")
def pair(normality_pair: ModuleType) -> ModuleType:
    return normality_pair


@pytest.fixture(scope="module")
def made(pair: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two trunks, on every engine."""
    bundle: Bundle = pair.bundle(tmp_path_factory.mktemp("pair") / "pair.bundle", ENGINES)
    return bundle


@pytest.fixture(scope="module")
def shared(pair: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One trunk for both heads."""
    path = tmp_path_factory.mktemp("shared") / "shared.bundle"
    bundle: Bundle = pair.bundle(path, ENGINES, second=pair.normality(scale=1.0))
    return bundle


# ---- the rule ----------------------------------------------------------------------------------------------------

finite = st.floats(0, 1e6, width=32)
shares = st.floats(0, 1, width=32)


def maps(values: st.SearchStrategy[float]) -> st.SearchStrategy[NDArray[np.float32]]:
    return arrays(np.float32, (3, 4), elements=values)


@settings(max_examples=500, deadline=None)
@given(maps(finite), maps(shares), finite, st.floats(-10, 1e6))
def test_lazy_decides_as_eager_for_every_score_map_and_suppression(
    anomaly_map: NDArray[np.float32], share: NDArray[np.float32], score: float, threshold: float
) -> None:
    eager = suppress_score(score, anomaly_map, suppress_map(anomaly_map, share))
    lazy = eager if is_due("lazy", score, threshold) else score
    assert (lazy > threshold) == (eager > threshold)
    assert eager <= score
    assert eager >= 0


@settings(max_examples=300, deadline=None)
@given(maps(st.floats(-1e6, 1e6, width=32)), maps(shares), st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6))
def test_lazy_decides_as_eager_where_maps_and_scores_are_negative_too(
    anomaly_map: NDArray[np.float32], share: NDArray[np.float32], score: float, threshold: float
) -> None:
    lowered = suppress_map(anomaly_map, share)
    assert (lowered <= anomaly_map).all()
    eager = suppress_score(score, anomaly_map, lowered)
    lazy = eager if is_due("lazy", score, threshold) else score
    assert (lazy > threshold) == (eager > threshold)


@settings(max_examples=200, deadline=None)
@given(maps(finite), maps(shares))
def test_of_a_score_that_is_the_maps_maximum_the_rule_is_the_papers(
    anomaly_map: NDArray[np.float32], share: NDArray[np.float32]
) -> None:
    lowered = suppress_map(anomaly_map, share)
    np.testing.assert_allclose(lowered, anomaly_map * (1 - share), rtol=1e-6)
    top = float(anomaly_map.max())
    assert suppress_score(top, anomaly_map, lowered) == pytest.approx(float(lowered.max()), rel=1e-6)


def test_a_negative_value_is_never_raised_by_suppression() -> None:
    anomaly_map = np.float32([[-4.0, -2.0], [1.0, 3.0]])
    lowered = suppress_map(anomaly_map, np.float32([[1.0, 1.0], [1.0, 0.5]]))
    np.testing.assert_array_equal(lowered, np.float32([[-4, -4], [-4, -0.5]]))
    # A product would have made -4 and -2 to 0, above places that nobody explained.
    assert suppress_score(3.0, anomaly_map, lowered) == pytest.approx(-0.5)


def test_nothing_is_suppressed_in_a_map_that_is_flat_or_by_a_share_of_0() -> None:
    flat = np.zeros((2, 2), np.float32)
    assert suppress_score(1.5, flat, suppress_map(flat, np.ones((2, 2), np.float32))) == 1.5
    some = np.float32([[0.1, 0.7], [-0.3, 0.2]])
    np.testing.assert_allclose(suppress_map(some, np.zeros((2, 2), np.float32)), some, rtol=1e-6)
    np.testing.assert_array_equal(suppress_map(abs(some), np.zeros((2, 2), np.float32)), abs(some))


@pytest.mark.parametrize("value", [np.nan, 1.5, -0.2, np.inf])
def test_a_suppression_map_outside_0_to_1_is_an_engines_failure(value: float) -> None:
    outputs = {"anomaly_map": np.full((1, 4, 4), 0.5, np.float32)}
    outputs["anomaly_map"][0, 1, 2] = value
    with pytest.raises(EngineError):
        suppression_map(outputs, (4, 4), (4, 4, 3), Preprocessing(4, 4))


def test_a_suppression_map_takes_the_size_of_the_anomaly_map() -> None:
    outputs = {"anomaly_map": np.float32([[[0.0, 1.0], [0.0, 1.0]]])}
    made = suppression_map(outputs, (4, 4), (9, 9, 3), Preprocessing(2, 2))
    np.testing.assert_allclose(made[0], [0, 0.25, 0.75, 1])


# ---- the inspector -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trunks", ["two trunks", "one trunk"])
def test_a_sentence_lets_what_it_names_pass_and_nothing_else(
    pair: ModuleType, made: Bundle, shared: Bundle, engine: str, trunks: str
) -> None:
    with Inspector(made if trunks == "two trunks" else shared, target=engine, threads=1) as inspector:
        before = inspector.inspect(pair.frame("red"))
        inspector.swap(pair.with_sentences(inspector.knowledge(), "red"))
        red, blue, good = (inspector.inspect(frame) for frame in (pair.frame("red"), pair.frame("blue"), pair.frame()))
        assert [item.verdict for item in (before, red, blue, good)] == [
            Verdict.NG,
            Verdict.OK,
            Verdict.NG,
            Verdict.OK,
        ]
        (region,) = before.regions
        (passed,) = red.suppressed
        assert (passed.box, passed.area, passed.peak, passed.point) == (
            region.box,
            region.area,
            region.peak,
            region.point,
        )
        assert (passed.sentence, passed.row) == ("red stain", 0)
        assert passed.share > 0.9
        assert red.base_score == before.score
        assert red.regions == ()
        assert red.score is not None
        assert red.score < 0.1 * before.score
        assert blue.suppressed == ()
        assert blue.base_score == pytest.approx(blue.score, rel=0.1)
        # Off again: the very same answer as before.
        inspector.swap(pair.with_sentences(inspector.knowledge()))
        again = inspector.inspect(pair.frame("red"))
        assert (again.verdict, again.score, again.regions) == (before.verdict, before.score, before.regions)


def test_each_region_is_explained_by_its_own_sentence_and_the_rest_still_alarms(pair: ModuleType, made: Bundle) -> None:
    pack = pair.with_sentences(made.pack(), "green", "blue", "red")
    with Inspector(made, target="onnx", threads=1, packs=[pack]) as inspector:
        both = inspector.inspect(pair.frame("red", "blue"))
        assert both.verdict is Verdict.OK
        assert {(item.sentence, item.row, item.box.x) for item in both.suppressed} == {
            ("red stain", 2, 0),
            ("blue thread", 1, 8),
        }
        inspector.swap(pair.with_sentences(made.pack(), "blue"))
        one = inspector.inspect(pair.frame("red", "blue"))
        assert one.verdict is Verdict.NG
        assert [region.box.x for region in one.regions] == [0]
        assert [(item.sentence, item.box.x) for item in one.suppressed] == [("blue thread", 8)]


def test_lazy_runs_the_second_trunk_on_alarms_only_and_eager_on_every_frame(pair: ModuleType, made: Bundle) -> None:
    pack = pair.with_sentences(made.pack(), "red")
    for mode, expected in (("lazy", 1), (None, 1), ("eager", 3)):
        with Inspector(made, target="onnx", threads=1, packs=[pack], suppression=mode) as inspector:
            trunk = counted(inspector)
            results = [inspector.inspect(frame) for frame in (pair.frame(), pair.frame("red"), pair.frame())]
            assert trunk.runs == expected
            assert [result.base_score is not None for result in results].count(True) == expected
            assert [result.verdict for result in results] == [Verdict.OK] * 3
            assert list(results[0].timings) == list(STAGES)
    with pytest.raises(InputError, match="lazy or eager"):
        Inspector(made, target="onnx", suppression="sometimes")  # type: ignore[arg-type]


def test_lazy_and_eager_agree_on_every_frame(pair: ModuleType, made: Bundle) -> None:
    pack = pair.with_sentences(made.pack(), "red", "green")
    rng = np.random.default_rng(0)
    frames = [pair.frame(*chosen) for n in range(3) for chosen in itertools.product(pair.COLOURS, repeat=n)]
    noisy = [np.clip(frame + rng.normal(0, 12, frame.shape), 0, 255).astype(np.uint8) for frame in frames]
    with (
        Inspector(made, target="onnx", threads=1, packs=[pack]) as lazy,
        Inspector(made, target="onnx", threads=1, packs=[pack], suppression="eager") as eager,
    ):
        for frame in [*frames, *noisy]:
            one, other = lazy.inspect(frame), eager.inspect(frame)
            assert one.verdict is other.verdict
            assert one.suppressed == other.suppressed
            if one.base_score is not None:
                assert (one.score, one.regions) == (other.score, other.regions)


def test_a_pack_without_sentences_opens_no_second_trunk(pair: ModuleType, made: Bundle) -> None:
    with Inspector(made, target="onnx", threads=1, suppression="eager") as inspector:
        assert inspector.inspect(pair.frame("red")).base_score is None
        assert inspector._active.normality_trunk is None
        assert inspector._active["carpet"].normality is None
        inspector.swap(pair.with_sentences(made.pack(), "red"))
        assert inspector._active.normality_trunk is not None


def test_a_sentence_makes_no_new_head_of_the_bank_and_a_threshold_none_at_all(pair: ModuleType, made: Bundle) -> None:
    with Inspector(made, target="onnx", threads=1) as inspector:
        bank = inspector._active["carpet"].head
        inspector.swap(pair.with_sentences(made.pack(), "red"))
        first = inspector._active["carpet"].normality
        assert inspector._active["carpet"].head is bank
        inspector.swap(pair.with_sentences(made.pack(), "red", "blue"))
        second = inspector._active["carpet"].normality
        assert inspector._active["carpet"].head is bank
        assert second is not first
        pack = inspector.knowledge()
        inspector.swap(Pack(pack.product, pack.fingerprint, Calibration(threshold=0.3), pack.arrays))
        assert (inspector._active["carpet"].head, inspector._active["carpet"].normality) == (bank, second)
        changed = {**pack.arrays, "bank.normal": pack.arrays["bank.normal"] + np.float32(0.01)}
        inspector.swap(Pack(pack.product, pack.fingerprint, pack.calibration, changed))
        assert inspector._active["carpet"].head is not bank
        assert inspector._active["carpet"].normality is second
        # What nobody holds any more is closed, what somebody holds is not.
        for session, closed in ((bank, True), (first, True), (second, False)):
            feeds = {port.name: np.zeros(port.shape, port.dtype) for port in session.inputs}
            if closed:
                with pytest.raises(EngineError, match="closed"):
                    session.infer(feeds)
            else:
                session.infer(feeds)


def test_tiles_are_compared_tile_by_tile(pair: ModuleType, tmp_path: Path) -> None:
    view = Preprocessing(pair.SIDE, pair.SIDE, tiles=Tiling(2, 2, overlap=0.0))
    bundle = pair.bundle(tmp_path / "b", ["onnx"], first=pair.base(view), second=pair.normality(view))
    frame = np.full((32, 32, 3), pair.GREY, np.uint8)
    frame[20:24, 20:24] = pair.COLOURS["red"]
    frame[4:8, 24:28] = pair.COLOURS["blue"]
    with Inspector(bundle, threads=1, packs=[pair.with_sentences(bundle.pack(), "blue", "red")]) as inspector:
        result = inspector.inspect(frame)
    assert result.verdict is Verdict.OK
    assert {(item.sentence, item.box.x, item.box.y) for item in result.suppressed} == {
        ("red stain", 20, 20),
        ("blue thread", 24, 4),
    }


def test_a_normality_map_that_is_no_number_never_lets_a_part_pass(pair: ModuleType, tmp_path: Path) -> None:
    bundle = pair.bundle(tmp_path / "b", ["onnx"], second=pair.normality(head=pair.NotANumber()))
    with Inspector(bundle, threads=1, packs=[pair.with_sentences(bundle.pack(), "red")]) as inspector:
        result = inspector.inspect(pair.frame("red"))
        assert result.verdict is Verdict.NOT_INSPECTED
        assert "normality map" in str(result.reason)
        assert not result.passes
        assert inspector.inspect(pair.frame()).verdict is Verdict.OK
        assert inspector._active["carpet"].users == 0


def test_a_second_trunk_that_fails_never_lets_a_part_pass(pair: ModuleType, made: Bundle) -> None:
    with Inspector(made, target="onnx", threads=1, packs=[pair.with_sentences(made.pack(), "red")]) as inspector:
        inspector.inspect(pair.frame("red"))
        trunk = inspector._active.normality_trunk
        assert trunk is not None
        trunk.close()  # as if the library had lost it
        result = inspector.inspect(pair.frame("red"))
        assert (result.verdict, result.suppressed) == (Verdict.NOT_INSPECTED, ())
        assert str(result.reason).startswith("engine: ")
        assert inspector.inspect(pair.frame()).verdict is Verdict.OK


def test_a_second_trunk_that_comes_too_late_is_answered_by_the_deadline(pair: ModuleType, made: Bundle) -> None:
    with Inspector(made, target="onnx", threads=1, packs=[pair.with_sentences(made.pack(), "red")]) as inspector:
        known = inspector._active["carpet"]
        assert known.normality is not None
        known.normality = head = Counted(known.normality)
        inspector._active._holders[head] = inspector._active._holders.pop(head.inner)
        trunk = counted(inspector)
        trunk.seconds = 0.5
        late = inspector.inspect(pair.frame("red"), deadline_ms=100)
        assert late.verdict is Verdict.NOT_INSPECTED
        assert str(late.reason).startswith("deadline")
        assert late.timings["total"] < 400
        # A good part needs no second trunk; and between trunk and head the late frame was given up.
        assert inspector.inspect(pair.frame(), deadline_ms=10_000).verdict is Verdict.OK
        assert (trunk.runs, head.runs) == (1, 0)
        trunk.seconds = 0.0
        assert inspector.inspect(pair.frame("red"), deadline_ms=10_000).verdict is Verdict.OK
        assert (trunk.runs, head.runs) == (2, 1)


def test_the_capacity_and_the_feature_space_of_sentences_are_checked(pair: ModuleType, made: Bundle) -> None:
    with Inspector(made, target="onnx", threads=1) as inspector:
        pack = inspector.knowledge()
        wide = {**pack.arrays, "normality.table": np.ones((1, 5), np.float32)}
        uneven = {
            **pair.with_sentences(pack, "red", "blue").arrays,
            "normality.normal": np.ones((1, 3), np.float32),
        }
        for changed in (wide, uneven):
            del changed["normality.table.text"]
            with pytest.raises(KnowledgeError):
                inspector.swap(Pack(pack.product, pack.fingerprint, pack.calibration, changed))
        assert inspector.knowledge() is pack


@pytest.mark.parametrize("engine", ENGINES)
def test_sentences_come_and_go_at_full_speed_and_no_frame_is_mixed_or_lost(
    pair: ModuleType, made: Bundle, engine: str
) -> None:
    start = made.pack()
    packs = [start, *(pair.with_sentences(start, *chosen) for chosen in (["red"], ["blue"], ["red", "blue"]))]
    frame, names = pair.frame("red", "blue"), [f"{number:04d}" for number in range(400)]
    truth: dict[str, Any] = {}
    for pack in packs:
        with Inspector(made, target=engine, threads=1, packs=[pack]) as alone:
            truth[pack.version] = answer(alone.inspect(frame))
    assert len({str(value) for value in truth.values()}) == 4
    ended = threading.Event()
    with Inspector(made, target=engine, threads=1) as inspector:

        def swap() -> None:
            turn = 0
            while not ended.is_set():
                turn += 1
                inspector.swap(packs[turn % 4])

        thread = threading.Thread(target=swap)
        thread.start()
        results: list[tuple[str, Any]] = []
        turns = 0
        # On a busy machine a whole pass of frames may end before a swap does.
        while turns < 20 and len({result.knowledge for _, result in results}) < 2:
            results += [(capture.name, result) for capture, result in Stream(inspector, Frames(frame, names))]
            turns += 1
        ended.set()
        thread.join()
    assert [name for name, _ in results] == names * turns
    assert all(answer(result) == truth[result.knowledge] for _, result in results)
    assert len({result.knowledge for _, result in results}) > 1


# ---- for people --------------------------------------------------------------------------------------------------


def test_lines_say_which_sentence_let_a_part_pass(pair: ModuleType, made: Bundle) -> None:
    with Inspector(made, target="onnx", threads=1, packs=[pair.with_sentences(made.pack(), "red")]) as inspector:
        frames = pair.frame("red"), pair.frame("red", "blue"), pair.frame()
        passed, alarm, good = (inspector.inspect(frame) for frame in frames)
    capture = Capture("7.png", "7", frames[0])
    assert 'passed: "red stain" explains 1 region' in text_line(capture, passed)
    assert 'also: "red stain" explains 1 region' in text_line(capture, alarm)
    assert "explains" not in text_line(capture, good)
    line = decode_line(encode_line(result_line(passed, "7.png")))
    assert (line.suppressed[0].sentence, line.suppressed[0].row) == ("red stain", 0)
    assert line.base_score == passed.base_score
    assert b'"suppressed":[],"base_score":null,"sentences":[]' in encode_line(result_line(good, "7.png"))


def test_a_picture_shows_what_was_suppressed_in_another_colour(pair: ModuleType, made: Bundle) -> None:
    frame = pair.frame("red", side=320)
    with Inspector(made, target="onnx", threads=1, packs=[pair.with_sentences(made.pack(), "red")]) as inspector:
        passed = inspector.inspect(frame)
    drawn, plain = (overlay(frame, item, inspector.spec.preprocessing) for item in (passed, without(passed)))
    changed = (drawn != plain).any(-1)
    rows, columns = np.nonzero(changed)
    assert changed.any()
    # A box around the patch, and the sentence at it; nothing far away.
    assert columns.min() >= 0
    assert rows.max() < 200
    blue = drawn[changed].astype(int)
    assert (blue[:, 2] > blue[:, 0]).mean() > 0.5


class Frames(Source):
    """A source of one frame under many names, as fast as it is asked."""

    def __init__(self, frame: NDArray[np.uint8], names: list[str]) -> None:
        self._frame, self._names = frame, names

    def captures(self, skip: Container[str] = ()) -> Iterator[Capture]:
        for name in self._names:
            yield Capture(name, name, self._frame)


def answer(result: Inspection) -> tuple[Any, ...]:
    """What one version of the knowledge says; half of two would not be among the truths."""
    return result.verdict, result.score, result.threshold, result.regions, result.suppressed


def without(result: Inspection) -> Inspection:
    return dataclasses.replace(result, suppressed=())


class Counted(Session):
    """A session that counts its runs, and can be slow."""

    def __init__(self, inner: Session) -> None:
        super().__init__(inner.name, inner.inputs, inner.outputs)
        self.inner, self.runs = inner, 0
        self.seconds = 0.0
        """How long a run takes in addition."""

    def _infer(self, feeds: Any) -> dict[str, NDArray[Any]]:
        self.runs += 1
        time.sleep(self.seconds)
        return self.inner.infer(feeds)

    def close(self) -> None:
        self.inner.close()


def counted(inspector: Inspector) -> Counted:
    """Puts a counting session around the second trunk."""
    trunk = inspector._active.normality_trunk
    assert trunk is not None
    inspector._active._trunk = found = Counted(trunk)
    return found
