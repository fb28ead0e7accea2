"""What several people sign on machines of their own: a draft is made, signed by each, and put in force.

    stage   the publisher changes a repository in memory and puts the metadata that offline keys are to sign in a draft
    sign    a custodian sees what it says, verified from the root that lies in the key folder, and adds a signature
    finish  the publisher checks every threshold and commits it with the online keys

A draft carries all that is needed to judge it: the roots since the first, the metadata of each changed role as it is
now and of the roles above it, and the release records that it names. Nothing in it is believed that the root of the
key folder does not lead to, so that a publisher's machine that was taken over can show a custodian no false past. It is
good for exactly the repository that it was made from: a role that changed since makes it outdated.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import msgspec
from msgspec import Struct
from securesystemslib.signer import Key, Signature, Signer
from tuf.api.metadata import Metadata, Role, Root, Targets

from edgead.runtime.errors import InputError
from edgead.server_side.ota.drafts import SCHEMA, Draft, Part, Signed, outdated, refused, tampered
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.repository import Repository
from edgead.server_side.ota.roles import ONLINE, Layout
from edgead.server_side.ota.verified import parsed, verify


class Authority(Struct, frozen=True):
    """Who may sign a role, by whose word.

    Attributes:
        word: for people: 'root 3', or the role above.
        threshold: signatures that it needs.
        keys: by id.
    """

    word: str
    threshold: int
    keys: dict[str, Key]


class Case:
    """A draft whose past was verified: what changes, and who may sign it.

    Args:
        draft: which.
        trusted: root to begin from, as a key folder keeps it.

    Raises:
        InputError: the draft was tampered with, or is of another repository.

    Attributes:
        draft: as given.
        layout: roles of the repository once the draft is in force.
        root: the root in force.
        before, after: content by role, in force and drafted; `before` lacks roles that are new.
    """

    def __init__(self, draft: Draft, trusted: bytes) -> None:
        self.draft = draft
        self.layout = Layout(draft.settings)
        self.root = _root_of(draft, trusted)
        self.before: dict[str, Any] = {"root": self.root.signed}
        self.after: dict[str, Any] = {}
        texts = dict(draft.above) | {part.role: part.before for part in draft.parts if part.before is not None}
        # Parents come before their children.
        for role in reversed(self.layout.order(texts)):
            if role == "root":
                continue
            parent = self.layout.parent(role)
            if parent not in self.before:
                raise tampered(f"the role {parent}, above {role}")
            metadata = parsed(texts[role].encode(), Targets, role)
            verify(self.before[parent], role, metadata)
            self.before[role] = metadata.signed
        for part in draft.parts:
            signed = self.metadata(part).signed
            old = self.before.get(part.role)
            if part.role in self.after or signed.version != (old.version + 1 if old else 1):
                raise tampered(f"version {old.version + 1 if old else 1} of the role {part.role}, once")
            self.after[part.role] = signed

    def record(self, path: str) -> bytes | None:
        """The content of a small target that is new; None if the draft has none.

        Raises:
            InputError: it is not what is to be signed.
        """
        text = self.draft.records.get(path)
        if text is None:
            return None
        entry = self.after[self.layout.role_of(path)].targets[path]
        if hashlib.sha256(text.encode()).hexdigest() != entry.hashes["sha256"]:
            raise tampered(f"the content of {path} that is to be signed")
        return text.encode()

    def metadata(self, part: Part) -> Metadata[Any]:
        """A part as metadata, with the signatures that it has."""
        found = parsed(part.text.encode(), Root if part.role == "root" else Targets, part.role)
        found.signatures = {one.keyid: Signature(one.keyid, one.sig) for one in part.signatures}
        return found

    def authorities(self, role: str) -> list[Authority]:
        """All whose thresholds a role must meet: for a root the one before and its own; for others the roles above.

        The targets role is written before a new root is, so it must be good under both.
        """
        if role == "root":
            sources = [self.before["root"], self.after["root"]]
        else:
            parent = self.layout.parent(role)
            drafted = self.after.get(parent)
            sources = [drafted] if drafted is not None else [self.before[parent]]
            if parent == "root" and drafted is not None:
                sources.insert(0, self.before[parent])
        return [_authority(source, role) for source in sources]

    def missing(self, part: Part) -> list[int]:
        """By authority, how many signatures a part still needs.

        Raises:
            InputError: a signature is false, there twice, or of a key that may not sign the role.
        """
        metadata, authorities = self.metadata(part), self.authorities(part.role)
        good: dict[str, Key] = {}
        for one in part.signatures:
            key = next((found.keys[one.keyid] for found in authorities if one.keyid in found.keys), None)
            if key is None:
                raise refused(part.role, f"one by the key {one.keyid[:64]!r}, which may not sign it")
            if one.keyid in good or any(key.keyval == other.keyval for other in good.values()):
                raise refused(part.role, f"two by the key {one.keyid}")
            try:
                key.verify_signature(Signature(one.keyid, one.sig), metadata.signed_bytes)
            # Every key type has errors of its own for a signature that is no signature.
            except Exception as error:  # key libraries have no error tree in common
                raise refused(part.role, f"a false one under the key {one.keyid}") from error
            good[one.keyid] = key
        return [max(0, found.threshold - len(found.keys.keys() & good.keys())) for found in authorities]


def stage(repository: Repository, title: str, root: Metadata[Root] | None = None) -> Draft:
    """What was changed in a repository, as a draft; targets are written, metadata is not.

    Args:
        repository: of which nothing may be done afterwards but to close it.
        title: for people.
        root: a new root, from `Repository.next_root`.

    Raises:
        InputError: nothing was changed.
        StorageError: the disk refused.
    """
    layout = repository.layout
    roots = [
        (repository.folder / "metadata" / f"{version}.root.json").read_text("utf-8")
        for version in range(1, repository.root.signed.version + 1)
    ]
    staged = repository.stage()
    parts = [] if root is None else [Part("root", _bare(root), roots[-1])]
    records: dict[str, str] = {}
    above: dict[str, str] = {}
    for role, metadata in staged.items():
        before = _text(repository, role)
        parts.append(Part(role, _bare(metadata), before))
        parent = layout.parent(role)
        while parent != "root" and parent not in above and parent not in staged:
            text = _text(repository, parent)
            assert text is not None
            above[parent] = text
            parent = layout.parent(parent)
        old = {} if before is None else Metadata[Targets].from_bytes(before.encode()).signed.targets
        for path, entry in metadata.signed.targets.items():
            if path.startswith("releases/") and (path not in old or old[path].hashes != entry.hashes):
                records[path] = repository.file(path, entry).read_text("utf-8")
    if not parts:
        raise InputError(wanted="a change to be signed", got="none: all of it is in the repository already")
    return Draft(
        schema=SCHEMA,
        title=title,
        made=int(repository.clock().timestamp()),
        roots=tuple(roots),
        above=above,
        parts=tuple(parts),
        records=records,
        settings=repository.settings,
    )


def sign(draft: Draft, keyring: Keyring, trusted: bytes) -> tuple[Draft, list[tuple[str, str]]]:
    """Add the signatures of one custodian: of each role the first key that is here and that it still needs.

    Returns:
        the draft, and (role, key id) of what was added.

    Raises:
        InputError: the draft does not verify, or no key here is needed for it.
    """
    case = Case(draft, trusted)
    parts, added = [], []
    for part in draft.parts:
        metadata = case.metadata(part)
        for signer in _chosen(case, part, keyring):
            signature = metadata.sign(signer, append=True)
            part = msgspec.structs.replace(
                part, signatures=(*part.signatures, Signed(signature.keyid, signature.signature))
            )
            added.append((part.role, signature.keyid))
        parts.append(part)
    if not added:
        raise InputError(
            wanted="a key that this draft still needs a signature of",
            got=", ".join(
                f"{part.role}: {max(case.missing(part))} missing, signed by "
                f"{', '.join(one.keyid for one in part.signatures) or 'nobody'}"
                for part in draft.parts
            ),
            next_step="Pass the draft to the next custodian, or finish it with: edgead ota finish",
        )
    return msgspec.structs.replace(draft, parts=tuple(parts)), added


def finish(repository: Repository, draft: Draft, keyring: Keyring) -> list[str]:
    """Put a signed draft in force: online roles are signed here, all is verified, then written.

    Returns:
        names of the roles that changed.

    Raises:
        InputError: signatures are missing, false or strangers'; the draft is outdated; a target's file is gone.
        StorageError: the disk refused.
    """
    _check_current(repository, draft)
    case = Case(draft, repository.root.to_bytes())
    ready: dict[str, Metadata[Any]] = {}
    for part in draft.parts:
        metadata, missing = case.metadata(part), max(case.missing(part))
        if missing and case.layout.kind_of(part.role) in ONLINE:
            metadata.signatures.clear()  # by `commit`, with the online keys
            metadata.signed.version -= 1
        elif missing:
            raise InputError(
                wanted=f"{missing} more signature{'s' * (missing > 1)} of the role {part.role}",
                got=f"those by {', '.join(one.keyid for one in part.signatures) or 'nobody'}",
                next_step="Have it signed by a further custodian: edgead ota sign DRAFT --keys DIR",
            )
        if metadata.signed.expires <= repository.clock():
            raise outdated(part.role, f"one that expired at {metadata.signed.expires.isoformat()}")
        ready[part.role] = metadata
    also: dict[str, list[Signer]] = {}
    root = ready.pop("root", None)
    if root is not None:
        for role in ("snapshot", "timestamp"):
            new = _authority(root.signed, role)
            fresh = [key for keyid, key in new.keys.items() if keyid not in repository.root.signed.roles[role].keyids]
            if fresh:
                also[role] = keyring.signers(fresh, min(new.threshold, len(fresh)), role)
    changed = {} if draft.settings == repository.settings else msgspec.structs.asdict(draft.settings)
    if changed:
        repository.change_settings(**changed)
    for role, metadata in ready.items():
        repository.take(role, metadata)
        _check_files(repository, metadata)
    repository.commit(keyring, also=also)
    if root is not None:
        repository.put_root(root, keyring)
    return [part.role for part in draft.parts]


def _chosen(case: Case, part: Part, keyring: Keyring) -> list[Signer]:
    """Signers of a part that are here: one for each authority that is not met and that this custodian did not sign."""
    there, found = {one.keyid for one in part.signatures}, []
    for authority, count in zip(case.authorities(part.role), case.missing(part), strict=True):
        mine = [key for keyid, key in authority.keys.items() if keyring.holds(keyid)]
        if not count or not mine or there & {key.keyid for key in mine}:
            continue
        there.add(mine[0].keyid)
        found += keyring.signers(mine[:1], 1, part.role)
    return found


def _check_current(repository: Repository, draft: Draft) -> None:
    first = (repository.folder / "metadata" / "1.root.json").read_text("utf-8")
    if draft.roots[0] != first:
        raise InputError(wanted="a draft of this repository", got="one of another", next_step="Name its repository.")
    if len(draft.roots) != repository.root.signed.version:
        raise outdated("root", f"one made under root {len(draft.roots)}")
    for role, text in [*draft.above.items(), *((part.role, part.before) for part in draft.parts)]:
        if role != "root" and text != _text(repository, role):
            raise outdated(role, "one made from another version of it")


def _check_files(repository: Repository, metadata: Metadata[Any]) -> None:
    for path, entry in metadata.signed.targets.items():
        if not repository.file(path, entry).is_file():
            raise InputError(
                wanted=f"the file of {path}", got="none", next_step="Make the draft anew: its files were pruned."
            )


def _authority(source: Any, role: str) -> Authority:
    found: Role = source.get_delegated_role(role)
    word = f"root {source.version}" if isinstance(source, Root) else f"the role above, version {source.version}"
    return Authority(word, found.threshold, {keyid: source.get_key(keyid) for keyid in found.keyids})


def _root_of(draft: Draft, trusted: bytes) -> Metadata[Root]:
    """The root in force, reached from one that is trusted."""
    here: Metadata[Root] = parsed(trusted, Root, "the key folder's root")
    version = here.signed.version
    if version > len(draft.roots):
        raise outdated("root", f"one made under root {len(draft.roots)}, before {version}")
    same = parsed(draft.roots[version - 1].encode(), Root, f"root {version}")
    if same.signed_bytes != here.signed_bytes:
        raise tampered(f"the root {version} that the key folder keeps")
    for text in draft.roots[version:]:
        new = parsed(text.encode(), Root, f"root {here.signed.version + 1}")
        verify(here.signed, "root", new)
        verify(new.signed, "root", new)
        if new.signed.version != here.signed.version + 1:
            raise tampered(f"root {here.signed.version + 1}")
        here = new
    return here


def _text(repository: Repository, role: str) -> str | None:
    """The metadata of a role as it lies in the repository; None if there is none."""
    entry = repository.snapshot.signed.meta.get(f"{role}.json")
    if entry is None:
        return None
    return (repository.folder / "metadata" / f"{entry.version}.{role}.json").read_text("utf-8")


def _bare(metadata: Metadata[Any]) -> str:
    bare = copy.deepcopy(metadata)
    bare.signatures.clear()
    return bare.to_bytes().decode()


__all__ = ["Authority", "Case", "finish", "sign", "stage"]
