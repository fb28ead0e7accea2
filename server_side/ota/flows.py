"""From the wish to a signed release with a pilot group, in one commit: what a line's people ask for on a weekday.

Each flow takes what the product's devices have (engine and pack of the latest release), changes the knowledge, runs
the release test, and puts pack, deltas, release and roll-out into the repository together. If anything is refused on
the way, the repository is as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgead.runtime.bundle import Bundle
from edgead.runtime.errors import InputError
from edgead.runtime.image import list_images
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack
from edgead.runtime.release import Release
from edgead.runtime.rollout import Rollout
from edgead.server_side import knowledge_rows as made
from edgead.server_side import knowledge_tools as room
from edgead.server_side.enrolment import next_id
from edgead.server_side.ota.provenance import provenance_of
from edgead.server_side.ota.publish import Published, engines_of, load_pack, publish_pack, releases_of
from edgead.server_side.ota.releases import make_release
from edgead.server_side.ota.repository import Repository
from edgead.server_side.ota.rollouts import roll_out


@dataclass(frozen=True)
class Shipped:
    """What a flow put into the repository, to be committed."""

    published: Published
    release: Release
    rollout: Rollout


def current_of(repository: Repository, product: str) -> tuple[Bundle, Pack]:
    """Engine and knowledge of a product's latest release.

    Raises:
        InputError: there is no release yet.
    """
    releases = releases_of(repository, product)
    if not releases:
        raise InputError(
            wanted=f"a release of {product!r} to change",
            got="none yet",
            next_step="Publish its bundle and release it first.",
        )
    return engines_of(repository)[releases[-1].engine], load_pack(
        repository, product, releases[-1].product_packs[product]
    )


def ship(
    repository: Repository,
    pack: Pack,
    *,
    groups: Sequence[str],
    now_normal: Sequence[str] = (),
    notes: str = "",
    calibrated: bool = False,
) -> Shipped:
    """Put a pack, its release and its roll-out to some groups. `Repository.commit` then signs all of it.

    Args:
        repository: where to.
        pack: the knowledge.
        groups: devices that take it first.
        now_normal, notes: see `make_release`.
        calibrated: see `publish_pack`; what `teach` returns is.

    Raises:
        InputError: the pack is what the devices have already.
        KnowledgeError, ReleaseError, EngineError: see `publish_pack` and `make_release`.
    """
    releases = releases_of(repository, pack.product)
    if releases and releases[-1].product_packs[pack.product] == pack.digest:
        raise InputError(
            wanted="knowledge that changes something",
            got=f"that of release {releases[-1].counter}",
            next_step="Nothing has to be released.",
        )
    published = publish_pack(repository, pack, calibrated=calibrated)
    release = make_release(repository, pack.product, pack=pack.digest, now_normal=now_normal, notes=notes)
    return Shipped(published, release, roll_out(repository, pack.product, release=release.counter, groups=groups))


def teach(
    repository: Repository,
    product: str,
    pictures: Sequence[tuple[Path, Path | None]],
    *,
    anomalous: bool,
    held_out: Path,
    defects: Path | None = None,
    most: int = 512,
    target: str | None = None,
) -> room.BankChange:
    """The knowledge of a product with rows of further pictures, and thresholds set anew on held-out ones.

    Args:
        repository: has what the devices have.
        product: whose.
        pictures: with their masks, or None.
        anomalous: whether they show defects.
        held_out: folder of good parts that no bank was taught.
        defects: folder of known defects, to count misses.
        most: rows to add to each bank, at most.
        target: engine of the bundle to embed and judge with.

    Raises:
        InputError: too few held-out pictures, one of them taught, nothing new, or no bank of that kind.
        EngineError, ImageError, KnowledgeError: a picture, or the engine.
    """
    held = list_images(held_out)
    if len(held) < 2:
        raise InputError(
            wanted="at least 2 held-out pictures of good parts (20 work, 200 are comfortable)",
            got=str(len(held)),
            next_step="Hold out more: one picture cannot show how normal parts differ.",
        )
    known = [path for path in list_images(defects) if not path.stem.endswith("_mask")] if defects is not None else []
    state = _state(repository, product)
    room.refuse_seen(held, state, [path for path, _ in pictures])
    with Inspector(
        state.bundle, target=target, packs=[state.pack], products=[product], suppression="eager"
    ) as inspector:
        judge = made.Judge(inspector, held, known)
        banks = made.banks_of(state.bundle.manifest.detector, anomalous=anomalous)
        if not anomalous:
            offered = made.normal_rows(inspector, [path for path, _ in pictures], banks)
            return room.add_rows(state, judge, offered, levels=room.novelties(state, judge, banks), most=most)
        unmasked = any(mask is None for _, mask in pictures)
        levels = room.farthest_known(state, judge, banks) if unmasked else dict.fromkeys(banks, 0.0)
        offered = made.anomalous_rows(inspector, pictures, banks, levels, state.pack)
        return room.add_rows(state, judge, offered, levels={}, most=most)


def _state(repository: Repository, product: str) -> room.State:
    bundle, pack = current_of(repository, product)
    records = tuple(provenance_of(repository, product))
    ids = [next_id(pack, repository.settings.next_ids.get(product)), *(record.next_id for record in records)]
    return room.State(bundle, pack, records, max(ids))
