"""Bundles of two detectors: what may stand beside what, one pack for both, parity under a table that is not empty."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgead.detector_file import FittedDetector
from edgead.exporter.export import export_bundle
from edgead.exporter.parity import TOLERANCE, check_parity, reference_of
from edgead.exporter.with_normality import combined_pack, probe_pack, undecided
from edgead.runtime.bundle import open_bundle
from edgead.runtime.engines import normality_record, open_engine
from edgead.runtime.engines.tensorrt_plans import has_plan
from edgead.runtime.errors import BundleError, DetectorError, KnowledgeError, ParityError
from edgead.runtime.knowledge import head_feeds
from edgead.runtime.show import as_text, describe
from edgead.runtime.spec import Preprocessing, Region, Tiling, canonical_json


@pytest.fixture(scope="session")
def tiny(normality_pair: ModuleType) -> ModuleType:
    return normality_pair


@pytest.fixture(scope="module")
def pair(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair") / "pair.bundle"
    tiny.bundle(path)
    return path


def test_the_pack_has_the_fingerprint_of_both_detectors_and_the_rows_of_the_first(tiny: ModuleType, pair: Path) -> None:
    bundle, first, second = open_bundle(pair), tiny.base(), tiny.normality()
    content = canonical_json({"detector": first.spec.fingerprint, "normality": second.spec.fingerprint})
    pack = bundle.pack()
    assert pack.fingerprint == hashlib.sha256(b"edgead/feature-space-with-normality/v1\0" + content).hexdigest()
    assert pack.arrays["bank.normal"].tobytes() == first.pack.arrays["bank.normal"].tobytes()
    assert pack.ids("bank.normal").tolist() == first.pack.ids("bank.normal").tolist()
    assert pack.calibration == first.pack.calibration
    assert pack.arrays["normality.table"].shape == pack.arrays["normality.normal"].shape == (0, 3)


def test_a_pack_of_one_detector_does_not_fit_a_bundle_of_two(tiny: ModuleType, pair: Path) -> None:
    with open_engine(open_bundle(pair), "onnx") as engine, pytest.raises(KnowledgeError, match="feature space"):
        engine.head(tiny.base().pack)


def test_the_manifest_says_what_the_second_detector_is(tiny: ModuleType, pair: Path) -> None:
    bundle = open_bundle(pair)
    record = bundle.manifest.normality
    assert record is not None
    assert (record.model, record.weights, record.shared_trunk) == ("tiny", "ab" * 32, False)
    assert record.detector == tiny.normality().spec
    shown = as_text(describe(pair))
    assert "normality" in shown
    assert "tiny" in shown
    card = bundle.read("card.md").decode()
    assert "## Normality by sentences" in card
    assert "ab" * 32 in card


def test_the_second_graphs_pass_the_gate_with_a_filled_table_too(tiny: ModuleType, pair: Path) -> None:
    bundle = open_bundle(pair)
    report = json.loads(bundle.read("parity.json"))["engines"]
    for engine in bundle.manifest.engines:
        assert engine.normality is not None
        assert engine.normality.parity is not None
        assert engine.normality.parity.map < 1e-4
        for check in ("normality", "normality_probe"):
            assert report[engine.name][check]["engine"]["parity"]["images"] == 2
        assert report[engine.name]["normality_probe"]["engine"]["agreement"]["nearest_row"] == 1.0


def test_a_second_head_that_is_off_shows_only_under_a_filled_table(tiny: ModuleType, pair: Path) -> None:
    first, other = tiny.base(), tiny.normality(head=tiny.Halved())
    tolerance = TOLERANCE["fp32"]
    with open_engine(open_bundle(pair), "onnx") as engine:
        second = engine.normality()
        assert second is not None
        empty = combined_pack(first, other.pack, other)
        found = check_parity(second, other, reference_of(undecided(other, other.pack), scale=1.0), tolerance, empty)
        assert found.figures.map == 0
        probe = probe_pack(other)
        filled = combined_pack(first, probe, other)
        with pytest.raises(ParityError, match=r"'onnx-fp32\.normality'"):
            check_parity(second, other, reference_of(undecided(other, probe), scale=1.0), tolerance, filled)


def test_equal_fingerprints_share_one_trunk(tiny: ModuleType, tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path / "b", ["onnx", "tensorrt"], second=tiny.normality(scale=1.0))
    record = bundle.manifest.normality
    assert record is not None
    assert record.shared_trunk
    onnx, tensorrt = bundle.manifest.engines
    assert onnx.normality is not None
    assert onnx.normality.trunk == onnx.trunk
    assert not bundle.has("engines/onnx-fp32/normality/trunk.onnx")
    # A TensorRT recipe always builds both graphs of its folder.
    assert tensorrt.normality is not None
    assert tensorrt.normality.trunk == "engines/tensorrt-fp32/normality/trunk.onnx"


def test_a_tensorrt_engine_has_room_for_64_sentences(tiny: ModuleType, tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path / "b", ["tensorrt"])
    (engine,) = bundle.manifest.engines
    assert engine.capacity == {"bank.normal": 1024, "normality.table": 64}
    recipe = json.loads(bundle.read("engines/tensorrt-fp32/normality/recipe.json"))
    assert recipe["profiles"]["head"]["normality.table"] == [[64, 3]] * 3
    assert recipe["profiles"]["head"]["normality.normal"] == [[64, 3]] * 3
    full = tiny.with_sentences(bundle.pack(), *["red"] * 64)
    assert head_feeds(full, bundle.manifest.knowing, engine.capacity)["normality.table"].shape == (64, 3)
    with pytest.raises(KnowledgeError, match="at most 64 rows"):
        head_feeds(tiny.with_sentences(bundle.pack(), *["red"] * 65), bundle.manifest.knowing, engine.capacity)


@pytest.mark.parametrize(
    "view",
    [
        {"rotate": 90},
        {"roi": Region(0, 0, 8, 8)},
        {"tiles": Tiling(2, 1)},
    ],
)
def test_a_second_detector_of_another_view_says_how_to_fit_it(
    tiny: ModuleType, view: dict[str, Any], tmp_path: Path
) -> None:
    first = tiny.base(Preprocessing(tiny.SIDE, tiny.SIDE, rotate=180, tiles=Tiling(3, 2, overlap=0.2)))
    second = tiny.normality(Preprocessing(tiny.SIDE, tiny.SIDE, **view))
    with pytest.raises(DetectorError) as caught:
        export_bundle(first, tmp_path / "b", normality=second)
    assert "--method normality --rotate 180 --tiles 3x2 --overlap 0.2" in caught.value.next_step


def test_only_a_normality_detector_may_be_the_second_and_only_maps_can_be_suppressed(
    tiny: ModuleType, colours: FittedDetector, tmp_path: Path
) -> None:
    with pytest.raises(DetectorError, match=r"normality\.table"):
        export_bundle(tiny.base(), tmp_path / "b", normality=tiny.base())
    with pytest.raises(DetectorError, match="anomaly maps"):
        export_bundle(colours, tmp_path / "b", normality=tiny.normality())


def test_a_manifest_with_half_of_a_second_detector_is_refused(tiny: ModuleType, pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "b")
    manifest = tmp_path / "b" / "manifest.json"
    content = json.loads(manifest.read_bytes())
    content["engines"][0]["normality"] = None
    manifest.write_bytes(json.dumps(content).encode())
    with pytest.raises(BundleError, match="normality graphs"):
        open_bundle(tmp_path / "b")


def test_a_bundle_of_one_detector_still_reads(tiny: ModuleType, tmp_path: Path) -> None:
    export_bundle(tiny.base(), tmp_path / "b")
    manifest = tmp_path / "b" / "manifest.json"
    content = json.loads(manifest.read_bytes())
    # As bundles were written before there was a second detector.
    del content["normality"]
    for engine in content["engines"]:
        del engine["normality"]
    manifest.write_bytes(json.dumps(content).encode())
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.normality is None
    with open_engine(bundle) as engine:
        assert engine.normality() is None
    np.testing.assert_array_equal(bundle.pack().arrays["bank.normal"], tiny.base().pack.arrays["bank.normal"])


def test_compile_builds_the_plans_of_both_pairs_where_each_will_be_looked_for(tiny: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds plans without a GPU")
    from edgead.runtime.compile_cli import compile_bundle

    bundle = tiny.bundle(tmp_path / "b", ["onnx", "tensorrt"])
    results = compile_bundle(bundle, capabilities=("8.6",))
    assert [result["engine"] for result in results] == ["tensorrt-fp32", "tensorrt-fp32.normality"]
    record = bundle.engine("tensorrt")
    second = normality_record(record)
    assert second is not None
    for one in (record, second):
        assert has_plan(bundle, one)
        assert sorted(path.name for path in (tmp_path / "b" / "compiled" / one.name).glob("*.plan")) == [
            "head.plan",
            "trunk.plan",
        ]
    assert [result["built"] for result in compile_bundle(bundle, capabilities=("8.6",))] == [False, False]


def test_plans_ahead_of_time_are_built_for_both_pairs(tiny: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds plans without a GPU")
    bundle = export_bundle(
        tiny.base(), tmp_path / "b", ["tensorrt"], normality=tiny.normality(), compute_capabilities=["8.6"]
    )
    (engine,) = bundle.manifest.engines
    assert engine.normality is not None
    assert engine.normality.head == "engines/tensorrt-fp32/normality/head.plan"
    report = json.loads(bundle.read("parity.json"))["engines"]["tensorrt-fp32"]
    # No GPU here: the ONNX of both pairs was run in the plans' place, its banks padded.
    assert report["normality_probe"]["source"]["parity"]["map"] < 1e-4


def test_the_command_takes_the_second_detector_as_a_file(
    tiny: ModuleType, small_detector: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from edgead.detector_file import write_detector
    from edgead.export_command import export

    made = tiny.normality()
    write_detector(
        tmp_path / "n.detector",
        trunk=tiny.Colours(2.0),
        head=tiny.Explained(),
        spec=made.spec,
        pack=made.pack,
        golden=made.golden,
        card=made.card,
    )
    words = [str(small_detector), "--with-normality", str(tmp_path / "n.detector"), "-o", str(tmp_path / "b"), "--json"]
    answer = json.loads(CliRunner().invoke(export, words, catch_exceptions=False).stdout)
    assert answer["engines"]["onnx-fp32"]["normality"]["map"] < 1e-4
    assert open_bundle(tmp_path / "b").manifest.normality is not None
    with pytest.raises(DetectorError, match="nothing there"):
        CliRunner().invoke(
            export,
            [str(small_detector), "--with-normality", "nowhere", "-o", str(tmp_path / "c")],
            catch_exceptions=False,
        )
