"""Bundles: whole and unedited, or refused with the reason; the same content is always the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgead.runtime.bundle import Bundle, golden_files, open_bundle, write_bundle
from edgead.runtime.errors import BundleError, KnowledgeError, OutputExistsError, StorageError
from edgead.runtime.knowledge import new_pack
from edgead.runtime.spec import (
    Calibration,
    DetectorSpec,
    EngineRecord,
    KnowledgePort,
    Limits,
    Port,
    Preprocessing,
    Tolerance,
)

FINGERPRINT = "ab" * 32
DETECTOR = DetectorSpec(
    contract=1,
    method="memory-bank",
    preprocessing=Preprocessing(12, 10),
    features=(Port("patches", "float32", ("B", 4, 3)),),
    knowledge=(KnowledgePort("bank.normal", "float32", ("N", 3), rows="bank.normal.rows"),),
    outputs=(Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", 10, 12))),
    fingerprint=FINGERPRINT,
)
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 10, 12, 3), dtype=np.uint8)
MAPS = np.random.default_rng(1).random((2, 10, 12), dtype=np.float32)
HEAD = "engines/onnx-fp32/head.onnx"


def engine(name: str, target: str = "onnx", precision: str = "fp32") -> EngineRecord:
    folder = f"engines/{name}"
    return EngineRecord(
        name=name,
        target=target,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        trunk=f"{folder}/trunk.onnx",
        head=f"{folder}/head.onnx",
        made_with="a test",
    )


ENGINES = (engine("onnx-fp32"), engine("openvino-fp32", "openvino"), engine("openvino-fp16", "openvino", "fp16"))


def content(**changes: Any) -> dict[str, Any]:
    """The arguments of `write_bundle` for a small bundle."""
    packs = {
        product: new_pack(
            product=product,
            fingerprint=FINGERPRINT,
            calibration=Calibration(threshold=1.0),
            arrays={"bank.normal": np.full((size, 3), 0.5, np.float32)},
        )
        for product, size in (("bolt", 4), ("anchor", 2))
    }
    golden, files = golden_files(FRAMES, [0.25, 1.75], [False, True], MAPS)
    for record in ENGINES:
        files[record.trunk] = record.name.encode() * 300
        files[record.head] = record.name.encode() * 50
    files["card.md"] = b"# card\n"
    return {
        "name": "part",
        "detector": DETECTOR,
        "engines": ENGINES,
        "packs": packs,
        "golden": golden,
        "files": files,
        **changes,
    }


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small bundle as a folder and as one file; not to be changed."""
    root = tmp_path_factory.mktemp("bundles")
    write_bundle(root / "part.bundle", **content())
    write_bundle(root / "part.edgead", **content())
    return root / "part.bundle", root / "part.edgead"


@pytest.fixture
def folder(originals: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the bundle as a folder, to be damaged."""
    return Path(shutil.copytree(originals[0], tmp_path / "copy.bundle"))


@pytest.fixture
def single(originals: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the bundle as one file, to be damaged."""
    return Path(shutil.copy(originals[1], tmp_path / "copy.edgead"))


@pytest.fixture(params=["folder", "file"])
def bundle(request: pytest.FixtureRequest, originals: tuple[Path, Path]) -> Bundle:
    return open_bundle(originals[request.param == "file"])


# What is in it.


def test_everything_comes_back_as_it_was_written(bundle: Bundle) -> None:
    written = content()
    assert bundle.manifest.detector == DETECTOR
    assert bundle.manifest.engines == ENGINES
    for name, data in written["files"].items():
        assert bundle.has(name)
        assert bundle.read(name) == data
    assert not bundle.has("manifest.json")
    assert bundle.pack().digest == written["packs"]["bolt"].digest
    assert bundle.pack("anchor").digest == written["packs"]["anchor"].digest
    assert bundle.products == ("bolt", "anchor")
    for (record, image), frame, score in zip(bundle.golden_images(), FRAMES, (0.25, 1.75), strict=True):
        assert record.score == score
        assert record.anomalous == (score > 1)
        np.testing.assert_array_equal(image, frame)
    np.testing.assert_array_equal(bundle.golden_maps(), MAPS)


def test_only_a_folder_has_paths(originals: tuple[Path, Path]) -> None:
    as_folder, as_file = map(open_bundle, originals)
    path = as_folder.file(HEAD)
    assert path is not None
    assert path.read_bytes() == as_file.read(HEAD)
    assert as_folder.compiled == originals[0] / "compiled"
    assert as_file.file(HEAD) is None
    assert as_file.compiled is None


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (None, "onnx-fp32"),
        ("onnx", "onnx-fp32"),
        ("openvino", "openvino-fp32"),
        ("openvino:fp16", "openvino-fp16"),
        ("openvino-fp16", "openvino-fp16"),
    ],
)
def test_an_engine_is_found_by_name_target_or_precision(bundle: Bundle, target: str | None, name: str) -> None:
    assert bundle.engine(target).name == name


