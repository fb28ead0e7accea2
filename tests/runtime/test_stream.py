"""Streams: files whole, cameras recent, outages survived and said."""

from __future__ import annotations

import itertools
import socketserver
import threading
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from edgead.runtime.errors import InputError
from edgead.runtime.image import encode_jpeg, encode_png
from edgead.runtime.inspection import Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.sources import CameraSource, Capture, PictureSource, Source, VideoSource, open_source
from edgead.runtime.stream import LiveFeed, Stream, Tally


class Beeper(Source):
    """A live source in memory: numbered frames as fast as they are taken, or at a pace."""

    live = True

    def __init__(self, frames: int, pause: float = 0.0, level: int = 100) -> None:
        self.frames = frames
        self.pause = pause
        self.level = level
        self.given = 0
        self.closed = False

    def captures(self, skip: Container[str] = ()) -> Iterator[Capture]:
        for number in range(self.frames):
            if self.closed:
                return
            time.sleep(self.pause)
            self.given += 1
            yield Capture(f"beep#{number}", f"beep-{number}", np.full((16, 16, 3), self.level, np.uint8))

    def close(self) -> None:
        self.closed = True


class Scripted:
    """A camera device in memory that gives the pictures of a script, then fails."""

    def __init__(self, pictures: list[Any]) -> None:
        self.pictures = pictures
        self.released = False

    def read(self) -> tuple[bool, Any]:
        if not self.pictures:
            return False, None
        return True, self.pictures.pop(0)

    def release(self) -> None:
        self.released = True


def pictures(count: int, start: int = 0) -> list[np.ndarray]:
    return [np.full((32, 32, 3), (start + number) % 256, np.uint8) for number in range(count)]


