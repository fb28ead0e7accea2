"""Brings marked pictures to the publisher beside everything else that a device does, as it does with statuses.

Nothing here raises, waits for an inspection or keeps one waiting. What did not arrive stays, and is tried again later
and later; what the publisher refused stays for somebody to look at, and is not offered again by this process.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from edgead.runtime.disk import Disk, RealDisk
from edgead.runtime.errors import EdgeadError
from edgead.runtime.marks import FOLDER, Marks, Sent
from edgead.runtime.marks_send import PATH

EVERY_S = 60.0
"""Seconds between two looks for marks."""
_LONGEST_S = 3600.0


def candidates_address(statuses: str) -> str:
    """Where marks go if statuses go to this address; empty for nowhere.

    Args:
        statuses: http(s)://, mqtt(s):// or file:// address; empty for none. A broker takes no pictures.
    """
    where = urlsplit(statuses)
    if where.scheme in ("http", "https"):
        return where._replace(path=where.path.rpartition("/")[0] + PATH).geturl()
    if where.scheme == "file":
        return where._replace(path=f"{where.path.rstrip('/')}/{FOLDER}").geturl()
    return ""


class MarksPost:
    """Sends the marks of one device. `send` may be called from one thread at a time.

    Args:
        folder: of the device.
        statuses: where its statuses go; marks go beside them, see `candidates_address`.
        every_s: seconds between two looks; doubled after each failure, up to an hour.
        disk: takes the steps.
        rng: for jitter; differs from device to device.
        timeout_s: how long one step of sending may take.

    Attributes:
        trouble: why the last attempt brought not everything; empty if it did.
    """

    def __init__(
        self,
        folder: Path,
        statuses: str,
        *,
        every_s: float = EVERY_S,
        disk: Disk | None = None,
        rng: random.Random | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self.trouble = ""
        self._address = candidates_address(statuses)
        self._disk = disk or RealDisk()
        self._marks = Marks(folder, disk=self._disk)
        self._every = every_s
        self._rng = rng or random.Random()
        self._timeout = timeout_s
        self._refused: set[str] = set()
        self._failures = 0

    def send(self) -> list[Sent]:
        """Send what waits, and was not refused before; empty where nothing does, or nobody takes it. Never raises."""
        if not self._address:
            return []
        done: list[Sent] = []
        try:
            if set(self._marks.waiting()) - self._refused:
                self._prepare()
                done = self._marks.send(self._address, timeout_s=self._timeout, skip=self._refused)
            self.trouble = next((item.reason for item in done if item.outcome != "arrived"), "")
        except Exception as error:  # a mark that does not leave is not worth a device
            self.trouble = error.got if isinstance(error, EdgeadError) else f"{type(error).__name__}: {error}"[:300]
        self._refused |= {item.digest for item in done if item.outcome == "refused"}
        kept = any(item.outcome == "kept" for item in done) or (bool(self.trouble) and not done)
        self._failures = self._failures + 1 if kept else 0
        return done

    def start(self, stop: threading.Event) -> threading.Thread:
        """Send on a thread of its own, which ends with the process, until `stop` is set."""

        def run() -> None:
            while not stop.is_set():
                self.send()
                pause = min(_LONGEST_S, self._every * 2.0 ** min(self._failures, 10)) * self._rng.uniform(0.8, 1.2)
                if stop.wait(pause):
                    return

        thread = threading.Thread(target=run, name="edgead-marks", daemon=True)
        if self._address:
            thread.start()
        return thread

    def _prepare(self) -> None:
        where = urlsplit(self._address)
        if where.scheme == "file":
            place = Path(url2pathname(where.path))
            self._disk.size(place.parent)  # a medium that is not there is not replaced by a folder in its place
            self._disk.make_folder(place)


__all__ = ["EVERY_S", "MarksPost", "candidates_address"]
