#!/usr/bin/env python3
"""Drives the updater's trusted repository from the command line, for the TUF project's conformance suite.

    tuf_conformance_client.py --metadata-dir DIR init ROOT_JSON
    tuf_conformance_client.py --metadata-dir DIR --metadata-url URL refresh
    tuf_conformance_client.py --metadata-dir DIR --metadata-url URL --target-name NAME --target-base-url URL
                              --target-dir DIR download

Exits with 0 if all went well and with 1 if not. The same code that a device runs fetches and verifies; what is switched
off is what plain TUF repositories do not have: the time at which a timestamp was made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import TargetFile

from edgead.runtime.disk import RealDisk, put_file
from edgead.runtime.errors import EdgeadError
from edgead.runtime.fetch import Fetcher
from edgead.runtime.fetch_rules import FetchLimits
from edgead.runtime.trust import TrustedRepository

LIMITS = FetchLimits(connect_s=5.0, gap_s=5.0, total_s=60.0, tries=1)


def init(metadata: Path, root: Path) -> None:
    """Trust a root; nothing is asked for."""
    data = root.read_bytes()
    if json.loads(data)["signed"]["_type"] != "root":
        raise ValueError("not root metadata")
    metadata.mkdir(parents=True, exist_ok=True)
    place = metadata / "root.json"
    place.unlink(missing_ok=True)  # it may be a link to a newer one
    put_file(RealDisk(), place, [data])


def refreshed(metadata: Path, url: str, targets_url: str, fetcher: Fetcher, now: float) -> TrustedRepository:
    """The repository as its newest metadata has it."""
    root = (metadata / "root.json").read_bytes()
    repository = TrustedRepository(url, root, metadata, fetcher, now=now, targets_url=targets_url, dated=False)
    repository.refresh()
    return repository


def download(repository: TrustedRepository, fetcher: Fetcher, name: str, folder: Path) -> None:
    """One target into a folder, under a name that says nothing but which target it is."""
    entry = repository.entry(name)
    if entry is None:
        raise ValueError(f"no target of the name {name!r}")
    signed, url = entry
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / hashlib.sha256(name.encode()).hexdigest()
    if place.is_file() and place.stat().st_size == signed.length and _fits(signed, place.read_bytes()):
        return
    # What broke off is no target: it lies elsewhere until it is whole.
    with tempfile.TemporaryDirectory() as elsewhere:
        if "sha256" in signed.hashes:
            target = repository.find(name)
            assert target is not None
            fetcher.save(url, Path(elsewhere) / "part", RealDisk(), length=target.length, sha256=target.sha256)
            data = (Path(elsewhere) / "part").read_bytes()
        else:
            data = fetcher.read(url, signed.length)
    if not _fits(signed, data):
        raise ValueError(f"{name!r} is not what was signed")
    put_file(RealDisk(), place, [data])


def _fits(signed: TargetFile, data: bytes) -> bool:
    """Whether a content has the length and every hash that is signed; no unknown hash counts."""
    try:
        signed.verify_length_and_hashes(data)
    except RepositoryError:
        return False
    return True


def main(arguments: Sequence[str] | None = None, clock: Callable[[], float] = time.time) -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-base-url", default="")
    parser.add_argument("--target-dir", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    words = parser.parse_args(arguments)
    if words.command != "init" and not words.metadata_url:
        parser.error("--metadata-url is needed")
    if words.command == "download" and not (words.target_name and words.target_dir and words.target_base_url):
        parser.error("--target-name, --target-base-url and --target-dir are needed")
    fetcher = Fetcher(LIMITS)
    try:
        if words.command == "init":
            init(words.metadata_dir, words.root)
            return 0
        repository = refreshed(words.metadata_dir, words.metadata_url, words.target_base_url, fetcher, clock())
        for name in words.target_name if words.command == "download" else ():
            download(repository, fetcher, name, words.target_dir)
    except (EdgeadError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        fetcher.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
