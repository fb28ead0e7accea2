"""The parity gate lets through what agrees with torch, and says where the rest goes wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgead.detector_file import FittedDetector
from edgead.exporter.export import export_bundle
from edgead.exporter.parity import TOLERANCE, check_parity, reference_of
from edgead.runtime.bundle import open_bundle
from edgead.runtime.engines import Engine, open_engine
from edgead.runtime.errors import DetectorError, ParityError
from edgead.runtime.knowledge import Pack
from edgead.runtime.spec import Calibration, Tolerance

FULL = TOLERANCE["fp32"]


@pytest.fixture(scope="module")
def engine(small_bundle: Path) -> Iterator[Engine]:
    """The shared memory bank as an ONNX engine."""
    with open_engine(open_bundle(small_bundle), "onnx:fp32") as opened:
        yield opened


def with_threshold(detector: FittedDetector, threshold: float) -> FittedDetector:
    pack = detector.pack
    calibration = Calibration(threshold=threshold, typical=0.0)
    return replace(detector, pack=Pack(pack.product, pack.fingerprint, calibration, pack.arrays))


def test_an_engine_that_agrees_passes_with_its_figures(bank: FittedDetector, engine: Engine) -> None:
    found = check_parity(engine, bank, reference_of(bank), FULL)
    assert found.figures.images == len(bank.golden)
    assert 0 <= found.figures.map < 1e-4
    assert found.figures.decisions_changed == 0
    assert found.agreement["nearest_row"] > 0.99
    assert set(found.trunk) == {"patches"}


def test_a_map_that_is_off_in_one_pixel_is_placed(bank: FittedDetector, engine: Engine) -> None:
    reference = reference_of(bank)
    maps = reference.outputs["anomaly_map"].copy()
    maps[1, 7, 42] += 10 * FULL.map * reference.scale
    off = replace(reference, outputs={**reference.outputs, "anomaly_map": maps})
    with pytest.raises(ParityError) as caught:
        check_parity(engine, bank, off, FULL)
    text = str(caught.value)
    assert "map at row 7, column 42" in text
    assert "golden/001.png" in text
    assert "'onnx-fp32'" in text
    wanted, got = (float(re.search(p, text)[1]) for p in (r"torch's ([\d.e+-]+\d)", r"got ([\d.e+-]+\d)"))  # type: ignore[index]
    assert wanted - got == pytest.approx(10 * FULL.map * reference.scale, rel=0.1)


def test_a_score_that_is_off_is_found_without_a_map(colours: FittedDetector, tmp_path: Path) -> None:
    bundle = export_bundle(colours, tmp_path / "bundle")
    reference = reference_of(colours)
    off = replace(reference, outputs={"score": reference.scores + np.float32(0.01)})
    with open_engine(bundle) as engine, pytest.raises(ParityError, match=r"the score of 'onnx-fp32'"):
        check_parity(engine, colours, off, FULL)


def test_a_difference_that_begins_in_the_trunk_is_laid_at_its_door(bank: FittedDetector, engine: Engine) -> None:
    class Brighter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: Tensor) -> tuple[Tensor]:
            return (self.inner(image)[0] * 1.05,)

    image = torch.from_numpy(bank.golden[:1].copy())
    trunk = torch.export.export(Brighter(bank.trunk.module()), (image,), strict=False)
    changed = replace(bank, trunk=trunk)
    with pytest.raises(ParityError, match=r"It begins in the trunk .*patches"):
        check_parity(engine, changed, reference_of(changed), FULL)


def test_a_difference_that_begins_in_the_head_is_laid_at_its_door(bank: FittedDetector, engine: Engine) -> None:
    reference = reference_of(bank)
    outputs = {**reference.outputs, "score": reference.scores * np.float32(1.05)}
    with pytest.raises(ParityError, match=r"It begins in the head"):
        check_parity(engine, bank, replace(reference, outputs=outputs), FULL)


def test_a_changed_decision_fails_within_a_generous_tolerance(bank: FittedDetector, engine: Engine) -> None:
    reference = reference_of(bank)
    detector = with_threshold(bank, float(reference.scores[0] * 1.05))
    shifted = reference.scores.copy()
    shifted[0] *= 1.1
    off = replace(
        reference,
        outputs={**reference.outputs, "score": shifted},
        anomalous=shifted > detector.pack.calibration.threshold,
    )
    with pytest.raises(ParityError, match=r"the decision of 'onnx-fp32' on golden/000.png"):
        check_parity(engine, detector, off, Tolerance(score=0.2, map=0.2))


def test_a_score_right_at_the_threshold_may_fall_to_either_side(bank: FittedDetector, engine: Engine) -> None:
    # A threshold is often the score of a held-out photograph, and that may be a golden one.
    reference = reference_of(bank)
    detector = with_threshold(bank, float(reference.scores[0]))
    flipped = reference.scores > detector.pack.calibration.threshold
    with engine.trunk() as trunk, engine.head(bank.pack) as head:
        score = float(head.infer(trunk.infer({"image": bank.golden[:1]}))["score"][0])
    flipped[0] = not score > detector.pack.calibration.threshold
    found = check_parity(engine, detector, replace(reference, anomalous=flipped), FULL)
    assert found.figures.decisions_changed == 1


def test_a_detector_that_answers_nan_in_torch_is_refused(make_detector: Callable[..., FittedDetector]) -> None:
    class Undefined(nn.Module):
        def forward(self, patches: Tensor, normal: Tensor, rows: Tensor) -> tuple[Tensor]:
            return ((-patches.square().sum((1, 2)) - 1).sqrt() + 0 * normal.sum() + 0 * rows.sum(),)

    with pytest.raises(DetectorError, match=r"finite numbers in 'score'"):
        reference_of(make_detector(head=Undefined()))


def test_an_engine_that_answers_nan_never_passes(bank: FittedDetector, engine: Engine) -> None:
    arrays = {**bank.pack.arrays, "anomalous.weight": np.array([np.float32(3e38)])}
    reference = reference_of(bank)
    rows = bank.pack.arrays["bank.normal"][:1] * 1.01
    arrays |= {"bank.anomalous": rows, "bank.anomalous.ids": np.array([2**40], np.uint64)}
    broken = replace(bank, pack=Pack(bank.pack.product, bank.pack.fingerprint, bank.pack.calibration, arrays))
    with pytest.raises(ParityError):
        check_parity(engine, broken, reference, Tolerance(score=1e9, map=1e9))


def test_tolerances_are_tighter_the_more_bits_there_are() -> None:
    assert msgspec.to_builtins(FULL) == {"score": 1e-4, "map": 1e-4}
    assert FULL.map < TOLERANCE["fp16"].map <= 1e-2


def test_the_golden_images_of_a_bundle_carry_what_torch_said(bank: FittedDetector, small_bundle: Path) -> None:
    bundle = open_bundle(small_bundle)
    reference = reference_of(bank)
    images = bundle.golden_images()
    assert [record.score for record, _ in images] == pytest.approx(reference.scores.tolist())
    assert all(np.array_equal(image, frame) for (_, image), frame in zip(images, bank.golden, strict=True))
    maps = bundle.golden_maps()
    assert maps is not None
    assert np.array_equal(maps, reference.outputs["anomaly_map"])
