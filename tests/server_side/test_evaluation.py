"""`evaluate` on painted defects with a real engine, against figures computed from its own answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from edgead.cli import main
from edgead.runtime.bundle import open_bundle, write_bundle
from edgead.runtime.errors import BundleError, ImageError, InputError
from edgead.runtime.image import encode_png, map_to_frame, read_image
from edgead.runtime.inspection import Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack
from edgead.server_side import datasets
from edgead.server_side.evaluation import Evaluation, evaluate_bundle
from edgead.server_side.evaluation_report import heat, html_report, outlined, text_table
from edgead.server_side.painting import paint_defect, paint_part


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 good parts, 4 with red stains and masks, 3 with faint dents and no masks; mixed sizes."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(5)
    for kind, count in (("good", 4), ("stain", 4), ("dent", 3)):
        (root / "test" / kind).mkdir(parents=True)
        for index in range(count):
            image = paint_part("flange", rng=rng, size=96 if index % 2 else 128).image
            if kind == "stain":
                image, mask = paint_defect(image, kind, size=0.3, contrast=1.0, colour=(210, 20, 30), rng=rng)
                (root / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(root / "ground_truth" / kind / f"{index:03d}_mask.png"), mask)
            elif kind == "dent":
                image, _ = paint_defect(image, kind, size=0.05, contrast=0.02, rng=rng)
            (root / "test" / kind / f"{index:03d}.png").write_bytes(encode_png(image))
    return root


@pytest.fixture(scope="module")
def evaluation(small_bundle: Path, data: Path) -> Evaluation:
    return evaluate_bundle(small_bundle, data, target="onnx")


def test_image_metrics_and_decisions_are_those_of_the_single_answers(evaluation: Evaluation) -> None:
    everything, dent, stain, good = evaluation.kinds
    assert [kind.kind for kind in evaluation.kinds] == ["all", "dent", "stain", "good"]
    assert [kind.images for kind in evaluation.kinds] == [7, 3, 4, 4]
    labels = [outcome.sample.anomalous for outcome in evaluation.outcomes]
    assert everything.auroc == pytest.approx(roc_auc_score(labels, [o.score for o in evaluation.outcomes]))
    chosen = [o for o in evaluation.outcomes if o.sample.kind in ("good", "stain")]
    wanted = roc_auc_score([o.sample.anomalous for o in chosen], [o.score for o in chosen])
    assert stain.auroc == pytest.approx(wanted)
    assert wanted > 0.8
    missed = [o for o in evaluation.outcomes if o.sample.anomalous and o.score <= evaluation.threshold]
    assert everything.wrong == len(missed) == dent.wrong + stain.wrong
    alarms = [o for o in evaluation.outcomes if o.sample.kind == "good" and o.score > evaluation.threshold]
    assert good.wrong == len(alarms)


def test_pixels_are_compared_in_the_resolution_of_the_masks(
    evaluation: Evaluation, small_bundle: Path, data: Path
) -> None:
    scores, truth = [], []
    with Inspector(small_bundle, target="onnx") as inspector:
        for sample in datasets.test_samples(data):
            if sample.kind == "dent":
                continue
            frame = read_image(sample.path)
            found = inspector.inspect(frame).anomaly_map
            assert found is not None
            scores.append(map_to_frame(found, frame.shape, inspector.spec.preprocessing).ravel())
            truth.append(datasets.read_mask(sample, frame.shape).ravel())
    exact = roc_auc_score(np.concatenate(truth), np.concatenate(scores))
    everything, dent, stain, _ = evaluation.kinds
    assert everything.pixel_auroc == pytest.approx(exact, abs=1e-4)
    assert stain.pixel_auroc == everything.pixel_auroc, "only stains have masks"
    assert stain.pro is not None
    assert dent.pixel_auroc is None
    assert evaluation.notes == ("no masks for dent: left out of the pixel metrics",)


def test_no_map_is_kept(evaluation: Evaluation) -> None:
    assert all(outcome.inspection.anomaly_map is None for outcome in evaluation.outcomes)


def test_the_report_shows_each_miss_and_is_one_file(evaluation: Evaluation, small_bundle: Path, data: Path) -> None:
    with Inspector(small_bundle, target="onnx") as inspector:
        text = html_report(evaluation, inspector, "Flange <1>")
    assert "Flange &lt;1&gt;" in text
    misses = [o for o in evaluation.outcomes if o.sample.anomalous and o.inspection.verdict is Verdict.OK]
    assert misses, "the faint dents are there to be missed"
    worst = sorted(misses, key=lambda outcome: outcome.score)[:6]
    assert all(f"{o.sample.kind}/{o.sample.path.name}" in text for o in worst)
    assert text.count("data:image/jpeg;base64,") >= 2 * len(worst)
    assert "http" not in text


def test_the_table_has_a_line_for_each_type_and_says_what_was_not_measured(evaluation: Evaluation) -> None:
    lines = text_table(evaluation).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["type", "all", "dent", "stain", "good"]
    assert lines[-1].startswith("no masks for dent")


def test_the_command_writes_json_and_a_report(
    small_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    words = ["evaluate", small_bundle, "--data", data, "--target", "onnx", "--limit", 2, "--json", "--html", page]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kinds"]["stain"]["images"] == 2
    assert result["kinds"]["good"]["images"] == 2
    assert result["engine"] == "onnx-fp32"
    assert page.read_text().startswith("<!doctype html>")


def test_a_page_that_cannot_be_written_does_not_cost_the_figures(
    small_bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", small_bundle, "--data", data, "--target", "onnx", "--limit", 1, "--json"]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in (*words, "--html", "/proc/edgead/report.html")])
    assert end.value.code == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["engine"] == "onnx-fp32"
    assert "/proc/edgead" in said.err


@pytest.fixture(scope="module")
def two_products(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with a second product, 'strict', whose threshold no part stays under."""
    bundle = open_bundle(small_bundle)
    pack = bundle.pack("part")
    strict = Pack("strict", pack.fingerprint, msgspec.structs.replace(pack.calibration, threshold=1e-6), pack.arrays)
    manifest = bundle.manifest
    path = tmp_path_factory.mktemp("two") / "two.bundle"
    write_bundle(
        path,
        name="two",
        detector=manifest.detector,
        engines=manifest.engines,
        packs={"part": pack, "strict": strict},
        default="part",
        golden=manifest.golden,
        files={name: bundle.read(name) for name in manifest.files if name not in manifest.packs.values()},
    )
    return path


