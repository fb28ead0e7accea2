"""The worker process of an isolated inspector: `python -m edgead.runtime.isolation_worker`.

Its main thread inspects frames, a second one swaps knowledge and embeds. It ends when its parent closes the channels
or dies, whatever the engine's library is doing then.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import cast

import numpy as np

from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import BundleError
from edgead.runtime.inspector import Inspector
from edgead.runtime.isolation_wire import (
    Answer,
    Asked,
    Embed,
    Embedded,
    FrameArea,
    Look,
    Order,
    Ready,
    Swapped,
    manifest_digest,
    raw,
    receive,
    refused,
    send,
    to_answer,
)
from edgead.runtime.knowledge import decode_pack
from edgead.runtime.normality import Mode
from edgead.runtime.preprocess import Frame
from edgead.runtime.spec import Preprocessing

_LAST_SECONDS = 5.0
"""Time that a frame in flight gets once the parent is gone."""
_PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> int:
    """Serve the parent until it closes the channels. `words` are the descriptors: frames, control, area."""
    parent = os.getppid()
    # Ctrl-C, and a service manager that signals the whole group, are for the parent to heed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with(parent)
    frames, control = (socket.socket(fileno=int(word)) for word in words[:2])
    area = FrameArea(int(words[2]))
    order: Order
    try:
        order, data = receive(control, Order)
    except (EOFError, OSError):
        return 0
    try:
        inspector = _open(order, memoryview(data))
        inspector.inspect(_blank(inspector.spec.preprocessing))  # the first run of a trunk is slow
    except Exception as error:  # told to the parent, whose caller wants to know
        send(control, refused(error))
        return 1
    send(control, Ready(inspector.engine, inspector.threads))
    threading.Thread(target=_serve_control, args=(control, inspector), daemon=True).start()
    _serve_frames(frames, area, inspector)
    inspector.close()
    return 0


def _open(order: Order, data: memoryview) -> Inspector:
    bundle = open_bundle(Path(order.bundle), verify=False)
    if manifest_digest(bundle) != order.manifest:
        raise BundleError(
            wanted=f"the bundle that was opened at {order.bundle}",
            got="another one in its place",
            next_step="Open the new bundle with a new inspector.",
        )
    packs, start = [], 0
    for size in order.packs:
        packs.append(decode_pack(bytes(data[start : start + size])))
        start += size
    return Inspector(
        bundle,
        target=order.target,
        threads=order.threads,
        device=order.device,
        packs=packs,
        products=(),
        suppression=cast("Mode | None", order.suppression),
    )


def _serve_frames(frames: socket.socket, area: FrameArea, inspector: Inspector) -> None:
    look: Look
    while True:
        try:
            look, _ = receive(frames, Look)
            try:
                answer, found = to_answer(inspector.inspect(area.frame(look.shape), product=look.product))
            except Exception as error:  # a frame never ends the stream
                answer, found = _no_answer(look, inspector, error), b""
            send(frames, answer, found)
        except (EOFError, OSError):
            return


def _no_answer(look: Look, inspector: Inspector, error: Exception) -> Answer:
    return to_answer(inspector.refusal(f"engine: {refused(error).got}", look.product))[0]


def _serve_control(control: socket.socket, inspector: Inspector) -> None:
    asked: Asked
    while True:
        try:
            asked, data = receive(control, Asked)
            try:
                if isinstance(asked, Embed):
                    frame = np.frombuffer(data, np.uint8).reshape(asked.shape)
                    features = {
                        name: np.ascontiguousarray(array, np.float32) for name, array in inspector.embed(frame).items()
                    }
                    send(
                        control,
                        Embedded({name: array.shape for name, array in features.items()}),
                        *(raw(array) for array in features.values()),
                    )
                else:
                    send(control, Swapped(*inspector.swap(decode_pack(bytes(data)))))
            except (EOFError, OSError):
                raise
            except Exception as error:  # told to the one who asked
                send(control, refused(error))
        except (EOFError, OSError):
            # The parent is gone. The main thread sees it too, unless its frame hangs in the engine's library.
            time.sleep(_LAST_SECONDS)
            os._exit(1)


def _blank(spec: Preprocessing) -> Frame:
    """A black frame that holds the region of interest."""
    width, height = spec.width, spec.height
    if spec.roi is not None:
        width, height = spec.roi.x + spec.roi.width, spec.roi.y + spec.roi.height
    return np.zeros((width, height, 3) if spec.rotate in (90, 270) else (height, width, 3), np.uint8)


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends: a hung call would otherwise outlive it."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it was too late for that
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
