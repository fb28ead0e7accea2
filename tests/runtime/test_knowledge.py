"""Knowledge packs: one content has one encoding, and nothing else is read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgead.runtime.errors import KnowledgeError, OutputExistsError, StorageError
from edgead.runtime.knowledge import (
    Pack,
    check_fits,
    decode_pack,
    encode_pack,
    head_feeds,
    new_pack,
    read_pack,
    write_pack,
)
from edgead.runtime.spec import Calibration, DetectorSpec, KnowledgePort, Limits, Port, Preprocessing

FINGERPRINT = "ab" * 32
Arrays = dict[str, NDArray[Any]]


def rows(count: int, dim: int = 3, dtype: str = "float32") -> NDArray[Any]:
    return np.random.default_rng(count).standard_normal((count, dim)).astype(dtype)


def bolt(**changes: Any) -> Pack:
    arrays: Arrays = {
        "bank.normal": rows(5),
        "bank.anomalous": rows(0),
        "anomalous.weight": np.array([0.5], np.float32),
    }
    arrays.update(changes.pop("arrays", {}))
    content: dict[str, Any] = {
        "product": "bolt",
        "fingerprint": FINGERPRINT,
        "calibration": Calibration(threshold=1.5, map_threshold=1.25, typical=0.75, held_out=20),
        "arrays": arrays,
        **changes,
    }
    return new_pack(**content)


def detector(**changes: Any) -> DetectorSpec:
    spec = DetectorSpec(
        contract=1,
        method="memory-bank",
        preprocessing=Preprocessing(8, 8),
        features=(Port("patches", "float32", ("B", 4, 3)),),
        knowledge=(
            KnowledgePort("bank.normal", "float32", ("N", 3), rows="bank.normal.rows"),
            KnowledgePort("bank.anomalous", "float32", ("M", 3), rows="bank.anomalous.rows", empty_ok=True),
            KnowledgePort("anomalous.weight", "float32", (1,)),
        ),
        outputs=(Port("score", "float32", ("B",)),),
        fingerprint=FINGERPRINT,
    )
    return msgspec.structs.replace(spec, **changes)


def file_of(header: dict[str, Any] | bytes, data: bytes, *, pad: bool = True) -> bytes:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64 if pad else 0)
    return struct.pack("<Q", len(text)) + text + data


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def payload(data: bytes) -> bytes:
    return data[8 + struct.unpack("<Q", data[:8])[0] :]


def edited(pack: Pack, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The pack's file with `change` applied to its header."""
    data = encode_pack(pack)
    header = header_of(data)
    change(header)
    return file_of(header, payload(data))


# The format.


def test_a_tiny_pack_is_these_bytes() -> None:
    pack = new_pack(
        product="bolt",
        fingerprint=FINGERPRINT,
        calibration=Calibration(threshold=1.5),
        arrays={"bank.normal": np.array([[1.0, -2.0]], np.float32), "a": np.array([7], np.int32)},
        first_id=258,
    )
    header = (
        '{"__metadata__":{"calibration":"{\\"threshold\\":1.5}","edgead.pack":"1","fingerprint":"'
        + FINGERPRINT
        + '","product":"bolt"},"a":{"data_offsets":[0,4],"dtype":"I32","shape":[1]},'
        '"bank.normal":{"data_offsets":[4,12],"dtype":"F32","shape":[1,2]},'
        '"bank.normal.ids":{"data_offsets":[12,20],"dtype":"U64","shape":[1]}}'
    ).encode()
    assert encode_pack(pack) == (
        b"\x78\x01\0\0\0\0\0\0"
        + header
        + b" " * (0x178 - len(header))
        + b"\x07\0\0\0"
        + b"\0\0\x80\x3f\0\0\0\xc0"
        + b"\x02\x01\0\0\0\0\0\0"
    )
    assert (8 + 0x178) % 64 == 0
    assert pack.version == pack.digest[:12]


def test_its_digest_is_the_sha256_of_its_file_and_does_not_depend_on_how_it_was_made() -> None:
    pack = bolt()
    assert pack.digest == hashlib.sha256(encode_pack(pack)).hexdigest()
    shuffled = dict(reversed(list(pack.arrays.items())))
    other = Pack(pack.product, pack.fingerprint, pack.calibration, shuffled)
    assert encode_pack(other) == encode_pack(pack)
    fortran = {name: np.asfortranarray(array) for name, array in pack.arrays.items()}
    assert Pack("bolt", FINGERPRINT, pack.calibration, fortran).digest == pack.digest
    big_endian = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in pack.arrays.items()}
    assert Pack("bolt", FINGERPRINT, pack.calibration, big_endian).digest == pack.digest


