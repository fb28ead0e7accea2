"""What was marked at a camera and waits to reach the publisher: files in the device's folder `candidates/`.

Their number and bytes are bounded. When there is no room the newest mark is refused in words, so that what somebody
marked before is never lost silently. A mark changes nothing on the device: it inspects as before.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgead.runtime.candidates import (
    CANDIDATE_BYTES,
    PIXELS,
    SUFFIX,
    Candidate,
    Kind,
    Mark,
    decode_candidate,
    encode_candidate,
)
from edgead.runtime.disk import PART, Disk, RealDisk, locked, put_file
from edgead.runtime.errors import CandidateError, EdgeadError, InputError, StorageError, storage_errors
from edgead.runtime.image import Frame, encode_png, prepare
from edgead.runtime.inspection import Inspection
from edgead.runtime.marks_send import Outcome, sender_to
from edgead.runtime.spec import Preprocessing, Region

FOLDER = "candidates"
"""In the folder of a device."""
MOST_FILES = 100
MOST_BYTES = 128 * 2**20
_RESERVE = 16 * 2**20
"""Bytes that stay free on the disk, for updates."""
_RECORD = 16 * 2**10
"""Bytes that a candidate has beside its pictures, at most."""
_WAIT_S = 10.0


@dataclass(frozen=True)
class Sent:
    """What became of one mark that was to leave the device.

    Attributes:
        digest: of the candidate.
        outcome: `arrived` and gone from here; `refused` by who got it, or `kept` because it did not arrive.
        reason: why, for people.
    """

    digest: str
    outcome: Outcome
    reason: str = ""


class Marks:
    """The marks of one device. Any process may add; the files say all there is.

    Args:
        folder: of the device.
        disk: takes the steps.
        most_files, most_bytes: how many may wait.
    """

    def __init__(
        self, folder: Path, *, disk: Disk | None = None, most_files: int = MOST_FILES, most_bytes: int = MOST_BYTES
    ) -> None:
        self.folder = folder / FOLDER
        self._disk = disk or RealDisk()
        self._most_files, self._most_bytes = most_files, most_bytes

    def add(self, data: bytes) -> tuple[str, bool]:
        """Keep a candidate, as `marked` makes it.

        Returns:
            digest of the candidate that says so, and whether it is new: the same place on the same picture, marked
            twice, is one.

        Raises:
            CandidateError: it is none.
            InputError: there is no room for a further one; nothing was removed.
            StorageError: the file system refused.
        """
        new = decode_candidate(data)
        with storage_errors(self.folder, "to make a folder"):
            self._disk.make_folder(self.folder)
        with locked(self._disk, self.folder / ".lock", _WAIT_S, "to keep a marked picture"):
            self._clean()
            names = self._names()
            for _, old in self:
                if _place(old.mark) == _place(new.mark):
                    return old.digest, False
            with storage_errors(self.folder, "to look at marked pictures"):
                held = sum(self._disk.size(self.folder / name) for name in names)
                free = self._disk.free_space(self.folder)
            if len(names) >= self._most_files or held + len(data) > self._most_bytes:
                raise InputError(
                    wanted=f"room among at most {self._most_files} marked pictures of {self._most_bytes} bytes in all",
                    got=f"{len(names)} of {held} bytes that wait to be sent, and one of {len(data)} more",
                    next_step="Send or copy them away (edgead device marks FOLDER --to WHERE), then mark it again.",
                )
            if free < len(data) + _RESERVE:
                raise StorageError(
                    wanted=f"{len(data)} bytes for a marked picture, and {_RESERVE} that stay free for updates",
                    got=f"{free} free",
                    next_step="Free some space, or send what waits: edgead device marks FOLDER --to WHERE",
                )
            put_file(self._disk, self.folder / f"{new.digest}{SUFFIX}", [data])
        return new.digest, True

    def __iter__(self) -> Iterator[tuple[bytes, Candidate]]:
        """Bytes and content of each, the oldest first. What is no candidate is passed over; see `damaged`."""
        found = []
        for name in self._names():
            with contextlib.suppress(EdgeadError, OSError):
                data = self._disk.read(self.folder / name, CANDIDATE_BYTES + 1)
                candidate = decode_candidate(data)
                if name == f"{candidate.digest}{SUFFIX}":
                    found.append((candidate.mark.time, name))
        for _, name in sorted(found):
            with contextlib.suppress(EdgeadError, OSError):
                data = self._disk.read(self.folder / name, CANDIDATE_BYTES + 1)
                yield data, decode_candidate(data)

    def damaged(self) -> list[str]:
        """Names of files here that are no candidates."""
        sound = {f"{candidate.digest}{SUFFIX}" for _, candidate in self}
        return [name for name in self._names() if name not in sound]

    def remove(self, digest: str) -> None:
        """Take a mark back before it leaves the device.

        Args:
            digest: or its beginning.

        Raises:
            InputError: no mark, or several.
            StorageError: the file system refused.
        """
        found = [name for name in self._names() if name.startswith(digest) and digest]
        if len(found) != 1:
            raise InputError(
                wanted=f"one mark whose digest begins with {digest!r}",
                got=f"{len(found)}",
                next_step="See: edgead device marks FOLDER",
            )
        self._remove(found[0])

    def waiting(self) -> list[str]:
        """Digests that the files here are named after, unread."""
        return [name.removesuffix(SUFFIX) for name in self._names()]

    def send(
        self, where: str, *, keep: bool = False, timeout_s: float = 30.0, skip: Collection[str] = ()
    ) -> list[Sent]:
        """Bring all marks to the publisher. What arrived is removed here, everything else stays.

        Args:
            where: http(s)://host[:port][/path] of a collector, or a folder or file:// address such as that of a stick.
            keep: remove nothing here.
            timeout_s: how long one step may take.
            skip: digests of those that are not to be sent now.

        Raises:
            InputError: `where` is neither.
        """
        send = sender_to(where, self._disk, timeout_s)
        done: list[Sent] = []
        for data, candidate in self:
            digest = candidate.digest
            if digest in skip:
                continue
            if done and done[-1].outcome == "kept":
                # Nobody answers there now; the others are not tried for as long again.
                done.append(Sent(digest, "kept", done[-1].reason))
                continue
            outcome, reason = send(digest, data)
            if outcome == "arrived" and not keep:
                self._remove(f"{digest}{SUFFIX}")
            done.append(Sent(digest, outcome, reason))
        return done

    def _names(self) -> list[str]:
        with storage_errors(self.folder, "to list marked pictures"):
            return [name for name in self._disk.names(self.folder) if name.endswith(SUFFIX)]

    def _clean(self) -> None:
        with storage_errors(self.folder, "to clean up after a mark that was interrupted"):
            for name in self._disk.names(self.folder):
                if name.endswith(PART):
                    self._disk.remove(self.folder / name)

    def _remove(self, name: str) -> None:
        with storage_errors(self.folder / name, "to remove a marked picture"):
            self._disk.remove(self.folder / name)
            self._disk.sync_folder(self.folder)


def marked(
    frame: Frame,
    inspection: Inspection,
    kind: Kind,
    *,
    device: str,
    private_key: bytes,
    fingerprint: str,
    release: int,
    preprocessing: Preprocessing,
    mask: Frame | None = None,
    box: Region | None = None,
    note: str = "",
    now: int | None = None,
) -> bytes:
    """A candidate of a frame, for `Marks.add`.

    The camera's frame is kept as it is. One that is too large is kept as the engine sees it, where the detector looks
    at the whole frame: its rows are the same.

    Args:
        frame: uint8 RGB [H, W, 3], as it was inspected.
        inspection: what was said of it.
        kind: what it shows, says the person.
        device: name of this device.
        private_key: 32 bytes.
        fingerprint: feature space of the active knowledge.
        release: counter of the active release.
        preprocessing: of the active detector.
        mask: where the defect is, uint8 RGB [H, W, 3], bright inside.
        box: or a rectangle of pixels around it.
        note: one line for the people at the publisher.
        now: seconds since 1970; by default this machine's clock.

    Raises:
        CandidateError: the frame is too large, or something does not fit the format.
        InputError: the mask has another size or marks nothing.
        MissingDependencyError: the package for signatures is not installed.
    """
    if mask is not None:
        mask = _binary(mask, frame)
    height, width = frame.shape[:2]
    if box is not None and (box.x + box.width > width or box.y + box.height > height):
        raise InputError(
            wanted=f"a box inside of {width} x {height} pixels",
            got=f"{box.x},{box.y},{box.width},{box.height}",
            next_step="Give it as X,Y,W,H in pixels of the picture, from its upper left corner.",
        )
    picture, drawn = _pngs(frame, mask)
    resized = _size(picture, drawn) > CANDIDATE_BYTES or height * width > PIXELS
    if resized:
        frame, mask, box = _as_engine_sees(frame, mask, box, preprocessing)
        picture, drawn = _pngs(frame, mask)
    mark = Mark(
        device=device,
        product=inspection.product,
        kind=kind,
        picture=hashlib.sha256(picture).hexdigest(),
        width=frame.shape[1],
        height=frame.shape[0],
        time=int(time.time()) if now is None else now,
        fingerprint=fingerprint,
        verdict=inspection.verdict.value,
        score=inspection.score,
        threshold=inspection.threshold,
        knowledge=inspection.knowledge,
        release=release,
        mask=None if drawn is None else hashlib.sha256(drawn).hexdigest(),
        box=box,
        resized=resized,
        note=unicodedata.normalize("NFC", note),
    )
    return encode_candidate(mark, picture, drawn, private_key)


def _place(mark: Mark) -> tuple[object, ...]:
    return mark.device, mark.product, mark.kind, mark.picture, mark.mask, mark.box


def _pngs(frame: Frame, mask: Frame | None) -> tuple[bytes, bytes | None]:
    return encode_png(frame), None if mask is None else encode_png(mask)


def _size(picture: bytes, mask: bytes | None) -> int:
    return len(picture) + len(mask or b"") + _RECORD


def _binary(mask: Frame, frame: Frame) -> Frame:
    if mask.shape != frame.shape or not mask.any():
        size = f"{mask.shape[1]} x {mask.shape[0]}" if mask.any() else "a black picture"
        raise InputError(
            wanted=f"a mask of {frame.shape[1]} x {frame.shape[0]} pixels, bright where the defect is",
            got=size,
            next_step="Draw the mask on the picture itself.",
        )
    return np.where(mask > mask.max() / 2, np.uint8(255), np.uint8(0))


def _as_engine_sees(
    frame: Frame, mask: Frame | None, box: Region | None, preprocessing: Preprocessing
) -> tuple[Frame, Frame | None, Region | None]:
    if preprocessing.roi is not None or preprocessing.tiles is not None or preprocessing.rotate:
        raise CandidateError(
            wanted=f"a picture of at most {CANDIDATE_BYTES} bytes as PNG and {PIXELS} pixels",
            got=f"{frame.shape[1]} x {frame.shape[0]} pixels, of which the detector looks at parts",
            next_step="Carry the picture itself to the publisher, and teach it with: edgead ota add-anomaly",
        )
    small = prepare(frame, preprocessing)[0]
    if box is not None:
        wide, high = small.shape[1] / frame.shape[1], small.shape[0] / frame.shape[0]
        left, top = int(box.x * wide), int(box.y * high)
        right, bottom = -int(-(box.x + box.width) * wide // 1), -int(-(box.y + box.height) * high // 1)
        right, bottom = min(right, small.shape[1]), min(bottom, small.shape[0])
        box = Region(left, top, max(1, right - left), max(1, bottom - top))
    # A defect that is smaller than a pixel of the engine's frame stays one: any part of it counts.
    shrunk = None if mask is None else np.where(prepare(mask, preprocessing)[0] > 0, np.uint8(255), np.uint8(0))
    return small, shrunk, box


__all__ = ["FOLDER", "MOST_BYTES", "MOST_FILES", "Marks", "Sent", "marked"]
