"""From the wish to a pilot group by one command: new normals, new defects, and a sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgead.runtime.deltas import apply_delta
from edgead.runtime.errors import BundleError, InputError, KnowledgeError, ReleaseError
from edgead.runtime.image import encode_png
from edgead.runtime.inspection import Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import decode_pack, new_pack
from edgead.runtime.release import decode_release
from edgead.runtime.rollout import decode_rollout
from edgead.runtime.spec import Calibration
from edgead.server_side.ota.cli import ota
from edgead.server_side.ota.provenance import provenance_of
from edgead.server_side.ota.publish import packs_of

KEYS = ("--keys", "keys", "--passphrase-env", "EDGEAD_KEYS")


def run(*words: object) -> Any:
    done = CliRunner().invoke(ota, [*map(str, words), *KEYS, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


class Line:
    """A line with the tiny detector: a part of grey level 100, released to every camera."""

    def __init__(self, root: Path, tiny: Any) -> None:
        self.root, self.tiny = root, tiny
        rows = np.repeat(np.arange(100, 104, dtype=np.float32), 3).reshape(-1, 3)
        self.first = new_pack(
            product="part",
            fingerprint=tiny.detector().fingerprint,
            calibration=Calibration(threshold=30.0, map_threshold=30.0, typical=4.0, false_alarm_rate=0.05),
            arrays={"bank.normal": rows},
        )
        self.bundle = tiny.bundle(root / "part.edgead", [self.first]).path
        self.held_out = self.pictures("held-out", *range(97, 107), 151, 152, 153)
        self.defects = self.pictures("defects", 200, 210, 30)
        self.new = self.pictures("new", 150, 154)
        run("init", "up", "--product", "part")
        run("publish", "up", self.bundle)
        run("release", "up", "part")
        run("rollout", "up", "part", "--release", 1, "--percent", 100)

    def pictures(self, folder: str, *levels: int) -> Path:
        place = self.root / folder
        place.mkdir(exist_ok=True)
        for level in levels:
            (place / f"{level}.png").write_bytes(encode_png(self.tiny.frame(level)))
        return place

    def judged(self) -> tuple[object, ...]:
        return ("--held-out", self.held_out, "--defects", self.defects)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any, helpers: dict[str, Any]) -> Line:
    monkeypatch.setenv("EDGEAD_KEYS", helpers["PHRASE"])
    monkeypatch.chdir(tmp_path)
    return Line(tmp_path, tiny)


def test_new_normals_reach_the_pilot_group_and_its_cameras_agree(line: Line, helpers: dict[str, Any]) -> None:
    from edgead.server_side.ota.serve import serving

    done = run("add-normal", "up", "part", line.new, *line.judged())
    assert (done["release"], done["groups"], done["percent"]) == (2, ["pilot"], 0.0)
    assert done["added"] == {"bank.normal": 2}
    assert done["false_alarms"] == [3, 0]
    assert done["misses"] == [0, 0]
    root = (line.root / "keys" / "root.json").read_bytes()
    with serving(line.root / "up") as server:
        camera = helpers["Device"](line.root / "camera", server.url, root)
        record = decode_rollout(camera.fetch("rollout/part.json"))
        assert (record.release, record.previous, record.groups) == (2, 1, ("pilot",))
        release = decode_release(camera.fetch("releases/part/2.json"))
        assert release.notes == "normal: new"
        # A pack of a few rows is smaller than any delta to it.
        whole = camera.fetch(f"knowledge/part/{release.product_packs['part']}.safetensors")
    with Inspector(line.bundle, packs=[decode_pack(whole)]) as inspector:
        assert inspector.inspect(line.tiny.frame(152)).verdict is Verdict.OK
        assert inspector.inspect(line.tiny.frame(200)).verdict is Verdict.NG


def test_row_ids_are_given_out_once_over_all_updates(line: Line) -> None:
    from edgead.server_side.ota.publish import load_pack, publish_pack
    from edgead.server_side.ota.repository import opened

    run("add-normal", "up", "part", line.new, *line.judged())
    root = (line.root / "keys" / "root.json").read_bytes()
    with opened(line.root / "up", root) as repository:
        assert repository.settings.next_ids == {"part": 7}
        records = provenance_of(repository, "part")
        assert {image.name for image in records[0].images} == {"150.png", "154.png"}
        packs = packs_of(repository, "part")
        newest = next(digest for digest in packs if digest != line.first.digest)
        assert load_pack(repository, "part", newest).ids("bank.normal").tolist() == [1, 2, 3, 4, 5, 6]
        assert publish_pack(repository, line.first).files == []
    # The rows are taken back, and further ones get new ids.
    run("release", "up", "part", "--pack", line.first.digest)
    done = run("add-normal", "up", "part", line.pictures("newer", 149, 155), *line.judged())
    with opened(line.root / "up", root) as repository:
        assert load_pack(repository, "part", done["pack"]).ids("bank.normal").tolist() == [1, 2, 3, 4, 7, 8]


def test_a_provenance_record_beside_a_file_is_kept_with_what_is_published(line: Line) -> None:
    from edgead.cli import cli
    from edgead.server_side.ota.repository import opened

    words = ["knowledge", "add", line.bundle, "--normal", line.new, *line.judged(), "-o", line.root / "new.safetensors"]
    cli.main([*map(str, words), "--json"], "edgead", standalone_mode=False)
    run("publish", "up", line.root / "new.safetensors")
    with opened(line.root / "up", (line.root / "keys" / "root.json").read_bytes()) as repository:
        assert {image.name for image in provenance_of(repository, "part")[0].images} == {"150.png", "154.png"}
    # A picture that was taught cannot be held out by a later change, although the file is elsewhere now.
    taught = line.root / "held-out" / "153.png"
    taught.write_bytes((line.new / "154.png").read_bytes())
    with pytest.raises(InputError, match="held-out"):
        run("add-normal", "up", "part", line.pictures("newer", 149, 155), *line.judged())


def test_what_the_release_test_refuses_leaves_the_repository_as_it_was(line: Line) -> None:
    def files() -> set[str]:
        return {str(path) for path in (line.root / "up").rglob("*") if path.is_file()}

    before = files()
    # Level 200 is the golden defect.
    with pytest.raises(ReleaseError, match="to alarm as before"):
        run("add-normal", "up", "part", line.pictures("wrong", 200), *line.judged())
    assert files() == before
    assert run("rollout", "up", "part", "--percent", 100)["release"] == 1


def test_a_picture_that_is_held_out_is_not_taught(line: Line) -> None:
    with pytest.raises(InputError, match="held-out"):
        run("add-normal", "up", "part", line.held_out, *line.judged())


def test_nothing_new_is_said_and_not_released(line: Line) -> None:
    known = line.tiny.frame(103)
    known[:4, :4] = 102
    (line.pictures("same") / "known.png").write_bytes(encode_png(known))
    with pytest.raises(InputError, match="does not know yet"):
        run("add-normal", "up", "part", line.root / "same", *line.judged())


def test_a_defect_needs_a_detector_with_a_bank_of_defects(line: Line) -> None:
    with pytest.raises(InputError, match="anomalous rows"):
        run("add-anomaly", "up", "part", line.defects / "30.png", *line.judged())


def test_a_sentence_needs_a_bundle_with_a_normality_detector(line: Line) -> None:
    with pytest.raises(BundleError, match="with-normality"):
        run("add-normality", "up", "part", "thread", "--class", "carpet")


def test_a_flow_needs_a_first_release(line: Line) -> None:
    run("add-product", "up", "tile")
    with pytest.raises(InputError, match="release it first"):
        run("add-normal", "up", "tile", line.new, *line.judged())


def with_defects(tiny: Any, path: Path, pack: Any, spec: Any) -> Path:
    """The tiny detector with a bank of defects beside the normal one; its head adds nought times that to the score."""
    import onnx
    from onnx import TensorProto, helper

    from edgead.runtime.bundle import golden_files, write_bundle
    from edgead.runtime.spec import EngineRecord

    head = onnx.load_from_string(tiny.head_graph())
    for node in head.graph.node:
        node.output[:] = ["far" if name == "score" else name for name in node.output]
    head.graph.node.extend(
        [
            helper.make_node("Cast", ["bank.anomalous.rows"], ["defects"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["bank.anomalous"], ["sum"], keepdims=0),
            helper.make_node("Add", ["sum", "defects"], ["both"]),
            helper.make_node("Mul", ["both", "nought"], ["none"]),
            helper.make_node("Add", ["far", "none"], ["score"]),
        ]
    )
    value = helper.make_tensor_value_info
    head.graph.input.append(value("bank.anomalous", TensorProto.FLOAT, ["M", 3]))
    head.graph.input.append(value("bank.anomalous.rows", TensorProto.INT32, [1]))
    golden, pictures = golden_files(np.stack([tiny.frame(), tiny.frame(200)]), [0.0, 97.0], [False, True])
    graphs = {"e/trunk.onnx": tiny.trunk_graph(), "e/head.onnx": head.SerializeToString()}
    engine = EngineRecord("onnx-fp32", "onnx", "fp32", "e/trunk.onnx", "e/head.onnx", "a test")
    write_bundle(
        path,
        name="dented",
        detector=spec,
        engines=[engine],
        packs={pack.product: pack},
        golden=golden,
        files=graphs | pictures,
    )
    return path


def test_a_defect_becomes_rows_of_the_anomalous_bank_on_the_pilot_cameras(
    line: Line, tiny: Any, tmp_path: Path
) -> None:
    import msgspec

    from edgead.runtime.spec import KnowledgePort, Preprocessing
    from edgead.server_side.ota.publish import load_pack
    from edgead.server_side.ota.repository import opened

    spec = tiny.detector(Preprocessing(16, 16, rotate=180))
    port = KnowledgePort("bank.anomalous", "float32", ("M", 3), rows="bank.anomalous.rows", empty_ok=True)
    spec = msgspec.structs.replace(spec, knowledge=(*spec.knowledge, port))
    pack = new_pack(
        product="dented",
        fingerprint=spec.fingerprint,
        calibration=Calibration(threshold=30.0, map_threshold=30.0, typical=4.0, false_alarm_rate=0.05),
        arrays={"bank.normal": line.first.arrays["bank.normal"], "bank.anomalous": np.zeros((0, 3), np.float32)},
    )
    run("add-product", "up", "dented")
    run("publish", "up", with_defects(tiny, tmp_path / "dented.edgead", pack, spec))
    run("release", "up", "dented")
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[4:8, 4:8] = 255
    (tmp_path / "dent.png").write_bytes(encode_png(mask))
    picture = line.pictures("missed", 31) / "31.png"
    done = run("add-anomaly", "up", "dented", picture, "--mask", tmp_path / "dent.png", *line.judged())
    assert done["added"] == {"bank.anomalous": 1}
    with opened(line.root / "up", (line.root / "keys" / "root.json").read_bytes()) as repository:
        taught = load_pack(repository, "dented", done["pack"])
    assert taught.arrays["bank.anomalous"].tolist() == [[31.0] * 3]
    # The thresholds were set anew for this one too, and came out as they were.
    other = line.pictures("missed-too", 33) / "33.png"
    again = run("add-anomaly", "up", "dented", other, "--mask", tmp_path / "dent.png", *line.judged())
    assert (again["release"], again["threshold"][0]) == (3, again["threshold"][1])


@pytest.mark.slow
def test_a_sentence_becomes_a_signed_release_of_kilobytes(
    line: Line, normality_pair: Any, tmp_path: Path, helpers: dict[str, Any]
) -> None:
    pytest.importorskip("open_clip")
    from edgead.exporter.export import export_bundle
    from edgead.server_side.detectors import normality
    from edgead.server_side.detectors.projections import new_projections, write_projections
    from edgead.server_side.ota.serve import serving
    from edgead.server_side.vision_language import load_model
    from edgead.server_side.vision_language.options import VisionLanguageOptions

    sizes = {"layers": 4, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0, "image_size": 48}
    words = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = tmp_path / "clip.json"
    config.write_text(json.dumps({"embed_dim": 32, "vision_cfg": sizes, "text_cfg": words}))
    options = VisionLanguageOptions(model=str(config), weights="random:3", class_name="carpet")
    model = load_model(options.model, options.weights)
    projections = tmp_path / "projections.safetensors"
    write_projections(
        projections, new_projections((2, 4), (32, 32), 32, seed=1), model=model.name, weights=model.weights_sha256
    )
    learned = normality.learn([], dataclasses.replace(options, projections=projections))
    second = learned.write(tmp_path / "normality.detector")
    bundle = export_bundle(normality_pair.base(), tmp_path / "carpet.edgead", ["onnx"], normality=second)
    run("add-product", "up", "carpet")
    run("publish", "up", bundle.path)
    run("release", "up", "carpet")
    goldens = [f"--now-normal={record.path}" for record in bundle.manifest.golden if record.anomalous]
    done = run("add-normality", "up", "carpet", "thread", "--class", "carpet", "--model", config, *goldens)
    assert (done["release"], done["groups"]) == (2, ["pilot"])
    assert done["threshold"][0] == done["threshold"][1]
    assert done["delta_bytes"] < 2500
    with serving(line.root / "up") as server:
        camera = helpers["Device"](line.root / "camera", server.url, (line.root / "keys" / "root.json").read_bytes())
        base = bundle.pack("carpet")
        delta = camera.fetch(f"knowledge/carpet/{base.digest}-{done['pack']}.delta")
        assert apply_delta(base, delta).digest == done["pack"]
        assert decode_release(camera.fetch("releases/carpet/2.json")).notes == "normal from now on: thread"
    with pytest.raises((InputError, KnowledgeError), match="does not have yet"):
        run("add-normality", "up", "carpet", "thread", "--class", "carpet", "--model", config)
