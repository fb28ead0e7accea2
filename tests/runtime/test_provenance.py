"""Provenance and pins: byte-exact, bound to one row, one pack and one key, and no input that breaks the readers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.runtime.errors import EdgeadError, InputError, KnowledgeError, PinError
from edgead.runtime.knowledge import Pack, decode_pack, encode_pack, new_pack
from edgead.runtime.pins import (
    DOMAIN,
    Pin,
    TrustedKey,
    decode_pin,
    encode_pin,
    key_name,
    load_private_key,
    load_public_key,
    make_pin,
    signed_bytes,
    verify_pin,
)
from edgead.runtime.provenance import (
    BankSources,
    Provenance,
    SourceImage,
    banks_root,
    check_provenance,
    decode_provenance,
    encode_provenance,
    image_name,
    leaf_digests,
    merkle_root,
)
from edgead.runtime.provenance_file import provenance_beside, provenance_path, read_pin, write_pin, write_provenance
from edgead.runtime.spec import Calibration

FINGERPRINT = "0123456789abcdef" * 4
PHOTO = hashlib.sha256(b"photo").hexdigest()
ROWS = np.array([[1.0, 2.0], [0.0, -3.5], [5.0, 6.0]], np.float32)
SEED = bytes(range(32))
PUBLIC = bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")
NOW = datetime(2026, 6, 1, 12, 0, 0, tzinfo=timezone.utc)


def a_pack(rows: Any = ROWS, product: str = "bolt", threshold: float = 1.0) -> Pack:
    return new_pack(
        product=product,
        fingerprint=FINGERPRINT,
        calibration=Calibration(threshold=threshold),
        arrays={"bank.normal": np.asarray(rows, np.float32)},
    )


def a_record(pack: Pack, *, images: Any = (0, 0, -1), places: Any = ((0, 3, 1), (0, 4, 1), (-1, -1, -1))) -> Provenance:
    index, where = np.array(images, np.int32), np.array(places, np.int32).reshape(-1, 3)
    digests = np.array([list(bytes.fromhex(PHOTO)), [0] * 32], np.uint8)[index]
    ids = pack.ids("bank.normal")
    leaves = leaf_digests(pack.arrays["bank.normal"], ids, digests, where, FINGERPRINT)
    bank = BankSources(ids, index, where, leaves)
    return Provenance(pack.product, FINGERPRINT, 4, (SourceImage(PHOTO, "a.png"),), {"bank.normal": bank})


def private_key() -> Any:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    return ed25519.Ed25519PrivateKey.from_private_bytes(SEED)


def a_pin(pack: Pack, record: Provenance, **changes: Any) -> Pin:
    words: dict[str, Any] = {
        "kid": "quality-2026",
        "signer": "Anna Müller",
        "ts": NOW,
        "not_before": NOW - timedelta(days=1),
        "not_after": NOW + timedelta(days=365),
        **changes,
    }
    return make_pin(pack, record, private_key().sign, **words)


KEYS = {"quality-2026": TrustedKey(PUBLIC)}


def test_the_tree_has_the_roots_of_the_published_vectors() -> None:
    # The leaves and roots that Certificate Transparency implementations test RFC 6962 with.
    inputs = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
    leaves = [hashlib.sha256(b"\0" + bytes.fromhex(text)).digest() for text in inputs]
    roots = {
        0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        4: "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        6: "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    assert {size: merkle_root(leaves[:size]).hex() for size in roots} == roots


def test_a_leaf_is_over_these_bytes() -> None:
    record = a_record(a_pack())
    message = (
        b"\0edgead/row/v1\0"
        + bytes.fromhex(FINGERPRINT)
        + bytes.fromhex(PHOTO)
        + b"\x00\x00\x00\x00\x04\x00\x00\x00\x01\x00\x00\x00"  # tile 0, x 4, y 1
        + b"\x02\x00\x00\x00\x00\x00\x00\x00F32"  # id 2
        + b"\x00\x00\x00\x00\x00\x00\x60\xc0"  # 0.0 and -3.5
    )
    assert record.banks["bank.normal"].leaves[1].tobytes() == hashlib.sha256(message).digest()
    unknown = (
        b"\0edgead/row/v1\0"
        + bytes.fromhex(FINGERPRINT)
        + bytes(32)
        + b"\xff" * 12
        + b"\x03\x00\x00\x00\x00\x00\x00\x00F32"
        + ROWS[2].tobytes()
    )
    assert record.banks["bank.normal"].leaves[2].tobytes() == hashlib.sha256(unknown).digest()


def test_the_root_binds_the_names_and_lengths_of_the_banks() -> None:
    leaves = a_record(a_pack()).banks["bank.normal"].leaves
    tree = merkle_root([leaf.tobytes() for leaf in leaves])
    message = b"edgead/banks/v1\0" + b"\x0b\x00bank.normal" + b"\x03" + bytes(7) + tree
    assert banks_root({"bank.normal": leaves}) == hashlib.sha256(message).hexdigest()
    assert banks_root({"bank.normal": leaves}) != banks_root({"bank.other": leaves})


def test_a_record_has_these_bytes_and_reads_back() -> None:
    record = a_record(a_pack())
    data = encode_provenance(record)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"] == {
        "edgead.provenance": "1",
        "fingerprint": FINGERPRINT,
        "next_id": "4",
        "product": "bolt",
        "root": record.root,
    }
    body = (
        np.array([1, 2, 3], "<u8").tobytes()
        + np.array([0, 0, -1], "<i4").tobytes()
        + record.banks["bank.normal"].leaves.tobytes()
        + np.array([0, 3, 1, 0, 4, 1, -1, -1, -1], "<i4").tobytes()
        + b'["a.png"]'
        + bytes.fromhex(PHOTO)
    )
    assert data[8 + length :] == body
    again = decode_provenance(data)
    assert encode_provenance(again) == data
    assert again.image_of("bank.normal", 0) == SourceImage(PHOTO, "a.png")
    assert again.image_of("bank.normal", 2) is None
    check_provenance(a_pack(), again)


def test_a_row_that_changed_moved_or_has_another_source_is_named() -> None:
    pack = a_pack()
    record = a_record(pack)
    changed = ROWS.copy()
    changed[1, 0] = 1e-6
    with pytest.raises(KnowledgeError, match="row 2"):
        check_provenance(a_pack(changed), record)
    with pytest.raises(KnowledgeError, match="row 1"):
        check_provenance(a_pack(ROWS[[1, 0, 2]]), record)
    with pytest.raises(KnowledgeError, match="ids"):
        check_provenance(a_pack(ROWS[:2]), record)
    bank = record.banks["bank.normal"]
    for field, value in (("images", np.array([0, -1, -1], np.int32)), ("places", np.zeros((3, 3), np.int32))):
        forged = replace(record, banks={"bank.normal": replace(bank, **{field: value})})
        with pytest.raises(KnowledgeError, match="row"):
            check_provenance(pack, forged)
    with pytest.raises(KnowledgeError, match="row"):
        check_provenance(pack, replace(record, fingerprint="f" * 64))
    with pytest.raises(KnowledgeError):
        check_provenance(a_pack(product="nut"), record)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.0])
def test_rows_that_no_pack_can_have_have_no_leaf(bad: float) -> None:
    rows = ROWS.copy()
    rows[0, 0] = bad
    places, sources = np.zeros((3, 3), np.int32), np.zeros((3, 32), np.uint8)
    with pytest.raises(KnowledgeError):
        leaf_digests(rows, np.arange(3, dtype=np.uint64), sources, places, FINGERPRINT)


@pytest.mark.parametrize("word", [0x80000000, 0x7FC00000, 0x7F800000])
def test_a_pack_whose_zero_became_minus_zero_or_no_number_is_not_even_read(word: int) -> None:
    # +0.0 and -0.0 are equal and have other bits: a pin must not hold for both.
    data = encode_pack(a_pack())
    where = data.index(ROWS.tobytes()) + 8  # the 0.0 that begins the second row
    with pytest.raises(KnowledgeError):
        decode_pack(data[:where] + word.to_bytes(4, "little") + data[where + 4 :])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("next_id", 3),
        ("product", "../x"),
        ("images", (SourceImage(PHOTO, "a/b.png"),)),
        ("images", (SourceImage(PHOTO, "u\u0308.png"),)),
        ("images", (SourceImage(PHOTO, "a.png"), SourceImage(PHOTO, "b.png"))),
        ("images", ()),
    ],
)
def test_records_that_break_the_format_are_refused(field: str, value: Any) -> None:
    with pytest.raises(KnowledgeError):
        replace(a_record(a_pack()), **{field: value})


def test_names_of_images_lose_folders_directions_and_decomposed_letters() -> None:
    assert image_name("C:\\photos/day 1/u\u0308ber\u202e.png") == "über.png"
    assert image_name("x" * 400) == "x" * 255


def test_a_pin_signs_these_bytes() -> None:
    pack = a_pack()
    record = a_record(pack)
    pin = a_pin(pack, record)
    body = (
        f'{{"fingerprint":"{FINGERPRINT}","kid":"quality-2026","not_after":"2027-06-01T12:00:00Z",'
        f'"not_before":"2026-05-31T12:00:00Z","pack":"{pack.digest}","product":"bolt","root":"{record.root}",'
        '"signer":"Anna Müller","ts":"2026-06-01T12:00:00Z","v":2}'
    ).encode()
    assert DOMAIN == b"vectorpin/v2\x00"
    assert signed_bytes(pin) == DOMAIN + body
    assert private_key().public_key().public_bytes_raw() == PUBLIC
    private_key().public_key().verify(_raw(pin.sig), DOMAIN + body)
    with_signature = body.replace(b',"signer"', f',"sig":"{pin.sig}","signer"'.encode())
    assert encode_pin(pin) == with_signature
    assert decode_pin(with_signature) == pin
    # Ed25519 is deterministic: the same key over the same bytes.
    assert a_pin(pack, record) == pin


def test_a_pin_holds_for_its_own_pack() -> None:
    pack = a_pack()
    record = a_record(pack)
    verify_pin(a_pin(pack, record), pack, record, KEYS, now=NOW + timedelta(days=30))


def test_a_pin_moved_to_another_pack_or_row_is_refused() -> None:
    pack = a_pack()
    record = a_record(pack)
    pin = a_pin(pack, record)
    for other in (a_pack(threshold=2.0), a_pack(ROWS * 2), a_pack(product="nut")):
        with pytest.raises(PinError):
            verify_pin(pin, other, a_record(other), KEYS, now=NOW)
    elsewhere = a_record(pack, places=((0, 3, 2), (0, 4, 1), (-1, -1, -1)))
    with pytest.raises(PinError, match="root"):
        verify_pin(pin, pack, elsewhere, KEYS, now=NOW)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kid", "other"),
        ("v", 1),
        ("v", 3),
        ("signer", "Mallory"),
        ("not_after", "2099-01-01T00:00:00Z"),
        ("not_before", "2020-01-01T00:00:00Z"),
        ("ts", "2026-06-02T12:00:00Z"),
        ("pack", "a" * 64),
        ("root", "a" * 64),
        ("fingerprint", "a" * 64),
        ("product", "nut"),
        ("sig", "A" * 86),
    ],
)
def test_every_edited_field_is_refused(field: str, value: Any) -> None:
    pack = a_pack()
    record = a_record(pack)
    edited = msgspec.structs.replace(a_pin(pack, record), **{field: value})
    both = {**KEYS, "other": TrustedKey(PUBLIC)}  # the same key under two names does not help either
    with pytest.raises(PinError):
        verify_pin(edited, pack, record, both, now=NOW)


@pytest.mark.parametrize("days", [-2, 366])
def test_outside_the_window_of_the_key_nothing_counts(days: int) -> None:
    pack = a_pack()
    record = a_record(pack)
    with pytest.raises(PinError, match="window"):
        verify_pin(a_pin(pack, record), pack, record, KEYS, now=NOW + timedelta(days=days))


def test_a_key_that_its_owner_ended_does_not_count_whatever_the_pin_says() -> None:
    pack = a_pack()
    record = a_record(pack)
    ended = {"quality-2026": TrustedKey(PUBLIC, not_after=NOW - timedelta(hours=1))}
    with pytest.raises(PinError, match="window"):
        verify_pin(a_pin(pack, record), pack, record, ended, now=NOW)


def test_an_unknown_key_and_a_foreign_one_are_refused() -> None:
    pack = a_pack()
    record = a_record(pack)
    pin = a_pin(pack, record)
    with pytest.raises(PinError, match="trusted"):
        verify_pin(pin, pack, record, {}, now=NOW)
    with pytest.raises(PinError, match="signature"):
        verify_pin(pin, pack, record, {"quality-2026": TrustedKey(bytes(31) + b"\1")}, now=NOW)


def test_what_is_not_its_pack_is_not_signed() -> None:
    with pytest.raises(KnowledgeError):
        a_pin(a_pack(ROWS * 2), a_record(a_pack()))


@pytest.mark.parametrize("signer", ["Anna\n", "a\u202eb", "x" * 201])
def test_signers_are_plain_text(signer: str) -> None:
    pack = a_pack()
    with pytest.raises(PinError):
        a_pin(pack, a_record(pack), signer=signer)


def test_other_spellings_of_a_pin_are_refused() -> None:
    data = encode_pin(a_pin(a_pack(), a_record(a_pack())))
    decomposed = data.replace("ü".encode(), "u\u0308".encode())
    twice = data.replace(b'"v":2', b'"v":2,"v":2')
    unknown = data.replace(b'"v":2', b'"v":2,"w":2')
    padded = data.replace(b'","signer"', b'==","signer"')
    for other in (data + b" ", decomposed, twice, unknown, padded, b"[" * 70_000, b"", b"\xff"):
        with pytest.raises(PinError):
            decode_pin(other)


def test_keys_come_from_pem_with_their_passphrase() -> None:
    from cryptography.hazmat.primitives import serialization as form

    key = private_key()
    for secret, how in ((None, form.NoEncryption()), (b"tulip", form.BestAvailableEncryption(b"tulip"))):
        pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, how)
        assert load_private_key(pem, secret).public_key().public_bytes_raw() == PUBLIC
    for wrong in (None, b"rose"):
        with pytest.raises(InputError) as caught:
            load_private_key(pem, wrong)
        assert "rose" not in str(caught.value)
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    assert load_public_key(public) == PUBLIC
    with pytest.raises(InputError):
        load_public_key(pem)
    assert key_name(PUBLIC) == hashlib.sha256(PUBLIC).hexdigest()[:16]


def test_files_stand_beside_the_pack(tmp_path: Path) -> None:
    pack = a_pack()
    record = a_record(pack)
    path = tmp_path / "bolt.safetensors"
    assert provenance_beside(path) is None
    write_provenance(provenance_path(path), record)
    found = provenance_beside(path)
    assert found is not None
    assert found.root == record.root
    (tmp_path / "bolt.safetensors.provenance").write_bytes(b"x" * 9)
    with pytest.raises(KnowledgeError, match=r"bolt\.safetensors\.provenance"):
        provenance_beside(path)
    pin = a_pin(pack, record)
    write_pin(tmp_path / "p.pin", pin)
    assert read_pin(tmp_path / "p.pin") == pin
    (tmp_path / "p.pin").write_bytes(b"x" * 70_000)
    with pytest.raises(PinError, match=r"p\.pin"):
        read_pin(tmp_path / "p.pin")


RECORD_BYTES = encode_provenance(a_record(a_pack()))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_record_is_an_error_or_reads_as_itself(data: st.DataObject) -> None:
    damaged = bytearray(RECORD_BYTES)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))]) if data.draw(st.booleans()) else bytes(damaged)
    try:
        record = decode_provenance(cut)
    except KnowledgeError:
        return
    assert encode_provenance(record) == cut
    if cut != RECORD_BYTES:
        # Only what the pack does not know, the names of images and the next id, can differ unseen.
        try:
            check_provenance(a_pack(), record)
        except KnowledgeError:
            return
        assert record.root == a_record(a_pack()).root


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_pin_is_an_error(data: st.DataObject) -> None:
    pack = a_pack()
    record = a_record(pack)
    whole = encode_pin(a_pin(pack, record))
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))]) if data.draw(st.booleans()) else bytes(damaged)
    if cut == whole:
        return
    with pytest.raises(PinError):
        verify_pin(decode_pin(cut), pack, record, KEYS, now=NOW)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_a_typed_error(noise: bytes) -> None:
    for read in (decode_provenance, decode_pin):
        with pytest.raises(EdgeadError):
            read(noise)


def _raw(text: str) -> bytes:
    import base64

    return base64.urlsafe_b64decode(text + "==")
