"""What the week of `fleet_update.py` takes for granted: painted photographs, and somebody who signs too much."""

import os
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from edgead.cli import cli
from edgead.runtime import Pack, encode_pack
from edgead.runtime.image import encode_png
from edgead.runtime.release import encode_release
from edgead.server_side.ota.flows import current_of
from edgead.server_side.ota.keys import Keyring, environment
from edgead.server_side.ota.publish import publish_pack, releases_of
from edgead.server_side.ota.releases import release_path
from edgead.server_side.ota.repository import opened
from edgead.server_side.ota.rollouts import roll_out
from edgead.server_side.painting import paint_defect
from edgead.server_side.painting_parts import paint_part

KEYS = ["--keys", "keys", "--passphrase-env", "EDGEAD_KEYS"]
os.environ.setdefault(KEYS[3], "a long passphrase")


def edgead(commands: str) -> None:
    """Run commands as a shell would, one a line."""
    for command in commands.strip().splitlines():
        words = command.split()
        print("$ edgead", *words, flush=True)
        keys = KEYS if words[0] == "ota" and words[1] not in ("devices", "status") else []
        cli.main([*words, *keys], "edgead", standalone_mode=False)


def paint(folder: Path, name: str, count: int, rng: np.random.Generator, *, code: bool = False) -> None:
    """Flanges FOLDER/NAME-0.png and so on; dents have masks in the folder `masks` beside it."""
    for place in (folder, folder.with_name("masks")):
        place.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        part = paint_part("flange", rng=rng, size=96, new_pattern=code)
        image = part.image
        if name == "dent":
            # A worn tool dents every part alike.
            tool = np.random.default_rng(0)
            image, mask = paint_defect(image, "dent", place=(0.3, 0.5), contrast=0.6, rng=tool, within=part.surface)
            (place / f"{name}-{number}.png").write_bytes(encode_png(np.repeat(mask[..., None], 3, axis=2)))
        (folder / f"{name}-{number}.png").write_bytes(encode_png(image))


def paint_week(home: Path) -> None:
    """Good parts to learn from, others to set thresholds on, the new batch, and what passes on the line."""
    rng = np.random.default_rng(7)
    for folder, count in (("good", 16), ("held-out", 8), ("line", 2)):
        paint(home / folder, "good", count, rng)
    for folder, count in (("new", 6), ("held-out", 4), ("line", 1)):
        paint(home / folder, "code", count, rng, code=True)
    paint(home / "line", "dent", 2, rng)


def current() -> Pack:
    """The knowledge of the latest release."""
    with opened(Path("updates"), Path("keys/root.json").read_bytes()) as repository:
        return current_of(repository, "flange")[1]


def sign_blind_knowledge() -> Pack:
    """Sign a release by hand, whose threshold nothing reaches; `edgead ota release` would not make it."""
    with opened(Path("updates"), Path("keys/root.json").read_bytes()) as repository:
        pack, last = current_of(repository, "flange")[1], releases_of(repository, "flange")[-1]
        calibration = replace(pack.calibration, threshold=1e3, map_threshold=1e3)
        blind = Pack("flange", pack.fingerprint, calibration, pack.arrays)
        publish_pack(repository, blind)
        sizes = {last.engine: last.sizes[last.engine], blind.digest: len(encode_pack(blind))}
        bad = replace(last, name="flange-4", counter=4, product_packs={"flange": blind.digest}, sizes=sizes)
        repository.add(release_path("flange", 4), encode_release(bad))
        roll_out(repository, "flange", release=4, percent=100)
        repository.commit(Keyring([Path("keys")], environment(KEYS[3])))
    return blind