def test_every_part_of_the_meaning_changes_the_digest() -> None:
    pack = bolt()
    others = [
        bolt(product="nut"),
        bolt(fingerprint="cd" * 32),
        bolt(calibration=Calibration(threshold=1.5000000000000002)),
        bolt(arrays={"bank.normal": rows(5) + np.float32(1e-6)}),
        bolt(first_id=2),
        bolt(arrays={"more": np.zeros(1, np.float32)}),
    ]
    assert len({pack.digest, *(other.digest for other in others)}) == 7


def test_the_safetensors_package_reads_the_same_arrays_and_metadata(tmp_path: Path) -> None:
    pack = bolt(
        arrays={
            "text.table": rows(4, 6, "float16"),
            "u8": np.arange(3, dtype=np.uint8),
            "i64": np.array([[-5]], np.int64),
            "scalar": np.array(2, np.int32),
        }
    )
    read = safetensors.numpy.load(encode_pack(pack))
    assert read.keys() == pack.arrays.keys()
    for name, array in read.items():
        assert array.dtype == pack.arrays[name].dtype
        np.testing.assert_array_equal(array, pack.arrays[name])
    write_pack(tmp_path / "p.safetensors", pack)
    with safetensors.safe_open(tmp_path / "p.safetensors", "numpy") as opened:
        assert opened.metadata()["product"] == "bolt"


def test_a_pack_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pack = bolt()
    path = tmp_path / "deep" / "bolt.safetensors"
    write_pack(path, pack)
    again = read_pack(path)
    assert path.read_bytes() == encode_pack(pack) == encode_pack(again)
    assert (again.product, again.fingerprint, again.calibration) == ("bolt", FINGERPRINT, pack.calibration)
    assert list(again.arrays) == sorted(pack.arrays)
    for name, array in again.arrays.items():
        np.testing.assert_array_equal(array, pack.arrays[name])
        assert array.flags.aligned
        assert not array.flags.writeable


def test_decoding_copies_no_bank() -> None:
    data = encode_pack(bolt(arrays={"anomalous.weight": np.array([0.5, 1.0], np.float32)}))
    decoded = decode_pack(data)
    memory = np.frombuffer(data, np.uint8)
    assert np.shares_memory(decoded.arrays["bank.normal"], memory)


def test_arrays_of_a_pack_cannot_be_changed_behind_its_digest() -> None:
    source = rows(5)
    pack = bolt(arrays={"bank.normal": source})
    direct = Pack("bolt", FINGERPRINT, pack.calibration, {"weights": source})
    before = direct.digest
    source[0, 0] = 99
    assert pack.arrays["bank.normal"][0, 0] != 99
    assert dataclasses.replace(direct).digest == before
    with pytest.raises(ValueError, match="read-only"):
        pack.arrays["bank.normal"][0, 0] = 1
    with pytest.raises(TypeError):
        pack.arrays["bank.normal"] = source  # type: ignore[index]


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 10**6))
def test_calibration_numbers_come_back_to_the_last_bit(threshold: float, held_out: int) -> None:
    pack = bolt(calibration=Calibration(threshold=threshold, held_out=held_out))
    again = decode_pack(encode_pack(pack))
    assert again.calibration.threshold == threshold
    assert again.calibration.held_out == held_out
    assert again.digest == pack.digest


def test_a_whole_number_and_a_numpy_number_are_the_same_calibration() -> None:
    spellings = (2, 2.0, np.float32(2), np.float64(2), np.int64(2))
    assert len({bolt(calibration=Calibration(threshold=value)).digest for value in spellings}) == 1  # type: ignore[arg-type]
    signs = (0.0, -0.0)
    assert len({bolt(calibration=Calibration(threshold=value)).digest for value in signs}) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,8}", fullmatch=True).filter(
            lambda name: not name.startswith("bank.") and not name.endswith(".ids")
        ),
        st.tuples(
            st.sampled_from(["uint8", "float16", "float32", "int32", "int64", "uint64"]),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=6,
    ),
    st.integers(0, 20),
)
def test_any_legal_content_makes_the_round_trip(shapes: dict[str, tuple[str, list[int]]], count: int) -> None:
    arrays: Arrays = {
        name: np.arange(int(np.prod(shape))).astype(dtype).reshape(shape) for name, (dtype, shape) in shapes.items()
    }
    pack = bolt(arrays={**arrays, "bank.extra": rows(count)})
    data = encode_pack(pack)
    again = decode_pack(data)
    assert encode_pack(again) == data
    for name, array in arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
        assert again.arrays[name].dtype == array.dtype
    assert safetensors.numpy.load(data).keys() == pack.arrays.keys()


