"""The demo's update: an inspector runs at full rate while it is taught that a new pattern is normal.

Two inspectors play the two machines: the *line*, which inspects without a pause, and the *server*, which makes
the knowledge. Only the bytes of a pack go from one to the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack, decode_pack, encode_pack
from edgead.runtime.spec import canonical_json
from edgead.runtime.tensors import encode_tensors
from edgead.server_side.enrolment import BANK, add_normal_rows

Frame = NDArray[np.uint8]
KINDS = {
    "good": "good parts, as ever",
    "defect": "real defects, as ever",
    "new good": "good parts with the new code",
    "new defect": "real defects beside the new code",
}
"""What the frames of the line show, and how the report says it."""
SAME = 1e-3
"""Two engine runs on one frame agree to this share of the threshold."""


@dataclass(frozen=True)
class Shown:
    """One frame that goes past the line's camera.

    Attributes:
        path: its picture.
        frame: uint8 RGB [H, W, 3].
        kind: a key of `KINDS`.
    """

    path: Path
    frame: Frame
    kind: str


@dataclass(frozen=True)
class Seen:
    """What the line said of one frame, and when.

    Attributes:
        place: which of the shown frames.
        began, ended: seconds since the line started.
        inspection: the answer, without its map.
    """

    place: int
    began: float
    ended: float
    inspection: Inspection


@dataclass(frozen=True)
class LiveUpdate:
    """The update as measured.

    Attributes:
        shown: the frames, which the line inspects over and over.
        seen: every answer, in order.
        before, after: packs.
        offered: patches that were unlike the old bank.
        added: rows that came in for them.
        taught, calibrated: pictures of the new batch that gave rows, and held-out pictures that set the threshold.
        row_bytes: the added rows with ids and thresholds, as a file.
        pack_bytes: the whole new pack, as a file.
        learn_seconds: from pictures to the new pack, on the server.
        swap_seconds: of `Inspector.swap` on the line, off the frame path.
        swap_began, swap_ended: seconds since the line started.
        lost: frames without an answer.
        mixed: frames whose score is not that of the knowledge that they name, or old knowledge after new.
    """

    shown: tuple[Shown, ...]
    seen: tuple[Seen, ...]
    before: Pack
    after: Pack
    offered: int
    added: int
    taught: int
    calibrated: int
    row_bytes: int
    pack_bytes: int
    learn_seconds: float
    swap_seconds: float
    swap_began: float
    swap_ended: float
    lost: int
    mixed: int

    @property
    def during_swap(self) -> int:
        """Frames that were being inspected while the knowledge changed."""
        return sum(seen.ended > self.swap_began and seen.began < self.swap_ended for seen in self.seen)

    def alarms(self, kind: str, version: str) -> tuple[int, int]:
        """Of the different pictures of a kind: how many are NG under a version of the knowledge, and all."""
        verdicts = {
            seen.place: seen.inspection.verdict
            for seen in self.seen
            if seen.inspection.knowledge == version and self.shown[seen.place].kind == kind
        }
        return sum(verdict is Verdict.NG for verdict in verdicts.values()), len(verdicts)


def teach_while_running(
    line: Inspector,
    server: Inspector,
    shown: Sequence[Shown],
    teach: Sequence[Frame],
    hold_out: Sequence[Frame],
    *,
    seconds: float = 2.0,
) -> LiveUpdate:
    """Run the line, teach it on the server that `teach` is normal, swap the knowledge in, and check every frame.

    Args:
        line: inspects `shown` in a loop, in a thread of its own.
        server: of the same bundle; embeds pictures and calibrates.
        shown: what goes past the camera.
        teach: pictures of the new pattern whose patches may become rows.
        hold_out: normals, old and new ones, that never become rows: the threshold is set on them.
        seconds: how long the line runs before and after the update.
    """
    old = line.knowledge()
    with _running(line, shown) as answers:
        start = answers.start
        _wait_for(answers, seconds, len(shown))
        began = time.perf_counter()
        patches = np.concatenate([rows.reshape(-1, rows.shape[-1]) for rows in _patches(server, teach)])
        done = add_normal_rows(old, patches, lambda pack: _scores(server, pack, hold_out), first_id=_next_id(old))
        data = encode_pack(done.pack)
        learned = time.perf_counter()
        pack = decode_pack(data)
        swap_began = time.perf_counter()
        line.swap(pack)
        swap_ended = time.perf_counter()
        _wait_for(answers, seconds, len(shown))
    seen = tuple(answers.seen)
    server.swap(pack)
    return LiveUpdate(
        shown=tuple(shown),
        seen=seen,
        before=old,
        after=pack,
        offered=done.offered,
        added=done.added,
        taught=len(teach),
        calibrated=len(hold_out),
        row_bytes=len(_added(old, pack)),
        pack_bytes=len(data),
        learn_seconds=learned - began,
        swap_seconds=swap_ended - swap_began,
        swap_began=swap_began - start,
        swap_ended=swap_ended - start,
        lost=answers.asked - sum(answer.inspection.score is not None for answer in seen),
        mixed=_mixed(server, shown, seen, old, pack),
    )


class _Answers:
    """What the line has said so far; written by its thread alone."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.asked = 0
        self.seen: list[Seen] = []
        self.stop = threading.Event()
        self.failure: BaseException | None = None

    def work(self, line: Inspector, shown: Sequence[Shown]) -> None:
        from dataclasses import replace

        try:
            while not self.stop.is_set():
                place = self.asked % len(shown)
                self.asked += 1
                began = time.perf_counter() - self.start
                inspection = line.inspect(shown[place].frame)
                ended = time.perf_counter() - self.start
                self.seen.append(Seen(place, began, ended, replace(inspection, anomaly_map=None)))
        except BaseException as error:  # the thread that waits raises it
            self.failure = error


