"""The books of the week of `fleet_update.py`: every frame is judged again, with the knowledge that its line names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgead.runtime import Inspector, Pack, open_bundle, read_image
from edgead.runtime.image import list_images
from edgead.runtime.inspection import ResultLine, decode_line
from edgead.runtime.slots import Store
from edgead.runtime.tables import table


@dataclass(frozen=True)
class Row:
    """What became of a camera: `told` is what it said of each release, `verdicts` those of each picture under them."""

    device: str
    release: str
    frames: int
    lost: int
    mixed: int
    refused: int
    told: dict[int, str]
    verdicts: dict[str, list[str]]


def lines(camera: Path) -> list[ResultLine]:
    """What a camera has said so far."""
    log = camera / "log.jsonl"
    data = log.read_bytes() if log.exists() else b""
    return [decode_line(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def settled(camera: Path, pack: Pack) -> bool:
    """Whether a camera has confirmed a release, and inspected a dozen frames with that knowledge."""
    return Store(camera).state().confirmed and [line.knowledge for line in lines(camera)].count(pack.version) > 12


def audit(
    cameras: Sequence[Path],
    bundle: Path,
    photos: Path,
    packs: Sequence[Pack],
    books: Mapping[str, dict[int, str]],
) -> list[Row]:
    """Lost is a frame without an answer; mixed one whose score or threshold is not that of the knowledge it names."""
    truth, rows = {}, []
    for pack in packs:
        with Inspector(open_bundle(bundle), packs=[pack], threads=1) as inspector:
            for path in list_images(photos):
                found = inspector.inspect(read_image(path))
                truth[pack.version, path.stem] = (found.score, found.threshold)
    for camera in cameras:
        answered, mixed, verdicts = set(), 0, dict[str, dict[str, set[str]]]()
        for line in lines(camera):
            number, name = line.path.split("/")
            verdicts.setdefault(name, {}).setdefault(line.knowledge, set()).add(line.verdict)
            if line.score is not None:
                answered.add(number)
                mixed += not np.allclose((line.score, line.threshold), truth[line.knowledge, name], rtol=1e-4)
        frames, store = int(number) + 1, Store(camera)
        release, refused = store.active().release.name, len(store.state().quarantined)
        said = {name: [*map("/".join, found.values())] for name, found in sorted(verdicts.items())}
        rows.append(Row(camera.name, release, frames, frames - len(answered), mixed, refused, books[camera.name], said))
    return rows


def show(rows: list[Row]) -> list[Row]:
    cells = [["device", "release", "frames", "lost", "mixed", "refused", *rows[0].verdicts]]
    for row in rows:
        figures = (row.release, row.frames, row.lost, row.mixed, row.refused)
        cells.append([row.device, *map(str, figures), *(">".join(said) for said in row.verdicts.values())])
    print(table(cells))
    return rows
