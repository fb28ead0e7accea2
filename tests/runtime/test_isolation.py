"""An engine in a process of its own: what hangs or dies there costs its frame, never the stream."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import BundleError, EngineError, ImageError, InputError, KnowledgeError
from edgead.runtime.image import encode_png
from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.isolation import IsolatedInspector
from edgead.runtime.knowledge import Pack
from edgead.runtime.sources import open_source
from edgead.runtime.spec import Preprocessing, Region
from edgead.runtime.stream import Stream


@pytest.fixture(scope="module")
def hanging_bundle(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that never comes back from frames whose first red value is `tiny.HANG`."""
    path: Path = tiny.bundle(tmp_path_factory.mktemp("hanging") / "hanging.bundle", hangs=True).path
    return path


@pytest.fixture
def isolated(hanging_bundle: Path) -> Iterator[IsolatedInspector]:
    with IsolatedInspector(hanging_bundle, threads=1, hung_after=0.7) as made:
        yield made


def facts(inspection: Inspection) -> dict[str, object]:
    """All of an inspection but its map and its times."""
    skip = ("anomaly_map", "timings")
    return {
        field.name: getattr(inspection, field.name)
        for field in dataclasses.fields(inspection)
        if field.name not in skip
    }


def process(isolated: IsolatedInspector) -> int:
    """The worker's process id, once there is a worker."""
    until = time.monotonic() + 60
    while (found := isolated.process_id) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return found


def answered(isolated: IsolatedInspector, frame: np.ndarray) -> Inspection:
    """The first answer that is one."""
    for _ in range(10):
        result = isolated.inspect(frame)
        if result.verdict is not Verdict.NOT_INSPECTED:
            return result
    raise AssertionError(result.reason)


@pytest.mark.parametrize("rotate", [0, 90])
def test_the_answers_are_those_of_an_inspector_in_this_process(tiny: ModuleType, tmp_path: Path, rotate: int) -> None:
    spec = tiny.detector(Preprocessing(16, 16, rotate=rotate, roi=Region(0, 16, 64, 64)))
    packs = [tiny.pack(spec=spec), tiny.pack([[200] * 3], product="nut", spec=spec)]
    made = tiny.bundle(tmp_path / "b", packs, spec=spec)
    defect = tiny.frame(size=(128, 128))
    defect[40:60, 20:40] = 220
    frames = [tiny.frame(size=(128, 128)), defect, np.asfortranarray(defect), tiny.frame(255, size=(300, 200))]
    with Inspector(made, threads=1) as plain, IsolatedInspector(made, threads=1) as isolated:
        for product in (None, "part", "nut"):
            for frame in frames:
                one, other = plain.inspect(frame, product=product), isolated.inspect(frame, product=product)
                assert facts(one) == facts(other)
                assert list(one.timings) == list(other.timings)
                if one.anomaly_map is None or other.anomaly_map is None:
                    assert one.anomaly_map is other.anomaly_map
                else:
                    np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
        for name, array in plain.embed(defect).items():
            np.testing.assert_array_equal(array, isolated.embed(defect)[name])
        assert facts(plain.refusal("dust", "nut")) == facts(isolated.refusal("dust", "nut"))
        assert (plain.products, plain.engine, plain.threads) == (isolated.products, isolated.engine, isolated.threads)
        assert isolated.restarts == 0


