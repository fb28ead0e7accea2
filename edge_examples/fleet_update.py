"""A plant's week: a publisher, a web server and three cameras, each a process; no camera pauses for an update.

Monday: good parts. Tuesday: an engraved code is normal. Wednesday: a missed dent, for the pilot camera first.
Thursday: knowledge that finds nothing is signed past the publisher's tests, and each camera refuses it by itself.

    python fleet_update.py plant/
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fleet_audit import Row, audit, settled, show
from painted_plant import current, edgead, paint_week, sign_blind_knowledge

from edgead.runtime import Pack
from edgead.runtime.slots import Store

CAMERA = Path(__file__).with_name("updating_camera.py").resolve()
MONDAY = """
    export --normal good --product flange --size 96 --rows 300 --target onnx -o flange.edgead
    ota init updates --product flange
    ota publish updates flange.edgead
    ota release updates flange
    ota rollout updates flange --release 1 --percent 100 --window 1"""
TUESDAY = """
    ota add-normal updates flange new --held-out held-out
    ota rollout updates flange --percent 100 --window 1"""
WEDNESDAY = """
    ota add-anomaly updates flange line/dent-0.png --mask masks/dent-0.png --held-out held-out --group pilot
    ota rollout updates flange --group pilot --window 1"""
DEVICE = "device init {name} --id {name} --group {name} --product flange --root keys/root.json --repository {address}"
NAMES = ("pilot", "north", "south")
SERVE = [sys.executable, "-m", "edgead", "ota", "serve", "updates", "--port", "0", "--quiet"]


def until(reached: Callable[[Path], bool], *names: str) -> None:
    start = time.monotonic()
    while not all(reached(Path(name)) for name in names):
        if time.monotonic() > start + 120:
            raise TimeoutError(f"one of {', '.join(names)} does not come so far")
        time.sleep(0.1)
    print(f"-> {', '.join(names)}: {time.monotonic() - start:.1f} s\n", flush=True)


def learnt(*names: str) -> Pack:
    pack = current()
    until(lambda camera: settled(camera, pack), *names)
    return pack


def main(home: Path) -> list[Row]:
    paint_week(home)
    with contextlib.chdir(home), contextlib.ExitStack() as running:
        edgead(MONDAY)
        server = running.enter_context(subprocess.Popen(SERVE, stdout=subprocess.PIPE, text=True))
        running.callback(server.terminate)
        address = server.stdout.readline().split()[0]
        for name in NAMES:
            edgead(DEVICE.format(name=name, address=address))
            running.enter_context(subprocess.Popen([sys.executable, CAMERA, name, "line", "shift-over"]))
            running.callback(Path("shift-over").touch)
        packs = [learnt(*NAMES)]
        edgead(TUESDAY)
        packs.append(learnt(*NAMES))
        edgead(WEDNESDAY)
        learnt("pilot")
        print("pilot first:", *(Store(name).active().release.name for name in NAMES))
        edgead("ota rollout updates flange --percent 100")
        packs += [learnt(*NAMES), sign_blind_knowledge()]
        until(lambda camera: bool(Store(camera).state().quarantined), *NAMES)
    return show(audit([home / name for name in NAMES], home / "flange.edgead", home / "line", packs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