def test_a_product_is_measured_by_its_own_knowledge_and_the_report_names_it(
    two_products: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    words = ["evaluate", two_products, "--data", data, "--target", "onnx", "--limit", 2, "--json"]
    found = {}
    for more in ([], ["--product", "strict", "--html", page]):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in (*words, *more)])
        assert end.value.code == 0
        result = json.loads(capsys.readouterr().out)
        found[result["product"]] = result
    assert found["strict"]["threshold"] < found["part"]["threshold"]
    assert found["strict"]["kinds"]["good"]["wrong"] == 2 > found["part"]["kinds"]["good"]["wrong"]
    assert found["strict"]["knowledge"] != found["part"]["knowledge"]
    text = page.read_text()
    assert "two: strict on" in text
    assert "Product strict, engine onnx-fp32" in text
    assert "Worst false alarms" in text


def test_a_product_that_the_bundle_lacks_is_refused_with_near_names(two_products: Path, data: Path) -> None:
    with pytest.raises(BundleError, match="strict"):
        evaluate_bundle(two_products, data, product="strct", target="onnx")
    with Inspector(two_products, target="onnx") as inspector, pytest.raises(InputError, match="part, strict"):
        evaluate_bundle(inspector, data, product="strct")


def test_good_parts_alone_give_false_alarms_and_nothing_that_is_undefined(
    small_bundle: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "test" / "good", tmp_path / "test" / "good")
    result = evaluate_bundle(small_bundle, tmp_path, target="onnx")
    assert result.kinds[0].auroc is None
    assert result.kinds[-1].images == 4
    assert result.notes == ("no defects in the test set: only false alarms are measured",)
    with Inspector(small_bundle, target="onnx") as inspector:
        assert "NaN" not in html_report(result, inspector, "good only")


def test_defects_alone_are_measured_without_false_alarms(small_bundle: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "test" / "stain", tmp_path / "test" / "stain")
    result = evaluate_bundle(small_bundle, tmp_path, target="onnx")
    assert result.kinds[0].auroc is None
    assert result.kinds[-1].images == 0
    assert any("no good images" in note for note in result.notes)
    text_table(result)


def test_a_damaged_image_is_named(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "test" / "good").mkdir(parents=True)
    (tmp_path / "test" / "good" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"bad\.png"):
        evaluate_bundle(small_bundle, tmp_path, target="onnx")


def test_a_limit_below_one_is_refused(small_bundle: Path, data: Path) -> None:
    with pytest.raises(InputError, match="limit"):
        evaluate_bundle(small_bundle, data, limit=0)


def test_the_outline_is_drawn_around_the_mask_and_the_frame_is_left_alone() -> None:
    frame, mask = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.bool_)
    mask[10:20, 10:20] = True
    drawn = outlined(frame, mask)
    assert drawn[10, 15].any()
    assert not drawn[15, 15].any()
    assert not frame.any()


def test_heat_is_brightest_where_the_map_reaches_the_threshold() -> None:
    frame = np.full((2, 3, 3), 100, np.uint8)
    shown = heat(frame, np.array([[0, 1, 2], [3, 4, 8]], np.float32), 4.0).astype(int).sum(2).ravel()
    assert (np.diff(shown[:5]) > 0).all()
    assert shown[4] == shown[5]
    heat(frame, np.zeros((2, 3), np.float32), None)


def test_a_defect_that_nobody_marked_counts_in_the_images_and_not_in_the_pixels(
    small_bundle: Path, data: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "set")
    mask = tmp_path / "set" / "ground_truth" / "stain" / "000_mask.png"
    cv2.imwrite(str(mask), np.zeros_like(cv2.imread(str(mask))))
    result = evaluate_bundle(small_bundle, tmp_path / "set", target="onnx")
    assert any("stain/000.png" in note for note in result.notes)
    before, after = evaluation.kinds[0], result.kinds[0]
    assert after.images == before.images
    assert after.auroc == before.auroc
    assert after.pixel_auroc != before.pixel_auroc