# Making one.


def test_row_ids_are_allocated_once_over_all_banks() -> None:
    pack = bolt(arrays={"bank.anomalous": rows(2)}, first_id=10)
    assert pack.ids("bank.anomalous").tolist() == [10, 11]
    assert pack.ids("bank.normal").tolist() == [12, 13, 14, 15, 16]
    assert pack.banks == ("bank.anomalous", "bank.normal")
    given_ids = np.array([3, 7, 100, 101, 500], np.uint64)
    kept = bolt(arrays={"bank.normal.ids": given_ids, "bank.anomalous": rows(2)})
    assert kept.ids("bank.normal").tolist() == [3, 7, 100, 101, 500]
    assert kept.ids("bank.anomalous").tolist() == [501, 502]
    with pytest.raises(KnowledgeError, match=r"bank\.normal"):
        pack.ids("bank.other")


def test_negative_zeros_are_normalised_when_rows_are_made_and_nothing_else_changes() -> None:
    values = np.array([[-0.0, 0.0, -1e-45, 1e-38]], np.float32)
    made = bolt(arrays={"bank.normal": values, "w": np.array([-0.0], np.float16)})
    assert not np.signbit(made.arrays["bank.normal"][0, :2]).any()
    assert made.arrays["bank.normal"][0, 2:].tobytes() == values[0, 2:].tobytes()
    assert not np.signbit(made.arrays["w"]).any()
    assert np.signbit(values[0, 0])


# What is refused, by whoever makes a pack.


BAD_ARRAYS: dict[str, tuple[Arrays, str]] = {
    "NaN in a bank": ({"bank.normal": np.array([[1, np.nan, 2]], np.float32)}, "NaN"),
    "infinity in a bank": ({"bank.normal": np.array([[1, np.inf, 2]], np.float32)}, "infinity"),
    "NaN in a table": ({"text.table": np.array([np.nan], np.float16)}, "NaN"),
    "a bank of whole numbers": ({"bank.normal": np.ones((2, 3), np.int32)}, "float bank"),
    "a bank of one dimension": ({"bank.normal": np.ones(3, np.float32)}, "rows, dim"),
    "a bank without columns": ({"bank.normal": np.ones((3, 0), np.float32)}, "rows, dim"),
    "a scalar bank": ({"bank.normal": np.array(1, np.float32)}, "rows, dim"),
    "double precision": ({"bank.normal": np.ones((2, 3), np.float64)}, "float64"),
    "complex numbers": ({"x": np.ones(2, np.complex64)}, "complex64"),
    "objects": ({"x": np.array([None])}, "object"),
    "booleans": ({"x": np.array([True])}, "bool"),
    "a name with a slash": ({"../x": np.ones(1, np.float32)}, "names"),
    "an empty name": ({"": np.ones(1, np.float32)}, "names"),
    "a name of the format's own": ({"__metadata__": np.ones(1, np.float32)}, "names"),
    "nine dimensions": ({"x": np.ones((1,) * 9, np.float32)}, "dimensions"),
    "ids that repeat": ({"bank.normal.ids": np.array([1, 2, 2, 3, 4], np.uint64)}, "increasing"),
    "ids that fall": ({"bank.normal.ids": np.array([1, 2, 5, 3, 9], np.uint64)}, "increasing"),
    "too few ids": ({"bank.normal.ids": np.array([1, 2], np.uint64)}, "one id per row"),
    "signed ids": ({"bank.normal.ids": np.arange(5)}, "uint64"),
    "ids in a column": ({"bank.normal.ids": np.arange(5, dtype=np.uint64)[:, None]}, "uint64"),
    "ids of nothing": ({"bank.lost.ids": np.arange(5, dtype=np.uint64)}, "numbers the rows"),
}


@pytest.mark.parametrize("fault", BAD_ARRAYS)
def test_arrays_that_break_a_rule_make_no_pack(fault: str) -> None:
    arrays, reason = BAD_ARRAYS[fault]
    with pytest.raises(KnowledgeError, match=reason) as caught:
        bolt(arrays=arrays)
    assert caught.value.next_step


