"""Anybody's modules are held against the ports that they declare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from edgead.detector_file import FittedDetector
from edgead.exporter.contract import check_contract
from edgead.exporter.export import export_bundle
from edgead.runtime.errors import DetectorError
from edgead.runtime.spec import Port


def check(detector: FittedDetector) -> None:
    check_contract(detector.spec, detector.trunk, detector.head)


def with_outputs(detector: FittedDetector, *outputs: Port) -> FittedDetector:
    return replace(detector, spec=msgspec.structs.replace(detector.spec, outputs=outputs))


def test_a_detector_without_a_map_obeys_the_contract(colours: FittedDetector) -> None:
    check(colours)


def test_a_missing_output_is_named(colours: FittedDetector) -> None:
    score, anomaly_map = Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", 16, 16))
    with pytest.raises(DetectorError, match=r"2 outputs of the head.*'anomaly_map'"):
        check(with_outputs(colours, score, anomaly_map))


def test_an_output_of_another_dtype_is_named(colours: FittedDetector) -> None:
    with pytest.raises(DetectorError, match=r"output 'score' of the head as int32 .* got float32"):
        check(with_outputs(colours, Port("score", "int32", ("B",))))


def test_an_output_of_another_shape_is_named(colours: FittedDetector) -> None:
    features = (Port("patches", "float32", ("B", 5, 3)),)
    detector = replace(colours, spec=msgspec.structs.replace(colours.spec, features=features))
    with pytest.raises(DetectorError, match=r"output 'patches' of the trunk"):
        check(detector)


def test_a_head_without_a_score_is_refused(colours: FittedDetector) -> None:
    with pytest.raises(DetectorError, match=r"output 'score'"):
        check(with_outputs(colours, Port("distance", "float32", ("B",))))


def test_a_batch_that_was_frozen_when_traced_is_found(colours: FittedDetector) -> None:
    class Plain(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor]:
            return (image.float().mean((1, 2)).unsqueeze(1).expand(-1, 4, -1).contiguous(),)

    frozen = torch.export.export(Plain(), (torch.zeros(2, 16, 16, 3, dtype=torch.uint8),), strict=False)
    with pytest.raises(DetectorError, match=r"input 'image' of the trunk.*'B' is frozen to 2"):
        check(replace(colours, trunk=frozen))


def test_a_row_count_that_is_taken_for_the_batch_is_found(colours: FittedDetector) -> None:
    ports = list(colours.spec.knowledge)
    ports[0] = msgspec.structs.replace(ports[0], shape=("B", 3))
    with pytest.raises(DetectorError, match=r"input 'bank.normal' of the head"):
        check(replace(colours, spec=msgspec.structs.replace(colours.spec, knowledge=tuple(ports))))


def test_an_export_checks_the_contract_before_anything_else(colours: FittedDetector, tmp_path: Path) -> None:
    with pytest.raises(DetectorError, match=r"'score'"):
        export_bundle(with_outputs(colours, Port("score", "int32", ("B",))), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_module_that_returns_a_plain_tensor_exports(
    make_detector: Callable[..., FittedDetector], tmp_path: Path
) -> None:
    class Brightness(nn.Module):
        def forward(self, patches: Tensor, normal: Tensor, rows: Tensor) -> Tensor:
            return (patches.mean((1, 2)) - normal.mean()).abs() + 0.0 * rows.sum()

    bundle = export_bundle(make_detector(head=Brightness()), tmp_path / "bundle")
    parity = bundle.manifest.engines[0].parity
    assert parity is not None
    assert parity.score < 1e-5
    assert parity.map == 0.0