def test_unknown_names_are_answered_with_similar_ones(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"Did you mean .*openvino:fp16"):
        bundle.engine("opnvino:fp16")
    with pytest.raises(BundleError, match="Did you mean 'bolt'"):
        bundle.pack("blot")
    with pytest.raises(BundleError, match=r"head\.onnx"):
        bundle.read("engines/onnx-fp32/haed.onnx")
    for name in ("../outside", "/etc/passwd", "manifest.json", ""):
        with pytest.raises(BundleError):
            bundle.read(name)
        with pytest.raises(BundleError):
            bundle.file(name)


# Canonical form.


@pytest.mark.parametrize("name", ["part.bundle", "part.edgead"])
def test_the_same_content_in_another_order_is_the_same_bytes(
    originals: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    again = content()
    again["files"] = dict(reversed(list(again["files"].items())))
    write_bundle(tmp_path / name, **again)
    if name.endswith(".edgead"):
        assert (tmp_path / name).read_bytes() == originals[1].read_bytes()
    else:
        assert tree(tmp_path / name) == tree(originals[0])


def test_the_single_file_holds_exactly_the_folder_stored_and_sorted(originals: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(originals[1]) as archive:
        assert archive.namelist() == sorted(archive.namelist())
        assert {name: archive.read(name) for name in archive.namelist()} == tree(originals[0])
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_manifest_is_canonical_json_with_size_and_digest_of_every_file(originals: tuple[Path, Path]) -> None:
    files = tree(originals[0])
    data = files.pop("manifest.json")
    manifest = json.loads(data)
    assert data == json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    assert manifest["files"] == {
        name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in files.items()
    }


def test_whole_numbers_in_float_fields_change_no_byte(tmp_path: Path) -> None:
    for name, one in (("a", 1), ("b", 1.0)):
        record = msgspec.structs.replace(ENGINES[0], tolerance=Tolerance(score=one, map=one))
        write_bundle(tmp_path / name, **content(engines=(record,)))
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


# Damage.


def test_a_flipped_bit_in_any_file_is_found_when_opening_and_when_reading(folder: Path) -> None:
    for name, data in tree(folder).items():
        if name == "manifest.json":
            continue
        broken = bytearray(data)
        broken[len(data) // 2] ^= 0x10
        (folder / name).write_bytes(broken)
        with pytest.raises(BundleError, match="SHA-256") as caught:
            open_bundle(folder)
        assert name in caught.value.wanted
        trusting = open_bundle(folder, verify=False)
        for access in (trusting.read, trusting.file):
            with pytest.raises(BundleError, match="SHA-256"):
                access(name)
        (folder / name).write_bytes(data)
    open_bundle(folder)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_a_truncated_or_extended_file_is_found(folder: Path, change: Callable[[bytes], bytes], verify: bool) -> None:
    (folder / HEAD).write_bytes(change((folder / HEAD).read_bytes()))
    with pytest.raises(BundleError, match="bytes in"):
        open_bundle(folder, verify=verify)


def test_a_file_that_changes_after_opening_is_found(folder: Path) -> None:
    opened = open_bundle(folder)
    (folder / HEAD).write_bytes(b"short")
    with pytest.raises(BundleError, match="bytes in"):
        opened.read(HEAD)
    (folder / HEAD).write_bytes(b"x" * 10_000_000)
    with pytest.raises(BundleError, match="more"):
        opened.read(HEAD)
    (folder / HEAD).unlink()
    with pytest.raises(StorageError):
        opened.read(HEAD)
    (folder / HEAD).symlink_to("/etc/hostname")
    with pytest.raises(StorageError):
        opened.file(HEAD)
    (folder / HEAD).unlink()
    os.mkfifo(folder / HEAD)
    with pytest.raises(BundleError, match="special"):
        opened.read(HEAD)


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / HEAD).unlink()
    with pytest.raises(BundleError, match="no such file"):
        open_bundle(folder)


def test_a_file_that_the_manifest_does_not_list_is_refused(folder: Path) -> None:
    (folder / "engines" / "extra.so").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"extra\.so") as caught:
        open_bundle(folder)
    assert "Remove that file" in caught.value.next_step


def test_what_the_device_compiled_may_lie_beside_the_listed_files(folder: Path) -> None:
    plan = folder / "compiled" / "tensorrt-fp16" / "trunk.plan"
    plan.parent.mkdir(parents=True)
    plan.write_bytes(b"plan")
    assert open_bundle(folder).compiled == folder / "compiled"
    (folder / "engines" / "compiled").mkdir()
    (folder / "engines" / "compiled" / "x").write_bytes(b"")
    with pytest.raises(BundleError):
        open_bundle(folder)


@pytest.mark.parametrize("name", [HEAD, "engines", "extra", "compiled"])
def test_symbolic_links_in_a_bundle_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    place = folder / name
    if place.exists():
        place.rename(tmp_path / "moved")
    else:
        (tmp_path / "moved").mkdir()
    place.symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match="symbolic link"):
        open_bundle(folder)


