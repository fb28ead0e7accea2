"""Roll-out records: who takes a signed release when. Bytes in, decisions out; no clock, no files, no network.

A record is canonical JSON, the target `rollout/<product>.json` of an update repository, signed by the rollout role
alone. It names a release by its counter and can do no more than let more devices take it, hold it, or stop it: what
a release is stands in `releases/<product>/<counter>.json`, which that role cannot sign.

Which devices: all of any group in `groups`, and `percent` of all others. A device's place is a hash of product,
release and device id, so that every device finds its own without being told, a wider roll-out only adds devices, and
the same devices are not the first each time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edgead.runtime.errors import InputError
from edgead.runtime.spec import Name, canonical_json

SCHEMA = 1
"""Version of the record."""
RECORD_BYTES = 64 * 1024
"""Largest record that is read."""
_DOMAIN = b"edgead/rollout/v1\0"
_GROUPS = 256


class Rollout(Struct, frozen=True, forbid_unknown_fields=True):
    """How far a release of a product is rolled out."""

    schema: int
    product: Name
    sequence: Annotated[int, Meta(ge=1)]
    """Grows by one with each change of the product's record."""
    release: Annotated[int, Meta(ge=1)]
    """Counter of the release that is rolled out."""
    previous: Annotated[int, Meta(ge=1)] | None = None
    """Counter of the release for devices that are not to take `release`, such as a camera that is new in a plant."""
    groups: tuple[Name, ...] = ()
    percent: float = 0.0
    """Share of the devices outside of `groups`, 0 to 100."""
    error_threshold: float = 0.1
    """Share of failures among the devices that report, 0 to 1, above which the roll-out is to stop."""
    window: Annotated[int, Meta(ge=0, le=30 * 86400)] = 600
    """Seconds that a device watches the new release before it confirms it."""
    paused: bool = False
    """Devices that have the release keep it; no other takes it."""
    stopped: bool = False
    """No device takes the release, and those that have it go back to what they had before."""


def new_rollout(product: str, release: int, sequence: int, **fields: object) -> Rollout:
    """A checked record.

    Args:
        product, release, sequence: see `Rollout`.
        fields: the others of `Rollout`.

    Raises:
        InputError: a value that the format does not have.
    """
    return _checked({"schema": SCHEMA, "product": product, "release": release, "sequence": sequence, **fields})


def changed(record: Rollout, **fields: object) -> Rollout:
    """`record` with other values, one further in sequence.

    Raises:
        InputError: a value that the format does not have.
    """
    return _checked({**msgspec.to_builtins(record), **fields, "sequence": record.sequence + 1})


def encode_rollout(record: Rollout) -> bytes:
    """The one encoding of a record: canonical JSON."""
    return canonical_json(record)


def decode_rollout(data: bytes) -> Rollout:
    """A checked record from its bytes.

    Raises:
        InputError: too large, not canonical JSON, of a newer schema, or a value that the format does not have.
    """
    if len(data) > RECORD_BYTES:
        raise _refusal(f"at most {RECORD_BYTES} bytes", str(len(data)))
    try:
        content = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _refusal("JSON", str(error)) from error
    if not isinstance(content, dict):
        raise _refusal("a JSON object", type(content).__name__)
    record = _checked(content)
    if encode_rollout(record) != data:
        raise _refusal("canonical JSON", "another spelling of it")
    return record


def bucket(product: str, release: int, device_id: str) -> float:
    """A device's place in a roll-out, 0 <= place < 100, evenly spread over devices and independent by release.

    The first 8 bytes, big-endian, of SHA-256 over `edgead/rollout/v1`, a NUL, and product, release and device id
    with a NUL between them.
    """
    text = "\0".join((product, str(release), device_id)).encode()
    # 53 bits are what a float holds, so that the quotient can never be rounded up to 1.
    place = int.from_bytes(hashlib.sha256(_DOMAIN + text).digest()[:8], "big") >> 11
    return place / 2**53 * 100.0


def selected(record: Rollout, device_id: str, groups: Iterable[str] = ()) -> bool:
    """Whether the roll-out has reached a device, were it neither paused nor stopped."""
    if set(record.groups) & set(groups):
        return True
    return bucket(record.product, record.release, device_id) < record.percent


def applies(record: Rollout, device_id: str, groups: Iterable[str] = ()) -> bool:
    """Whether a device is to take the record's release now.

    Args:
        record: as signed.
        device_id: the device's own name.
        groups: that the device belongs to.
    """
    return not record.paused and not record.stopped and selected(record, device_id, groups)


def wanted(record: Rollout, device_id: str, groups: Iterable[str] = ()) -> int | None:
    """Counter of the release that a device should have by now: the new one, the one before it, or None for "stay".

    A device that already has this counter or a higher one has nothing to fetch.
    """
    return record.release if applies(record, device_id, groups) else record.previous


def withdrawn(record: Rollout, active: int | None) -> bool:
    """Whether a device whose active release has the counter `active` is to go back to what it had before."""
    return record.stopped and active == record.release


def breached(record: Rollout, failed: int, reported: int) -> bool:
    """Whether the share of failures is above what the record allows, so that the roll-out has to stop.

    Args:
        record: as signed.
        failed: devices that took the release and rolled it back, or report errors with it.
        reported: devices that took the release and have reported since, failed ones among them.
    """
    return reported > 0 and failed > record.error_threshold * reported


def widens(old: Rollout, new: Rollout) -> bool:
    """Whether every device that `old` has reached is one that `new` has reached, for the same release."""
    same = (old.product, old.release) == (new.product, new.release)
    return same and set(old.groups) <= set(new.groups) and old.percent <= new.percent


def _checked(content: dict[str, object]) -> Rollout:
    schema = content.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise InputError(
            wanted=f"a roll-out record of schema {SCHEMA}",
            got=f"schema {schema}",
            next_step="Update edgead on this machine.",
        )
    try:
        record = msgspec.convert(content, Rollout)
    except msgspec.MsgspecError as error:
        raise _refusal("the fields of its schema", str(error)) from error
    if record.schema != SCHEMA:
        raise _refusal(f"schema {SCHEMA}", str(record.schema))
    if not math.isfinite(record.percent) or not 0 <= record.percent <= 100:
        raise _refusal("a percentage from 0 to 100", str(record.percent))
    if not math.isfinite(record.error_threshold) or not 0 <= record.error_threshold <= 1:
        raise _refusal("an error threshold from 0 to 1", str(record.error_threshold))
    if record.previous is not None and record.previous >= record.release:
        raise _refusal(f"a release before {record.release} to fall back to", str(record.previous))
    if len(record.groups) > _GROUPS or list(record.groups) != sorted(set(record.groups)):
        raise _refusal(f"at most {_GROUPS} groups, sorted, each once", ", ".join(record.groups)[:200])
    return record


def _refusal(wanted: str, got: str) -> InputError:
    return InputError(wanted=f"a roll-out record with {wanted}", got=got, next_step="Make it with: edgead ota rollout")
