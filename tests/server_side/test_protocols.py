"""Published protocols on small painted sets: labels, groups, and what is refused. The models are random: no figure
here says how good a method is."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

from edgead.cli import main
from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import Bundle, open_bundle, write_bundle
from edgead.runtime.errors import BundleError, InputError, KnowledgeError
from edgead.runtime.image import encode_png, read_image
from edgead.runtime.inspector import Inspector
from edgead.server_side.detectors import normality, winclip
from edgead.server_side.detectors.projections import new_projections, write_projections
from edgead.server_side.metrics import auroc
from edgead.server_side.painting import paint_defect
from edgead.server_side.painting_parts import paint_part
from edgead.server_side.protocol_groups import Group, groups_of, read_groups
from edgead.server_side.protocol_report import (
    ADDITIONS,
    addition_dict,
    addition_html,
    addition_text,
    shot_dict,
    shot_html,
    shot_text,
)
from edgead.server_side.protocols import Encode, bundle_of, categories_of, encoder, normality_addition, shots
from edgead.server_side.vision_language import VisionLanguageModel, load_model
from edgead.server_side.vision_language.options import VisionLanguageOptions

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
KINDS = ("thread", "hole", "scratch")
GROUPS = {
    "schema": 1,
    "source": "made for a test",
    "categories": {
        "carpet": {
            "class": "carpet",
            "groups": {
                "fibres": {"types": ["thread"], "sentences": ["thread", "fibre"]},
                "damage": {"types": ["hole", "scratch"], "sentences": ["damage"]},
            },
        }
    },
}


class Bench(NamedTuple):
    """A painted data set; for it a zero-shot bundle with a normality detector, and a few-shot one without."""

    data: Path
    zero: Path
    few: Path
    model: VisionLanguageModel
    config: Path

    def encode(self, bundle: Bundle) -> Encode:
        return encoder(self.model, bundle)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("protocols")
    data = folder / "carpet"
    rng = np.random.default_rng(0)
    for kind in ("good", *KINDS):
        for number in range(3):
            part = paint_part("fabric", rng=rng, size=48)
            image, mask = part.image, None
            if kind != "good":
                image, mask = paint_defect(image, kind, size=0.5, rng=rng, within=part.surface)
            write(data / "test" / kind / f"{number}.png", image)
            if mask is None:
                write(data / "train" / "good" / f"{number}.png", image)
            else:
                write(data / "ground_truth" / kind / f"{number}_mask.png", np.repeat(mask[..., None], 3, axis=2))
    config = folder / "tiny.json"
    config.write_text(json.dumps(CONFIG))
    model = load_model(str(config), "random:0")
    projections = folder / "projections.safetensors"
    untrained = new_projections((1, 2), (32, 32), 16)
    write_projections(projections, untrained, model=model.name, weights=model.weights_sha256)
    options = VisionLanguageOptions(
        model=str(config), weights="random:0", class_name="carpet", product="carpet", projections=projections
    )
    normals = sorted((data / "train" / "good").iterdir())
    normality.learn(normals, options).write(folder / "normality.detector")
    winclip.learn([], options).write(folder / "zero.detector")
    zero = export_bundle(
        folder / "zero.detector", folder / "zero.bundle", ["onnx"], normality=folder / "normality.detector"
    )
    # The same engines with other knowledge, as one method has both; to export them again takes half a minute.
    few = winclip.learn(normals, dataclasses.replace(options, shots=1))
    assert few.spec == zero.manifest.detector
    write_bundle(
        folder / "few.bundle",
        name="few",
        detector=few.spec,
        engines=[msgspec.structs.replace(engine, normality=None) for engine in zero.manifest.engines],
        packs={"carpet": few.pack},
        files={name: zero.read(name) for name in zero.manifest.files if re.match("engines/[^/]+/[^/]+$", name)},
    )
    return Bench(data, folder / "zero.bundle", folder / "few.bundle", model, config)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(image))


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(GROUPS))
    return path


def test_each_group_in_turn_is_called_normal_and_the_rest_stays_anomalous(bench: Bench, groups: Path) -> None:
    result = normality_addition(bench.zero, bench.data, read_groups(groups), bench.encode)
    fibres, damage = result.additions
    assert (fibres.group, fibres.types, fibres.pictures) == ("fibres", ("thread",), (3, 3, 6))
    assert (damage.group, damage.types, damage.pictures) == ("damage", ("hole", "scratch"), (6, 3, 3))
    assert set(fibres.moved) == {"hole", "scratch"}
    assert set(damage.moved) == {"thread"}
    assert result.mean("after") == pytest.approx((fibres.after + damage.after) / 2)


def test_the_protocols_figures_are_those_of_an_eager_inspector(bench: Bench, groups: Path) -> None:
    fibres = normality_addition(bench.zero, bench.data, read_groups(groups), bench.encode).additions[0]
    paths = sorted((bench.data / "test").glob("*/*.png"))
    anomalous = np.array([path.parent.name in ("hole", "scratch") for path in paths])
    with Inspector(bench.zero, suppression="eager") as inspector:
        pack = inspector.knowledge()
        arrays = bench.encode(inspector.bundle)(("thread", "fibre"), "carpet")
        assert arrays["normality.table"].shape == (2, 16)
        found = []
        for arrays_now in ({}, arrays):
            inspector.swap(dataclasses.replace(pack, arrays={**pack.arrays, **arrays_now}))
            seen = [inspector.inspect(read_image(path)) for path in paths]
            found.append(auroc(anomalous, np.array([one.score for one in seen])))
            found.append(auroc(anomalous, np.array([one.anomaly_map.max() for one in seen])))
    assert found == pytest.approx([fibres.score_before, fibres.before, fibres.score_after, fibres.after])


def test_reports_show_before_and_after_beside_the_published_means(bench: Bench, groups: Path) -> None:
    result = normality_addition(bench.zero, bench.data, read_groups(groups), bench.encode, limit=2)
    text = addition_text(result)
    assert "made for a test" in text
    assert all(f"{before}" in text and f"{after}" in text for _, before, after in ADDITIONS)
    content = json.loads(json.dumps(addition_dict(result)))
    assert content["groups"][0]["pictures"] == [2, 2, 4]
    assert "fibres" in addition_html(result, "carpet")


def test_a_group_that_leaves_nothing_to_find_is_left_out_and_said(bench: Bench, groups: Path) -> None:
    content = json.loads(groups.read_text())
    content["categories"]["carpet"]["groups"]["all"] = {"types": list(KINDS), "sentences": ["anything"]}
    groups.write_text(json.dumps(content))
    result = normality_addition(bench.zero, bench.data, read_groups(groups), bench.encode)
    assert [one.group for one in result.additions] == ["fibres", "damage"]
    assert any("'all' is left out" in note for note in result.notes)


def test_a_bundle_without_a_normality_detector_is_refused(bench: Bench, small_bundle: Path) -> None:
    with pytest.raises(BundleError, match="--with-normality"):
        normality_addition(small_bundle, bench.data, read_groups(), bench.encode)


def test_sentences_of_another_model_are_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    other = load_model(str(tmp_path / "tiny.json"), "random:1")
    with pytest.raises(KnowledgeError, match="weights"):
        encoder(other, open_bundle(bench.zero))


def test_zero_shot_figures_stand_beside_published_ones(bench: Bench) -> None:
    result = shots(bench.zero, bench.data, "zero-shot")
    assert result.mean("auroc") == result.evaluations["carpet"].kinds[0].auroc
    text = shot_text(result)
    assert "ALFA" in text
    assert "93.2" in text
    assert json.loads(json.dumps(shot_dict(result)))["protocol"] == "zero-shot"
    assert "carpet" in shot_html(result, "carpet")


def test_few_shot_knowledge_is_not_measured_as_zero_shot_nor_the_other_way_round(bench: Bench) -> None:
    assert shots(bench.few, bench.data, "few-shot").mean("auroc") is not None
    with pytest.raises(InputError, match="few-shot"):
        shots(bench.few, bench.data, "zero-shot")
    with pytest.raises(InputError, match="zero-shot"):
        shots(bench.zero, bench.data, "few-shot")


def test_many_categories_need_a_bundle_or_a_product_for_each(bench: Bench, tmp_path: Path, groups: Path) -> None:
    for name in ("carpet", "felt"):
        shutil.copytree(bench.data, tmp_path / "sets" / name)
    sets = tmp_path / "sets"
    with pytest.raises(InputError, match="felt"):
        shots(bench.zero, sets, "zero-shot")
    shutil.copytree(bench.zero, tmp_path / "bundles" / "carpet.bundle")
    shutil.copytree(bench.zero, tmp_path / "bundles" / "felt.bundle")
    assert set(shots(tmp_path / "bundles", sets, "zero-shot").evaluations) == {"carpet", "felt"}
    result = normality_addition(tmp_path / "bundles", sets, read_groups(groups), bench.encode, limit=1)
    assert [one.group for one in result.additions if one.category == "felt"] == ["hole", "scratch", "thread"]
    assert any("no groups for 'felt'" in note for note in result.notes)
    with pytest.raises(InputError, match="--product"):
        bundle_of(bench.zero, "felt", alone=False, product="carpet")


def test_the_command_line_prints_and_writes_a_protocols_result(
    bench: Bench, groups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    words = ["evaluate", str(bench.zero), "--data", str(bench.data), "--protocol"]
    model = ["--model", str(bench.config), "--groups", str(groups)]
    code = run([*words, "normality-addition", *model, "--limit", "1", "--json", "--html", str(page)])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert [group["group"] for group in json.loads(shown.out)["groups"]] == ["fibres", "damage"]
    assert "Published means" in page.read_text()
    assert run([*words, "zero-shot", "--limit", "1"]) == 0
    assert "WinCLIP" in capsys.readouterr().out
    for wrong in ([*words, "zero-shot", *model], [*words[:-1], *model]):
        assert run(wrong) == 2
        assert "--groups" in capsys.readouterr().err


def run(words: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code


def test_mvtecs_groups_cover_its_categories_and_say_who_made_them() -> None:
    grouping = read_groups()
    assert len(grouping.categories) == 15
    assert "not the grouping of the NAND paper" in grouping.source
    for category in grouping.categories.values():
        types = [kind for group in category.groups.values() for kind in group.types]
        assert len(types) == len(set(types))
        assert "combined" not in types


def test_types_that_are_not_there_are_named_and_none_at_all_is_refused() -> None:
    content, notes = groups_of(read_groups(), "carpet", ["hole", "thread"])
    assert content.groups["cut or hole"] == Group(("hole",), ("cut", "hole"))
    assert any("no pictures of cut" in note for note in notes)
    with pytest.raises(InputError, match="--groups"):
        groups_of(read_groups(), "carpet", ["dent"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(schema=2),
        lambda content: content.pop("source"),
        lambda content: content["categories"]["carpet"]["groups"]["fibres"].update(types=[]),
        lambda content: content["categories"]["carpet"]["groups"]["fibres"].update(sentences=[" "]),
        lambda content: content["categories"]["carpet"].update(colour="red"),
    ],
)
def test_a_file_of_groups_that_is_not_well_formed_is_refused(
    groups: Path, damage: Callable[[dict[str, object]], None]
) -> None:
    content = json.loads(groups.read_text())
    damage(content)
    groups.write_text(json.dumps(content))
    with pytest.raises(InputError, match="groups of defect types"):
        read_groups(groups)


def test_a_folder_without_data_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="MVTec layout"):
        categories_of(tmp_path)