def test_a_bundle_reached_through_a_link_is_opened(originals: tuple[Path, Path], tmp_path: Path) -> None:
    for place, original in zip(("a", "b"), originals, strict=True):
        (tmp_path / place).symlink_to(original)
        assert open_bundle(tmp_path / place).manifest.name == "part"


def test_a_pipe_in_a_bundle_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(BundleError, match="special file"):
        open_bundle(folder)


def test_folders_without_end_are_refused(folder: Path) -> None:
    deep = folder.joinpath(*["d"] * 20)
    deep.mkdir(parents=True)
    with pytest.raises(BundleError):
        open_bundle(folder)


# The manifest.


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def listing(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["files"].update({name: {"size": 0, "sha256": "0" * 64}})


def put(*path: Any) -> Callable[[dict[str, Any]], object]:
    """A change of a manifest: the last of `path` is put where the others lead."""

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in path[:-2]:
            place = place[key]
        place[path[-2]] = path[-1]

    return change


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a newer schema": (put("schema", 2), "Update edgead"),
    "a newer schema with fields we do not know": (lambda m: m.update(schema=9, zeal=1), "Update edgead"),
    "an older schema": (put("schema", 0), "schema"),
    "no schema": (lambda m: m.pop("schema"), "schema"),
    "another contract": (put("detector", "contract", 2), "contract"),
    "an unknown field": (put("zeal", 1), "zeal"),
    "a missing field": (lambda m: m.pop("engines"), "engines"),
    "a field of another type": (put("golden", 0, "score", "high"), "score"),
    "an unknown target": (put("engines", 0, "target", "coreml"), "target"),
    "no engine": (put("engines", []), "engine"),
    "two engines of one name": (put("engines", 1, "name", "onnx-fp32"), "own name"),
    "an engine that is a path": (put("engines", 0, "name", "../x"), "name"),
    "an engine outside": (put("engines", 0, "trunk", "../trunk.onnx"), "missing there"),
    "a pack that is not listed": (put("packs", "bolt", "knowledge/other"), "missing there"),
    "a golden image that is not listed": (put("golden", 0, "path", "golden/9.png"), "missing there"),
    "an unknown default": (put("default", "nut"), "nut"),
    "a product that is a path": (put("packs", "../bolt", "card.md"), "product"),
    "a negative size": (put("files", HEAD, "size", -1), "size"),
    "a short digest": (put("files", HEAD, "sha256", "00"), "sha256"),
    "the manifest in its own list": (listing("manifest.json"), "own list"),
    "a listed plan": (listing("compiled/x/trunk.plan"), "belongs to the device"),
    "two ports of one name": (put("detector", "outputs", 0, "name", "patches"), "name of its own"),
    "a size of another type": (put("files", HEAD, "size", "big"), "size"),
    "a listed file that is not there": (listing("ghost.bin"), "ghost"),
    "more files than the limit": (lambda m: [listing(f"f{i}")(m) for i in range(1001)], "at most 1000 files"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_refused(folder: Path, name: str) -> None:
    change, reason = EDITS[name]
    edit(folder, change)
    with pytest.raises(BundleError, match=reason) as caught:
        open_bundle(folder)
    assert caught.value.next_step


TRICKS = [
    "../evil",
    "a/../../evil",
    "/etc/evil",
    "a//b",
    "a/./b",
    "a\\b",
    "a\0b",
    "a/",
    "",
    "..",
    ".hidden",
    "C:evil",
    "a b",
    "\u202eevil",
    "ﬁle",
    "a\n",
    "x" * 300,
    "/".join("abcdefghi"),
]


@pytest.mark.parametrize("name", TRICKS)
def test_names_that_could_leave_the_bundle_are_refused_on_reading_and_on_writing(
    folder: Path, tmp_path: Path, name: str
) -> None:
    edit(folder, listing(name))
    with pytest.raises(BundleError, match="file names"):
        open_bundle(folder)
    files = {**content()["files"], name: b"x"}
    for place in ("new.bundle", "new.edgead"):
        with pytest.raises(BundleError, match="file names"):
            write_bundle(tmp_path / place, **content(files=files))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.bundle"]


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"[" * 100_000, b"\xff\xfe", b'{"schema":1e400}', b'{"schema":'])
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError, match="manifest"):
        open_bundle(folder)


