"""Lists the benchmarks, or runs one, or all that need nothing but this environment.

python -m benchmarks                     all of the latter, one after the other
python -m benchmarks list                what there is
python -m benchmarks NAME [OPTIONS]      one of them; `NAME --help` shows its options
"""

from __future__ import annotations

import runpy
import sys

BENCHMARKS = {
    "bank-search": ("bank_search", "the bank search against the machine's matrix-multiply rate"),
    "frame": ("frame", "a decoded camera frame to verdict, map and regions, stage by stage"),
    "update": ("update", "100 rows more for a running inspector: bytes, seconds, frames lost"),
    "rows": ("rows", "one row in a hundred of 10,000 x 384 replaced: bytes of delta, pack and provenance"),
    "update-bytes": ("update_bytes", "what a device fetches for a poll and for an update, by size of fleet"),
    "ota": ("ota", "from add-normality to the first frame under it; a stream during updates; what updates cost"),
    "fleet": ("fleet", "10,000 devices through a roll-out with faults: bytes, rates, adoption, none ever mixed"),
    "footprint": ("footprint", "a bare environment: first score, peak memory, installed size"),
    "language": ("language", "detectors with sentences by engine, and what lazy suppression saves"),
    "fit": ("fit", "fitting from 600 photographs: seconds by stage, peak memory"),
    "speed": ("speed_with_peer", "milliseconds beside a peer in one run (needs --peer-python)"),
    "efficientad": (
        "efficientad_peer",
        "EfficientAD and SimpleNet beside a peer, in one run (needs --peer-python)",
    ),
    "parity": ("parity_with_peer", "the same maps and scores as a peer? (needs --peer-python)"),
    "winclip-parity": ("winclip_parity", "the same WinCLIP scores and maps as a peer? (needs --peer-python)"),
    "kka": ("kka", "does the loop of key knowledge augmentation do what it promises? (half an hour)"),
    "small-detectors": ("small_detectors", "trained detectors without and with generated anomalies (needs --data)"),
    "detection": ("detection", "how well defects are found, by backbone (needs --data)"),
}
ALONE = ("bank-search", "frame", "update", "update-bytes", "rows", "ota", "fleet", "footprint", "language", "fit")
"""Those that need neither a peer's environment nor data."""


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["list"], ["--help"], ["-h"]):
        print((__doc__ or "").strip() + "\n")
        for name, (_, what) in BENCHMARKS.items():
            print(f"  {name:<16} {what}")
        return 0
    if arguments and arguments[0] not in BENCHMARKS:
        print(f"no benchmark named '{arguments[0]}'; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    if arguments:
        return _run(arguments[0], arguments[1:])
    worst = 0
    for name in ALONE:
        print(f"\n== {name}: {BENCHMARKS[name][1]}", flush=True)
        worst = max(worst, _run(name, []))
    return worst


def _run(name: str, options: list[str]) -> int:
    """Run a benchmark's module as a program; returns its exit code."""
    kept = sys.argv
    sys.argv = [f"benchmarks {name}", *options]
    try:
        runpy.run_module(f"benchmarks.{BENCHMARKS[name][0]}", run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    finally:
        sys.argv = kept
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