def test_a_fault_in_the_last_row_of_a_large_bank_is_found() -> None:
    bank = np.ones((70_000, 16), np.float32)
    for value in (np.nan, -np.inf):
        bank[-1, -1] = value
        with pytest.raises(KnowledgeError, match="finite"):
            bolt(arrays={"bank.normal": bank})
    bank[-1, -1] = -0.0
    with pytest.raises(KnowledgeError, match=r"-0\.0"):
        Pack(
            "bolt",
            FINGERPRINT,
            Calibration(1.0),
            {"bank.normal": bank, "bank.normal.ids": np.arange(70_000, dtype=np.uint64)},
        )
    ids = np.arange(3_000_000, dtype=np.uint64)
    ids[2**20] = ids[2**20 - 1]
    with pytest.raises(KnowledgeError, match="increasing"):
        bolt(arrays={"bank.normal": np.ones((len(ids), 1), np.float32), "bank.normal.ids": ids})


@pytest.mark.parametrize("product", ["", "a/b", "../x", "a b", ".hidden", "ä", "a\n", "x" * 129])
def test_product_names_that_could_be_paths_are_refused(product: str) -> None:
    with pytest.raises(KnowledgeError, match="product name"):
        bolt(product=product)


@pytest.mark.parametrize("fingerprint", ["", "AB" * 32, "ab" * 31, "ab" * 32 + "\n"])
def test_malformed_fingerprints_are_refused(fingerprint: str) -> None:
    with pytest.raises(KnowledgeError, match="fingerprint"):
        bolt(fingerprint=fingerprint)


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration(threshold=float("nan")),
        Calibration(threshold=float("inf")),
        Calibration(threshold=1.0, map_threshold=float("-inf")),
        Calibration(threshold=1.0, held_out=-1),
        Calibration(threshold=1.0, false_alarm_rate=1.5),
        Calibration(threshold=1.0, false_alarm_bound=-0.1),
        Calibration(threshold=None),  # type: ignore[arg-type]
        Calibration(threshold="1"),  # type: ignore[arg-type]
        Calibration(threshold=1.0, false_alarm_rate=float("nan")),
    ],
)
def test_calibration_that_is_no_finite_number_is_refused(calibration: Calibration) -> None:
    with pytest.raises(KnowledgeError):
        bolt(calibration=calibration)


def test_ids_cannot_pass_64_bits() -> None:
    assert bolt(first_id=2**64 - 5).ids("bank.normal")[-1] == 2**64 - 1
    with pytest.raises(KnowledgeError, match="64 bits"):
        bolt(first_id=2**64 - 4)


def test_more_arrays_than_the_format_allows_are_refused() -> None:
    with pytest.raises(KnowledgeError, match="arrays"):
        bolt(arrays={f"a{index}": np.zeros(1, np.uint8) for index in range(1025)})


# What is refused when read. Each is a fault in bytes that a careless reader would take.


