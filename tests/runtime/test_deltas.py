"""Deltas: byte-exact content, the one right base or an error, small, and no input that breaks the reader."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.runtime.chain import write_knowledge
from edgead.runtime.deltas import MAGIC, apply_delta, is_delta, make_delta, read_delta
from edgead.runtime.errors import KnowledgeError
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.notes import encode_note
from edgead.runtime.show import as_text, describe
from edgead.runtime.spec import Calibration, Limits
from edgead.runtime.tensors import encode_tensors

FINGERPRINT = "f" * 64


def pack(
    rows: dict[int, list[float]] | None = None,
    *,
    threshold: float = 1.0,
    product: str = "bolt",
    fingerprint: str = FINGERPRINT,
    **arrays: Any,
) -> Pack:
    """A pack with rows by id in one bank, and other arrays whose names have '_' for '.'."""
    rows = {1: [1.0, 2.0], 2: [3.0, 4.0], 3: [5.0, 6.0]} if rows is None else rows
    made: dict[str, Any] = {name.replace("_", "."): array for name, array in arrays.items()}
    made["bank.normal"] = np.array(list(rows.values()), np.float32).reshape(-1, 2)
    made["bank.normal.ids"] = np.array(list(rows), np.uint64)
    return new_pack(product=product, fingerprint=fingerprint, calibration=Calibration(threshold=threshold), arrays=made)


def sentences(*texts: str, dimensions: int = 4) -> dict[str, Any]:
    """Arrays of so many normalities, each row made from its text."""
    rows = [np.random.default_rng(len(text)).standard_normal(dimensions).astype(np.float32) for text in texts]
    return {
        "normality_table": np.array(rows, np.float32).reshape(-1, dimensions),
        "normality_table_text": encode_note({"rows": [{"text": text} for text in texts], "model": "tiny"}),
    }


def framed(content: bytes, length: int | None = None) -> bytes:
    return MAGIC + (len(content) if length is None else length).to_bytes(8, "little") + zlib.compress(content)


def content(
    arrays: dict[str, Any] | None = None,
    *,
    base: Pack | None = None,
    result: Pack | None = None,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """A delta's content from its parts, right or wrong."""
    base = base or pack()
    return encode_tensors(
        arrays or {},
        {
            "base": base.digest,
            "calibration": '{"threshold":1.0}',
            "edgead.delta": "1",
            "fingerprint": base.fingerprint,
            "product": base.product,
            "removed": "[]",
            "result": (result or base).digest,
            "splices": "{}",
            **(metadata or {}),
        },
    )


def test_a_small_delta_has_these_bytes() -> None:
    base, result = pack(), pack({1: [1.0, 2.0], 3: [5.0, 6.0], 7: [0.5, -2.0]}, threshold=2.0)
    data = make_delta(base, result)
    assert data[:8] == b"edgead.d"
    unpacked = zlib.decompress(data[16:])
    assert int.from_bytes(data[8:16], "little") == len(unpacked)
    header = (
        '{"__metadata__":{'
        f'"base":"{base.digest}","calibration":"{{\\"threshold\\":2.0}}","edgead.delta":"1",'
        f'"fingerprint":"{FINGERPRINT}","product":"bolt","removed":"[]","result":"{result.digest}","splices":"{{}}"}},'
        '"add.bank.normal":{"data_offsets":[0,8],"dtype":"F32","shape":[1,2]},'
        '"del.bank.normal":{"data_offsets":[8,16],"dtype":"U64","shape":[1]},'
        '"ids.bank.normal":{"data_offsets":[16,24],"dtype":"U64","shape":[1]}}'
    ).encode()
    header += b" " * (-(8 + len(header)) % 64)
    rows = bytes.fromhex("0000003f000000c002000000000000000700000000000000")
    assert unpacked == len(header).to_bytes(8, "little") + header + rows