def test_a_frame_that_hangs_in_native_code_is_not_inspected_and_the_next_one_is(
    tiny: ModuleType, isolated: IsolatedInspector
) -> None:
    before = process(isolated)
    start = time.monotonic()
    hung = isolated.inspect(tiny.frame(tiny.HANG))
    assert time.monotonic() - start > 0.6
    assert hung.verdict is Verdict.NOT_INSPECTED
    assert "hung" in str(hung.reason)
    assert hung.knowledge == isolated.knowledge().version
    assert isolated.inspect(tiny.frame()).verdict is Verdict.OK
    assert isolated.restarts == 1
    assert process(isolated) != before
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_a_hung_frame_with_a_deadline_is_answered_at_the_deadline(
    tiny: ModuleType, isolated: IsolatedInspector
) -> None:
    start = time.monotonic()
    late = isolated.inspect(tiny.frame(tiny.HANG), deadline_ms=100)
    waited = time.monotonic() - start
    assert late.reason == "deadline of 100 ms"
    assert 0.09 < waited < 0.6
    # The call is still in there; frames that come meanwhile keep their own deadlines.
    assert isolated.inspect(tiny.frame(), deadline_ms=50).verdict is Verdict.NOT_INSPECTED
    assert isolated.inspect(tiny.frame(), deadline_ms=60_000).verdict is Verdict.OK
    assert isolated.restarts == 1


def test_a_late_frame_is_no_hung_one(tiny: ModuleType, slow_bundle: Path) -> None:
    with IsolatedInspector(slow_bundle, threads=1) as isolated:
        usual = isolated.inspect(tiny.frame()).timings["total"]
        late = isolated.inspect(tiny.frame(), deadline_ms=usual / 4)
        assert str(late.reason).startswith("deadline")
        patient = isolated.inspect(tiny.frame(tiny.GREY + 50), deadline_ms=60_000)
        assert patient.score == pytest.approx(50 * 3**0.5, rel=1e-5), "its own answer, not that of the late frame"
        assert isolated.restarts == 0


def test_a_process_that_is_stopped_by_the_system_is_replaced(tiny: ModuleType, isolated: IsolatedInspector) -> None:
    before = process(isolated)
    os.kill(before, signal.SIGSTOP)
    assert "hung" in str(isolated.inspect(tiny.frame()).reason)
    assert answered(isolated, tiny.frame()).verdict is Verdict.OK
    assert process(isolated) != before


def test_a_process_that_is_killed_over_a_frame_costs_that_frame(tiny: ModuleType, slow_bundle: Path) -> None:
    with IsolatedInspector(slow_bundle, threads=1) as isolated:
        before = process(isolated)
        threading.Timer(0.05, os.kill, (before, signal.SIGKILL)).start()
        lost = isolated.inspect(tiny.frame())
        assert lost.reason == "engine: its process was ended by SIGKILL"
        assert isolated.inspect(tiny.frame()).verdict is Verdict.OK
        assert isolated.restarts == 1


def test_a_process_that_dies_between_frames_is_replaced_before_anyone_asks(
    tiny: ModuleType, isolated: IsolatedInspector
) -> None:
    before = process(isolated)
    os.kill(before, signal.SIGKILL)
    until = time.monotonic() + 60
    while isolated.restarts == 0 or isolated.process_id is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert isolated.inspect(tiny.frame(), deadline_ms=60_000).verdict is Verdict.OK


def test_a_new_process_has_the_knowledge_that_is_active_now(tiny: ModuleType, isolated: IsolatedInspector) -> None:
    first = isolated.knowledge().version
    monday, tuesday = tiny.pack([[50] * 3]), tiny.pack([[60] * 3], threshold=5.0)
    assert isolated.swap(monday) == (first, monday.version)
    assert isolated.swap(tuesday) == (monday.version, tuesday.version)
    assert isolated.swap(tuesday) == (tuesday.version, tuesday.version)
    assert isolated.swap(tiny.pack([[9] * 3], product="nut"))[0] is None
    os.kill(process(isolated), signal.SIGKILL)
    result = answered(isolated, tiny.frame(61))
    assert (result.knowledge, result.verdict, result.threshold) == (tuesday.version, Verdict.OK, 5.0)
    assert isolated.inspect(tiny.frame(9), product="nut").verdict is Verdict.OK
    assert isolated.products == ("part", "nut")


