"""`edgead knowledge` on real engines: rows are followed to their photographs, thresholds go with every change."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgead.cli import cli
from edgead.runtime.bundle import open_bundle
from edgead.runtime.chain import read_chain
from edgead.runtime.errors import EdgeadError, InputError, KnowledgeError, OutputExistsError, PinError
from edgead.runtime.image import encode_png, prepare, read_image
from edgead.runtime.inspection import Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import new_pack, read_pack, write_pack
from edgead.runtime.provenance import check_provenance, decode_provenance
from edgead.runtime.provenance_file import provenance_beside, provenance_path, write_provenance
from edgead.runtime.spec import Calibration, DetectorSpec, KnowledgePort, Port, Preprocessing, Region, Tiling
from edgead.server_side import knowledge_view
from edgead.server_side.coreset import coreset_order, farthest_first
from edgead.server_side.knowledge_merge import Caps, capped
from edgead.server_side.knowledge_rows import feature_of
from edgead.server_side.sources import Origins, patch_places, provenance_of, source_image

Edgead = Callable[..., Any]


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    """The tiny detector of the light room's tests: a patch is the mean colour of 4 x 4 pixels."""
    path = Path(__file__).parents[1] / "runtime" / "tiny.py"
    spec = importlib.util.spec_from_file_location("edgead_tests_tiny_tools", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Plant:
    """A bundle of a part of grey level 100, and folders of pictures."""

    def __init__(self, root: Path, tiny: ModuleType) -> None:
        self.root, self.tiny = root, tiny
        calibration = Calibration(threshold=30.0, map_threshold=30.0, typical=4.0, false_alarm_rate=0.05)
        pack = new_pack(
            product="part",
            fingerprint=tiny.detector().fingerprint,
            calibration=calibration,
            arrays={"bank.normal": np.array([[100.0] * 3, [103.0] * 3], np.float32)},
        )
        self.bundle = tiny.bundle(root / "part.bundle", [pack]).path
        self.held_out = self.pictures("held-out", *range(97, 107), 151, 152, 153)
        self.defects = self.pictures("defects", 200, 210, 30)
        self.new = self.pictures("new", 150, 154)

    def pictures(self, folder: str, *levels: int) -> Path:
        place = self.root / folder
        place.mkdir(exist_ok=True)
        for level in levels:
            (place / f"{level}.png").write_bytes(encode_png(self.tiny.frame(level)))
        return place

    def judged(self) -> tuple[str, ...]:
        return ("--held-out", str(self.held_out), "--defects", str(self.defects))

    def add(self, edgead: Edgead, output: str = "new.delta", *words: Any) -> Any:
        return edgead("add", self.bundle, "--normal", self.new, *self.judged(), "-o", self.root / output, *words)


@pytest.fixture
def plant(tmp_path: Path, tiny: ModuleType) -> Plant:
    return Plant(tmp_path, tiny)


@pytest.fixture
def edgead(capsys: pytest.CaptureFixture[str]) -> Edgead:
    """Run `edgead knowledge WORDS`; the JSON that it prints, or its text if --json is among the words not."""

    def run(*words: Any, text: bool = False) -> Any:
        capsys.readouterr()
        cli.main(["knowledge", *map(str, words), *([] if text else ["--json"])], "edgead", standalone_mode=False)
        out = capsys.readouterr().out
        return out if text else json.loads(out)

    return run


def test_a_new_pattern_becomes_few_rows_and_a_threshold_and_both_figures_are_told(plant: Plant, edgead: Edgead) -> None:
    done = plant.add(edgead)
    assert done["added"] == {"bank.normal": 2}
    assert done["false_alarms"] == {"pictures": 13, "before": 3, "after": 0}
    assert done["misses"] == {"pictures": 3, "before": 0, "after": 0}
    assert done["threshold"][0] == 30.0
    assert done["threshold"][1] < 30.0
    found = read_chain(open_bundle(plant.bundle), [plant.root / "new.delta"])["part"]
    assert found.digest == done["result"]
    assert found.calibration.held_out == 13
    assert np.array_equal(found.arrays["bank.normal"][:2], [[100.0] * 3, [103.0] * 3])
    with Inspector(plant.bundle, packs=[found]) as inspector:
        assert inspector.inspect(plant.tiny.frame(152)).verdict is Verdict.OK
        assert inspector.inspect(plant.tiny.frame(200)).verdict is Verdict.NG


def test_the_text_says_what_changed(plant: Plant, edgead: Edgead) -> None:
    words = ("add", plant.bundle, "--normal", plant.new, *plant.judged(), "-o", plant.root / "new.delta")
    text = edgead(*words, text=True)
    assert "2 added, 0 removed, 4 rows now" in text
    assert "false alarms 3 -> 0 of 13 held-out normals, misses 0 -> 0 of 3 known defects" in text
    assert "threshold        30 -> " in text
    assert text.endswith(f"PICTURES --knowledge {plant.root / 'new.delta'}\n")
    after = ("remove", plant.bundle, "--knowledge", plant.root / "new.delta", "--row", 4, *plant.judged())
    assert "new.delta --knowledge" in edgead(*after, "-o", plant.root / "less.delta", text=True)


def test_a_row_is_followed_to_its_photograph_and_patch(plant: Plant, edgead: Edgead) -> None:
    picture = plant.tiny.frame(100)
    picture[4:8, 12:16] = 180  # the patch in the second row and the last column
    (plant.new / "spot.png").write_bytes(encode_png(picture))
    plant.add(edgead, "new.safetensors")
    pack = read_pack(plant.root / "new.safetensors")
    row = int(pack.ids("bank.normal")[int(pack.arrays["bank.normal"][:, 0].argmax())])
    found = edgead("trace", plant.root / "new.safetensors", row, "--photos", plant.new)
    assert found["image"] == "spot.png"
    assert found["sha256"] == source_image(plant.new / "spot.png").sha256
    assert found["file"] == str(plant.new / "spot.png")
    assert (found["tile"], found["x"], found["y"]) == (0, 3, 1)
    assert found["model"] == plant.tiny.detector().fingerprint
    assert found["pin"] is None
    assert found["pixels"] is None
    words = ("trace", plant.root / "new.safetensors", row, "--photos", plant.new, "--bundle", plant.bundle)
    assert edgead(*words)["pixels"] == [12, 4, 4, 4]
    assert "4 x 4 pixels at 12,4" in edgead(*words, text=True)
    assert edgead("trace", plant.root / "new.safetensors", 1)["image"] is None
    assert "x 3, y 1 of tile 0" in edgead("trace", plant.root / "new.safetensors", row, text=True)
    with pytest.raises(InputError, match="none has"):
        edgead("trace", plant.root / "new.safetensors", 99)
    with pytest.raises(InputError, match="provenance"):
        edgead("trace", plant.bundle, 1)


def test_nothing_new_is_told_and_nothing_is_written(plant: Plant, edgead: Edgead) -> None:
    again = plant.pictures("again", 101)
    (again / "101.png").write_bytes(encode_png(plant.tiny.frame(101, size=(32, 32))))
    with pytest.raises(InputError, match="does not know yet"):
        edgead("add", plant.bundle, "--normal", again, *plant.judged(), "-o", plant.root / "x.delta")
    assert not list(plant.root.glob("x.delta*"))


def test_without_held_out_pictures_no_bank_is_changed(plant: Plant, edgead: Edgead) -> None:
    for words in (("add", plant.bundle, "--normal", plant.new), ("remove", plant.bundle, "--row", 1)):
        with pytest.raises(InputError, match="--held-out"):
            edgead(*words, "-o", plant.root / "x.delta")
    one = plant.pictures("one", 99)
    with pytest.raises(InputError, match="at least 2"):
        edgead("remove", plant.bundle, "--row", 1, "--held-out", one, "-o", plant.root / "x.delta")


def test_a_held_out_picture_that_is_taught_is_refused_by_its_content(plant: Plant, edgead: Edgead) -> None:
    (plant.held_out / "other-name.png").write_bytes((plant.new / "150.png").read_bytes())
    with pytest.raises(InputError, match="other-name"):
        plant.add(edgead)
    (plant.held_out / "other-name.png").unlink()
    plant.add(edgead)
    (plant.held_out / "other-name.png").write_bytes((plant.new / "154.png").read_bytes())
    with pytest.raises(InputError, match="other-name"):
        edgead(
            "remove", plant.bundle, "--knowledge", plant.root / "new.delta", "--row", 1,
            *plant.judged(), "-o", plant.root / "x.delta",
        )  # fmt: skip


def test_what_a_picture_taught_is_forgotten_and_its_ids_are_never_used_again(plant: Plant, edgead: Edgead) -> None:
    first = plant.add(edgead)
    assert first["next_id"] == 5
    chain = ("--knowledge", plant.root / "new.delta")
    gone = edgead(
        "remove", plant.bundle, *chain, "--source", plant.new / "150.png",
        *plant.judged(), "-o", plant.root / "gone.delta",
    )  # fmt: skip
    assert gone["removed"] == {"bank.normal": 1}
    assert gone["next_id"] == 5
    record = provenance_beside(plant.root / "gone.delta")
    assert record is not None
    assert [image.name for image in record.images] == ["154.png"]
    named = edgead(
        "remove", plant.bundle, *chain, "--source", "154.png", *plant.judged(), "-o", plant.root / "named.delta"
    )
    assert named["removed"] == {"bank.normal": 1}
    chain = (*chain, "--knowledge", plant.root / "gone.delta")
    with pytest.raises(InputError, match="none among"):
        edgead("remove", plant.bundle, *chain, "--source", "150.png", *plant.judged(), "-o", plant.root / "x.delta")
    more = plant.pictures("more", 130)
    again = edgead("add", plant.bundle, *chain, "--normal", more, *plant.judged(), "-o", plant.root / "again.delta")
    assert again["next_id"] == 6
    pack = read_chain(open_bundle(plant.bundle), [plant.root / f"{name}.delta" for name in ("new", "gone", "again")])
    assert int(pack["part"].ids("bank.normal")[-1]) == 5


def test_forget_this_takes_the_rows_that_are_like_a_picture(plant: Plant, edgead: Edgead) -> None:
    plant.add(edgead)
    words = ("remove", plant.bundle, "--knowledge", plant.root / "new.delta", *plant.judged())
    picture = plant.root / "like.png"
    picture.write_bytes(encode_png(plant.tiny.frame(149)))
    near = edgead(*words, "--like", picture, "--radius", 20, "-o", plant.root / "radius.delta")
    assert near["removed"] == {"bank.normal": 2}
    assert near["false_alarms"]["after"] == 0  # the threshold follows the pictures that are held out
    counted = edgead(*words, "--like", picture, "--count", 1, "-o", plant.root / "count.safetensors")
    assert counted["removed"] == {"bank.normal": 1}
    assert read_pack(plant.root / "count.safetensors").arrays["bank.normal"][:, 0].tolist() == [100.0, 103.0, 154.0]
    with pytest.raises(InputError, match="nearest one"):
        edgead(*words, "--like", picture, "--radius", 0.1, "-o", plant.root / "x.delta")


def test_of_a_masked_picture_only_what_is_marked_is_forgotten(plant: Plant, edgead: Edgead) -> None:
    frame, mask = plant.tiny.frame(100), np.zeros((16, 16, 3), np.uint8)
    frame[:4, :4], mask[:4, :4] = 103, 255
    (plant.root / "like.png").write_bytes(encode_png(frame))
    (plant.root / "mask.png").write_bytes(encode_png(mask))
    words = ("remove", plant.bundle, *plant.judged(), "--like", plant.root / "like.png", "--radius", 1)
    edgead(*words, "--mask", plant.root / "mask.png", "-o", plant.root / "x.safetensors")
    assert read_pack(plant.root / "x.safetensors").arrays["bank.normal"].tolist() == [[100.0] * 3]
    with pytest.raises(KnowledgeError, match="at least 1 rows"):
        edgead(*words, "-o", plant.root / "y.safetensors")  # the bank would be empty, and the head needs a row


def test_rows_of_ones_own_are_added_as_they_are(plant: Plant, edgead: Edgead) -> None:
    path = plant.root / "rows.npy"
    np.save(path, np.array([[150.0, 150.0, -0.0], [1.0, 2.0, 3.0]]))
    done = edgead("add", plant.bundle, "--rows", path, *plant.judged(), "-o", plant.root / "rows.safetensors")
    assert done["added"] == {"bank.normal": 2}
    pack = read_pack(plant.root / "rows.safetensors")
    assert pack.arrays["bank.normal"][2:].tolist() == [[150.0, 150.0, 0.0], [1.0, 2.0, 3.0]]
    found = edgead("trace", plant.root / "rows.safetensors", 4)
    assert (found["image"], found["tile"], found["x"]) == ("rows.npy", -1, 1)
    for bad in (np.zeros((2, 4), np.float32), np.zeros(3, np.float32), np.full((1, 3), np.nan), np.zeros((2, 3), int)):
        np.save(path, bad)
        with pytest.raises(InputError):
            edgead("add", plant.bundle, "--rows", path, *plant.judged(), "-o", plant.root / "x.delta")
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(InputError, match=r"\.npy"):
        edgead("add", plant.bundle, "--rows", path, *plant.judged(), "-o", plant.root / "x.delta")


def test_deltas_are_applied_with_their_provenance_and_packs_compared(plant: Plant, edgead: Edgead) -> None:
    done = plant.add(edgead)
    whole = plant.root / "whole.safetensors"
    applied = edgead("apply", plant.bundle, plant.root / "new.delta", "-o", whole)
    assert applied["result"] == done["result"]
    record = provenance_beside(whole)
    assert record is not None
    check_provenance(read_pack(whole), record)
    found = edgead("diff", plant.bundle, whole)
    assert found["banks"] == {"bank.normal": {"added": 2, "removed": 0, "rewritten": 0, "rows": [2, 4]}}
    assert found["images"] == {"added": ["150.png", "154.png"], "removed": []}
    assert found["delta_bytes"] == (plant.root / "new.delta").stat().st_size
    assert found["calibration"]["held_out"] == [0, 13]
    assert "bank.normal" in edgead("diff", plant.bundle, whole, text=True)
    assert "the same knowledge" in edgead("diff", whole, whole, text=True)
    with pytest.raises(InputError, match="Apply it first"):
        edgead("show", plant.root / "new.delta")
    again = edgead("apply", whole, plant.root / "new.delta", "-o", plant.root / "again.safetensors")
    assert again["result"] == done["result"]
    with pytest.raises(InputError, match="safetensors"):
        edgead("apply", plant.bundle, plant.root / "new.delta", "-o", plant.root / "x.delta")
    with pytest.raises(KnowledgeError, match="order"):
        edgead("apply", other_pack(plant, {1: 5.0}), plant.root / "new.delta", "-o", plant.root / "x.safetensors")


def test_show_tells_rows_sources_and_signature(plant: Plant, edgead: Edgead) -> None:
    plant.add(edgead, "new.safetensors")
    found = edgead("show", plant.root / "new.safetensors")
    assert found["banks"]["bank.normal"]["rows"] == 4
    assert found["banks"]["bank.normal"]["known_sources"] == 2
    assert found["provenance"]["next_id"] == 5
    assert found["pin"] is None
    assert edgead("show", plant.bundle)["provenance"] is None
    text = edgead("show", plant.root / "new.safetensors", text=True)
    assert "1-4" in text
    assert "provenance: 2 images" in text


def a_key(folder: Path, name: str, passphrase: bytes | None = None) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    how = form.NoEncryption() if passphrase is None else form.BestAvailableEncryption(passphrase)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, how))
    info = form.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, info))
    return private, public


