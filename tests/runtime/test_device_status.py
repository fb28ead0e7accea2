"""A device's status: literal bytes, signed, and refused when a byte is another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.runtime.device_status import (
    MOST_QUARANTINED,
    STATUS_BYTES,
    Attempt,
    DeviceStatus,
    Failure,
    Poll,
    ScoreStatistics,
    decode_status,
    encode_status,
    new_device_key,
    plain_text,
    public_of,
    signed_bytes,
)
from edgead.runtime.errors import InputError, StatusError

SEED = bytes(range(32))
KEY = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
STATUS = DeviceStatus(
    device="cam-17",
    product="carpet",
    sequence=7,
    time=1_800_000_000,
    version="0.4.0",
    groups=("pilot",),
    release=3,
    digest="a" * 64,
    engine="e" * 64,
    packs={"carpet": "v3"},
    confirmed=True,
    counter=3,
    quarantined=("c" * 64,),
    alarm="rolled back from cccccccccccc",
    attempts=(Attempt(2, "rolled back", "3 of 9 frames without an answer"), Attempt(3, "confirmed")),
    poll=Poll("current", "", 1_799_999_999, 0),
    scores=(ScoreStatistics("carpet", 1000, 990, 9, 1, 1_799_990_000, (0.25, 0.5, 0.75, 1, 1.5)),),
    error=Failure("FetchError", "wanted x; got y", 1_799_999_000, 2),
)
BODY = (
    b'{"alarm":"rolled back from cccccccccccc","attempts":[{"outcome":"rolled back","reason":"3 of 9 frames without an '
    b'answer","release":2},{"outcome":"confirmed","reason":"","release":3}],"confirmed":true,"counter":3,'
    b'"device":"cam-17","digest":"' + b"a" * 64 + b'","dropped":0,"engine":"' + b"e" * 64 + b'","error":{"count":2,'
    b'"kind":"FetchError","message":"wanted x; got y","time":1799999000},"groups":["pilot"],"packs":{"carpet":"v3"},'
    b'"poll":{"failures":0,"reason":"","status":"current","time":1799999999},"product":"carpet","quarantined":["'
    + b"c"
    * 64
    + b'"],"release":3,"schema":1,"scores":[{"frames":1000,"ng":9,"not_inspected":1,"ok":990,"product":"carpet",'
    b'"ratios":[0.25,0.5,0.75,1.0,1.5],"since":1799990000}],"sequence":7,"starts":0,"time":1800000000,"version":"0.4.0"}'
)
SIGNATURE = (
    "bdeff8f8c175ea21e83b23dfa6bca7bc9a8d6a6dfca07d40731939e3c85b2820"
    "62957aa502781e68797e9121b8e086896ef0523b2eccebef076514bd3cafe90e"
)
ENVELOPE = (
    b'{"key":"' + KEY.encode() + b'","schema":1,"signature":"' + SIGNATURE.encode() + b'","status":' + BODY + b"}"
)


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The envelope with another content, in its canonical spelling."""
    content = json.loads(ENVELOPE)
    change(content)
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_a_status_is_these_bytes() -> None:
    assert signed_bytes(STATUS).startswith(b"edgead/status/v1\0")
    assert encode_status(STATUS, SEED) == ENVELOPE
    envelope = decode_status(ENVELOPE)
    assert envelope.status == STATUS
    assert envelope.key == KEY == public_of(SEED).hex()
    envelope.verify()
    envelope.verify(public_of(SEED))


def test_the_signature_is_over_the_domain_and_the_record() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signed = b"edgead/status/v1\0" + BODY
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(KEY)).verify(bytes.fromhex(SIGNATURE), signed)


def test_a_usual_status_is_small() -> None:
    assert len(ENVELOPE) < 1300


def test_any_other_byte_is_refused() -> None:
    for place in range(len(ENVELOPE)):
        for flip in (1, 0x20, 0x80):
            data = bytearray(ENVELOPE)
            data[place] ^= flip
            with pytest.raises(StatusError):
                decode_status(bytes(data)).verify(public_of(SEED))


def test_any_part_of_it_is_refused() -> None:
    for length in range(len(ENVELOPE)):
        with pytest.raises(StatusError):
            decode_status(ENVELOPE[:length])


@pytest.mark.parametrize("field", DeviceStatus.__struct_fields__)
def test_every_field_is_under_the_signature(field: str) -> None:
    other = DeviceStatus(
        device="cam-18",
        product="felt",
        sequence=8,
        time=1,
        version="1",
        groups=(),
        release=None,
        digest="",
        engine="",
        packs={},
        confirmed=False,
        starts=1,
        counter=4,
        quarantined=(),
        alarm="",
        attempts=(),
        poll=None,
        scores=(),
        error=None,
        dropped=1,
        schema=2,
    )
    forged = msgspec.structs.replace(STATUS, **{field: getattr(other, field)})
    data = edited(lambda content: content.update(status=msgspec.to_builtins(forged)))
    with pytest.raises(StatusError):
        decode_status(data).verify()


