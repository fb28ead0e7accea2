"""New keys for old ones, so that devices follow: rotate a role, revoke a key, renew what is about to expire.

A key of snapshot, timestamp or targets changes in two steps, because a root and a timestamp cannot be replaced in one
rename: first the role's metadata is signed by the old and the new keys, then the new root is written. The repository
is valid before, between and after. If the old key is lost, only the second step is left.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, Root

from edgead.runtime.errors import InputError
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.repository import Repository
from edgead.server_side.ota.roles import KINDS, ONLINE, ROLES


def keys_of(repository: Repository, kind: str) -> tuple[int, list[Key]]:
    """Threshold and keys of a top-level role or a kind of delegated ones.

    Raises:
        InputError: no such role.
    """
    if kind not in ROLES:
        raise InputError(wanted=f"one of the roles {', '.join(ROLES)}", got=repr(kind), next_step="Name one of these.")
    name = kind if kind not in KINDS or repository.settings.bins else repository.layout.roles(kind)[0]
    role, keys = repository.authority(name)
    return role.threshold, keys


def rotate(repository: Repository, kind: str, keyring: Keyring) -> list[str]:
    """Give a role new keys in place of all that it has; writes the repository.

    Returns:
        ids of the new keys.

    Raises:
        InputError: no such role, or keys that are needed are not here.
        StorageError: the disk refused.
    """
    _, keys = keys_of(repository, kind)
    return _replace(repository, kind, [key.keyid for key in keys], keyring)


def revoke(repository: Repository, keyid: str, keyring: Keyring) -> tuple[str, list[str]]:
    """Take a key out of its role and put a new one in its place; writes the repository.

    Returns:
        the role, and ids of the new keys.

    Raises:
        InputError: no role has such a key, or keys that are needed are not here.
        StorageError: the disk refused.
    """
    for kind in ROLES:
        if keyid in (key.keyid for key in keys_of(repository, kind)[1]):
            return kind, _replace(repository, kind, [keyid], keyring)
    raise InputError(
        wanted="the id of a key in use", got=repr(keyid[:64]), next_step="See them with: edgead ota status FOLDER"
    )


def renew(repository: Repository, roles: Sequence[str], keyring: Keyring) -> None:
    """Sign roles anew, so that they expire later; snapshot and timestamp with them. Writes the repository.

    Args:
        repository: which.
        roles: top-level roles or kinds; 'snapshot' and 'timestamp' need not be named. None at all signs the
            timestamp alone, or the snapshot too if a third of its time is left.
        keyring: has their keys.

    Raises:
        InputError: no such role, or its keys are not here.
        StorageError: the disk refused.
    """
    for kind in roles:
        keys_of(repository, kind)
        if kind == "targets":
            repository.edit(kind)
        elif kind in KINDS:
            for name in roles_of(repository, kind):
                repository.edit(name)
    left = repository.snapshot.signed.expires - repository.clock()
    if roles or left.days * 3 <= repository.settings.days["snapshot"]:
        repository.commit(keyring)
    else:
        repository.stamp(keyring)
    if "root" in roles:
        repository.commit_root(keyring, copy.deepcopy(repository.root))


def _replace(repository: Repository, kind: str, old: Sequence[str], keyring: Keyring) -> list[str]:
    _, keys = keys_of(repository, kind)
    purpose = "online" if kind in ONLINE else "offline"
    made = [keyring.create(kind, purpose) for _ in old]
    kept = [key for key in keys if key.keyid not in old]
    new = [*kept, *(signer.public_key for signer in made)]
    if kind in KINDS:
        delegate(repository, kind, new)
        repository.commit(keyring)
    else:
        _hand_over(repository, kind, new, made, keyring)
    return [signer.public_key.keyid for signer in made]


def delegate(repository: Repository, kind: str, new: Sequence[Key]) -> None:
    """Change who signs a kind of delegated roles, and have all of them signed anew."""
    # All of them are read before anything changes, because they are verified by the old keys.
    contents = [repository.edit(name) for name in roles_of(repository, kind)]
    delegations = repository.edit("targets").delegations
    assert delegations is not None
    assert delegations.roles is not None
    ids = [key.keyid for key in new]
    for role in delegations.roles.values():
        if repository.layout.kind_of(role.name) == kind:
            role.keyids = list(ids)
    used = {keyid for role in delegations.roles.values() for keyid in role.keyids}
    delegations.keys = {
        keyid: key for keyid, key in {**delegations.keys, **{key.keyid: key for key in new}}.items() if keyid in used
    }
    for content in contents:
        if content.delegations is not None and content.delegations.succinct_roles is not None:
            content.delegations.succinct_roles.keyids = list(ids)
            content.delegations.keys = {key.keyid: key for key in new}


def _hand_over(repository: Repository, kind: str, new: Sequence[Key], made: Sequence[Signer], keyring: Keyring) -> None:
    """Change who signs a top-level role, by a new root."""
    old: Metadata[Root] = copy.deepcopy(repository.root)
    if kind != "root":
        if kind == "targets":
            repository.edit(kind)
        try:
            repository.commit(keyring, also={kind: made})
        except InputError as error:
            raise InputError(
                wanted=f"the old key of {kind} once more, to hand over without a gap",
                got=error.got,
                next_step="Name the folder that has it with --keys.",
            ) from error
    root = repository.root.signed
    root.roles[kind].keyids = [key.keyid for key in new]
    used = {keyid for role in root.roles.values() for keyid in role.keyids}
    known = {**root.keys, **{key.keyid: key for key in new}}
    root.keys = {keyid: key for keyid, key in known.items() if keyid in used}
    repository.commit_root(keyring, old)


def roles_of(repository: Repository, kind: str) -> list[str]:
    """All roles that a kind's keys sign."""
    return [name for name in repository.layout.delegated() if repository.layout.kind_of(name) == kind]
