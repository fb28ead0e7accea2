"""What a custodian is about to sign, in words. All of it is taken from the bytes that are signed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from tuf.api.metadata import Root

from edgead.runtime.errors import ReleaseError
from edgead.runtime.release import Release, decode_release
from edgead.runtime.tables import bytes_text
from edgead.server_side.ota.custodians import Case
from edgead.server_side.ota.drafts import Part

_SHOWN = 12


def told(case: Case) -> list[str]:
    """A draft as lines for a person.

    Raises:
        InputError: it was tampered with.
    """
    made = datetime.fromtimestamp(case.draft.made, timezone.utc)
    lines = [f"draft {case.draft.digest[:_SHOWN]} of {made:%Y-%m-%d %H:%M} UTC: {_plain(case.draft.title)}"]
    for part in case.draft.parts:
        lines += _part(case, part)
    if case.draft.settings.products:
        lines.append(f"products: {', '.join(case.draft.settings.products)}")
    return lines


def _part(case: Case, part: Part) -> Iterator[str]:
    old, new = case.before.get(part.role), case.after[part.role]
    before = f"{old.version} -> " if old else ""
    yield f"{part.role}: version {before}{new.version}, valid until {new.expires:%Y-%m-%d}"
    for authority, missing in zip(case.authorities(part.role), case.missing(part), strict=True):
        have = sorted(authority.keys.keys() & {one.keyid for one in part.signatures})
        yield (
            f"  {authority.threshold} of {len(authority.keys)} must sign by {authority.word}: "
            f"{missing} missing, signed by {', '.join(have) or 'nobody'}"
        )
    yield from _who(old, new)
    if isinstance(new, Root):
        return
    was = {} if old is None else old.targets
    for path in sorted(was.keys() - new.targets.keys()):
        yield f"  - {_plain(path)}"
    for path, entry in sorted(new.targets.items()):
        if path in was and was[path].hashes == entry.hashes:
            continue
        yield f"  {'~' if path in was else '+'} {_plain(path)}  {bytes_text(entry.length)}"
        data = case.record(path)
        if data is not None:
            yield from _release(data)


def _release(data: bytes) -> Iterator[str]:
    try:
        found: Release = decode_release(data)
    except ReleaseError as error:
        yield f"      no release that a device would take: {_plain(str(error))}"
        return
    yield f"      release {found.counter}, {_plain(found.name)}: engine {found.engine}"
    for product, digest in found.product_packs.items():
        golden, alarms = found.scores.get(product, {}), found.must_alarm.get(product, ())
        yield f"      {product}: pack {digest}; {len(golden)} golden images, {len(alarms)} of them alarm"
    yield f"      scores may be off by {found.tolerance:.4g}; notes: {_plain(found.notes) or 'none'}"


def _who(old: Any, new: Any) -> Iterator[str]:
    """Changes of who may sign what."""
    was, now = _signers(old), _signers(new)
    for role in sorted(was.keys() | now.keys()):
        (before, keys_before), (after, keys_after) = was.get(role, (0, set())), now.get(role, (0, set()))
        for keyid in sorted(keys_after - keys_before):
            yield f"  {_plain(role)} may be signed by the key {_plain(keyid)}, which is new"
        for keyid in sorted(keys_before - keys_after):
            yield f"  {_plain(role)} may no longer be signed by the key {_plain(keyid)}"
        if before != after:
            yield f"  {_plain(role)} needs {after} signatures in place of {before}"


def _signers(content: Any) -> dict[str, tuple[int, set[str]]]:
    """By role, threshold and key ids, with each key's content so that an id under which another key lies shows."""
    if content is None:
        return {}
    if isinstance(content, Root):
        return {
            name: (role.threshold, {_named(content, keyid) for keyid in role.keyids})
            for name, role in content.roles.items()
        }
    found: dict[str, tuple[int, set[str]]] = {}
    if content.delegations is not None:
        roles = dict(content.delegations.roles or {})
        for name, role in roles.items():
            paths = ",".join([*(role.paths or ()), *(role.path_hash_prefixes or ())])
            found[f"{name} ({paths})"] = (role.threshold, {_named(content, keyid) for keyid in role.keyids})
        bins = content.delegations.succinct_roles
        if bins is not None:
            ids = {_named(content, keyid) for keyid in bins.keyids}
            found[f"{bins.name_prefix}-* ({2**bins.bit_length} bins)"] = (bins.threshold, ids)
    return found


def _named(content: Any, keyid: str) -> str:
    key = content.get_key(keyid)
    return f"{keyid} ({key.keytype} {str(key.keyval.get('public', ''))[:_SHOWN]})"


def _plain(text: str) -> str:
    """Without letters that steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:2000])


__all__ = ["told"]