def test_a_manifest_over_the_limit_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="at most 100 bytes"):
        open_bundle(folder, limits=Limits(manifest_bytes=100))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
def test_a_fuzzed_manifest_opens_as_it_was_or_is_a_bundle_error(
    originals: tuple[Path, Path], folder: Path, damage: list[tuple[int, bytes]]
) -> None:
    data = bytearray((originals[0] / "manifest.json").read_bytes())
    for place, piece in damage:
        data[place % len(data) : place % len(data) + len(piece)] = piece
    (folder / "manifest.json").write_bytes(data)
    try:
        opened = open_bundle(folder)
        opened.engine()
        opened.pack()
    except (BundleError, KnowledgeError):
        pass


# The single file.


def test_a_truncated_file_is_refused_at_every_length(single: Path) -> None:
    data = single.read_bytes()
    for end in [*range(0, len(data), 97), len(data) - 1]:
        single.write_bytes(data[:end])
        with pytest.raises(BundleError):
            open_bundle(single, verify=False)


def test_something_appended_or_put_before_is_refused(single: Path) -> None:
    data = single.read_bytes()
    for other in (data + b"x", b"#!/bin/sh\n" + data, data + data):
        single.write_bytes(other)
        with pytest.raises(BundleError):
            open_bundle(single)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_file_never_gives_wrong_content(
    originals: tuple[Path, Path], single: Path, place: int, flip: int
) -> None:
    data = bytearray(originals[1].read_bytes())
    # Most of the file is content, which the digests guard; the structure gets half of the flips.
    begin = data.find(b"PK\1\2") if place % 2 else 0
    data[begin + place % (len(data) - begin)] ^= flip
    single.write_bytes(data)
    try:
        opened = open_bundle(single)
    except BundleError:
        return
    assert {name: opened.read(name) for name in opened.manifest.files} == {
        name: body for name, body in tree(originals[0]).items() if name != "manifest.json"
    }


