"""A camera that keeps itself up to date: its updater works beside the inspection, which never waits for it.

The folder is made once with `edgead device init`; pictures are inspected in turn until the file SHIFT_OVER is there,
one line of JSON each in FOLDER/log.jsonl. A release is tested on the device, taken between two frames, watched, and
confirmed or taken back; what became of it is told to the address of --statuses. Needs only: pip install 'edgead[ota]'

    python updating_camera.py FOLDER photos/ SHIFT_OVER
"""

import sys
import time
from pathlib import Path

from edgead.runtime import read_image
from edgead.runtime.device_folder import note_outcome, read_device
from edgead.runtime.frames import FrameRing
from edgead.runtime.image import list_images
from edgead.runtime.inspection import encode_line, result_line
from edgead.runtime.live import LiveInspector
from edgead.runtime.slots import Store
from edgead.runtime.status_report import reporter_of
from edgead.runtime.updater import DeviceUpdater

PAUSE_S, POLL_S = 0.05, 0.5


def main(folder: Path, photos: Path, shift_over: Path, *, inspector: type[LiveInspector] = LiveInspector) -> None:
    store, device = Store(folder), read_device(folder)
    DeviceUpdater(store, device, threads=1).poll()
    ring = FrameRing(store.frames, every_s=1.0)
    # `start` counts the starts of a release that has not proved itself, and goes back when they are too many.
    with inspector(store.start(), frames=ring, threads=1) as line, open(folder / "log.jsonl", "ab", 0) as log:
        reporter = reporter_of(folder, store, device, inspector=line)
        updater = DeviceUpdater(store, device, line, threads=1, reporter=reporter)
        updater.start(POLL_S, report=lambda outcome: note_outcome(folder, outcome, updater.failures))
        frames = [(path.stem, read_image(path)) for path in list_images(photos)]
        number = (folder / "log.jsonl").read_bytes().count(b"\n")
        while not shift_over.exists():
            name, frame = frames[number % len(frames)]
            log.write(encode_line(result_line(line.inspect(frame), f"{number}/{name}")))
            number += 1
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
