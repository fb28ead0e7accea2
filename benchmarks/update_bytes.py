"""Bytes that a device fetches from an update repository: a quiet poll, and a small product's update, by size of fleet.

python -m benchmarks update-bytes [--large]

TUF's own client polls `edgead ota serve` over loopback. Counted are bodies; a request and the head of its answer add
about 350 bytes. The update is a roll-out record, a release, and a delta of one sentence (two float32 rows of 512
numbers, and what they mean). `--large` adds 10^5 targets, which takes a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater

from edgead.runtime.deltas import make_delta
from edgead.runtime.knowledge import Pack, encode_pack, new_pack
from edgead.runtime.notes import encode_note
from edgead.runtime.release import RELEASE_SCHEMA, Release, encode_release
from edgead.runtime.spec import Calibration
from edgead.runtime.tables import bytes_text, table
from edgead.server_side.ota.init import create
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.publish import delta_path, engine_path, pack_path, prune, releases_of
from edgead.server_side.ota.releases import release_path
from edgead.server_side.ota.repository import Repository, opened
from edgead.server_side.ota.roles import Settings
from edgead.server_side.ota.rollouts import roll_out
from edgead.server_side.ota.serve import RepositoryServer, serving

ENGINE = hashlib.sha256(b"an engine").hexdigest()
PRODUCT = "carpet"
GOLDEN = 8


def packs(count: int) -> list[Pack]:
    """A bank of 500 rows, and one sentence more in each further pack."""
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((500, 384)).astype(np.float32)
    made = []
    for sentences in range(count):
        words = [{"text": f"thread {number}", "class": "carpet", "prompts": 14} for number in range(sentences)]
        arrays = {
            "bank.normal": bank,
            "normality.table": rng.standard_normal((sentences, 512)).astype(np.float32),
            "normality.normal": rng.standard_normal((sentences, 512)).astype(np.float32),
            "normality.table.text": encode_note({"rows": words, "model": "ViT-B-16", "weights": "laion400m_e32"}),
        }
        if made:
            for name in ("normality.table", "normality.normal"):
                arrays[name][: sentences - 1] = made[-1].arrays[name]
        made.append(
            new_pack(product=PRODUCT, fingerprint="ab" * 32, calibration=Calibration(threshold=1.5), arrays=arrays)
        )
    return made


def publish(repository: Repository, keyring: Keyring, knowledge: list[Pack], place: int) -> None:
    """Pack number `place` with its delta, as release `place` + 1, to everybody."""
    pack, data = knowledge[place], encode_pack(knowledge[place])
    repository.add(pack_path(PRODUCT, pack.digest), data)
    for base in knowledge[max(0, place - repository.settings.keep) : place]:
        repository.add(delta_path(PRODUCT, base.digest, pack.digest), make_delta(base, pack))
    prune(repository, PRODUCT, pack.digest, releases_of(repository, PRODUCT), {knowledge[0].digest})
    repository.commit(keyring)
    names = [f"golden/{number:03d}.png" for number in range(GOLDEN)]
    release = Release(
        schema=RELEASE_SCHEMA,
        name=f"{PRODUCT}-{place + 1}",
        counter=place + 1,
        fingerprint=pack.fingerprint,
        engine=ENGINE,
        product_packs={PRODUCT: pack.digest},
        sizes={ENGINE: 40_000_000, pack.digest: len(data)},
        scores={PRODUCT: {name: 1.0 + number / 7 for number, name in enumerate(names)}},
        must_alarm={PRODUCT: tuple(names[GOLDEN // 2 :])},
        tolerance=1e-3,
        made_at=1_700_000_000,
    )
    repository.add(release_path(PRODUCT, release.counter), encode_release(release))
    repository.commit(keyring)
    roll_out(repository, PRODUCT, release=release.counter, percent=100.0)
    repository.commit(keyring)


def crowd(repository: Repository, products: int, targets: int) -> None:
    """Packs of other products, as entries."""
    for product in repository.settings.products[1 : products + 1]:
        for number in range(targets):
            digest = hashlib.sha256(f"{product}/{number}".encode()).hexdigest()
            path = pack_path(product, digest)
            entry = TargetFile(1_000_000, {"sha256": digest}, path)
            repository.edit(repository.layout.role_of(path)).targets[path] = entry


def fetch(server: RepositoryServer, folder: Path, root: bytes, paths: list[str]) -> int:
    """Bytes of the bodies of one poll, and of these targets."""
    del server.requests[:]
    (folder / "targets").mkdir(parents=True, exist_ok=True)
    where = (f"{server.url}/metadata/", str(folder / "targets"), f"{server.url}/targets/")
    updater = Updater(str(folder), *where, bootstrap=root)
    updater.refresh()
    for path in paths:
        found = updater.get_targetinfo(path)
        assert found is not None, path
        updater.download_target(found)
    return sum(size for _, _, size in server.requests)


def measure(name: str, products: int, targets: int, bins: int) -> list[str]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        folder, phrase = home / "updates", os.urandom(16).hex()
        keyring = Keyring([home / "keys"], lambda purpose: [phrase])
        names = (PRODUCT, *(f"product-{number:04d}" for number in range(products)))
        create(folder, keyring, Settings(products=names, bins=bins))
        root = keyring.root
        assert root is not None
        knowledge = packs(4)
        with opened(folder, root) as repository:
            repository.add(engine_path(ENGINE), b"stands for 40 MB")
            crowd(repository, products, targets)
            for place in range(3):
                publish(repository, keyring, knowledge, place)

        def targets_of(place: int) -> list[str]:
            base, result = knowledge[place - 1].digest, knowledge[place].digest
            paths = [f"rollout/{PRODUCT}.json", release_path(PRODUCT, place + 1)]
            return [*paths, delta_path(PRODUCT, base, result)]

        with serving(folder) as server:
            cold = fetch(server, home / "device", root, targets_of(2))
            poll = fetch(server, home / "device", root, [])
            with opened(folder, root) as repository:
                publish(repository, keyring, knowledge, 3)
                crowd(repository, min(products, 10), targets + 1)
                repository.commit(keyring)
            update = fetch(server, home / "device", root, targets_of(3))
            parts = {path: size for path, _, size in server.requests}
        delta = next(size for path, size in parts.items() if path.endswith(".delta"))
        snapshot = next(path for path in parts if path.endswith(".snapshot.json"))
        packed = len(zlib.compress((folder / snapshot[1:]).read_bytes(), 9))
        figures = (poll, update, delta, parts[snapshot], packed, cold)
        return [name, *(bytes_text(size) for size in figures)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--large", action="store_true", help="also 10^5 targets, which takes a minute")
    options = parser.parse_args()
    cases = [("1 product", 0, 0, 0), ("10^3 targets of 10 others", 10, 100, 0)]
    if options.large:
        cases += [
            ("10^5 targets of 100 others", 100, 1000, 0),
            ("10^5 targets of 1,000 others", 1000, 100, 0),
            ("10^5 of 1,000 in 256 bins", 1000, 100, 8),
            ("10^5 of 1,000 in 1,024 bins", 1000, 100, 10),
        ]
    head = ["beside", "poll", "update", "its delta", "its snapshot", "compressed", "first poll and update"]
    print(table([head, *(measure(*case) for case in cases)]))


if __name__ == "__main__":
    main()
