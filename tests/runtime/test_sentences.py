"""Which sentences weighed in a decision: the heaviest rows, by their text, of the array that the head weighs."""

from __future__ import annotations

import numpy as np
import pytest

from edgead.runtime.evidence import Texts, find_evidence, find_sentences, weighed
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.notes import encode_note
from edgead.runtime.spec import CONTRACT, Calibration, DetectorSpec, KnowledgePort, Port, Preprocessing

WORDS = ["flawless", "scratched", "dented", "stained", "cracked", "bent"]


@pytest.fixture
def spec() -> DetectorSpec:
    return DetectorSpec(
        contract=CONTRACT,
        method="sentences",
        preprocessing=Preprocessing(8, 8),
        features=(Port("patches", "float32", ("B", 1, 2)),),
        knowledge=(
            KnowledgePort("text.table", "float32", ("T", 2), rows="text.table.rows"),
            KnowledgePort("text.state", "float32", ("T",)),
            KnowledgePort("bank.normal", "float32", ("N", 2), rows="bank.normal.rows", empty_ok=True),
        ),
        outputs=(
            Port("score", "float32", ("B",)),
            Port("nearest_row", "int32", ("B", 1)),
            Port("evidence", "float32", ("B", "T")),
        ),
        fingerprint="0" * 64,
    )


@pytest.fixture
def pack() -> Pack:
    return new_pack(
        product="nut",
        fingerprint="0" * 64,
        calibration=Calibration(1.0),
        arrays={
            "text.table": np.eye(6, 2, dtype=np.float32),
            "text.table.text": encode_note({"rows": [{"text": word} for word in WORDS]}),
            "text.state": np.ones(6, np.float32),
            "bank.normal": np.ones((3, 2), np.float32),
        },
    )


def test_the_heaviest_rows_of_the_tile_that_decided_are_named(spec: DetectorSpec, pack: Pack) -> None:
    weights = np.float32([[9, 9, 9, 9, 9, 9, 9], [0.1, 0.5, -1.0, 0.4, -0.2, 0.3, 7.0]])  # one padded row, two tiles
    outputs = {"score": np.float32([0.1, 0.9]), "evidence": weights}
    found = find_sentences(outputs, pack, spec, Texts(pack))
    assert [(item.text, item.row) for item in found] == [
        ("scratched", 1),
        ("stained", 3),
        ("bent", 5),
        ("flawless", 0),
        ("cracked", 4),
    ]
    assert {item.array for item in found} == {"text.table"}
    assert found[0].weight == pytest.approx(0.5)


def test_rows_of_weight_0_or_of_no_number_had_no_part(spec: DetectorSpec, pack: Pack) -> None:
    outputs = {"score": np.float32([1.0]), "evidence": np.float32([[0, 0, np.nan, 0, 0, 2.0]])}
    assert [item.text for item in find_sentences(outputs, pack, spec, Texts(pack))] == ["bent"]
    assert find_sentences({"score": np.float32([1.0])}, pack, spec, Texts(pack)) == ()


def test_a_row_without_a_text_is_named_by_its_place(spec: DetectorSpec, pack: Pack) -> None:
    arrays = {name: array for name, array in pack.arrays.items() if not name.endswith(".text")}
    bare = Pack(pack.product, pack.fingerprint, pack.calibration, arrays)
    outputs = {"score": np.float32([1.0]), "evidence": np.float32([[0, 0, 0, 0, 3.0, 0]])}
    assert find_sentences(outputs, bare, spec, Texts(bare))[0].text == "row 4 of text.table"


def test_evidence_weighs_the_array_of_its_symbol_and_rows_are_those_of_a_bank(spec: DetectorSpec, pack: Pack) -> None:
    assert weighed(spec) == "text.table"
    outputs = {"score": np.float32([1.0]), "nearest_row": np.array([[2]], np.int32)}
    (row,) = find_evidence(outputs, [], pack, spec, None, (8, 8, 3))
    assert (row.bank, row.row, row.row_id) == ("bank.normal", 2, 3)