def set_in(*path: Any) -> Callable[[dict[str, Any]], object]:
    """A change of a header: the last of `path` is put where the others lead."""

    def change(header: dict[str, Any]) -> None:
        place: Any = header
        for key in path[:-2]:
            place = place[key]
        place[path[-2]] = path[-1]

    return change


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a larger shape": set_in("bank.normal", "shape", [6, 3]),
    "another shape of the same size": set_in("bank.normal", "shape", [3, 5]),
    "a dtype of the same width": set_in("bank.normal", "dtype", "I32"),
    "an unknown dtype": set_in("bank.normal", "dtype", "BF16"),
    "a gap": set_in("bank.normal", "data_offsets", [8, 68]),
    "an overlap": set_in("bank.normal", "data_offsets", [0, 60]),
    "an overflowing shape": set_in("bank.normal", "shape", [2**31 - 1, 2**31 - 1]),
    "a shape that wraps to the right size": set_in("bank.normal", "shape", [2**62, 4]),
    "a negative shape": set_in("bank.normal", "shape", [-5, -3]),
    "a shape of fractions": set_in("bank.normal", "shape", [5.0, 3.0]),
    "a shape of huge numbers": set_in("bank.normal", "shape", [10**400]),
    "an offset of huge numbers": set_in("bank.normal", "data_offsets", [0, 10**400]),
    "a field too many": set_in("bank.normal", "comment", "hello"),
    "an array less": lambda header: header.pop("bank.normal"),
    "metadata of another kind": set_in("__metadata__", "note", "hello"),
    "metadata less": lambda header: header["__metadata__"].pop("product"),
    "metadata that is no string": set_in("__metadata__", "product", 5),
    "no metadata": lambda header: header.pop("__metadata__"),
    "a newer schema": set_in("__metadata__", "edgead.pack", "2"),
    "a schema that is no number": set_in("__metadata__", "edgead.pack", "one"),
    "a schema of another script": set_in("__metadata__", "edgead.pack", "١"),
    "calibration that is no JSON": set_in("__metadata__", "calibration", "{"),
    "calibration with white space": set_in("__metadata__", "calibration", '{"threshold": 1.5}'),
    "calibration with a default spelled out": set_in("__metadata__", "calibration", '{"held_out":0,"threshold":1.5}'),
    "calibration in another spelling": set_in("__metadata__", "calibration", '{"threshold":1.50}'),
    "calibration without a threshold": set_in("__metadata__", "calibration", "{}"),
    "calibration with a field of the future": set_in("__metadata__", "calibration", '{"threshold":1.5,"zeal":1}'),
    "calibration with NaN": set_in("__metadata__", "calibration", '{"threshold":NaN}'),
    "calibration with a number out of range": set_in("__metadata__", "calibration", '{"threshold":1e999}'),
    "calibration that is no object": set_in("__metadata__", "calibration", "[" * 100_000),
    "a product that is a path": set_in("__metadata__", "product", "../bolt"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_header_is_refused(edit: str) -> None:
    with pytest.raises(KnowledgeError) as caught:
        decode_pack(edited(bolt(), EDITS[edit]))
    assert caught.value.next_step


def test_a_newer_schema_says_what_to_update() -> None:
    with pytest.raises(KnowledgeError, match="Update edgead"):
        decode_pack(edited(bolt(), set_in("__metadata__", "edgead.pack", "2")))


def test_the_unedited_header_passes_the_same_way() -> None:
    assert decode_pack(edited(bolt(), lambda header: None)).digest == bolt().digest


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0])
def test_rows_that_are_not_finite_or_hold_negative_zeros_are_refused_when_read(value: float) -> None:
    data = bytearray(encode_pack(bolt()))
    start = 8 + struct.unpack("<Q", data[:8])[0] + header_of(bytes(data))["bank.normal"]["data_offsets"][0]
    struct.pack_into("<f", data, start, value)
    with pytest.raises(KnowledgeError, match=r"NaN|-0\.0"):
        decode_pack(bytes(data))


def test_permuted_ids_are_refused_and_permuted_rows_are_another_pack() -> None:
    data = bytearray(encode_pack(bolt()))
    base = 8 + struct.unpack("<Q", data[:8])[0]
    ids = base + header_of(bytes(data))["bank.normal.ids"]["data_offsets"][0]
    data[ids], data[ids + 8] = data[ids + 8], data[ids]
    with pytest.raises(KnowledgeError, match="increasing"):
        decode_pack(bytes(data))
    assert bolt(arrays={"bank.normal": rows(5)[::-1]}).digest != bolt().digest


def test_big_endian_rows_cannot_pass_as_little_endian_ones() -> None:
    bank = rows(5)
    swapped = encode_pack(bolt()).replace(bank.tobytes(), bank.astype(">f4").tobytes())
    with contextlib.suppress(KnowledgeError):
        assert decode_pack(swapped).digest != bolt().digest
    with pytest.raises(KnowledgeError):
        decode_pack(edited(bolt(), set_in("bank.normal", "dtype", ">F4")))
    assert encode_pack(bolt()).endswith(np.arange(1, 6, dtype="<u8").tobytes())


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{}", b""),
        (b"null", b""),
        (b"[]", b""),
        (b"{" * 100_000, b""),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b""),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"data_offsets":[0,1],"dtype":"U8","shape":[1]}}',
            b"x",
        ),
        (b'{"__metadata__":{"k":"v"},"__metadata__":{"k":"v"}}', b""),
        (b'{"a":{"data_offsets":[0,1],"dtype":"U8","shape":[1]}} \xff', b"x"),
        (b'{"\xff":{"data_offsets":[0,1],"dtype":"U8","shape":[1]}}', b"x"),
        (b"\xef\xbb\xbf{}", b""),
        (b"{ }", b""),
        (b'{"a":{"data_offsets":[0,0],"dtype":"U8","shape":[0,18446744073709551616]}}', b""),
    ],
)
def test_odd_headers_are_refused(header: bytes, data: bytes) -> None:
    with pytest.raises(KnowledgeError):
        decode_pack(file_of(header, data))


