"""A new repository, and a new product in one that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from securesystemslib.signer import Key
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.metadata import Role as TufRole

from edgead.runtime.disk import Disk, RealDisk
from edgead.runtime.errors import InputError, OutputExistsError
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.repository import SETTINGS, Clock, Repository, utc_now
from edgead.server_side.ota.roles import KINDS, ONLINE, ROLES, TOP, Settings

THRESHOLDS = {"root": (2, 3), "releases": (2, 2)}
"""Signatures that a role needs, and keys that it has; one of one for every other role."""


def create(
    folder: Path,
    keyring: Keyring,
    settings: Settings,
    thresholds: Mapping[str, tuple[int, int]] | None = None,
    elsewhere: Mapping[str, Sequence[tuple[str, Path]]] | None = None,
    *,
    disk: Disk | None = None,
    clock: Clock = utc_now,
) -> Repository:
    """Make keys, roles and an empty repository.

    Args:
        folder: where to; must not hold one.
        keyring: takes the new keys.
        settings: how it is laid out.
        thresholds: (signatures, keys) by role, over those of `THRESHOLDS`.
        elsewhere: by role, (URI, public key as PEM file) of keys that are there already and not made.
        disk, clock: see `opened`.

    Raises:
        OutputExistsError: there is a repository or a keyring.
        InputError: a threshold that the keys cannot meet, or keys that cannot be made or used.
        StorageError: the disk refused.
    """
    for place in (folder / SETTINGS, folder / "metadata"):
        if place.exists():
            raise OutputExistsError(
                wanted=f"a new repository in {folder}", got="one that is there", next_step="Name another folder."
            )
    if keyring.records:
        raise OutputExistsError(
            wanted=f"a new key folder at {keyring.folders[0]}",
            got="one with keys",
            next_step="Name another folder: keys of two repositories do not mix.",
        )
    counts = {role: (thresholds or {}).get(role) or THRESHOLDS.get(role, (1, 1)) for role in ROLES}
    for role, (threshold, count) in counts.items():
        given = len((elsewhere or {}).get(role, ()))
        if not 1 <= threshold <= max(count, given):
            raise InputError(
                wanted=f"a threshold of 1 to {max(count, given)} for {role}, which has so many keys",
                got=str(threshold),
                next_step="Give the role more keys, or a smaller threshold.",
            )
    keys: dict[str, list[Key]] = {}
    for role, (_, count) in counts.items():
        adopted = [keyring.adopt(role, uri, public) for uri, public in (elsewhere or {}).get(role, ())]
        purpose = "online" if role in ONLINE else "offline"
        made = [keyring.create(role, purpose) for _ in range(count - len(adopted))]
        keys[role] = [signer.public_key for signer in (*adopted, *made)]
    repository = Repository(folder, settings, disk or RealDisk(), clock)
    roles = {role: TufRole([key.keyid for key in keys[role]], counts[role][0]) for role in TOP}
    public = {key.keyid: key for role in TOP for key in keys[role]}
    repository.root = Metadata(Root(keys=public, roles=roles, consistent_snapshot=True))
    repository.targets = Metadata(Targets())
    repository.snapshot = Metadata(Snapshot())
    repository.timestamp = Metadata(Timestamp())
    limits = {kind: counts[kind][0] for kind in KINDS}
    repository.targets.signed.delegations = repository.layout.delegations(dict(keys), limits)
    for top in (repository.targets, repository.snapshot, repository.timestamp):
        top.signed.version = 0
    repository.edit("targets")
    for name in repository.layout.delegated():
        kind = repository.layout.kind_of(name)
        bins = repository.layout.bins(kind, keys[kind], limits[kind]) if name == kind else None
        repository.new_role(name, Targets(delegations=bins))
    repository.change_settings()
    repository.commit_root(keyring, None)
    repository.commit(keyring)
    return repository


def add_product(repository: Repository, product: str, keyring: Keyring) -> None:
    """Let a repository take packs and releases of another product.

    Needs the offline targets key, but for a repository with hash bins, and the keys of the new delegations.

    Raises:
        InputError: it is there, or keys are missing.
        StorageError: the disk refused.
    """
    settings = repository.settings
    if product in settings.products:
        raise InputError(wanted="a new product", got=repr(product), next_step="It is there: publish to it.")
    if settings.bins:
        repository.change_settings(products=(*settings.products, product))
        repository.commit(keyring)
        return
    first = settings.products[0] if settings.products else None
    if first is None:
        raise InputError(
            wanted="a repository with a product, whose keys the new one takes",
            got="one without",
            next_step="Make the repository anew: edgead ota init FOLDER --product NAME",
        )
    keys, limits = {}, {}
    for kind in KINDS:
        role, found = repository.authority(kind if kind == "engines" else f"{kind}.{first}")
        keys[kind], limits[kind] = found, role.threshold
    repository.change_settings(products=(*settings.products, product))
    repository.edit("targets").delegations = repository.layout.delegations(dict(keys), limits)
    for kind in KINDS[1:]:
        repository.new_role(f"{kind}.{product}", Targets())
    repository.commit(keyring)
