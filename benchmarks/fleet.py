"""10,000 devices through a roll-out with faults: bytes, rates, adoption, and whether any ever ran something mixed.

    python -m benchmarks fleet [--devices N] [--json FILE] [--picture FILE]

Real: the updater of every device with its checks of signatures, the A/B store, deltas, the repository with its keys
and signatures, HTTP over sockets of this machine to a static server in a process of its own, and the rules by which
polls are spread, failed polls come later, and a roll-out is breached. All devices are in this process and poll one
after the other.

Simulated: the clock (days pass in minutes; waits between attempts of a download cost nothing), the disks (in memory;
a power cut leaves what was synced, and chance decides about the rest), the factory (but for 20 devices, which install
their first release over the network, all are imaged from one of them), frames and the inspector, and the way of a
device's report to its publisher. The signed cache is on the real file system. Releases are tested on the engine by
20 devices and whenever one is new; the other devices have the same machine and take the result that the same bytes had.
The engine is a small one (113 kB), so that bytes of an update are those of metadata and of a delta of 20 rows of 48.

A quiet day; a bad release to the pilot group, which its devices refuse and its publisher stops; a good one to the pilot
group, 10, 50 and 100 %; a power cut after which the whole plant wakes together. Devices are looked at after every start
and activation: engine, pack and threshold must be of one sound release. The exit code is 1 if one ever was not.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

from benchmarks.common import report
from benchmarks.fleet_device import Shares
from benchmarks.fleet_disk import MemoryDisk, MixingDisk
from benchmarks.fleet_report import figures, picture, text
from benchmarks.fleet_run import Settings, simulate


def main(arguments: list[str] | None = None) -> int:
    """Simulate, and print what came of it."""
    whole = Settings()
    parser = argparse.ArgumentParser(
        "benchmarks fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=whole.devices)
    parser.add_argument("--seed", type=int, default=whole.seed)
    parser.add_argument("--interval", type=float, default=whole.interval, help="seconds between polls of a device")
    parser.add_argument("--jitter", type=float, default=whole.jitter, help="share of the interval")
    parser.add_argument("--scratch", type=Path, help="folder for some 100 kB per device; by default memory, if there")
    parser.add_argument("--mixing", action="store_true", help="disks that are broken on purpose, which must be noticed")
    parser.add_argument("--picture", type=Path, help="write an SVG of adoption and requests here")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    faults = parser.add_argument_group("shares of polls in which something goes wrong")
    for item in dataclasses.fields(Shares):
        faults.add_argument(f"--{item.name}", type=float, default=item.default)
    options = parser.parse_args(arguments)
    shares = Shares(**{item.name: getattr(options, item.name) for item in dataclasses.fields(Shares)})
    settings = Settings(
        devices=options.devices, seed=options.seed, interval=options.interval, jitter=options.jitter, shares=shares
    )
    memory = Path("/dev/shm")
    scratch = options.scratch or (memory if memory.is_dir() else None)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="edgead-fleet-", dir=scratch) as home:
        found = simulate(Path(home), settings, MixingDisk if options.mixing else MemoryDisk)
    seconds = time.perf_counter() - start
    numbers = figures(found, settings)
    print(text(numbers, settings, seconds))
    if options.picture is not None:
        options.picture.write_text(picture(found, settings))
    report("fleet", {**numbers, "settings": dataclasses.asdict(settings), "seconds": seconds}, options.json)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