def rezipped(single: Path, change: Callable[[zipfile.ZipFile, dict[str, bytes]], object]) -> None:
    """Write the members anew, as somebody else's zip tool would, after `change`."""
    with zipfile.ZipFile(single) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(single, "w") as archive:
        change(archive, members)
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_bundle_that_was_zipped_again_is_the_same_bundle(single: Path) -> None:
    rezipped(single, lambda archive, members: None)
    assert open_bundle(single).pack().product == "bolt"


def compressed(archive: zipfile.ZipFile, members: dict[str, bytes]) -> None:
    archive.writestr(HEAD, members.pop(HEAD), zipfile.ZIP_DEFLATED)


def bomb(archive: zipfile.ZipFile, members: dict[str, bytes]) -> None:
    archive.writestr("bomb", b"\0" * 50_000_000, zipfile.ZIP_DEFLATED)


def with_comment(archive: zipfile.ZipFile, members: dict[str, bytes]) -> None:
    archive.comment = b"hello"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (compressed, "compressed"),
        (bomb, "compressed"),
        (with_comment, "end in place"),
        (lambda archive, members: archive.writestr(HEAD, b"another"), "twice"),
        (lambda archive, members: archive.writestr("../evil", b""), "file names"),
        (lambda archive, members: archive.writestr("/etc/evil", b""), "file names"),
        (lambda archive, members: archive.writestr("extra", b""), "does not list"),
        (lambda archive, members: archive.writestr("folder/", b""), "file names"),
        (lambda archive, members: members.pop(HEAD), "no such file"),
        (lambda archive, members: members.pop("manifest.json"), "manifest.json"),
        (lambda archive, members: [archive.writestr(f"f{i}", b"") for i in range(1001)], "at most 1000 files"),
    ],
)
def test_an_archive_that_edgead_would_not_write_is_refused(
    single: Path, change: Callable[[zipfile.ZipFile, dict[str, bytes]], object], reason: str
) -> None:
    rezipped(single, change)
    with pytest.raises(BundleError, match=reason):
        open_bundle(single)


@pytest.mark.parametrize("counted", [True, False])
def test_a_zip64_record_cannot_smuggle_in_another_table(single: Path, counted: bool) -> None:
    data = single.read_bytes()
    start = int.from_bytes(data[-6:-2], "little")
    size = int.from_bytes(data[-10:-6], "little")
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 2**40, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    end = bytearray(data[-22:])
    if counted:
        struct.pack_into("<I", end, 12, size + len(record) + len(locator))
    single.write_bytes(data[:-22] + record + locator + end)
    with pytest.raises(BundleError, match="another structure"):
        open_bundle(single)


