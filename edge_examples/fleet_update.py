"""A plant's week: a publisher, a web server, a collector and three cameras, each a process; none pauses for an update.

Monday: good parts. Tuesday: an engraved code is normal. Wednesday: a missed dent, for the pilot camera first.
Thursday: knowledge that finds nothing is signed past the publisher's tests, and each camera refuses it by itself.
Friday: a good release, under which the driver of one camera dies; it goes back by itself, and the publisher sees it.

    python fleet_update.py plant/
"""

import contextlib
import sys
from pathlib import Path

from fleet_audit import Row, audit, settled, show
from painted_plant import current, edgead, paint_week, sign_blind_knowledge
from plant_programs import camera, service, told, until

from edgead.runtime import Pack
from edgead.runtime.device_reports import public_key
from edgead.runtime.slots import Store

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
FRIDAY = """
    ota add-anomaly updates flange line/dent-1.png --mask masks/dent-1.png --held-out held-out
    ota rollout updates flange --percent 100 --window 1"""
DEVICE = """
    device init {name} --id {name} --group {name} --product flange --root keys/root.json --repository {server} \
        --statuses {collector}"""
CAMERAS = {"pilot": "updating_camera.py", "north": "fragile_camera.py", "south": "updating_camera.py"}
NAMES = tuple(CAMERAS)


def learnt(*names: str) -> Pack:
    pack = current()
    until(lambda camera: settled(camera, pack), *names)
    return pack


def main(home: Path) -> list[Row]:
    paint_week(home)
    with contextlib.chdir(home), contextlib.ExitStack() as running:
        edgead(MONDAY)
        server = service(running, "ota serve updates --port 0 --quiet")
        collector = service(running, "ota collect --database fleet.db --listen 127.0.0.1:0 --keep 1000")
        for name, program in CAMERAS.items():
            edgead(DEVICE.format(name=name, server=server, collector=collector))
            edgead(f"ota devices add fleet.db {name} {public_key(Path(name))}")
            camera(running, name, program)
        packs = [learnt(*NAMES)]
        edgead(TUESDAY)
        packs.append(learnt(*NAMES))
        edgead(WEDNESDAY)
        learnt("pilot")
        print("pilot first:", *(Store(name).active().release.name for name in NAMES))
        edgead("ota rollout updates flange --percent 100")
        packs += [learnt(*NAMES), sign_blind_knowledge()]
        until(lambda camera: told(camera.name).get(4) == "rejected", *NAMES)
        edgead(FRIDAY)
        packs.append(learnt("pilot", "south"))
        until(lambda camera: told(camera.name).get(5) in ("confirmed", "rolled back"), *NAMES)
        edgead("ota status --statuses fleet.db --repository updates --html fleet.html")
        books = {name: told(name) for name in NAMES}
    return show(audit([home / name for name in NAMES], home / "flange.edgead", home / "line", packs, books))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
