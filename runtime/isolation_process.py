"""The worker process of an isolated inspector, as its parent sees it."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle
from edgead.runtime.errors import EngineError
from edgead.runtime.isolation_wire import (
    Answer,
    Asked,
    FrameArea,
    Look,
    Order,
    Ready,
    Refused,
    Replied,
    manifest_digest,
    receive,
    send,
)
from edgead.runtime.knowledge import Pack, encode_pack

_MODULE = "edgead.runtime.isolation_worker"
_POLL = 0.1
_MESSAGE_SECONDS = 30.0
"""Most seconds between two parts of one message."""
_END_SECONDS = 3.0
"""Time that a worker gets to close its engine."""


class Worker:
    """A process with an open engine. One frame and one control request at a time.

    Attributes:
        ready: what it said when it was ready.
        frames: the channel that answers come from.
        reply: the answer to the last frame, once it has come.
        busy: a frame has been asked for and its answer has not come.
        patience: seconds after which that frame counts as hung.
        condemned: why the process must be ended, whatever it does now.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        frames: socket.socket,
        control: socket.socket,
        area: FrameArea,
        ready: Ready,
    ) -> None:
        self.process = process
        self.ready = ready
        self.frames = frames
        self.reply: tuple[Answer, bytearray] | None = None
        self.busy = False
        self.patience = 0.0
        self.condemned: str | None = None
        self._control = control
        self._area = area
        self._since = 0.0

    def ask(self, frame: NDArray[np.uint8], product: str, patience: float) -> None:
        """Hand over a frame, uint8 RGB [H, W, 3]; `take` gives the answer. Not while the worker is busy.

        Raises:
            OSError: the worker is gone, or there is no memory for the frame; it is condemned then.
        """
        self.reply, self.patience, self._since = None, patience, time.monotonic()
        self.busy = True
        try:
            self._area.write(frame)
            height, width, channels = frame.shape
            send(self.frames, Look((height, width, channels), product))
        except OSError:
            self.condemned = self.condemned or "could not be reached and was killed"
            raise

    def take(self) -> tuple[Answer, bytearray]:
        """The next answer.

        Raises:
            EOFError, OSError: the worker is gone, or stopped in the middle of a message.
        """
        return receive(self.frames, Answer)

    def is_hung(self) -> bool:
        """Whether the frame that it works on has taken longer than its patience."""
        return self.busy and time.monotonic() - self._since > self.patience

    def control(
        self, asked: Asked, *parts: bytes | memoryview, seconds: float = _MESSAGE_SECONDS
    ) -> tuple[Replied, bytearray]:
        """Ask for something that is no frame. Whatever interrupts it condemns the worker: its answer may still come.

        Raises:
            EOFError, OSError: the worker is gone, or gave no answer in time (`TimeoutError`).
        """
        try:
            self._control.settimeout(seconds)
            send(self._control, asked, *parts)
            return receive(self._control, Replied)
        except BaseException as error:
            hung = isinstance(error, TimeoutError)
            self.condemned = f"hung for {seconds:g} s and was killed" if hung else "was left without an answer"
            raise

    def obituary(self) -> str:
        """How the process ended, for people; waits a little for it to have done so."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        return _obituary(self.process.returncode)

    def end(self, *, kill: bool) -> None:
        """End the process: at once, or after it has closed its engine."""
        self.frames.close()
        self._control.close()
        _end(self.process, 0.0 if kill else _END_SECONDS)
        self._area.close()


def start_worker(
    bundle: Bundle,
    packs: Sequence[Pack],
    *,
    target: str | None,
    threads: int | None,
    device: str | None,
    suppression: str | None,
    seconds: float,
    closed: Callable[[], bool],
) -> Worker:
    """Start a process and wait until its engine has run once.

    Args:
        bundle, packs, target, threads, device, suppression: what it is to open.
        seconds: most that it may take.
        closed: asked now and then; the start is given up when it says yes.

    Raises:
        EdgeadError: what opening the engine raised in the worker.
        EngineError: the process could not be started, ended, or took too long.
    """
    with contextlib.ExitStack() as undo:
        try:
            frames, theirs = socket.socketpair()
            undo.callback(frames.close)
            with theirs:
                control, also_theirs = socket.socketpair()
                undo.callback(control.close)
                with also_theirs:
                    area = FrameArea()
                    undo.callback(area.close)
                    handles = (theirs.fileno(), also_theirs.fileno(), area.descriptor)
                    process = subprocess.Popen(
                        [sys.executable, "-m", _MODULE, *map(str, handles)],
                        pass_fds=handles,
                        stdin=subprocess.DEVNULL,
                        stdout=2,  # what a library prints must not mix with results on standard output
                        start_new_session=True,  # Ctrl-C is for the parent alone
                    )
            undo.callback(_end, process, 0.0)
            frames.settimeout(_MESSAGE_SECONDS)
            control.settimeout(_MESSAGE_SECONDS)
            data = [encode_pack(pack) for pack in packs]
            sizes = tuple(len(part) for part in data)
            order = Order(
                bundle=str(bundle.path.resolve()),
                manifest=manifest_digest(bundle),
                target=target,
                threads=threads,
                device=device,
                suppression=suppression,
                packs=sizes,
            )
            send(control, order, *data)
            ready = _ready(control, seconds, closed)
        except TimeoutError as error:
            raise _no_start(f"none in {seconds:g} s") from error
        except EOFError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            raise _no_start(_obituary(process.returncode)) from error
        except OSError as error:
            raise _no_start(f"the system's refusal: {error.strerror or error}") from error
        undo.pop_all()
    return Worker(process, frames, control, area, ready)


def _ready(control: socket.socket, seconds: float, closed: Callable[[], bool]) -> Ready:
    until = time.monotonic() + seconds
    while not select.select([control], [], [], _POLL)[0]:
        if closed():
            raise _no_start("the end of the inspector")
        if time.monotonic() > until:
            raise TimeoutError
    said: tuple[Ready | Refused, bytearray] = receive(control, Ready | Refused)
    if isinstance(said[0], Refused):
        raise said[0].error()
    return said[0]


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for so long, then kill."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return
    process.kill()
    # A call that hangs in a driver may keep even a killed process; it is not waited for.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)


def _obituary(code: int | None) -> str:
    if code is None:
        return "its process left the line"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with code {code}"


def _no_start(got: str) -> EngineError:
    return EngineError(
        wanted="an engine that opens in a process of its own",
        got=got,
        next_step="Try it in this process to see why: edgead run without --isolate.",
    )