def test_a_status_of_another_key_is_refused() -> None:
    other = new_device_key()
    envelope = decode_status(encode_status(STATUS, other))
    envelope.verify()
    with pytest.raises(StatusError, match=KEY[:16]):
        envelope.verify(public_of(SEED))
    with pytest.raises(StatusError, match="edited or forged"):
        decode_status(edited(lambda content: content.update(key=public_of(other).hex()))).verify()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        ENVELOPE + b"\n",
        b" " + ENVELOPE,
        b"\xef\xbb\xbf" + ENVELOPE,
        ENVELOPE * 2,
        b"{" * 16_000,
        b"[" * STATUS_BYTES,
        b'{"status":' * 1500,
        ENVELOPE.replace(b'"alarm":"', b'"alarm":' + b"[" * 10_000, 1),
        ENVELOPE + b" " * STATUS_BYTES,
        b"\xff" * 1000,
        ENVELOPE.replace(b"cam-17", b"\xed\xa0\x80"),
        ENVELOPE.replace(b"cam-17", b"cam\\u002d17"),
        ENVELOPE.replace(b'"starts":0', b'"starts":0,"starts":0'),
        ENVELOPE.replace(b'"starts":0', b'"starts":-0'),
        ENVELOPE.replace(b'"starts":0', b'"starts":0.0'),
        ENVELOPE.replace(b'"starts":0', b'"starts":' + b"9" * 5000),
        ENVELOPE.replace(b"1.5]", b"1.50]"),
        ENVELOPE.replace(b"1.5]", b"NaN]"),
        ENVELOPE.replace(b"1.5]", b"Infinity]"),
        ENVELOPE.replace(b"1.5]", b"1e999]"),
        ENVELOPE.replace(b"[0.25,", b"[-0.0,"),
        ENVELOPE.replace(b"[0.25,", b"[-1.0,"),
        ENVELOPE.replace(b"[0.25,", b"[2.0,"),
        ENVELOPE.replace(b"[0.25,", b"["),
        ENVELOPE.replace(b'"ok":990', b'"ok":991'),
    ],
    ids=lambda data: repr(data[:12] + data[-12:]),
)
def test_what_is_no_status_is_refused(data: bytes) -> None:
    with pytest.raises(StatusError) as caught:
        decode_status(data)
    assert isinstance(caught.value, InputError)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(schema=2),
        lambda content: content.update(more=1),
        lambda content: content.update(key=KEY.upper()),
        lambda content: content.update(signature=SIGNATURE[:-2]),
        lambda content: content.pop("signature"),
        lambda content: content["status"].update(more=1),
        lambda content: content["status"].pop("dropped"),
        lambda content: content["status"].update(sequence=0),
        lambda content: content["status"].update(sequence=2**53 + 1),
        lambda content: content["status"].update(device="../etc"),
        lambda content: content["status"].update(device="a" * 129),
        lambda content: content["status"].update(digest="a" * 63),
        lambda content: content["status"].update(alarm="x" * 301),
        lambda content: content["status"].update(alarm="\x1b[2J"),
        lambda content: content["status"].update(alarm="left\u202eright"),
        lambda content: content["status"].update(groups=["a"] * 17),
        lambda content: content["status"].update(quarantined=["c" * 64] * (MOST_QUARANTINED + 1)),
        lambda content: content["status"].update(attempts=content["status"]["attempts"] * 5),
        lambda content: content["status"].update(scores=content["status"]["scores"] * 2),
        lambda content: content["status"]["attempts"][0].update(outcome="fine"),
        lambda content: content["status"]["error"].update(message="x" * 501),
    ],
)
def test_a_field_that_the_format_does_not_have_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(StatusError):
        decode_status(edited(change))


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), -0.0, -1.0])
def test_a_ratio_that_is_no_number_is_not_signed(ratio: float) -> None:
    scores = (msgspec.structs.replace(STATUS.scores[0], ratios=(ratio, 1.0, 1.0, 1.0, 1.0)),)
    with pytest.raises(StatusError):
        encode_status(msgspec.structs.replace(STATUS, scores=scores), SEED)


def test_a_record_that_breaks_a_rule_is_not_signed() -> None:
    for fields in ({"device": "no name"}, {"alarm": "x" * 301}, {"sequence": 0}, {"alarm": "\ud800"}, {"schema": 2}):
        with pytest.raises(StatusError):
            encode_status(msgspec.structs.replace(STATUS, **fields), SEED)
    with pytest.raises(StatusError):
        encode_status(STATUS, b"short")
    full = tuple(Attempt(number, "rejected", "\U0001f9f5" * 300) for number in range(8))
    wide = tuple(f"{number}" + "g" * 126 for number in range(10, 26))
    with pytest.raises(StatusError, match=str(STATUS_BYTES)):
        encode_status(
            msgspec.structs.replace(
                STATUS, attempts=full, groups=wide, packs=dict.fromkeys(wide, "v" * 128), quarantined=("c" * 64,) * 32
            ),
            SEED,
        )


def test_a_short_key_has_no_public_one() -> None:
    with pytest.raises(StatusError):
        public_of(b"short")
    assert len(new_device_key()) == 32
    assert new_device_key() != new_device_key()


@settings(max_examples=400, deadline=None)
@given(
    st.binary(max_size=300)
    | st.integers(0, len(ENVELOPE)).flatmap(
        lambda at: st.binary(max_size=8).map(lambda noise: ENVELOPE[:at] + noise + ENVELOPE[at + len(noise) :])
    )
)
def test_noise_is_refused_or_is_the_status(data: bytes) -> None:
    try:
        envelope = decode_status(data)
        envelope.verify(public_of(SEED))
    except StatusError:
        return
    assert data == ENVELOPE


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=2000))
def test_any_text_can_be_made_one_that_a_status_holds(text: str) -> None:
    plain = plain_text(text)
    status = msgspec.structs.replace(STATUS, alarm=plain)
    decoded = decode_status(encode_status(status, SEED))
    decoded.verify()
    assert decoded.status.alarm == plain
    assert decoded.status == status