@pytest.fixture(scope="module")
def inspector(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector(tiny_bundle, threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def slow(slow_bundle: Path) -> Iterator[Inspector]:
    with Inspector(slow_bundle, threads=1) as made:
        yield made


@pytest.fixture
def folder(tiny: ModuleType, tmp_path: Path) -> Path:
    for number in range(6):
        (tmp_path / "in" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "sub" / f"{number}.png").write_bytes(encode_png(tiny.frame(100 + 20 * number)))
    return tmp_path / "in"


def test_a_live_source_faster_than_the_engine_loses_its_oldest_frames_and_counts_them(slow: Inspector) -> None:
    source = Beeper(200, pause=0.005)
    stream = Stream(slow, source)
    seen = [int(capture.name.split("#")[1]) for capture, _ in stream]
    assert stream.dropped > 0
    assert len(seen) + stream.dropped == 200
    assert seen == sorted(seen)
    assert seen[-2:] == [198, 199], "the newest frames wait, the oldest are dropped"


def test_a_finite_source_slower_than_nothing_is_never_dropped(slow: Inspector, folder: Path) -> None:
    stream = Stream(slow, open_source(str(folder)))
    names = [Path(capture.name).name for capture, _ in stream]
    assert names == [f"{number}.png" for number in range(6)]
    assert stream.dropped == 0


def test_a_live_source_slower_than_the_engine_loses_nothing(inspector: Inspector) -> None:
    stream = Stream(inspector, Beeper(20, pause=0.02))
    assert len(list(stream)) + stream.dropped == 20
    assert stream.dropped <= 2  # a busy machine may sleep for longer than a frame


def test_a_silent_camera_is_reported_while_it_is_silent() -> None:
    feed = LiveFeed(Beeper(3, pause=0.7), silence=0.3)
    stop = threading.Event()
    captures = list(feed.captures(stop))
    assert [capture.image is None for capture in captures].count(False) == 3
    silent = [capture for capture in captures if capture.image is None]
    assert len(silent) >= 2
    assert silent[0].reason == "camera: no frame for 0.3 s"
    feed.close()


def test_an_error_of_a_live_source_reaches_the_one_who_iterates(inspector: Inspector) -> None:
    class Broken(Beeper):
        def captures(self, skip: Container[str] = ()) -> Iterator[Capture]:
            yield from super().captures()
            raise InputError(wanted="a lens", got="dust")

    results = iter(Stream(inspector, Broken(1)))
    assert next(results)[0].name == "beep#0"
    with pytest.raises(InputError, match="dust"):
        next(results)


def test_a_stream_ends_after_the_current_frame_and_closes_its_camera(inspector: Inspector) -> None:
    stop = threading.Event()
    source = Beeper(10**9)
    seen = 0
    for _ in Stream(inspector, source, stop=stop):
        seen += 1
        if seen == 3:
            stop.set()
    assert seen == 3
    assert source.closed


def test_a_limit_ends_a_stream_without_asking_for_another_frame(inspector: Inspector, folder: Path) -> None:
    class Counting(PictureSource):
        asked = 0

        def _capture(self, path: Path) -> Capture:
            Counting.asked += 1
            return super()._capture(path)

    paths = sorted(folder.rglob("*.png"))
    assert len(list(Stream(inspector, Counting(paths, folder), limit=2))) == 2
    assert Counting.asked == 2


def test_what_is_skipped_is_not_read(inspector: Inspector, folder: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    paths[0].write_bytes(b"rot")
    results = list(Stream(inspector, open_source(str(folder)), skip={str(path) for path in paths[:4]}))
    assert [capture.name for capture, _ in results] == [str(path) for path in paths[4:]]
    assert results[0][0].slug == "sub/4.png"


def test_an_unreadable_picture_has_its_answer_and_the_folder_goes_on(inspector: Inspector, folder: Path) -> None:
    (folder / "sub" / "1.png").write_bytes(b"")
    (folder / "sub" / "2.png").write_bytes(encode_png(np.zeros((16, 16, 3), np.uint8))[:-30])
    verdicts = [inspection for _, inspection in Stream(inspector, open_source(str(folder)))]
    assert [item.verdict is Verdict.NOT_INSPECTED for item in verdicts] == [False, True, True, False, False, False]
    assert str(verdicts[1].reason).startswith("image: ")
    assert verdicts[1].knowledge == inspector.knowledge().version


def test_every_frame_of_a_video_file_is_inspected(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "line.avi"
    levels = [40, 100, 160, 220, 100]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MJPG")
    for level in levels:
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    source = open_source(str(path))
    assert isinstance(source, VideoSource)
    assert source.total == len(levels)
    results = list(Stream(inspector, source))
    assert [capture.name for capture, _ in results] == [f"{path}#{number:06d}" for number in range(5)]
    scores = [inspection.score for _, inspection in results]
    assert scores == pytest.approx([abs(level - 100) * 3**0.5 for level in levels], abs=4)
    again = open_source(str(path))
    left = list(Stream(inspector, again, skip={capture.name for capture, _ in results[:3]}))
    assert [capture.name for capture, _ in left] == [f"{path}#{number:06d}" for number in (3, 4)]


def test_a_camera_that_is_unplugged_is_reached_again_and_the_outage_is_said() -> None:
    devices: list[Scripted | None] = [Scripted(pictures(2)), None, Scripted(pictures(2, 50))]
    used = [device for device in devices if device is not None]
    source = CameraSource("cam", lambda: devices.pop(0) if devices else None, first_wait=0.01)
    seen = []
    for capture in source.captures():
        seen.append(capture.reason or int(capture.image[0, 0, 0]))
        if len(seen) == 8:
            source.close()
    unplugged, gone = "camera: no frame", "camera: it cannot be opened"
    assert seen == [0, 1, unplugged, gone, 50, 51, unplugged, gone]
    assert all(device.released for device in used)


def test_back_off_grows_and_starts_anew_after_a_frame() -> None:
    devices: list[Scripted | None] = [Scripted(pictures(1)), None, None, None, Scripted(pictures(1)), None]
    source = CameraSource("cam", lambda: devices.pop(0) if devices else None, first_wait=0.04)
    times = []
    for capture in source.captures():
        times.append((time.monotonic(), capture.image is not None))
        if len(times) == 8:
            source.close()
    # frame, lost, 3 x none, frame, lost, none: waits of 0.04, 0.08, 0.16, 0.32 and, after the frame, 0.04 s
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(times)]
    assert gaps[2] > 0.05
    assert gaps[4] > 0.2
    assert gaps[6] < gaps[4]


def test_a_frozen_picture_is_an_outage_unless_that_is_turned_off() -> None:
    def endless() -> list[np.ndarray]:
        return [np.full((32, 32, 3), 9, np.uint8)] * 100_000

    source = CameraSource("cam", lambda: Scripted(endless()), frozen_after=0.05, first_wait=0.01)
    for capture in source.captures():
        if capture.image is None:
            assert capture.reason == "camera: frozen"
            source.close()
    patient = CameraSource("cam", lambda: Scripted(pictures(0) + endless()[:200]), frozen_after=None)
    reasons = []
    for capture in patient.captures():
        reasons.append(capture.reason)
        if capture.reason:
            patient.close()
    assert reasons == [None] * 200 + ["camera: no frame"]


def test_a_camera_that_cannot_be_opened_at_all_is_the_callers_mistake() -> None:
    with pytest.raises(InputError, match="camera at cam"):
        CameraSource("cam", lambda: None)


class _Pictures(BaseHTTPRequestHandler):
    """A network camera: motion JPEG over HTTP. The first connection is cut after some frames."""

    connections = 0
    frames = 12

    def do_GET(self) -> None:
        type(self).connections += 1
        first = type(self).connections == 1
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in range(self.frames if first else 10_000):
            level = 100 if number % 2 else 104
            data = encode_jpeg(np.full((48, 64, 3), level, np.uint8), 95)
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            try:
                self.wfile.write(head + data + b"\r\n")
            except OSError:
                return
            time.sleep(0.02)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def network_camera() -> Iterator[str]:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        allow_reuse_address = True

    _Pictures.connections = 0
    with Server(("127.0.0.1", 0), _Pictures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://user:secret@127.0.0.1:{server.server_address[1]}/video.mjpg?token=secret"
        finally:
            server.shutdown()


def test_a_real_network_stream_that_is_cut_is_reached_again(inspector: Inspector) -> None:
    if not cv2.videoio_registry.hasBackend(cv2.CAP_FFMPEG):
        pytest.skip("this OpenCV has no FFmpeg")
    with network_camera() as address:
        source = open_source(address)
        seen: list[tuple[Capture, Verdict]] = []
        until = time.monotonic() + 30
        for capture, inspection in Stream(inspector, source):
            seen.append((capture, inspection.verdict))
            after = [verdict for _, verdict in seen[-3:]]
            if (_Pictures.connections > 1 and after == [Verdict.OK] * 3) or time.monotonic() > until:
                break
    assert "secret" not in seen[0][0].name
    lost = [capture.reason for capture, verdict in seen if verdict is Verdict.NOT_INSPECTED]
    assert "camera: no frame" in lost
    assert _Pictures.connections > 1
    assert [verdict for _, verdict in seen[-3:]] == [Verdict.OK] * 3


@pytest.mark.parametrize("missing", ["nowhere", "nowhere.mp4"])
def test_a_source_that_is_not_there_is_named(missing: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=missing):
        open_source(str(tmp_path / missing))


def test_a_file_that_only_says_it_is_a_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="video"):
        open_source(str(tmp_path / "x.mp4"))


def test_a_tally_counts_verdicts_reasons_and_times(inspector: Inspector, tiny: ModuleType) -> None:
    tally = Tally()
    for level in (100, 200, 255):
        tally.add(inspector.inspect(tiny.frame(level)))
    assert (tally.frames, tally.inspected) == (3, 2)
    assert tally.verdicts == {Verdict.OK: 1, Verdict.NG: 1, Verdict.NOT_INSPECTED: 1}
    assert sum(tally.reasons.values()) == 1
    assert list(tally.knowledge) == [inspector.knowledge().version]
    assert tally.milliseconds(0.5)["total"] > 0