def test_a_pack_is_signed_and_verified_and_no_other_passes_for_it(
    plant: Plant, edgead: Edgead, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.add(edgead, "new.safetensors")
    pack = plant.root / "new.safetensors"
    private, public = a_key(plant.root, "quality", b"tulip")
    _, foreign = a_key(plant.root, "foreign")
    with pytest.raises(InputError, match="passphrase"):
        edgead("sign", pack, "--key", private, "--signer", "Anna")
    monkeypatch.setenv("EDGEAD_KEY_PASSPHRASE", "tulip")
    said = edgead("sign", pack, "--key", private, "--signer", "Anna, quality")
    assert edgead("verify", pack)["signature"] == "not checked"
    assert "NOT CHECKED" in edgead("verify", pack, text=True)
    found = edgead("verify", pack, "--key", public)
    assert found["signature"] == "checked"
    assert found["root"] == said["root"]
    assert edgead("trace", pack, 3)["pin"]["signer"] == "Anna, quality"
    with pytest.raises(PinError, match="trusted"):
        edgead("verify", pack, "--key", foreign)
    with pytest.raises(PinError, match="signature"):
        edgead("verify", pack, "--key", foreign, "--key-id", said["kid"])
    other = plant.root / "other.safetensors"
    plant.add(edgead, "other.safetensors", "--most", 1)
    with pytest.raises(PinError):
        edgead("verify", other, "--pin", pack.with_name("new.safetensors.pin"), "--key", public)
    pin = pack.with_name("new.safetensors.pin")
    pin.write_bytes(pin.read_bytes().replace(b"Anna", b"Otto"))
    with pytest.raises(PinError, match="signature"):
        edgead("verify", pack, "--key", public)


def test_a_bundle_without_provenance_can_be_signed_and_says_that_no_source_is_known(
    plant: Plant, edgead: Edgead
) -> None:
    private, public = a_key(plant.root, "quality")
    text = edgead("sign", plant.bundle, "--key", private, "--signer", "Anna", text=True)
    assert "no source of its 2 rows is known" in text
    found = edgead("verify", plant.bundle, "--key", public)
    assert (found["signature"], found["known_sources"], found["rows"]) == ("checked", 0, 2)


def test_an_edited_pack_is_not_the_one_of_its_provenance(plant: Plant, edgead: Edgead) -> None:
    plant.add(edgead, "new.safetensors")
    pack = read_pack(plant.root / "new.safetensors")
    arrays = {**pack.arrays, "bank.normal": pack.arrays["bank.normal"] + np.float32([0, 0, 1e-3])}
    edited = new_pack(product=pack.product, fingerprint=pack.fingerprint, calibration=pack.calibration, arrays=arrays)
    write_pack(plant.root / "new.safetensors", edited, force=True)
    with pytest.raises(KnowledgeError, match="row 1"):
        edgead("verify", plant.root / "new.safetensors")


def test_outputs_are_not_overwritten_by_chance_and_an_old_pin_does_not_stay(plant: Plant, edgead: Edgead) -> None:
    plant.add(edgead, "new.safetensors")
    private, _ = a_key(plant.root, "quality")
    edgead("sign", plant.root / "new.safetensors", "--key", private, "--signer", "Anna")
    with pytest.raises(OutputExistsError):
        plant.add(edgead, "new.safetensors")
    plant.add(edgead, "new.safetensors", "--force")
    assert not (plant.root / "new.safetensors.pin").exists()
    assert not [path for path in plant.root.iterdir() if path.name.endswith(".part")]


def other_pack(plant: Plant, rows: dict[int, float]) -> Path:
    path = plant.root / "line-2.safetensors"
    arrays = {
        "bank.normal": np.array([[level] * 3 for level in rows.values()], np.float32),
        "bank.normal.ids": np.array(list(rows), np.uint64),
    }
    fingerprint = plant.tiny.detector().fingerprint
    calibration = Calibration(threshold=30.0)
    write_pack(path, new_pack(product="part", fingerprint=fingerprint, calibration=calibration, arrays=arrays))
    return path


def test_packs_are_merged_and_rows_keep_their_ids_where_they_can(plant: Plant, edgead: Edgead) -> None:
    other = other_pack(plant, {1: 100.0, 2: 150.0, 7: 120.0})
    done = edgead("merge", plant.bundle, other, *plant.judged(), "-o", plant.root / "both.safetensors")
    both = read_pack(plant.root / "both.safetensors")
    # Row 1 is the same in both, row 2 another one: it gets an id that neither ever had.
    assert dict(zip(both.ids("bank.normal").tolist(), both.arrays["bank.normal"][:, 0].tolist(), strict=True)) == {
        1: 100.0,
        2: 103.0,
        7: 120.0,
        8: 150.0,
    }
    assert done["next_id"] == 9
    assert done["false_alarms"] == {"pictures": 13, "before": 3, "after": 0}
    assert "1 rows of the other pack got new ids" in done["notes"]


def test_merged_rows_bring_their_sources(plant: Plant, edgead: Edgead) -> None:
    plant.add(edgead, "new.safetensors")
    edgead("merge", plant.bundle, plant.root / "new.safetensors", *plant.judged(), "-o", plant.root / "b.safetensors")
    assert edgead("trace", plant.root / "b.safetensors", 3)["image"] in ("150.png", "154.png")


def test_over_a_cap_a_coreset_stands_for_the_rows(plant: Plant, edgead: Edgead) -> None:
    spread = {number: 100.0 + number for number in range(10, 60)}
    other = other_pack(plant, spread)
    words = ("merge", plant.bundle, other, *plant.judged())
    few = edgead(*words, "--most-rows", 6, "-o", plant.root / "few.safetensors")
    assert few["rows"] == {"bank.normal": 6}
    kept = read_pack(plant.root / "few.safetensors")
    assert {int(number) for number in kept.ids("bank.normal")} <= {1, 2, *spread}
    levels = np.sort(kept.arrays["bank.normal"][:, 0])
    assert levels[0] == 100.0
    assert levels[-1] == 159.0
    assert np.diff(levels).max() <= 20  # evenly spread over what there was
    size = 1200
    small = edgead(*words, "--most-bytes", size, "-o", plant.root / "small.safetensors")
    assert small["bytes"] <= size
    assert small["rows"]["bank.normal"] >= 4
    with pytest.raises(InputError, match="larger cap"):
        edgead(*words, "--most-bytes", 100, "-o", plant.root / "x.safetensors")
    with pytest.raises(InputError, match="not for the rows"):
        edgead(*words, "--most-ms", 1e-6, "-o", plant.root / "x.safetensors")
    quick = edgead(*words, "--most-ms", 10_000, "-o", plant.root / "quick.safetensors")
    assert quick["rows"] == {"bank.normal": 52}


def test_only_packs_of_one_feature_space_are_merged(plant: Plant, edgead: Edgead) -> None:
    path = plant.root / "foreign.safetensors"
    arrays = {"bank.normal": np.zeros((1, 3), np.float32)}
    write_pack(path, new_pack(product="part", fingerprint="f" * 64, calibration=Calibration(1.0), arrays=arrays))
    with pytest.raises(KnowledgeError, match="same detector"):
        edgead("merge", plant.bundle, path, *plant.judged(), "-o", plant.root / "x.safetensors")


@pytest.mark.parametrize(
    "words",
    [
        ("add",),
        ("add", "--normal", "x", "--rows", "y"),
        ("remove",),
        ("remove", "--row", "1", "--source", "x"),
        ("remove", "--row", "1", "--count", "2"),
        ("remove", "--like", "x.png", "--count", "2", "--radius", "1"),
        ("remove", "--row", "77"),
        ("remove", "--source", "unknown.png"),
        ("add", "--normal", "nowhere"),
        ("add", "--anomalous", "nowhere"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(plant: Plant, edgead: Edgead, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        edgead(words[0], plant.bundle, *words[1:], *plant.judged(), "-o", plant.root / "x.delta")
    assert caught.value.next_step
    assert not list(plant.root.glob("x.delta*"))


def test_a_record_of_other_rows_under_the_same_ids_says_nothing(tiny: ModuleType) -> None:
    one, other = tiny.pack([[1.0, 2.0, 3.0]]), tiny.pack([[4.0, 5.0, 6.0]])
    known = provenance_of(one, fingerprint=one.fingerprint)
    bank = known.banks["bank.normal"]
    assert np.array_equal(provenance_of(one, fingerprint=one.fingerprint, before=[known]).banks[
        "bank.normal"].leaves, bank.leaves)  # fmt: skip
    assert provenance_of(other, fingerprint=other.fingerprint, before=[known]).banks["bank.normal"].images[0] == -1


def test_every_row_of_a_fit_is_the_patch_that_its_provenance_names(
    small_detector: Path, small_bundle: Path, painted_normals: Path
) -> None:
    record = provenance_beside(small_detector)
    assert record is not None
    pack = open_bundle(small_bundle).pack("part")
    check_provenance(pack, record)
    bank = record.banks["bank.normal"]
    assert (bank.images >= 0).all()
    with Inspector(small_bundle, target="onnx") as inspector:
        for row in range(0, len(bank.ids), 17):
            image = record.image_of("bank.normal", row)
            assert image is not None
            patches = inspector.embed(read_image(painted_normals / image.name))["patches"]
            tile, x, y = bank.places[row]
            side = round(patches.shape[1] ** 0.5)
            assert np.allclose(patches[tile, y * side + x], pack.arrays["bank.normal"][row], atol=1e-3)


def test_a_marked_defect_becomes_rows_of_the_anomalous_bank_and_scores_higher(
    small_bundle: Path, painted_normals: Path, tmp_path: Path, edgead: Edgead
) -> None:
    from edgead.server_side.painting import paint_defect
    from edgead.server_side.painting_parts import paint_part

    rng = np.random.default_rng(5)
    good, bad = tmp_path / "held-out", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    for index in range(6):
        (good / f"{index}.png").write_bytes(encode_png(paint_part("flange", rng=rng, size=96).image))
    defect, mask = paint_defect(read_image(painted_normals / "000.png"), "stain", contrast=0.9, rng=rng)
    (bad / "dent.png").write_bytes(encode_png(defect))
    (bad / "dent_mask.png").write_bytes(encode_png(np.repeat(mask.astype(np.uint8)[..., None] * 255, 3, axis=2)))
    output = tmp_path / "dent.safetensors"
    done = edgead("add", small_bundle, "--anomalous", bad, "--held-out", good, "--target", "onnx", "-o", output)
    assert done["added"].keys() == {"bank.anomalous"}
    pack = read_pack(output)
    with Inspector(small_bundle, target="onnx") as inspector:
        before = inspector.inspect(defect).score
        inspector.swap(pack)
        after = inspector.inspect(defect).score
    assert after > before
    row = int(pack.ids("bank.anomalous")[0])
    assert edgead("trace", output, row)["image"] == "dent.png"
    (bad / "dent_mask.png").unlink()
    unmarked = tmp_path / "unmarked.safetensors"
    words = ("add", small_bundle, "--anomalous", bad, "--held-out", good, "--target", "onnx")
    assert edgead(*words, "-o", unmarked)["added"]["bank.anomalous"] >= 1


def test_the_tools_work_where_torch_is_not_installed(plant: Plant) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'torchvision', 'sklearn', 'timm', 'open_clip', 'onnx'):
            raise ModuleNotFoundError('refused: ' + name, name=name)
sys.meta_path.insert(0, Refuse())
from edgead.cli import main
main(sys.argv[1:])
"""
    words = ["knowledge", "add", plant.bundle, "--normal", plant.new, *plant.judged(), "-o", plant.root / "n.delta"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "2 added" in done.stdout


def test_a_coreset_covers_its_rows_and_alike_rows_fill_it_up() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, (400, 80)).astype(np.float32)
    chosen = coreset_order(rows, 40)
    assert len(set(chosen.tolist())) == 40
    assert np.array_equal(coreset_order(rows, 10), chosen[:10])
    rows[::40] += 50 * rng.normal(0, 1, (10, 80)).astype(np.float32)  # ten rows that are like no other
    assert set(range(0, 400, 40)) <= set(coreset_order(rows, 12).tolist())
    assert sorted(coreset_order(np.ones((50, 3), np.float32), 7).tolist()) == list(range(7))
    assert farthest_first(rows[:0], 5).tolist() == []
    line = np.arange(11, dtype=np.float32)[:, None]
    assert set(farthest_first(line, 3).tolist()) == {0, 5, 10}
    assert len(farthest_first(line, 100, within=2.5)) < 8


def a_spec(features: dict[str, int], banks: dict[str, int]) -> DetectorSpec:
    return DetectorSpec(
        contract=1,
        method="x",
        preprocessing=Preprocessing(16, 16),
        features=tuple(Port(name, "float32", ("B", 16, size)) for name, size in features.items()),
        knowledge=tuple(KnowledgePort(name, "float32", ("N", size)) for name, size in banks.items()),
        outputs=(),
        fingerprint="0" * 64,
    )


@pytest.mark.parametrize(
    ("features", "bank", "size", "wanted"),
    [
        ({"patches": 8}, "bank.normal", 8, "patches"),
        ({"windows.2": 8, "windows.3": 8, "patches": 8}, "bank.patches", 8, "patches"),
        ({"windows.2": 8, "windows.3": 8}, "bank.anomalous.3", 8, "windows.3"),
        ({"layer.6": 4, "tokens.6": 8, "layer.12": 4, "tokens.12": 8}, "bank.layer.6", 8, "tokens.6"),
        # Of one dimension, both could be meant: rows of the wrong one would poison the bank.
        ({"layer.6": 8, "tokens.6": 8}, "bank.layer.6", 8, None),
        ({"patches": 8}, "bank.normal", 9, None),
    ],
)
def test_a_bank_gets_rows_of_its_own_feature_or_none(
    features: dict[str, int], bank: str, size: int, wanted: str | None
) -> None:
    spec = a_spec(features, {bank: size})
    if wanted is None:
        with pytest.raises(InputError, match="--rows"):
            feature_of(spec, bank)
    else:
        assert feature_of(spec, bank) == wanted


def test_rows_that_an_engine_of_fixed_shapes_has_no_room_for_are_refused(
    small_detector: Path, painted_normals: Path, tmp_path: Path, edgead: Edgead
) -> None:
    from edgead.exporter.export import export_bundle

    bundle = export_bundle(small_detector, tmp_path / "full.bundle", ["onnx", "tensorrt"], capacity=100).path
    rows = tmp_path / "rows.npy"
    np.save(rows, open_bundle(bundle).pack("part").arrays["bank.normal"][:2] + 1)
    words = ("--rows", rows, "--bank", "bank.normal", "--held-out", painted_normals, "--target", "onnx")
    with pytest.raises(KnowledgeError, match="capacity"):
        edgead("add", bundle, *words, "-o", tmp_path / "x.delta")


@pytest.mark.parametrize("name", ["new.safetensors.provenance", "new.safetensors.pin"])
def test_damaged_files_beside_a_pack_are_typed_errors(plant: Plant, edgead: Edgead, name: str) -> None:
    plant.add(edgead, "new.safetensors")
    (plant.root / name).write_bytes(b"\xff" * 100)
    with pytest.raises(EdgeadError, match=name):
        edgead("show", plant.root / "new.safetensors")


def test_a_record_survives_its_file(plant: Plant, edgead: Edgead) -> None:
    plant.add(edgead, "new.safetensors")
    path = provenance_path(plant.root / "new.safetensors")
    data = path.read_bytes()
    write_provenance(path, decode_provenance(data))
    assert path.read_bytes() == data


def test_a_time_that_half_the_rows_keep_is_kept_by_half_the_rows(tiny: ModuleType) -> None:
    # A clock of one millisecond for each row stands in for the engine, whose time no test can foretell.
    levels = np.arange(100, dtype=np.float32)
    pack = tiny.pack([[level] * 3 for level in levels])
    small = capped(pack, Caps(milliseconds=50.0), lambda tried: float(len(tried.ids("bank.normal"))))
    assert 45 <= len(small.ids("bank.normal")) <= 50
    assert np.diff(small.arrays["bank.normal"][:, 0]).max() <= 4


def test_ids_of_rows_that_were_forgotten_are_not_given_to_merged_rows(plant: Plant, edgead: Edgead) -> None:
    plant.add(edgead)
    gone = ("remove", plant.bundle, "--knowledge", plant.root / "new.delta", "--source", "150.png", *plant.judged())
    edgead(*gone, "-o", plant.root / "gone.safetensors")
    other = other_pack(plant, {3: 120.0, 4: 121.0})
    words = ("merge", plant.bundle, other, "--knowledge", plant.root / "gone.safetensors", *plant.judged())
    edgead(*words, "-o", plant.root / "both.safetensors")
    both = read_pack(plant.root / "both.safetensors")
    level = dict(zip(both.ids("bank.normal").tolist(), both.arrays["bank.normal"][:, 0].tolist(), strict=True))
    assert sorted(level) == [1, 2, *sorted({3, 4} & set(level)), 5, 6]
    assert (level[5], level[6]) == (120.0, 121.0)


def test_the_pixels_of_a_patch_are_those_that_made_it_whatever_the_preprocessing(
    tiny: ModuleType, tmp_path: Path
) -> None:
    spec = tiny.detector(
        Preprocessing(16, 16, rotate=90, roi=Region(10, 20, 64, 32), tiles=Tiling(columns=2, rows=1, overlap=0.0))
    )
    picture = np.full((90, 70, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 32, 6):
        tile, x, y = patch_places(2, (4, 4))[place]
        (tmp_path / "p.png").write_bytes(encode_png(picture))
        pack = tiny.pack([[1.0, 2.0, 3.0]], spec=spec)
        origins = Origins([source_image(tmp_path / "p.png")], np.zeros(1, np.int64), np.array([[tile, x, y]], np.int32))
        made = provenance_of(
            pack, fingerprint=spec.fingerprint, made={"bank.normal": (pack.ids("bank.normal"), origins)}
        )
        loaded = knowledge_view.Loaded(tmp_path / "p", pack, made, None)
        found = knowledge_view.traced(loaded, 1, None, tmp_path, spec)["pixels"]
        marked = np.zeros_like(picture)
        marked[found[1] : found[1] + found[3], found[0] : found[0] + found[2]] = 255
        seen = prepare(marked, spec.preprocessing).reshape(2, 4, 4, 4, 4, 3).mean((2, 4, 5))
        assert int(seen.reshape(-1).argmax()) == place
        assert seen.max() == 255
        assert np.sort(seen.reshape(-1))[-2] == 0
