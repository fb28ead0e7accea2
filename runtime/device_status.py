"""What a device says about itself, signed with its own key. Bytes in, a verified record or an error out; no files here.

What is sent is one JSON object in its canonical spelling (sorted keys, no white space, UTF-8), of at most 16 KiB:

    key          value
    key          the device's public key: 32 bytes of Ed25519 (RFC 8032) as 64 hex digits
    schema       1
    signature    64 bytes as 128 hex digits
    status       the record, `DeviceStatus`

Signed are the 16 bytes `edgead/status/v1` and a NUL, followed by the canonical JSON of `status`. The key in the
envelope says nothing by itself: who receives a status knows the key of each device, and asks for that one.

Texts come from errors of anything that a camera meets, and are shown to people: they hold no control or direction
characters, and have a limit each.
"""

from __future__ import annotations

import math
import secrets
import unicodedata
from itertools import pairwise
from typing import Annotated, Literal, NoReturn

import msgspec
from msgspec import Meta, Struct

from edgead.runtime.errors import StatusError, missing_dependency
from edgead.runtime.release import Counter
from edgead.runtime.spec import Digest, Name, canonical_json

SCHEMA = 1
DOMAIN = b"edgead/status/v1\0"
STATUS_BYTES = 16 * 2**10
"""Largest envelope."""
QUANTILES = (0.05, 0.5, 0.95, 0.99, 1.0)
"""Which ones `ScoreStatistics.ratios` holds."""
MOST_ATTEMPTS = 8
MOST_QUARANTINED = 32
MOST_NAMES = 16
"""Of groups, of packs, and of products with scores."""
REASON = 300
MESSAGE = 500
"""Characters that a reason and an error's message may have."""
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

Reason = Annotated[str, Meta(max_length=REASON)]
Outcome = Literal["probation", "confirmed", "rolled back", "rejected"]