def test_knowledge_that_does_not_fit_leaves_the_old_in_place(tiny: ModuleType, isolated: IsolatedInspector) -> None:
    pack = isolated.knowledge()
    with pytest.raises(KnowledgeError, match="feature space"):
        isolated.swap(Pack("part", "f" * 64, pack.calibration, pack.arrays))
    assert isolated.inspect(tiny.frame()).knowledge == pack.version
    assert isolated.restarts == 0


def test_knowledge_over_which_the_process_dies_is_not_active_in_the_next_one(
    tiny: ModuleType, isolated: IsolatedInspector
) -> None:
    old, before = isolated.knowledge().version, process(isolated)
    os.kill(before, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (before, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match="new knowledge for 'part'"):
        isolated.swap(tiny.pack([[50] * 3]))
    assert isolated.knowledge().version == old
    assert answered(isolated, tiny.frame()).knowledge == old
    assert isolated.swap(tiny.pack([[50] * 3]))[0] == old


def test_swaps_at_full_speed_mix_no_versions_and_lose_no_frame(tiny: ModuleType, isolated: IsolatedInspector) -> None:
    packs = [tiny.pack([[level] * 3], threshold=float(level)) for level in (20, 60, 100)]
    truth = {
        pack.version: ((120 - level) * 3**0.5, float(level)) for pack, level in zip(packs, (20, 60, 100), strict=True)
    }
    isolated.swap(packs[0])
    ended = threading.Event()

    def swap() -> None:
        turn = 0
        while not ended.is_set():
            turn += 1
            isolated.swap(packs[turn % len(packs)])

    thread = threading.Thread(target=swap)
    thread.start()
    results = [isolated.inspect(tiny.frame(120)) for _ in range(150)]
    ended.set()
    thread.join()
    assert len({result.knowledge for result in results}) > 1
    for result in results:
        score, threshold = truth[result.knowledge]
        assert result.score == pytest.approx(score, rel=1e-5)
        assert result.threshold == threshold


def test_a_bundle_that_was_replaced_is_refused_by_the_next_process(
    tiny: ModuleType, tmp_path: Path, hanging_bundle: Path
) -> None:
    tiny.bundle(tmp_path / "b")
    with IsolatedInspector(tmp_path / "b", threads=1) as isolated:
        (tmp_path / "b").rename(tmp_path / "old")
        tiny.bundle(tmp_path / "b", [tiny.pack([[50] * 3])])
        os.kill(process(isolated), signal.SIGKILL)
        until = time.monotonic() + 60
        while "another one in its place" not in str(isolated.inspect(tiny.frame(50)).reason):
            assert time.monotonic() < until
        # The old bundle is put back: the inspector recovers by itself.
        (tmp_path / "b").rename(tmp_path / "new")
        (tmp_path / "old").rename(tmp_path / "b")
        while isolated.inspect(tiny.frame()).verdict is not Verdict.OK:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_an_engine_that_does_not_open_is_told_as_it_is_without_isolation(tiny: ModuleType, tmp_path: Path) -> None:
    made = tiny.bundle(tmp_path / "b")
    with pytest.raises(BundleError, match="openvino"):
        IsolatedInspector(made, target="openvino")
    with pytest.raises(BundleError, match="product"):
        IsolatedInspector(made, products=["prat"])
    (tmp_path / "b" / "engines" / "onnx-fp32" / "trunk.onnx").write_bytes(b"rot")
    with pytest.raises(BundleError, match=r"trunk\.onnx"):
        IsolatedInspector(open_bundle(tmp_path / "b", verify=False))
    assert not [thread for thread in threading.enumerate() if thread.name == "edgead-isolation"]


def test_mistakes_of_the_caller_are_raised_and_cost_no_process(tiny: ModuleType, isolated: IsolatedInspector) -> None:
    for bad in (np.zeros((16, 16), np.uint8), np.zeros((16, 16, 3), np.float32)):
        with pytest.raises(ImageError):
            isolated.inspect(bad)
        with pytest.raises(ImageError):
            isolated.embed(bad)
    with pytest.raises(InputError, match="part"):
        isolated.inspect(tiny.frame(), product="prat")
    assert isolated.inspect(tiny.frame(tiny.POISON)).verdict is Verdict.NOT_INSPECTED
    assert isolated.inspect(tiny.frame(255)).verdict is Verdict.NOT_INSPECTED
    assert isolated.inspect(tiny.frame()).verdict is Verdict.OK
    assert isolated.restarts == 0


def test_a_closed_inspector_says_so_closes_twice_and_leaves_no_process(tiny: ModuleType, tiny_bundle: Path) -> None:
    isolated = IsolatedInspector(tiny_bundle, threads=1)
    before = process(isolated)
    isolated.close()
    isolated.close()
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    for call in (isolated.inspect, isolated.embed):
        with pytest.raises(InputError, match="closed"):
            call(tiny.frame())
    with pytest.raises(InputError, match="closed"):
        isolated.swap(tiny.pack([[50] * 3]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a process with its parent")
def test_a_worker_that_hangs_does_not_outlive_a_parent_that_is_killed(hanging_bundle: Path) -> None:
    code = """
import os, signal, sys, time
from edgead.runtime.isolation import IsolatedInspector
isolated = IsolatedInspector(sys.argv[1], threads=1)
os.kill(isolated.process_id, signal.SIGSTOP)
print(isolated.process_id, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(hanging_bundle)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        parent.kill()
    until = time.monotonic() + 10
    while _runs(worker):
        assert time.monotonic() < until, "the worker is still there"
        time.sleep(0.02)


def _runs(process_id: int) -> bool:
    """Whether a process is there and no zombie that waits for a reaper."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def folder(tiny: ModuleType, tmp_path: Path) -> Path:
    """Five pictures; the engine never comes back from the third."""
    for number, level in enumerate((100, 200, tiny.HANG, 101, 220)):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.png").write_bytes(encode_png(tiny.frame(level)))
    return tmp_path / "in"


VERDICTS = ["OK", "NG", "NOT_INSPECTED", "OK", "NG"]


def test_a_stream_goes_on_behind_a_frame_that_hangs(isolated: IsolatedInspector, folder: Path) -> None:
    results = list(Stream(isolated, open_source(str(folder))))
    assert [inspection.verdict.value for _, inspection in results] == VERDICTS


def test_the_command_goes_on_says_so_and_loads_no_engine_itself(hanging_bundle: Path, folder: Path) -> None:
    code = """
import sys
from edgead.runtime.cli import run
assert run.main(sys.argv[1:], standalone_mode=False) in (0, None)
assert 'onnxruntime' not in sys.modules
"""
    words = [hanging_bundle, folder, "--json", "--isolate", "--hung-after", "0.7", "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["verdict"] for line in done.stdout.splitlines()] == VERDICTS
    assert "engine restarts  1" in done.stderr
    assert "hung for 0.7 s" in done.stderr


def test_an_interrupted_isolated_run_ends_after_its_frame(slow_bundle: Path, tiny: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number:02d}.png").write_bytes(encode_png(tiny.frame(90 + number)))
    code = "from edgead.runtime.cli import run; import sys; sys.exit(run.main(sys.argv[1:], standalone_mode=False))"
    words = [slow_bundle, tmp_path / "in", "--json", "--isolate", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        first = running.stdout.readline()
        os.killpg(running.pid, signal.SIGINT)  # the terminal's Ctrl-C goes to the whole group
        rest, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "Traceback" not in said
    verdicts = [json.loads(line)["verdict"] for line in (first + rest).splitlines()]
    assert 1 <= len(verdicts) < 40
    assert "NOT_INSPECTED" not in verdicts


def test_the_limit_for_hung_frames_needs_a_process_that_can_be_ended(tiny_bundle: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgead.runtime.cli import run

    result = CliRunner().invoke(run, [str(tiny_bundle), str(tmp_path), "--hung-after", "1"])
    assert isinstance(result.exception, InputError)
    assert "--isolate" in str(result.exception)