def test_duplicate_keys_are_refused_even_if_they_agree() -> None:
    data = encode_pack(bolt())
    entry = b'"anomalous.weight":{"data_offsets":[0,4],"dtype":"F32","shape":[1]},'
    text = data[8 : len(data) - len(payload(data))].rstrip(b" ").replace(entry, entry + entry)
    with pytest.raises(KnowledgeError, match="canonical"):
        decode_pack(file_of(text, payload(data)))


def test_other_paddings_of_the_header_are_refused() -> None:
    data = encode_pack(bolt(product="longer"))
    text = data[8 : len(data) - len(payload(data))]
    assert text.endswith(b" ")
    for other in (text.rstrip(b" "), text + b" " * 64, text.rstrip(b" ") + b"\n", b" " + text[:-1]):
        changed = file_of(other, payload(data), pad=False)
        assert changed != data
        with pytest.raises(KnowledgeError):
            decode_pack(changed)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 16 * 2**20 + 1, 10**9])
def test_a_huge_header_is_refused_without_being_read(length: int) -> None:
    with pytest.raises(KnowledgeError, match="header"):
        decode_pack(struct.pack("<Q", length) + b"{}")


def test_a_truncated_or_extended_pack_is_refused_at_every_length() -> None:
    data = encode_pack(bolt())
    for end in range(len(data)):
        with pytest.raises(KnowledgeError):
            decode_pack(data[:end])
    with pytest.raises(KnowledgeError):
        decode_pack(data + b"\0")


def test_every_flipped_bit_of_a_pack_is_refused_or_another_digest() -> None:
    pack = bolt()
    data = encode_pack(pack)
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        try:
            assert decode_pack(bytes(broken)).digest != pack.digest
        except KnowledgeError:
            continue


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 900), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4))
def test_any_damage_gives_a_canonical_pack_or_a_knowledge_error(damage: list[tuple[int, bytes]]) -> None:
    data = bytearray(encode_pack(bolt()))
    for place, piece in damage:
        data[place : place + len(piece)] = piece
    with contextlib.suppress(KnowledgeError):
        assert encode_pack(decode_pack(bytes(data))) == data


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_knowledge_error(data: bytes) -> None:
    with pytest.raises(KnowledgeError):
        decode_pack(data)


def test_limits_are_kept() -> None:
    data = encode_pack(bolt())
    with pytest.raises(KnowledgeError, match="bytes"):
        decode_pack(data, limits=Limits(pack_bytes=len(data) - 1))
    with pytest.raises(KnowledgeError, match="header"):
        decode_pack(data, limits=Limits(pack_header_bytes=100))
    with pytest.raises(KnowledgeError, match="rows"):
        decode_pack(data, limits=Limits(bank_rows=4))
    assert decode_pack(data, limits=Limits(pack_bytes=len(data), bank_rows=5)).version


def test_files_that_are_no_files_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match="device"):
        read_pack("/dev/zero")
    with pytest.raises(StorageError):
        read_pack(tmp_path / "nothing")
    with pytest.raises(StorageError):
        read_pack(tmp_path)
    (tmp_path / "large").write_bytes(b"x" * 100)
    with pytest.raises(KnowledgeError, match="at most 99 bytes"):
        read_pack(tmp_path / "large", limits=Limits(pack_bytes=99))


