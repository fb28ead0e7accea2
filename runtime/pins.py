"""Pins: who says that these rows, with these sources, are what a product's pack holds. Signed, and detached from it.

A pin is one JSON object in its canonical spelling (sorted keys, no white space, UTF-8), of at most 64 KiB:

    key          value
    fingerprint  feature space of the rows, 64 hex digits
    kid          name of the key: letters, digits, '.', '_', '-', at most 128
    not_after    end of the key's window, such as "2027-05-01T00:00:00Z"
    not_before   its beginning
    pack         digest of the pack, 64 hex digits
    product      whose pack
    root         root of the provenance's leaves, 64 hex digits (`edgead.runtime.provenance`)
    sig          signature, base64url without padding
    signer       for people: who signed; Unicode's form NFC, no control or direction characters, at most 200 characters
    ts           when it was signed, within the window
    v            2

Signed, with Ed25519 (RFC 8032), are the 13 bytes `vectorpin/v2` and a NUL, followed by the canonical JSON of everything
but `sig`. This follows the VectorPin protocol, version 2, for a whole pack in place of one vector: key, version and
window are under the signature, so that none of them can be exchanged. It is checked against the pack, not only against
itself: the root is computed from the pack's own rows.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NoReturn

import msgspec
from msgspec import Struct

from edgead.runtime.errors import InputError, PinError, missing_dependency
from edgead.runtime.knowledge import Pack
from edgead.runtime.provenance import Provenance, check_provenance
from edgead.runtime.spec import Digest, Name, canonical_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

DOMAIN = b"vectorpin/v2\0"
VERSION = 2
PIN_BYTES = 64 * 2**10
MAX_SIGNER = 200
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z\Z", re.ASCII)
_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_NOT_IN_TEXT = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


class Pin(Struct, frozen=True, forbid_unknown_fields=True):
    """A pin as read: well formed; whether it is true shows `verify_pin`. Fields as in this module's docstring."""

    fingerprint: Digest
    kid: Name
    not_after: str
    not_before: str
    pack: Digest
    product: Name
    root: Digest
    sig: str
    signer: str
    ts: str
    v: int


@dataclass(frozen=True)
class TrustedKey:
    """A key that pins may be signed with.

    Attributes:
        public: 32 bytes of Ed25519.
        not_before, not_after: when its owner lets it count, beside the window that a pin names; None for ever.
    """

    public: bytes
    not_before: datetime | None = None
    not_after: datetime | None = None


def signed_bytes(pin: Pin) -> bytes:
    """What a pin's signature is over."""
    content = msgspec.to_builtins(pin)
    del content["sig"]
    return DOMAIN + canonical_json(content)


def encode_pin(pin: Pin) -> bytes:
    """The one encoding of a pin."""
    return canonical_json(pin)


def decode_pin(data: bytes) -> Pin:
    """A pin from its bytes.

    Raises:
        PinError: too large, not canonical JSON, an unknown or missing field, another version, or a value that is not
            spelled as the format wants it.
    """
    if len(data) > PIN_BYTES:
        _refuse(f"at most {PIN_BYTES} bytes", str(len(data)))
    try:
        pin = msgspec.json.decode(data, type=Pin)
        same = canonical_json(pin) == data
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as error:
        _refuse("the fields of the format", f"something else ({error})")
    if not same:
        _refuse("canonical JSON", "another spelling of it")
    _check(pin)
    return pin


def make_pin(
    pack: Pack,
    provenance: Provenance,
    sign: Callable[[bytes], bytes],
    *,
    kid: str,
    signer: str,
    ts: datetime,
    not_before: datetime,
    not_after: datetime,
) -> Pin:
    """Pin a pack with its provenance.

    Args:
        pack, provenance: what is signed; they are checked against each other first.
        sign: bytes -> 64 bytes of an Ed25519 signature, such as `Ed25519PrivateKey.sign`, or that of a key store.
        kid: name of the key.
        signer: who signs, for people.
        ts: now.
        not_before, not_after: the key's window.

    Raises:
        KnowledgeError: the provenance is not that of the pack.
        PinError: a name or time that the format does not have.
    """
    check_provenance(pack, provenance)
    pin = Pin(
        fingerprint=provenance.fingerprint,
        kid=kid,
        not_after=time_text(not_after),
        not_before=time_text(not_before),
        pack=pack.digest,
        product=pack.product,
        root=provenance.root,
        sig=_base64(bytes(64)),
        signer=unicodedata.normalize("NFC", signer),
        ts=time_text(ts),
        v=VERSION,
    )
    return decode_pin(encode_pin(msgspec.structs.replace(pin, sig=_base64(sign(signed_bytes(pin))))))


def verify_pin(
    pin: Pin, pack: Pack, provenance: Provenance, keys: Mapping[str, TrustedKey], *, now: datetime | None = None
) -> None:
    """Check that a trusted key signed exactly this pack with exactly this provenance, and counts today.

    Args:
        pin: as read.
        pack, provenance: what it should be about.
        keys: trusted keys by name.
        now: an aware time, best the last one seen in signed data; this machine's clock if None.

    Raises:
        PinError: unknown key, a signature that is not that of the key, a pin for another pack, rows or model, or a
            time outside the key's window.
        KnowledgeError: the provenance is not that of the pack.
        MissingDependencyError: the package for signatures is not installed.
    """
    verify_pin_of(pin, pack.product, pack.digest, keys, now=now)
    check_provenance(pack, provenance)
    if (pin.root, pin.fingerprint) != (provenance.root, provenance.fingerprint):
        _refuse(f"the root {provenance.root[:12]} of this pack's rows and sources", f"the root {pin.root[:12]}")


