"""Photographs -> trunk and head -> engines -> parity gate -> bundle -> inspector -> swap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import KnowledgeError
from edgead.runtime.image import list_images, read_image
from edgead.runtime.inspection import Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack, new_pack

ENGINES = ("onnx:fp32", "onnx:fp16", "openvino:fp32", "openvino:fp16")


@pytest.fixture
def normal(painted_normals: Path) -> NDArray[np.uint8]:
    return read_image(list_images(painted_normals)[0])


@pytest.fixture
def defective(normal: NDArray[np.uint8]) -> NDArray[np.uint8]:
    frame = normal.copy()
    frame[40:60, 40:60] = (255, 0, 255)
    return frame


def with_rows(pack: Pack, rows: NDArray[np.float32]) -> Pack:
    """The pack with more normal rows behind the old ones."""
    return new_pack(
        product=pack.product,
        fingerprint=pack.fingerprint,
        calibration=pack.calibration,
        arrays={
            "bank.normal": np.concatenate([pack.arrays["bank.normal"], rows]),
            "bank.anomalous": pack.arrays["bank.anomalous"],
            "anomalous.weight": pack.arrays["anomalous.weight"],
        },
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_passes_the_parity_gate_and_its_figures_are_kept(small_bundle: Path, engine: str) -> None:
    record = open_bundle(small_bundle).engine(engine)
    assert record.parity is not None
    assert record.tolerance is not None
    assert record.parity.map <= record.tolerance.map
    assert record.parity.score <= record.tolerance.score


@pytest.mark.parametrize("engine", ENGINES)
def test_a_part_it_learnt_is_ok_and_a_painted_square_is_ng_where_it_is(
    small_bundle: Path, engine: str, normal: NDArray[np.uint8], defective: NDArray[np.uint8]
) -> None:
    with Inspector(small_bundle, target=engine) as inspector:
        good, bad = inspector.inspect(normal), inspector.inspect(defective)
    assert good.verdict is Verdict.OK
    assert bad.verdict is Verdict.NG
    assert bad.score is not None
    assert good.score is not None
    assert bad.score > bad.threshold > good.score
    box = bad.regions[0].box
    assert box.x < 60
    assert box.x + box.width > 40
    assert box.y < 60
    assert box.y + box.height > 40


@pytest.mark.parametrize("engine", ENGINES)
def test_new_rows_change_the_next_frame_and_leave_the_engine_alone(
    small_bundle: Path, engine: str, defective: NDArray[np.uint8]
) -> None:
    before = {path: path.read_bytes() for path in small_bundle.rglob("*") if path.is_file()}
    with Inspector(small_bundle, target=engine) as inspector:
        alarm = inspector.inspect(defective)
        rows = inspector.embed(defective)["patches"].reshape(-1, inspector.knowledge().arrays["bank.normal"].shape[1])
        taught = with_rows(inspector.knowledge(), rows)
        inspector.swap(taught)
        after = inspector.inspect(defective)
    assert alarm.verdict is Verdict.NG
    assert after.verdict is Verdict.OK
    assert after.knowledge == taught.version != alarm.knowledge
    assert {path: path.read_bytes() for path in small_bundle.rglob("*") if path.is_file()} == before


def test_knowledge_of_another_feature_space_is_refused_and_the_old_stays(
    small_bundle: Path, normal: NDArray[np.uint8]
) -> None:
    with Inspector(small_bundle, target="onnx") as inspector:
        pack = inspector.knowledge()
        stranger = Pack(pack.product, "0" * 64, pack.calibration, pack.arrays)
        with pytest.raises(KnowledgeError):
            inspector.swap(stranger)
        assert inspector.inspect(normal).knowledge == pack.version


def test_engines_agree_with_each_other_on_frames_that_they_never_saw(
    small_bundle: Path, defective: NDArray[np.uint8]
) -> None:
    maps = {}
    for engine in ENGINES:
        with Inspector(small_bundle, target=engine) as inspector:
            anomaly_map = inspector.inspect(defective).anomaly_map
            assert anomaly_map is not None
            maps[engine] = anomaly_map
    reference = maps["onnx:fp32"]
    scale = float(np.ptp(reference))
    assert float(np.abs(maps["openvino:fp32"] - reference).max()) < 1e-4 * scale
    assert float(np.abs(maps["onnx:fp16"] - reference).max()) < 2e-2 * scale
    assert float(np.abs(maps["openvino:fp16"] - reference).max()) < 2e-2 * scale
