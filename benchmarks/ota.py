"""From "this is normal" at the publisher to the first frame that is judged so, and what updates cost a camera.

    python -m benchmarks ota
    python -m benchmarks ota --model MobileCLIP-S1 --cases alone
    python -m benchmarks ota --peer-python .venv-peer/bin/python

A real repository, `edgead ota serve` in a process of its own, and cameras as processes that inspect while they are
updated, all on this machine. Bytes are those of HTTP, heads included, as a relay between camera and server counts
them. The command runs in this process, whose modules are loaded; as a program of its own it is timed once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from packaging.requirements import Requirement

from benchmarks.common import median, note, painted, report, table
from benchmarks.ota_camera import JITTER, POLL_S
from benchmarks.ota_world import GROWN, PRODUCT, Made, Program, Publisher, Relay, make_bundle, served
from benchmarks.rows import measured
from benchmarks.update import peer_export
from edgead.runtime.device_folder import init_device
from edgead.runtime.update_outcome import Device

CASES = {"alone": (0, 0), "beside 10^3 targets of 10 products": (10, 100), "beside 10^5 of 100": (100, 1000)}
"""Other products, and targets of each."""
AIMS = {"update_bytes": 10_000, "update_s": 2.0, "float32": 160_000, "float16": 80_000, "poll_bytes": 1000}
PEER = {"bytes": (27_000_000, 13_500_000), "export_s": (8.0, 10.0), "import_s": (12.0, 18.0)}
"""anomalib 2.7 with OpenVINO, measured before on another machine: 100 rows more for 10,240 of 384 in float32 and
float16; it has no update of knowledge, so the model is exported anew and shipped whole."""
STAGES = ("sign", "wait for the poll", "download", "tests", "replay and swap", "first frame")

IMPORTS = """
import sys, time
begin = time.perf_counter()
from edgead.runtime.live import LiveInspector
inspector = time.perf_counter()
from edgead.runtime.updater import DeviceUpdater
from edgead.runtime.trust import TrustedRepository
import tuf.ngclient.updater, cryptography.hazmat.primitives.asymmetric.ed25519
print(inspector - begin, time.perf_counter() - inspector)
"""
UPDATE = """
import sys
from edgead.cli import cli
cli.main(["device", "update", sys.argv[1], "--target", "onnx"], "edgead", standalone_mode=False)
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", line.split()[1])
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks ota", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000, help="of the camera's bank")
    parser.add_argument(
        "--model", help="text encoder with random weights; a very small one of the same width if left out"
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--repeats", type=int, default=3, help="sentences in each case")
    parser.add_argument("--updates", type=int, default=5, help="updates of the stream; 0 leaves it out")
    parser.add_argument("--peer-python", type=Path, help="has anomalib[openvino]; measures its export too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {
        "aims": AIMS,
        "bank": options.rows,
        "encoder": options.model or "small",
        "cases": {},
        "load": [],
    }
    with tempfile.TemporaryDirectory(prefix="edgead-ota-") as scratch:
        home = Path(scratch)
        note("exporting ...")
        made = make_bundle(home, options.rows, options.model)
        np.save(home / "frames.npy", np.concatenate([painted(4, seed=21), painted(1, seed=9, defects=True)]))
        publisher = None
        for place, name in enumerate(options.cases):
            note(f"add-normality, {name} ...")
            figures["load"].append(os.getloadavg()[0])
            (home / str(place)).mkdir()
            publisher = Publisher(home / str(place), made, *CASES[name])
            figures["cases"][name] = _sentences(home, home / str(place), publisher, options.repeats, place == 0)
        if options.updates:
            note("a stream at full rate ...")
            figures["stream"] = _stream(home, made, options.updates)
        note("rows, imports, sizes ...")
        figures["rows"] = {dtype: measured(10_000, 384, 100, dtype)["delta"] for dtype in ("float32", "float16")}
        figures["imports"] = _imports()
        figures["installed"] = _installed()
        if options.peer_python is not None:
            note("the peer exports ...")
            figures["peer"] = peer_export(options.peer_python, home, 10_340)
    _show(figures)
    report("ota", figures, options.json)
    return 0


def _sentences(home: Path, place: Path, publisher: Publisher, repeats: int, costs: bool) -> dict[str, Any]:
    """Some sentences, one after the other, each until a frame was inspected under it."""
    found: dict[str, Any] = {"updates": []}
    with served(publisher.folder) as relay:
        device = _device(place / "camera", publisher, relay)
        with Program("-m", "benchmarks.ota_camera", "follow", device, home / "frames.npy") as camera:
            found["peak_before_kb"] = camera.event("ready")["peak_kb"]
            found["poll"] = _quiet_poll(camera, relay)
            for number in range(repeats):
                time.sleep(0.37 * number)  # at another moment between two polls
                before, begin = relay.moved(), time.time()
                said = publisher.add_normality(f"thread {number}")
                found["updates"].append(_followed(camera, relay, publisher, before, begin, said["pack"]))
            found["peak_after_kb"] = camera.event("outcome")["peak_kb"]
            if costs:
                begin = time.time()
                subprocess.run(
                    [sys.executable, "-m", "edgead", *publisher.words("loose thread")], check=True, capture_output=True
                )
                found["program_signs_s"] = publisher.signed_at() - begin
                found["program_s"] = camera.event("knowledge")["at"] - begin
        if costs:
            found["process"] = _process(place, publisher, relay)
    return found


def _device(folder: Path, publisher: Publisher, relay: Relay) -> Path:
    device = Device(folder.name, relay.url, PRODUCT, publisher.root.read_bytes(), ("pilot",))
    init_device(folder, device)
    return folder


def _quiet_poll(camera: Program, relay: Relay) -> dict[str, Any]:
    """A poll without news, heads of HTTP included."""
    before, outcome = (0, 0), {"requests": 0}
    for _ in range(3):  # the first one may bring more than a poll without news does
        before = relay.moved()
        outcome = camera.event("outcome")
        while not outcome["requests"]:  # a look at the release on probation
            outcome = camera.event("outcome")
        time.sleep(0.1)
    up, down = (now - then for now, then in zip(relay.moved(), before, strict=True))
    if outcome["status"] != "current" or outcome["requests"] != 2:
        raise SystemExit(f"a poll without news came to {outcome}")
    return {"bodies": outcome["received"], "up": up, "down": down, "seconds": outcome["seconds"]}


def _followed(
    camera: Program, relay: Relay, publisher: Publisher, before: tuple[int, int], begin: float, pack: str
) -> dict[str, Any]:
    signed = publisher.signed_at()
    seen: dict[str, dict[str, Any]] = {}
    while len(seen) < 2:
        event = camera.event("knowledge", "outcome")
        if event.get("error"):
            raise SystemExit(event["error"])
        if event["event"] == "knowledge" or event["status"] in ("activated", "rejected"):
            seen[event["event"]] = event
    outcome, frame = seen["outcome"], seen["knowledge"]
    if not pack.startswith(frame["knowledge"]):
        raise SystemExit(f"the camera has {frame['knowledge']}, and {pack[:12]} was signed")
    up, down = (now - then for now, then in zip(relay.moved(), before, strict=True))
    moments = [begin, signed, outcome["polled"], *outcome["tested"], outcome["taken"][1], frame["at"]]
    stages = dict(zip(STAGES, np.diff(moments).tolist(), strict=True))
    return {
        "seconds": frame["at"] - begin,
        "stages": stages,
        "bodies": outcome["received"],
        "requests": outcome["requests"],
        "way": outcome["way"],
        "up_with_polls": up,
        "down_with_polls": down,
        "swap_ms": 1e3 * (outcome["taken"][1] - outcome["taken"][0]),
    }


def _process(place: Path, publisher: Publisher, relay: Relay) -> dict[str, Any]:
    """`edgead device update` as a process of its own: the first release, a poll without news, and a delta."""
    found: dict[str, Any] = {}
    device = _device(place / "by-hand", publisher, relay)
    for name in ("first release", "no news", "a delta"):
        if name == "a delta":
            publisher.add_normality("frayed thread")
        before, begin = relay.moved(), time.perf_counter()
        done = subprocess.run([sys.executable, "-c", UPDATE, device], check=True, capture_output=True, text=True)
        up, down = (now - then for now, then in zip(relay.moved(), before, strict=True))
        peak = int(done.stdout.split()[-1])
        found[name] = {"peak_kb": peak, "seconds": time.perf_counter() - begin, "up": up, "down": down}
        found[name]["line"] = done.stdout.splitlines()[0]
    return found


def _stream(home: Path, made: Made, updates: int) -> dict[str, Any]:
    place = home / "stream"
    place.mkdir()
    publisher = Publisher(place, made, 0, 0)
    with served(publisher.folder) as relay:
        device = _device(place / "camera", publisher, relay)
        with Program("-m", "benchmarks.ota_camera", "pause", device, home / "frames.npy") as camera:
            camera.event("ready", patience=120.0)
            for _ in range(updates):
                counter = publisher.grow()
                time.sleep(1.5)  # what the publisher computes on the same processor is over
                publisher.roll_out(counter)
                event = camera.event("update", "trouble")
                if event["event"] == "trouble":
                    raise SystemExit(f"an update of the stream failed: {event}")
                time.sleep(1.0)
            camera.finish()
            return camera.event("pause")


def _imports() -> dict[str, float]:
    """Seconds of fresh processes."""
    runs = []
    for _ in range(7):
        done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
        runs.append([float(word) for word in done.stdout.split()])
    return {"inspector_s": median([run[0] for run in runs]), "updates_s": median([run[1] for run in runs])}


def _installed() -> dict[str, Any]:
    """Bytes of what the extra 'ota' installs and the camera's own install does not, without compiled caches."""
    # What this environment was installed from may be older than the tree.
    base, extra = _closure(_listed("dependencies")), _closure(_listed("ota"))
    sizes = {name: _size(name) for name in sorted(extra - base)}
    return {"bytes": sum(sizes.values()), "packages": sizes, "base_bytes": sum(map(_size, base))}


def _listed(name: str) -> list[str]:
    """A list of requirements in pyproject.toml."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    found = re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return re.findall(r'"([^"]+)"', found[1])


def _closure(requirements: list[str]) -> set[str]:
    """Names of the packages that some requirements lead to."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        need, extra = waiting.pop()
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", need.name).lower()
        for part in {"", *need.extras} - {part for known, part in found if known == name}:
            found.add((name, part))
            waiting += [(Requirement(text), part) for text in importlib.metadata.requires(name) or ()]
    return {name for name, _ in found}


def _size(name: str) -> int:
    files = importlib.metadata.files(name) or ()
    places = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(place.stat().st_size for place in places if place.is_file())


def _show(figures: dict[str, Any]) -> None:
    rows = []
    for name, case in figures["cases"].items():
        updates = case["updates"]
        seconds, received = median([u["seconds"] for u in updates]), median([u["bodies"] for u in updates])
        stages = [median([u["stages"][stage] for u in updates]) for stage in STAGES]
        rows.append([name, int(received), _aim(received, "update_bytes"), seconds, _aim(seconds, "update_s"), *stages])
    if rows:
        print(
            f"add-normality, encoder {figures['encoder']}, in a process with its modules loaded, to the first frame "
            f"under it; bank of {figures['bank']} rows, polls each {POLL_S:g} s +- {JITTER:.0%} and no poke; medians"
        )
        print(table(["", "bytes", f"aim {AIMS['update_bytes']}", "s", f"aim {AIMS['update_s']:g}", *STAGES], rows))
        ways = {u["way"] for case in figures["cases"].values() for u in case["updates"]}
        print(f"(load of the machine at the beginning of each: {', '.join(f'{load:.1f}' for load in figures['load'])})")
        print(f"(bytes are bodies; knowledge came as: {', '.join(sorted(ways))})")
        _show_costs(next(iter(figures["cases"].values())), figures)
    if "stream" in figures:
        _show_stream(figures["stream"])
    _show_rows(figures)


def _show_costs(case: dict[str, Any], figures: dict[str, Any]) -> None:
    poll = case["poll"]
    total = poll["up"] + poll["down"]
    print(
        f"\na poll without news: {poll['bodies']} bytes of bodies, {total} with both heads of 2 requests "
        f"({poll['up']} up, {poll['down']} down); aim {AIMS['poll_bytes']}: {_aim(total, 'poll_bytes')}"
    )
    print(
        f"the command as a program of its own: signed after {case['program_signs_s']:.2f} s, the import of "
        f"torch included, first frame after {case['program_s']:.2f} s"
    )
    lines = [
        [name, run["peak_kb"] / 1e3, run["seconds"], run["up"], run["down"]] for name, run in case["process"].items()
    ]
    print(table(["edgead device update", "peak, MB", "s", "bytes up", "down"], lines))
    print(
        f"a camera that inspects and updates in one process: {case['peak_before_kb'] / 1e3:.0f} MB at the peak before "
        f"the first update, {case['peak_after_kb'] / 1e3:.0f} MB after {len(case['updates'])}"
    )
    imports, installed = figures["imports"], figures["installed"]
    print(
        f"import: {imports['inspector_s']:.2f} s to inspect, {imports['updates_s']:.2f} s more for updates; the extra "
        f"'ota' installs {installed['bytes'] / 1e6:.1f} MB ({', '.join(installed['packages'])}) on top of "
        f"{installed['base_bytes'] / 1e6:.0f} MB"
    )


def _show_stream(found: dict[str, Any]) -> None:
    interval, swaps = found["interval_ms"], ", ".join(f"{ms:.1f}" for ms in found["swap_ms"])
    print(
        f"\na stream at the highest rate that it sustains, {found['frames_per_s']:.1f} frames/s, one each "
        f"{interval:.1f} ms; {found['updates']} updates of {GROWN} rows, swaps of {swaps} ms"
    )
    rows = []
    for name in ("quiet", "all", "in_updates", "in_swaps"):
        part = found[name]
        gaps = part["gaps_ms"] or {}
        longest = part["longest_pause_ms"] or 0.0
        rows.append(
            [
                {"quiet": "no updater", "all": "with one", "in_updates": "in its updates", "in_swaps": "in the swaps"}[
                    name
                ],
                *(part[key] for key in ("frames", "dropped", "not_inspected")),
                *(gaps.get(key, 0.0) for key in ("median", "p99", "p99.9", "longest")),
                longest,
                "ok" if longest <= interval and not part["dropped"] and not part["not_inspected"] else "ABOVE",
            ]
        )
    head = ["gaps between answers, ms", "frames", "dropped", "refused", "median", "p99", "p99.9", "longest"]
    print(table([*head, "longest pause", "aim: one interval, none dropped"], rows))
    print("(a pause is what a gap is longer than the interval)")


def _show_rows(figures: dict[str, Any]) -> None:
    print("\n1 % of 10,000 x 384 rows replaced, bytes of the delta")
    rows = [[dtype, size, AIMS[dtype], _aim(size, dtype)] for dtype, size in figures["rows"].items()]
    print(table(["", "bytes", "aim", ""], rows))
    peer = figures.get("peer")
    if peer is not None:
        print(
            f"the peer, for any change: {peer['bytes']} bytes, import {peer['import_s']:.1f} s and export "
            f"{peer['export_s']:.1f} s"
        )
        return
    print(
        "the peer (anomalib 2.7 with OpenVINO; measured before, on another machine, for 100 rows more in 10,240 of "
        f"384), for any change: {PEER['bytes'][0] / 1e6:g} MB in float32, {PEER['bytes'][1] / 1e6:g} MB in float16, "
        f"import {PEER['import_s'][0]:g}-{PEER['import_s'][1]:g} s and export {PEER['export_s'][0]:g}-"
        f"{PEER['export_s'][1]:g} s; --peer-python measures it here"
    )


def _aim(value: float, name: str) -> str:
    return "ok" if value <= AIMS[name] else "ABOVE"


if __name__ == "__main__":
    raise SystemExit(main())
