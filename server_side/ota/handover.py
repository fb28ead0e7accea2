"""Other keys for a role, when no machine has all the keys that must sign that: changed in memory, for a draft."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from securesystemslib.signer import Key
from tuf.api.metadata import Metadata, Root

from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.files import write_file
from edgead.runtime.spec import canonical_json
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.repository import Repository
from edgead.server_side.ota.roles import KINDS, ONLINE
from edgead.server_side.ota.rotation import delegate, keys_of, roles_of

_KEY_BYTES = 64 * 1024


def new_key(keyring: Keyring, role: str) -> Path:
    """A key for a role in the first key folder, and beside it its public half as a file to be sent.

    Raises:
        InputError: no passphrase.
        StorageError: the folder cannot be written.
    """
    key = keyring.create(role, "online" if role in ONLINE else "offline").public_key
    place = keyring.folders[0] / f"{role}-{key.keyid}.pub"
    write_file(place, canonical_json({"keyid": key.keyid, "public": key.to_dict()}))
    return place


def read_key(path: Path) -> Key:
    """A public key as `new_key` writes it.

    Raises:
        InputError: it is none.
        StorageError: the file cannot be read.
    """
    with storage_errors(path, "to read a public key"), path.open("rb") as stream:
        data = stream.read(_KEY_BYTES)
    try:
        content = json.loads(data)
        return Key.from_dict(content["keyid"], content["public"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            wanted=f"a public key in {path}", got="something else", next_step="Make one with: edgead ota new-key"
        ) from error


def hand_over(repository: Repository, kind: str, give: Sequence[Key], take: Sequence[str]) -> Metadata[Root] | None:
    """Give a role further keys and take others from it; with neither, have it signed anew. `stage` then drafts it.

    Args:
        repository: which.
        kind: top-level role or kind of delegated ones.
        give: new keys.
        take: ids of keys that sign nothing any more.

    Returns:
        the new root, if it takes one.

    Raises:
        InputError: no such role or key, or fewer keys than its threshold would be left.
    """
    threshold, keys = keys_of(repository, kind)
    unknown = [keyid for keyid in take if keyid not in (key.keyid for key in keys)]
    if unknown:
        raise InputError(
            wanted=f"ids of keys of {kind}: {', '.join(key.keyid for key in keys)}",
            got=repr(unknown[0][:64]),
            next_step="See them with: edgead ota status FOLDER",
        )
    known = {key.keyid: key for key in (*keys, *give) if key.keyid not in take}
    if len(known) < threshold or len({str(key.keyval) for key in known.values()}) != len(known):
        raise InputError(
            wanted=f"at least {threshold} different keys left for {kind}",
            got=", ".join(known) or "none",
            next_step="Give it as many new keys as are taken: --give FILE.pub",
        )
    if kind in KINDS:
        if give or take:
            delegate(repository, kind, list(known.values()))
        for name in roles_of(repository, kind):
            repository.edit(name)
        return None
    if kind == "targets":
        repository.edit(kind)
        if not (give or take):
            return None
    root = repository.next_root()
    root.signed.roles[kind].keyids = list(known)
    used = {keyid for role in root.signed.roles.values() for keyid in role.keyids}
    root.signed.keys = {keyid: key for keyid, key in {**root.signed.keys, **known}.items() if keyid in used}
    return root


__all__ = ["hand_over", "new_key", "read_key"]