class Attempt(Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a release on this device.

    Attributes:
        release: its counter.
        outcome: `probation` while it is watched.
        reason: why, for people.
    """

    release: Counter
    outcome: Outcome
    reason: Reason = ""


class Poll(Struct, frozen=True, forbid_unknown_fields=True):
    """The last look for a release.

    Attributes:
        status: as in `edgead.runtime.update_outcome.Outcome`.
        reason: for people.
        time: seconds since 1970 by the device's clock.
        failures: polls in a row that failed.
    """

    status: Annotated[str, Meta(min_length=1, max_length=32)]
    reason: Reason
    time: Counter
    failures: Counter


class ScoreStatistics(Struct, frozen=True, forbid_unknown_fields=True):
    """What the frames of one product came to since the release became active in this process.

    Attributes:
        product: of the frames.
        frames: how many.
        ok, ng, not_inspected: verdicts of them; their sum is `frames`.
        since: when counting began, seconds since 1970 by the device's clock.
        ratios: `QUANTILES` of score/threshold, none below zero and in rising order; empty if no frame had a score.
    """

    product: Name
    frames: Counter
    ok: Counter
    ng: Counter
    not_inspected: Counter
    since: Counter
    ratios: tuple[float, ...] = ()


class Failure(Struct, frozen=True, forbid_unknown_fields=True):
    """The last error.

    Attributes:
        kind: class of the error.
        message: for people.
        time: when it came, seconds since 1970 by the device's clock.
        count: errors since the process started.
    """

    kind: Name
    message: Annotated[str, Meta(max_length=MESSAGE)]
    time: Counter
    count: Counter


class DeviceStatus(Struct, frozen=True, forbid_unknown_fields=True):
    """What a device says about itself.

    Attributes:
        device: its name.
        product: what it inspects.
        groups: for roll-outs.
        sequence: grows with each status of a device, over restarts too.
        time: seconds since 1970 by the device's clock, which may be wrong.
        version: of edgead there.
        release: counter of the active release; None if there is none.
        digest: of the active release's record; empty if there is none.
        engine: digest of its engine; empty if there is none.
        packs: version of the pack of each product.
        confirmed: whether the active release has proved itself.
        starts: how often the device started with it unconfirmed.
        counter: highest counter of all releases that it saw; -1 before the first.
        quarantined: digests of releases that failed there, oldest first.
        alarm: what somebody should know; empty if all is well.
        attempts: the last releases that it took or refused, oldest first.
        poll: the last look for a release; None before the first.
        scores: by product.
        error: the last error since the process started.
        dropped: statuses that fell out of the device's spool before they could be sent.
        schema: version of this record.
    """

    device: Name
    product: Name
    sequence: Annotated[int, Meta(ge=1, le=2**53)]
    time: Counter
    version: Annotated[str, Meta(max_length=64)]
    groups: Annotated[tuple[Name, ...], Meta(max_length=MOST_NAMES)] = ()
    release: Counter | None = None
    digest: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    engine: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    packs: Annotated[dict[Name, Annotated[str, Meta(max_length=128)]], Meta(max_length=MOST_NAMES)] = msgspec.field(
        default_factory=dict
    )
    confirmed: bool = False
    starts: Counter = 0
    counter: Annotated[int, Meta(ge=-1, le=2**53)] = -1
    quarantined: Annotated[tuple[Digest, ...], Meta(max_length=MOST_QUARANTINED)] = ()
    alarm: Reason = ""
    attempts: Annotated[tuple[Attempt, ...], Meta(max_length=MOST_ATTEMPTS)] = ()
    poll: Poll | None = None
    scores: Annotated[tuple[ScoreStatistics, ...], Meta(max_length=MOST_NAMES)] = ()
    error: Failure | None = None
    dropped: Counter = 0
    schema: int = SCHEMA


class Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    """A status as it came: well formed; whether it is the device's shows `verify`.

    Attributes:
        status: what is said.
        key: public key that it names, 64 hex digits.
        signature: 128 hex digits.
        schema: version of this record.
    """

    status: DeviceStatus
    key: Digest
    signature: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}\Z")]
    schema: int = SCHEMA

    def verify(self, public_key: bytes | None = None) -> None:
        """Check the signature.

        Args:
            public_key: 32 bytes that the device is known by; None if whoever holds the key in the envelope will do.

        Raises:
            StatusError: it is signed with another key, or what it says was edited.
            MissingDependencyError: the package for signatures is not installed.
        """
        try:
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        except ModuleNotFoundError as error:
            raise missing_dependency("cryptography", "ota", "signatures") from error
        device, key = self.status.device, bytes.fromhex(self.key)
        if public_key is not None and not secrets.compare_digest(key, public_key):
            _refuse(f"the key {public_key.hex()[:16]} of {device!r}", f"the key {self.key[:16]}")
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(self.signature), signed_bytes(self.status))
        except (InvalidSignature, ValueError):
            _refuse(f"a signature of {device!r} over what it says", "another one: it was edited or forged")


_ENVELOPE = msgspec.json.Decoder(Envelope)


def signed_bytes(status: DeviceStatus) -> bytes:
    """What a status's signature is over."""
    return DOMAIN + canonical_json(status)


def encode_status(status: DeviceStatus, private_key: bytes) -> bytes:
    """An envelope as it is sent.

    Args:
        status: what is said.
        private_key: the 32 bytes that `new_device_key` gave.

    Raises:
        StatusError: a value that the format does not have, or more than `STATUS_BYTES`.
        MissingDependencyError: the package for signatures is not installed.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ModuleNotFoundError as error:
        raise missing_dependency("cryptography", "ota", "signatures") from error
    try:
        # A record that was built is not checked yet, and whole numbers in float fields are no floats yet.
        status = msgspec.json.decode(canonical_json(status), type=DeviceStatus)
        key = Ed25519PrivateKey.from_private_bytes(private_key)
        signature = key.sign(signed_bytes(status))
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        _refuse("every field as the format has it", f"something else ({error})"[:REASON])
    data = canonical_json(Envelope(status, key.public_key().public_bytes_raw().hex(), signature.hex()))
    decode_status(data)
    return data


def decode_status(data: bytes) -> Envelope:
    """A status from its bytes; whose it is shows `Envelope.verify`.

    Raises:
        StatusError: too large, not canonical JSON, of another schema, an unknown, missing or wrong field, a number that
            is not finite, or characters that are no text.
    """
    if len(data) > STATUS_BYTES:
        _refuse(f"at most {STATUS_BYTES} bytes", f"{len(data)}")
    try:
        envelope = _ENVELOPE.decode(data)
        same = canonical_json(envelope) == data
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as error:
        _refuse("every field as the format has it", f"something else ({error})"[:REASON])
    if not same:
        _refuse("canonical JSON", "another spelling of it")
    if (envelope.schema, envelope.status.schema) != (SCHEMA, SCHEMA):
        _refuse(f"schema {SCHEMA}", f"schema {envelope.schema} with {envelope.status.schema}")
    _check(envelope.status)
    return envelope


def new_device_key() -> bytes:
    """A new private key: 32 bytes of the system's randomness, of which Ed25519 makes the rest."""
    return secrets.token_bytes(32)


def public_of(seed: bytes) -> bytes:
    """The 32 bytes of the public key of a private one.

    Raises:
        StatusError: no 32 bytes.
        MissingDependencyError: the package for signatures is not installed.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ModuleNotFoundError as error:
        raise missing_dependency("cryptography", "ota", "signatures") from error
    if len(seed) != 32:
        _refuse("a private key of 32 bytes", f"{len(seed)} bytes")
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def plain_text(text: str, most: int = REASON) -> str:
    """`text` as a status may hold it: one line, without hidden characters, of at most `most` characters."""
    # Ten times the limit is enough to find the characters that stay, whatever a foreign library wrote.
    kept = "".join(" " if unicodedata.category(letter) in _HIDDEN else letter for letter in text[: 10 * most])
    return " ".join(kept.split())[:most]


def _check(status: DeviceStatus) -> None:
    texts = [status.version, status.alarm, *status.packs.values()]
    texts += [attempt.reason for attempt in status.attempts]
    texts += [] if status.poll is None else [status.poll.status, status.poll.reason]
    texts += [] if status.error is None else [status.error.message]
    if any(unicodedata.category(letter) in _HIDDEN for text in texts for letter in text):
        _refuse("plain texts", "one with control or direction characters")
    products = [item.product for item in status.scores]
    if len(set(products)) != len(products):
        _refuse("one entry for each product", f"several for one of {', '.join(products)}"[:REASON])
    for item in status.scores:
        if item.ok + item.ng + item.not_inspected != item.frames:
            _refuse("verdicts of each frame", f"{item.ok}, {item.ng} and {item.not_inspected} of {item.frames}")
        # Minus zero has a spelling of its own, and sorts as if it were none.
        proper = all(math.isfinite(ratio) and math.copysign(1.0, ratio) > 0 for ratio in item.ratios)
        if len(item.ratios) not in (0, len(QUANTILES)) or not proper or any(a > b for a, b in pairwise(item.ratios)):
            _refuse(f"none or {len(QUANTILES)} rising ratios", f"{item.ratios}"[:REASON])


def _refuse(wanted: str, got: str) -> NoReturn:
    raise StatusError(
        wanted=f"a status with {wanted}",
        got=got,
        next_step="Do not count it; look at the device, or at what lies between it and here.",
    )


__all__ = [
    "MESSAGE",
    "MOST_ATTEMPTS",
    "MOST_NAMES",
    "QUANTILES",
    "REASON",
    "STATUS_BYTES",
    "Attempt",
    "DeviceStatus",
    "Envelope",
    "Failure",
    "Poll",
    "ScoreStatistics",
    "decode_status",
    "encode_status",
    "new_device_key",
    "plain_text",
    "public_of",
    "signed_bytes",
]
