"""The publisher of the simulated fleet: a real repository with real keys, a real bundle, and releases good and bad."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from torch import Tensor, nn

from benchmarks.update_bytes import crowd
from edgead.detector_file import FittedDetector, detector_spec, export_programs
from edgead.exporter import export_bundle
from edgead.runtime.knowledge import Pack, encode_pack, new_pack
from edgead.runtime.release import Release, digest_of, encode_release
from edgead.runtime.rollout import Rollout
from edgead.runtime.spec import Calibration, KnowledgePort, Port, Preprocessing
from edgead.server_side.detectors.memory_bank import nearest_rows
from edgead.server_side.ota.init import create
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.publish import publish_bundle, publish_pack, releases_of
from edgead.server_side.ota.releases import make_release, release_path
from edgead.server_side.ota.repository import opened
from edgead.server_side.ota.roles import Settings
from edgead.server_side.ota.rollouts import roll_out, rollout_of, stop

PRODUCT = "flange"
BEGIN = datetime(2030, 1, 7, tzinfo=timezone.utc)
"""Second 0 of the virtual clock."""
SIDE, PATCH = 32, 4
ROWS, ADDED = 400, 20
OTHERS, THEIRS = 4, 25
"""Other products of the repository, and packs of each."""


class _Trunk(nn.Module):
    """Patches of 4 x 4 pixels as they are: [B, 64, 48]."""

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.permute(0, 3, 1, 2).float() / 255.0
        return nn.functional.pixel_unshuffle(pixels, PATCH).flatten(2).transpose(1, 2)


class _Head(nn.Module):
    """Distance of each patch to the nearest known one."""

    def forward(self, patches: Tensor, normal: Tensor, normal_rows: Tensor) -> tuple[Tensor, Tensor]:
        distance, _ = nearest_rows(patches, normal, normal_rows)
        grid = distance.reshape(-1, 1, SIDE // PATCH, SIDE // PATCH)
        anomaly_map = nn.functional.interpolate(grid, scale_factor=float(PATCH), mode="nearest")
        return distance.amax(dim=1), anomaly_map[:, 0]


@dataclass(frozen=True)
class Released:
    """What belongs together, as its publisher made it: the truth that devices are checked against.

    Attributes:
        counter: of the release.
        engine, pack: SHA-256 of the files.
        threshold: of the pack.
        sound: whether a device may run it.
    """

    counter: int
    engine: str
    pack: str
    threshold: float
    sound: bool


class Publisher:
    """Signs with all keys; `now` is the second of the virtual clock.

    Args:
        home: folder for repository, keys and bundle.

    Attributes:
        folder: of the repository.
        released: by SHA-256 of the record, every release that was ever signed.
        now: seconds since `BEGIN`.
    """

    def __init__(self, home: Path) -> None:
        self.folder = home / "updates"
        self.released: dict[str, Released] = {}
        self.now = 0.0
        phrase = os.urandom(16).hex()
        self._keyring = Keyring([home / "keys"], lambda purpose: [phrase])
        others = tuple(f"product-{number}" for number in range(OTHERS))
        create(self.folder, self._keyring, Settings(products=(PRODUCT, *others)), clock=self._clock)
        bundle = home / "flange.edgead"
        data, self._pack = _exported()
        bundle.write_bytes(data)
        with opened(self.folder, self.root, clock=self._clock) as repository:
            publish_bundle(repository, bundle)
            for place in range(OTHERS):
                crowd(repository, place + 1, THEIRS)
            repository.commit(self._keyring)
            self._keep(make_release(repository, PRODUCT, pack=self._pack.digest, target="onnx"), self._pack, sound=True)
            repository.commit(self._keyring)
            roll_out(repository, PRODUCT, release=1, percent=100.0)
            repository.commit(self._keyring)

    @property
    def root(self) -> bytes:
        """The first root, which devices are given."""
        return (self.folder / "metadata" / "1.root.json").read_bytes()

    def stamp(self) -> None:
        """The daily timestamp."""
        with opened(self.folder, self.root, clock=self._clock) as repository:
            repository.stamp(self._keyring)

    def release_bad(self, group: str) -> int:
        """Sign by hand, past the publisher's tests, knowledge that finds nothing; roll it out to a group.

        Returns:
            the counter.
        """
        blind = replace(self._pack.calibration, threshold=1e3, map_threshold=1e3)
        pack = Pack(PRODUCT, self._pack.fingerprint, blind, self._pack.arrays)
        with opened(self.folder, self.root, clock=self._clock) as repository:
            publish_pack(repository, pack)
            last = releases_of(repository, PRODUCT)[-1]
            counter = last.counter + 1
            bad = replace(
                last,
                name=f"{PRODUCT}-{counter}",
                counter=counter,
                product_packs={PRODUCT: pack.digest},
                sizes={last.engine: last.sizes[last.engine], pack.digest: len(encode_pack(pack))},
            )
            repository.add(release_path(PRODUCT, counter), encode_release(bad))
            repository.commit(self._keyring)
            roll_out(repository, PRODUCT, release=counter, groups=[group])
            repository.commit(self._keyring)
        self._keep(bad, pack, sound=False)
        return counter

    def release_good(self, group: str) -> int:
        """Teach some rows, release them after the release test, and roll them out to a group.

        Returns:
            the counter.
        """
        pack = _grown(self._pack)
        with opened(self.folder, self.root, clock=self._clock) as repository:
            publish_pack(repository, pack)
            made = make_release(repository, PRODUCT, pack=pack.digest, target="onnx")
            repository.commit(self._keyring)
            roll_out(repository, PRODUCT, release=made.counter, groups=[group])
            repository.commit(self._keyring)
        self._pack = pack
        self._keep(made, pack, sound=True)
        return made.counter

    def widen(self, percent: float) -> None:
        """Let more devices take the release that is rolled out."""
        with opened(self.folder, self.root, clock=self._clock) as repository:
            roll_out(repository, PRODUCT, percent=percent)
            repository.commit(self._keyring)

    def stop(self) -> None:
        """Stop the roll-out."""
        with opened(self.folder, self.root, clock=self._clock) as repository:
            stop(repository, PRODUCT)
            repository.commit(self._keyring)

    def rollout(self) -> Rollout:
        """The record that is signed now."""
        with opened(self.folder, self.root, clock=self._clock) as repository:
            record = rollout_of(repository, PRODUCT)
        assert record is not None
        return record

    def _keep(self, release: Release, pack: Pack, *, sound: bool) -> None:
        digest = digest_of(encode_release(release))
        threshold = pack.calibration.threshold
        self.released[digest] = Released(release.counter, release.engine, pack.digest, threshold, sound)

    def _clock(self) -> datetime:
        return (BEGIN + timedelta(seconds=self.now)).replace(microsecond=0)


def pilot(device: int, devices: int, share: float) -> bool:
    """Whether a device is of the pilot group: evenly spread, and the same ones each time."""
    place = int.from_bytes(hashlib.sha256(b"pilot %d" % device).digest()[:4], "big") / 2**32
    return place < share or device < min(3, devices)


@cache
def _exported() -> tuple[bytes, Pack]:
    """A detector of pixels as a bundle for ONNX Runtime, and its pack."""
    trunk, head = _Trunk().eval(), _Head().eval()
    spec = detector_spec(
        trunk,
        method="pixel-bank",
        preprocessing=Preprocessing(SIDE, SIDE),
        features=(Port("patches", "float32", ("B", (SIDE // PATCH) ** 2, 3 * PATCH**2)),),
        knowledge=(KnowledgePort("bank.normal", "float32", ("N", 3 * PATCH**2), rows="bank.normal.rows"),),
        outputs=(Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", SIDE, SIDE))),
    )
    rng = np.random.default_rng(0)
    rows = rng.normal(0.5, 0.02, (ROWS, 3 * PATCH**2)).astype(np.float32)
    good = rng.normal(127.5, 5.0, (2, SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    dented = good.copy()
    dented[:, 8:16, 8:16] = (240, 40, 40)
    pack = new_pack(
        product=PRODUCT,
        fingerprint=spec.fingerprint,
        calibration=Calibration(threshold=1.0, map_threshold=1.0),
        arrays={"bank.normal": rows},
    )
    programs = export_programs(trunk, head, spec)
    frames = np.concatenate([good, dented])
    with tempfile.TemporaryDirectory(prefix="edgead-fleet-") as folder:
        path = Path(folder) / "flange.edgead"
        export_bundle(FittedDetector(spec, *programs, pack, frames, {"method": "pixel-bank"}), path, ["onnx"])
        return path.read_bytes(), pack


def _grown(base: Pack) -> Pack:
    """The pack with some rows more, whose old ones keep their ids, and another threshold."""
    ids, rows = base.ids("bank.normal"), base.arrays["bank.normal"]
    more = np.random.default_rng(len(rows)).normal(0.5, 0.02, (ADDED, rows.shape[1])).astype(np.float32)
    return Pack(
        PRODUCT,
        base.fingerprint,
        replace(base.calibration, threshold=base.calibration.threshold + 0.05),
        {
            "bank.normal": np.concatenate([rows, more]),
            "bank.normal.ids": np.concatenate([ids, ids[-1] + 1 + np.arange(ADDED, dtype=np.uint64)]),
        },
    )


__all__ = ["BEGIN", "PRODUCT", "Publisher", "Released", "pilot"]