def verify_pin_of(
    pin: Pin, product: str, digest: str, keys: Mapping[str, TrustedKey], *, now: datetime | None = None
) -> None:
    """Check all of a pin that can be checked without the pack and its provenance, as a camera does.

    The digest is that of every byte of the pack, and the root stands under the same signature: neither can be of other
    rows. What only the provenance shows, and `verify_pin` checks, is that the sources of the rows give the root.

    Args:
        pin: as read.
        product, digest: of the pack that it should be about.
        keys: trusted keys by name.
        now: an aware time, best the last one seen in signed data; this machine's clock if None.

    Raises:
        PinError: unknown key, a signature that is not that of the key, a pin for another pack or product, or a time
            outside the key's window.
        MissingDependencyError: the package for signatures is not installed.
    """
    _check(pin)
    key = keys.get(pin.kid)
    if key is None:
        _refuse(f"one of the trusted keys {', '.join(sorted(keys)) or '(none)'}", f"one of {pin.kid!r}")
    _check_signature(pin, key)
    moment = datetime.now(timezone.utc) if now is None else now
    ts, before, after = (_time(text) for text in (pin.ts, pin.not_before, pin.not_after))
    for what, when in (("now", moment), ("when it was signed", ts)):
        if not before <= when <= after or (key.not_before or when) > when or (key.not_after or when) < when:
            _refuse(
                f"a key that counts {what}, {time_text(when)}",
                f"the window {pin.not_before} to {pin.not_after}"
                + (" and the key's own" if key.not_before or key.not_after else ""),
            )
    if (pin.pack, pin.product) != (digest, product):
        _refuse(
            f"the digest of this pack, {digest[:12]} of {product!r}",
            f"that of {pin.pack[:12]} of {pin.product!r}",
        )


def key_name(public: bytes) -> str:
    """The name that a key has if nobody gave it one: the first 16 hex digits of the SHA-256 of its 32 bytes."""
    return hashlib.sha256(public).hexdigest()[:16]


def load_private_key(data: bytes, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """An Ed25519 key from PEM (PKCS #8).

    Raises:
        InputError: no such key, of another kind, encrypted without a passphrase, or a wrong one.
        MissingDependencyError: the package for signatures is not installed.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ModuleNotFoundError as error:
        raise missing_dependency("cryptography", "ota", "signatures") from error
    try:
        key = load_pem_private_key(data, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # The library's words may quote the file; the reader needs only to know which of the three it is.
        reason = "one that is encrypted" if isinstance(error, TypeError) and passphrase is None else "one that is not"
        raise InputError(
            wanted="a private key as PEM that its passphrase, if it has one, opens",
            got=reason,
            next_step="Give the passphrase in the environment variable that --passphrase-env names.",
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(wanted="an Ed25519 private key", got="one of another kind", next_step="Make an Ed25519 key.")
    return key


def load_public_key(data: bytes) -> bytes:
    """The 32 bytes of an Ed25519 public key in PEM.

    Raises:
        InputError: no such key.
        MissingDependencyError: the package for signatures is not installed.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ModuleNotFoundError as error:
        raise missing_dependency("cryptography", "ota", "signatures") from error
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(
            wanted="an Ed25519 public key as PEM",
            got="something else",
            next_step="Make it with: openssl pkey -in KEY.pem -pubout -out KEY.pub.pem",
        )
    return key.public_bytes_raw()


def time_text(moment: datetime) -> str:
    """A time as pins spell it: UTC, whole seconds.

    Raises:
        PinError: a time without its zone.
    """
    if moment.tzinfo is None:
        _refuse("times with their zone", str(moment))
    return f"{moment.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%SZ}".rjust(20, "0")


def _check_signature(pin: Pin, key: TrustedKey) -> None:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ModuleNotFoundError as error:
        raise missing_dependency("cryptography", "ota", "signatures") from error
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(_signature(pin.sig), signed_bytes(pin))
    except (InvalidSignature, ValueError):
        _refuse(f"a signature of the key {pin.kid!r} over what it says", "another one: it was edited or forged")


def _check(pin: Pin) -> None:
    if pin.v != VERSION:
        _refuse(f"version {VERSION}", f"version {pin.v}")
    if (
        len(pin.signer) > MAX_SIGNER
        or unicodedata.normalize("NFC", pin.signer) != pin.signer
        or any(unicodedata.category(letter) in _NOT_IN_TEXT for letter in pin.signer)
    ):
        _refuse(f"a signer in form NFC, of at most {MAX_SIGNER} plain characters", repr(pin.signer)[:80])
    _signature(pin.sig)
    if not _time(pin.not_before) <= _time(pin.ts) <= _time(pin.not_after):
        _refuse("a time of signing within the key's window", f"{pin.ts} in {pin.not_before} to {pin.not_after}")


def _signature(text: str) -> bytes:
    try:
        raw = base64.b64decode(text.encode("ascii") + b"==", altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raw = b""
    # Base64 has several spellings of one value; only the one that the encoder gives counts.
    if len(raw) != 64 or _base64(raw) != text:
        _refuse("a signature of 64 bytes as base64url without padding", "something else")
    return raw


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _time(text: str) -> datetime:
    try:
        if _TIME.match(text):
            return datetime.strptime(text, _FORMAT).replace(tzinfo=timezone.utc)
    except ValueError:
        pass
    _refuse("times such as 2027-05-01T00:00:00Z", repr(text)[:40])


def _refuse(wanted: str, got: str) -> NoReturn:
    raise PinError(
        wanted=f"a pin with {wanted}", got=got, next_step="Do not use this pack; have its owner sign it again."
    )