@contextmanager
def _running(line: Inspector, shown: Sequence[Shown]) -> Iterator[_Answers]:
    answers = _Answers()
    thread = threading.Thread(target=answers.work, args=(line, shown), name="edgead-demo-line", daemon=True)
    thread.start()
    try:
        yield answers
    finally:
        answers.stop.set()
        thread.join()
    if answers.failure is not None:
        raise answers.failure


def _wait_for(answers: _Answers, seconds: float, frames: int) -> None:
    """Let the line run for so long, and until it has seen every frame once more."""
    until, enough = time.perf_counter() + seconds, len(answers.seen) + frames + 1
    while answers.failure is None and (time.perf_counter() < until or len(answers.seen) < enough):
        time.sleep(0.01)


def _patches(server: Inspector, frames: Sequence[Frame]) -> Iterator[NDArray[np.float32]]:
    for frame in frames:
        yield server.embed(frame)["patches"]


def _scores(
    server: Inspector, pack: Pack, frames: Sequence[Frame]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    server.swap(pack)
    answers = [server.inspect(frame) for frame in frames]
    scores = np.array([answer.score for answer in answers], np.float32)
    maps = [answer.anomaly_map for answer in answers if answer.anomaly_map is not None]
    maxima = np.array([one.max() for one in maps], np.float32) if len(maps) == len(answers) else None
    return scores, maxima


def _next_id(pack: Pack) -> int:
    return 1 + max((int(pack.ids(bank)[-1]) for bank in pack.banks if len(pack.ids(bank))), default=0)


def _added(old: Pack, new: Pack) -> bytes:
    """What the new pack has and the old one has not: rows, ids and thresholds as one file."""
    start = len(old.arrays[BANK])
    return encode_tensors(
        {BANK: new.arrays[BANK][start:], f"{BANK}.ids": new.ids(BANK)[start:]},
        {"calibration": canonical_json(new.calibration).decode()},
    )


def _mixed(server: Inspector, shown: Sequence[Shown], seen: Sequence[Seen], old: Pack, new: Pack) -> int:
    """Frames that are neither wholly of the old nor wholly of the new knowledge."""
    expected: dict[tuple[str, int], float] = {}
    for pack in (old, new):
        server.swap(pack)
        for place, item in enumerate(shown):
            expected[pack.version, place] = server.inspect(item.frame).score or 0.0
    count = 0
    changed = False
    for answer in seen:
        version = answer.inspection.knowledge
        wanted = expected.get((version, answer.place))
        score = answer.inspection.score
        wrong = wanted is None or (
            score is not None and abs(score - wanted) > SAME * max(answer.inspection.threshold, 1e-9)
        )
        count += wrong or (changed and version == old.version)
        changed = changed or version == new.version
    return count
