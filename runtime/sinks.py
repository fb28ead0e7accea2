"""Where results go: lines of text or JSON on standard output, a file of JSON lines, overlay pictures."""

from __future__ import annotations

import abc
import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from edgead.runtime.errors import InputError, OutputExistsError, storage_errors
from edgead.runtime.files import refuse_existing, write_file
from edgead.runtime.image import encode_jpeg
from edgead.runtime.inspection import Inspection, Verdict, decode_line, encode_line, result_line
from edgead.runtime.overlay import overlay
from edgead.runtime.sources import Capture
from edgead.runtime.spec import Preprocessing

_CANNOT_SYNC = (errno.EINVAL, errno.EROFS, errno.ENOTSUP)
"""What fsync answers for pipes and some devices: nothing is lost by it."""


class Sink(abc.ABC):
    """Takes results in order.

    Args:
        unanswered: what the line does with a frame that was not inspected: `Verdict.OK` or `Verdict.NG`.
        only_ng: leave out frames that the line lets pass.
    """

    def __init__(self, *, unanswered: Verdict = Verdict.NG, only_ng: bool = False) -> None:
        self.unanswered = unanswered
        self.only_ng = only_ng

    def take(self, capture: Capture, inspection: Inspection) -> None:
        """Take one result.

        Raises:
            StorageError: it could not be written.
        """
        if not self.only_ng or inspection.decision(self.unanswered) is Verdict.NG:
            self._take(capture, inspection)

    @abc.abstractmethod
    def _take(self, capture: Capture, inspection: Inspection) -> None: ...

    def close(self) -> None:
        """Make what was taken durable. May be called twice."""


class JsonLines(Sink):
    """One line of JSON for each result, to an open binary stream such as standard output."""

    def __init__(self, stream: BinaryIO, *, unanswered: Verdict = Verdict.NG, only_ng: bool = False) -> None:
        super().__init__(unanswered=unanswered, only_ng=only_ng)
        self._stream = stream

    def _take(self, capture: Capture, inspection: Inspection) -> None:
        line = result_line(inspection, capture.name, unanswered=self.unanswered, time=capture.time)
        self._stream.write(encode_line(line))
        self._stream.flush()


class JsonFile(Sink):
    """A file of JSON lines that holds whole lines only, whatever happens, and can be gone on with.

    Every result is a line here, also of frames that pass.

    Args:
        path: the file.
        resume: go on behind the lines of an existing file; `done` then names them.
        force: replace an existing file.

    Raises:
        OutputExistsError: the file exists, and neither `resume` nor `force` was given.
        InputError: the file to go on with holds something else than result lines.
        StorageError: the file system refused.
    """

    def __init__(
        self, path: Path, *, resume: bool = False, force: bool = False, unanswered: Verdict = Verdict.NG
    ) -> None:
        super().__init__(unanswered=unanswered)
        if path.exists() and not resume and not force:
            raise OutputExistsError(
                wanted=f"a new output at {path}",
                got="something that is already there",
                next_step="Go on with it with --resume, replace it with --force, or name another output.",
            )
        self.path = path
        self.done: set[str] = set()
        """Names of the frames that the file already answered."""
        self.knowledge: set[str] = set()
        """Versions of the knowledge that answered them."""
        self._size = self._read_lines() if resume and path.exists() else 0
        with storage_errors(path, "to write results"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO | None = open(path, "ab", buffering=0)  # noqa: SIM115 closed in close()
            # Behind the last whole line there can be half of one, from a power cut.
            self._file.truncate(self._size)

    def _read_lines(self) -> int:
        """Reads what is there; returns where the last whole line ends."""
        size = 0
        with storage_errors(self.path, "to read earlier results"), open(self.path, "rb") as stream:
            for number, data in enumerate(stream, 1):
                if not data.endswith(b"\n"):
                    break
                try:
                    line = decode_line(data)
                except msgspec.DecodeError as error:
                    raise InputError(
                        wanted=f"results of `edgead run` in {self.path}",
                        got=f"something else in line {number} ({error})",
                        next_step="Name another output, or replace this one with --force.",
                    ) from error
                self.done.add(line.path)
                self.knowledge.add(line.knowledge)
                size += len(data)
        return size

    def _take(self, capture: Capture, inspection: Inspection) -> None:
        assert self._file is not None
        line = result_line(inspection, capture.name, unanswered=self.unanswered, time=capture.time)
        data = memoryview(encode_line(line))
        end = self._size + len(data)
        with storage_errors(self.path, "to write a result"):
            try:
                while data:
                    data = data[self._file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size = end

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with storage_errors(self.path, "to write results"), file:
                try:
                    os.fsync(file.fileno())
                except OSError as error:
                    if error.errno not in _CANNOT_SYNC:
                        raise


class TextLines(Sink):
    """One compact line of text for each result.

    Args:
        write: prints a line, given the line and its verdict.
    """

    def __init__(
        self,
        write: Callable[[str, Verdict], None],
        *,
        unanswered: Verdict = Verdict.NG,
        only_ng: bool = False,
    ) -> None:
        super().__init__(unanswered=unanswered, only_ng=only_ng)
        self._write = write

    def _take(self, capture: Capture, inspection: Inspection) -> None:
        self._write(text_line(capture, inspection), inspection.verdict)


def text_line(capture: Capture, inspection: Inspection) -> str:
    """'NG  score 1.43, threshold 1.20   2 regions    31 ms  photos/7.png'."""
    if inspection.score is None:
        return f"--  {inspection.reason}  {capture.name}"
    where = _count(len(inspection.regions))
    return (
        f"{inspection.verdict.value:<2}  score {inspection.score:<8.4g} threshold {inspection.threshold:<8.4g} "
        f"{where if inspection.regions else '':<10} {inspection.timings.get('total', 0.0):6.0f} ms  {capture.name}"
        f"{explanation(inspection)}"
    )


def explanation(inspection: Inspection) -> str:
    """'  passed: "thread" explains 2 regions' of a part that a sentence let pass, 'also: ...' of one that alarms."""
    if not inspection.suppressed:
        return ""
    counts = Counter(item.sentence for item in inspection.suppressed)
    said = ", ".join(f'"{sentence}" explains {_count(count)}' for sentence, count in counts.items())
    return f"  {'passed' if inspection.passes else 'also'}: {said}"


def _count(regions: int) -> str:
    return f"{regions} region{'s' if regions != 1 else ''}"


class Overlays(Sink):
    """A JPEG picture of each result, under the frame's relative path: 'bad/7.png' -> 'bad/7.png.jpg'.

    Frames that never were a picture have none.

    Args:
        folder: where to; made if it is missing.
        spec: preprocessing of the detector.
        force: write into a folder that holds something already.

    Raises:
        OutputExistsError: the folder is not empty and `force` is false.
    """

    def __init__(
        self,
        folder: Path,
        spec: Preprocessing,
        *,
        force: bool = False,
        unanswered: Verdict = Verdict.NG,
        only_ng: bool = False,
    ) -> None:
        super().__init__(unanswered=unanswered, only_ng=only_ng)
        with storage_errors(folder, "to write overlays"):
            if not folder.is_dir() or any(folder.iterdir()):
                refuse_existing(folder, force)
            folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.written = 0
        self._spec = spec

    def _take(self, capture: Capture, inspection: Inspection) -> None:
        if capture.image is None:
            return
        picture = overlay(capture.image, inspection, self._spec)
        write_file(self.folder / f"{capture.slug}.jpg", encode_jpeg(picture))
        self.written += 1