def test_an_existing_pack_is_replaced_only_with_force(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_pack(path, bolt())
    with pytest.raises(OutputExistsError):
        write_pack(path, bolt(first_id=5))
    assert read_pack(path).digest == bolt().digest
    write_pack(path, bolt(first_id=5), force=True)
    assert read_pack(path).digest == bolt(first_id=5).digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_large_pack_is_read_with_little_more_memory_than_its_size(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    write_pack(path, bolt(arrays={"bank.normal": np.ones((50_000, 384), np.float32)}))
    code = (
        "import resource, sys\n"
        "from edgead.runtime.knowledge import read_pack\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pack = read_pack(sys.argv[1]); pack.digest\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1.4 * path.stat().st_size


# Whether it fits an engine.


def test_a_pack_made_for_the_detector_fits() -> None:
    check_fits(bolt(), detector(), {"bank.normal": 5})


@pytest.mark.parametrize(
    ("pack", "spec", "reason"),
    [
        (bolt(fingerprint="cd" * 32), detector(), "feature space"),
        (bolt(arrays={"bank.normal": rows(5, 4)}), detector(), r"shape \[N, 3\]"),
        (bolt(arrays={"bank.normal": rows(5, 3, "float16")}), detector(), "float16"),
        (bolt(arrays={"bank.normal": rows(0)}), detector(), "at least 1 rows"),
        (bolt(arrays={"anomalous.weight": np.ones(2, np.float32)}), detector(), r"\[1\]"),
        (bolt(arrays={"anomalous.weight": np.ones((1, 1), np.float32)}), detector(), r"\[1\]"),
        (bolt(arrays={"text.table": rows(2)}), detector(), r"text\.table"),
        (bolt(arrays={"bank.third": rows(2)}), detector(), r"bank\.third"),
        (
            new_pack(
                product="b", fingerprint=FINGERPRINT, calibration=Calibration(1.0), arrays={"bank.normal": rows(5)}
            ),
            detector(),
            r"bank\.anomalous",
        ),
    ],
)
def test_a_pack_for_something_else_does_not_fit(pack: Pack, spec: DetectorSpec, reason: str) -> None:
    with pytest.raises(KnowledgeError, match=reason) as caught:
        check_fits(pack, spec)
    assert caught.value.next_step
    with pytest.raises(KnowledgeError):
        head_feeds(pack, spec)


def test_more_rows_than_a_static_engine_has_room_for_do_not_fit() -> None:
    with pytest.raises(KnowledgeError, match="capacity"):
        check_fits(bolt(), detector(), {"bank.normal": 4})


def test_one_symbol_is_one_size() -> None:
    spec = detector(
        knowledge=(
            KnowledgePort("text.table", "float32", ("T", 3)),
            KnowledgePort("text.state", "float32", ("T",)),
        )
    )

    def pack(states: int) -> Pack:
        arrays = {"text.table": rows(4), "text.state": np.ones(states, np.float32)}
        return new_pack(product="b", fingerprint=FINGERPRINT, calibration=Calibration(1.0), arrays=arrays)

    check_fits(pack(4), spec)
    with pytest.raises(KnowledgeError, match="one size T"):
        check_fits(pack(5), spec)


def test_a_bank_needs_the_least_rows_that_the_head_asks_for() -> None:
    ports = list(detector().knowledge)
    ports[0] = msgspec.structs.replace(ports[0], min_rows=6)
    with pytest.raises(KnowledgeError, match="at least 6 rows"):
        check_fits(bolt(), detector(knowledge=tuple(ports)))


def test_head_feeds_come_in_graph_order_with_their_row_counts() -> None:
    pack, spec = bolt(), detector()
    feeds = head_feeds(pack, spec)
    assert list(feeds) == [port.name for port in spec.head_inputs()[1:]]
    np.testing.assert_array_equal(feeds["bank.normal"], pack.arrays["bank.normal"])
    assert feeds["bank.normal"] is pack.arrays["bank.normal"]
    assert feeds["bank.normal.rows"].tolist() == [5]
    assert feeds["bank.normal.rows"].dtype == np.int32


def test_an_empty_bank_is_one_zero_row_with_a_count_of_none() -> None:
    feeds = head_feeds(bolt(), detector())
    assert feeds["bank.anomalous"].tolist() == [[0.0, 0.0, 0.0]]
    assert feeds["bank.anomalous.rows"].tolist() == [0]
    ports = list(detector().knowledge)
    ports[1] = msgspec.structs.replace(ports[1], min_rows=3)
    assert head_feeds(bolt(), detector(knowledge=tuple(ports)))["bank.anomalous"].shape == (3, 3)


def test_banks_are_padded_with_zero_rows_to_the_capacity() -> None:
    feeds = head_feeds(bolt(), detector(), {"bank.normal": 8, "bank.anomalous": 4})
    assert feeds["bank.normal"].shape == (8, 3)
    np.testing.assert_array_equal(feeds["bank.normal"][:5], rows(5))
    assert not feeds["bank.normal"][5:].any()
    assert feeds["bank.normal.rows"].tolist() == [5]
    assert feeds["bank.anomalous"].shape == (4, 3)
    assert feeds["bank.anomalous.rows"].tolist() == [0]