def test_members_that_share_their_bytes_are_refused(single: Path) -> None:
    """The overlapping kind of zip bomb: many entries, one large body."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("body", b"x" * 100_000)
        only = archive.infolist()[0]
        for index in range(200):
            entry = zipfile.ZipInfo(f"e{index}")
            for field in ("CRC", "compress_size", "file_size", "header_offset", "flag_bits"):
                setattr(entry, field, getattr(only, field))
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
    single.write_bytes(buffer.getvalue())
    with pytest.raises(BundleError, match="overlap"):
        open_bundle(single)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\5\6" + b"\0" * 18, b"\x89PNG\r\n\x1a\n" + b"\0" * 100])
def test_other_files_are_no_bundle(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.edgead").write_bytes(data)
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "x.edgead")


def test_other_places_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nothing there"):
        open_bundle(tmp_path / "no")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="nothing there"):
        open_bundle(tmp_path / ("x" * 300))


def test_more_bytes_than_the_limit_are_refused(originals: tuple[Path, Path]) -> None:
    for path in originals:
        with pytest.raises(BundleError, match="at most"):
            open_bundle(path, limits=Limits(bundle_bytes=1000))


# Meaning.


def test_a_pack_of_another_product_or_engine_is_not_written(tmp_path: Path) -> None:
    packs = content()["packs"]
    with pytest.raises(BundleError, match="anchor"):
        write_bundle(tmp_path / "b", **content(packs={"bolt": packs["anchor"]}))
    foreign = msgspec.structs.replace(DETECTOR, fingerprint="cd" * 32)
    with pytest.raises(KnowledgeError, match="feature space"):
        write_bundle(tmp_path / "b", **content(detector=foreign))
    assert not any(tmp_path.iterdir())


def test_packs_that_changed_places_are_refused(folder: Path) -> None:
    def swap(manifest: dict[str, Any]) -> None:
        packs = manifest["packs"]
        packs["bolt"], packs["anchor"] = packs["anchor"], packs["bolt"]

    edit(folder, swap)
    with pytest.raises(BundleError, match="'anchor' in its place"):
        open_bundle(folder).pack()


@pytest.mark.parametrize(
    "changes",
    [
        {"engines": ()},
        {"engines": (ENGINES[0], ENGINES[0])},
        {"name": "a/b"},
        {"packs": {}},
        {"default": "nut"},
        {"golden": golden_files(FRAMES[:1], [float("nan")], [True])[0]},
        {"engines": (msgspec.structs.replace(ENGINES[0], head="engines/none"),)},
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "b", **content(**changes))
    assert not any(tmp_path.iterdir())


def test_golden_files_of_another_size_or_number_are_refused(tmp_path: Path) -> None:
    golden, files = golden_files(FRAMES[:, :5], [0.0, 1.0], [False, True], MAPS[:1])
    opened = write_bundle(tmp_path / "b", **content(golden=golden, files={**content()["files"], **files}))
    with pytest.raises(BundleError, match="12x10"):
        opened.golden_images()
    with pytest.raises(BundleError, match="per golden frame"):
        opened.golden_maps()


def test_a_detector_without_maps_has_no_reference_maps(tmp_path: Path) -> None:
    golden, files = golden_files(FRAMES, [0.0, 1.0], [False, True])
    files.update({name: data for name, data in content()["files"].items() if name.startswith("engines/")})
    assert write_bundle(tmp_path / "b", **content(golden=golden, files=files)).golden_maps() is None


# Writing.


@pytest.mark.parametrize("name", ["b", "b.edgead"])
def test_an_existing_bundle_is_replaced_only_with_force(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path / name, **content())
    with pytest.raises(OutputExistsError):
        write_bundle(tmp_path / name, **content(name="other"))
    assert open_bundle(tmp_path / name).manifest.name == "part"
    assert write_bundle(tmp_path / name, **content(name="other"), force=True).manifest.name == "other"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["b", "b.edgead"])
def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path / name, **content())
    code = """
    import importlib.util, sys
    from pathlib import Path
    from edgead.runtime.bundle import write_bundle
    from edgead.runtime.errors import StorageError
    spec = importlib.util.spec_from_file_location("these_tests", sys.argv[2])
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    try:
        write_bundle(Path(sys.argv[1]), **tests.content(name="other"), force=True)
    except StorageError as error:
        print(error)
    """

    def confine() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code), str(tmp_path / name), __file__],
        preexec_fn=confine,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "free space" in done.stdout, done.stderr
    assert open_bundle(tmp_path / name).manifest.name == "part"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["b", "b.edgead"])
def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        write_bundle(tmp_path / "file" / name, **content())