CHANGES = {
    "rows": ({"rows": {2: [3.0, 4.0], 9: [7.0, 7.0]}}, {}),
    "all rows go": ({"rows": {}}, {}),
    "from no rows": ({}, {"rows": {}}),
    "threshold alone": ({"threshold": 9.0}, {}),
    "a sentence first": (sentences("thread"), sentences()),
    "a sentence behind": (sentences("thread", "a stain"), sentences("thread")),
    "a sentence between": (sentences("thread", "dot", "a stain"), sentences("thread", "a stain")),
    "a sentence gone": (sentences("a stain"), sentences("thread", "a stain")),
    "a row once more": (
        {"score_weights": np.float32([[1, 2], [3, 4], [1, 2]])},
        {"score_weights": np.float32([[1, 2], [3, 4]])},
    ),
    "an array more": ({"score_weights": np.float32([1, 2, 3])}, {}),
    "an array less": ({}, {"score_weights": np.float32([1, 2, 3])}),
    "another dtype": ({"score_weights": np.float16([1, 2])}, {"score_weights": np.float32([1, 2])}),
    "another bank": ({"bank_other": np.ones((2, 3), np.float32)}, {}),
    "a scalar": ({"score_weights": np.float32(2.0)}, {"score_weights": np.float32(1.0)}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_delta_makes_its_result_of_its_base_and_back(change: str) -> None:
    new, old = (pack(**arrays) for arrays in CHANGES[change])
    for base, result in ((old, new), (new, old)):
        made = apply_delta(base, make_delta(base, result))
        assert made.digest == result.digest
        assert list(made.arrays) == list(result.arrays)


def test_what_did_not_change_is_not_copied() -> None:
    base = pack(**sentences("thread"))
    made = apply_delta(base, make_delta(base, pack(**sentences("thread", "a stain"))))
    assert np.shares_memory(made.arrays["bank.normal"], base.arrays["bank.normal"])


def test_applied_twice_is_once_and_on_another_base_is_refused() -> None:
    base, result, third = pack(), pack(threshold=2.0), pack(threshold=3.0)
    delta = make_delta(base, result)
    once = apply_delta(base, delta)
    assert apply_delta(once, delta) is once
    with pytest.raises(KnowledgeError, match=f"against version {third.version}"):
        apply_delta(third, delta)
    for other in (pack(product="nut"), pack(fingerprint="e" * 64)):
        with pytest.raises(KnowledgeError, match="a delta for"):
            apply_delta(other, delta)
        with pytest.raises(KnowledgeError, match="two packs"):
            make_delta(base, other)


def test_deltas_out_of_order_are_refused_and_in_order_are_a_chain() -> None:
    first, second, third = pack(), pack(threshold=2.0), pack({4: [1.0, 1.0]}, threshold=3.0)
    one, two = make_delta(first, second), make_delta(second, third)
    with pytest.raises(KnowledgeError):
        apply_delta(first, two)
    assert apply_delta(apply_delta(first, one), two).digest == third.digest


def test_another_row_under_an_old_id_cannot_be_a_delta() -> None:
    with pytest.raises(KnowledgeError, match="never change under their id"):
        make_delta(pack(), pack({1: [9.0, 9.0]}))


ROW = np.ones((1, 2), np.float32)


def u64(*values: int) -> Any:
    return np.array(values, np.uint64)


WRONG: dict[str, dict[str, Any]] = {
    "an absent id is deleted": {"del.bank.normal": u64(5)},
    "an id is added that is there": {"add.bank.normal": ROW, "ids.bank.normal": u64(2)},
    "an id is deleted and used again": {
        "add.bank.normal": ROW,
        "del.bank.normal": u64(2),
        "ids.bank.normal": u64(2),
    },
    "the same id twice": {"add.bank.normal": np.ones((2, 2), np.float32), "ids.bank.normal": u64(8, 8)},
    "rows without ids": {"add.bank.normal": ROW},
    "fewer ids than rows": {"add.bank.normal": np.ones((2, 2), np.float32), "ids.bank.normal": u64(8)},
    "NaN": {"add.bank.normal": ROW * np.nan, "ids.bank.normal": u64(8)},
    "negative zero": {"add.bank.normal": ROW * -0.0, "ids.bank.normal": u64(8)},
    "another dimension": {"add.bank.normal": np.ones((1, 3), np.float32), "ids.bank.normal": u64(8)},
    "another dtype": {"add.bank.normal": ROW.astype(np.float16), "ids.bank.normal": u64(8)},
    "rows of no bank": {"add.text.table": ROW, "ids.text.table": u64(8)},
    "a bank that is not there": {"add.bank.other": ROW, "ids.bank.other": u64(8)},
    "a splice without its place": {"put.text.table": ROW},
    "another kind": {"new.bank.normal": ROW},
    "two changes of one array": {"set.bank.normal": ROW, "del.bank.normal": u64(2)},
    "nothing, though another result is promised": {},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_forged_delta_is_refused(what: str) -> None:
    with pytest.raises(KnowledgeError):
        apply_delta(pack(), framed(content(WRONG[what], result=pack(threshold=7.0))))


BASE = pack(score_weights=np.float32([[1, 2], [3, 4], [5, 6]]))


@pytest.mark.parametrize(
    "metadata",
    [
        {"splices": '{"bank.normal":[0,1]}'},
        {"splices": '{"text.table":[0,99]}'},
        {"splices": '{"text.table": [0,1]}'},
        {"splices": '{"score.weights":[0,0,3]}'},
        {"splices": '{"score.weights":[4,0,0]}'},
        {"splices": '{"score.weights":[0,4,0]}'},
        {"splices": '{"bank.normal":[0,1,0]}'},
        {"splices": '{"bank.normal.ids":[0,1,0]}'},
        {"splices": '{"nothing":[0,0,0]}'},
        {"splices": '{"score.weights":[0,0,0,0]}'},
        {"splices": "[]"},
        {"splices": '{"text.table":[-1,0]}'},
        {"removed": '["nothing"]'},
        {"removed": '["b","a"]'},
        {"removed": "7"},
        {"calibration": "{}"},
        {"base": "F" * 64},
        {"product": "../bolt"},
        {"edgead.delta": "2"},
        {"edgead.delta": "x"},
        {"surplus": "1"},
    ],
)
def test_metadata_of_another_kind_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(KnowledgeError):
        apply_delta(BASE, framed(content(base=BASE, result=pack(threshold=7.0), metadata=metadata)))


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zlib.compress(b"\0" * 50_000_000, 9)
    honest = MAGIC + (50_000_000).to_bytes(8, "little") + bomb
    with pytest.raises(KnowledgeError, match="at most 1000000 bytes"):
        read_delta(honest, limits=Limits(delta_bytes=1_000_000))
    with pytest.raises(KnowledgeError, match="of 100 bytes"):
        read_delta(MAGIC + (100).to_bytes(8, "little") + bomb)
    with pytest.raises(KnowledgeError):
        read_delta(MAGIC + b"\xff" * 8 + bomb)


def test_every_truncation_and_every_surplus_is_refused() -> None:
    data = make_delta(pack(), pack({1: [1.0, 2.0], 9: [0.5, 0.5]}, **sentences("thread")))
    for length in range(len(data)):
        with pytest.raises(KnowledgeError):
            read_delta(data[:length])
    with pytest.raises(KnowledgeError):
        read_delta(data + b"\0")
    assert not is_delta(b"PK")


def test_every_flipped_bit_is_refused_or_harmless() -> None:
    base, result = pack(), pack({1: [1.0, 2.0], 9: [0.5, 0.5]}, threshold=2.0)
    data = make_delta(base, result)
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        try:
            made = apply_delta(base, bytes(changed))
        except KnowledgeError:
            continue
        assert made.digest == result.digest  # a bit of zlib's header that changes nothing


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_bytes_that_are_no_delta_are_refused_in_words(data: bytes, framed_well: bool) -> None:
    with pytest.raises(KnowledgeError):
        read_delta(framed(data) if framed_well else data)


numbers = st.floats(-8, 8, width=16).map(lambda value: value + 0.0)
banks = st.dictionaries(st.integers(1, 40), st.tuples(numbers, numbers), max_size=12).map(
    lambda rows: {row: list(rows[row]) for row in sorted(rows)}
)


@settings(max_examples=100, deadline=None)
@given(banks, banks, st.lists(st.text(min_size=1, max_size=8), max_size=5), st.lists(st.text(min_size=1), max_size=5))
def test_any_two_packs_are_joined_by_a_delta(
    old: dict[int, list[float]], new: dict[int, list[float]], texts: list[str], others: list[str]
) -> None:
    new = {row: old.get(row, values) for row, values in new.items()}
    base, result = pack(old, **sentences(*texts)), pack(new, threshold=2.0, **sentences(*others))
    assert apply_delta(base, make_delta(base, result)).digest == result.digest


def test_a_hundredth_of_a_large_bank_is_a_hundredth_of_its_bytes() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((10_000, 384)).astype(np.float32)
    base = new_pack(product="p", fingerprint=FINGERPRINT, calibration=Calibration(1.0), arrays={"bank.normal": rows})
    keep = np.sort(rng.choice(10_000, 9_900, replace=False))
    numbers = np.concatenate([base.ids("bank.normal")[keep], np.arange(10_001, 10_101, dtype=np.uint64)])
    changed = np.concatenate([rows[keep], rng.standard_normal((100, 384)).astype(np.float32)])
    result = new_pack(
        product="p",
        fingerprint=FINGERPRINT,
        calibration=Calibration(1.1),
        arrays={"bank.normal": changed, "bank.normal.ids": numbers},
    )
    assert len(make_delta(base, result)) < 160_000


def test_a_sentence_costs_its_row_and_its_text() -> None:
    known = ["thread", "a stain", "dust"]
    normal = np.random.default_rng(9).standard_normal((1, 640)).astype(np.float32)
    base, result = (
        pack(**sentences(*texts, dimensions=640), normality_normal=normal.repeat(len(texts), axis=0))
        for texts in (known, [*known, "a loose fibre"])
    )
    assert len(make_delta(base, result)) < 640 * 4 + 700


def test_show_says_what_a_delta_changes(tmp_path: Path) -> None:
    base, result = pack(**sentences("thread")), pack({2: [3.0, 4.0], 9: [7.0, 7.0]}, **sentences("thread", "a stain"))
    path = tmp_path / "x.delta"
    assert write_knowledge(path, base, result) == path.stat().st_size
    record = describe(path)
    assert record["rows_added"] == {"bank.normal": 1}
    assert record["rows_deleted"] == {"bank.normal": 2}
    assert record["splices"]["normality.table"] == {"first": 1, "out": 0, "in": 1}
    text = as_text(record)
    for word in (base.version, result.version, "1 rows more", "2 rows fewer", "1 in the place of 0 from 1 on"):
        assert word in text
