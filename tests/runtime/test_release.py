"""Releases: literal bytes, canonical or refused, and of one piece with what they name."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import EdgeadError, KnowledgeError, ReleaseError
from edgead.runtime.knowledge import decode_pack
from edgead.runtime.release import (
    RELEASE_BYTES,
    Release,
    check_whole,
    decode_release,
    digest_of,
    encode_release,
)


def _helper() -> ModuleType:
    """Tests are no package, so the module beside this one is loaded by its path."""
    path = Path(__file__).with_name("store_faults.py")
    spec = importlib.util.spec_from_file_location("edgead_tests_store", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "Parts"):
        spec.loader.exec_module(module)
    return module


faults = _helper()
OLD = faults.OLD

SMALL = Release(
    schema=1,
    name="carpet-7",
    counter=7,
    fingerprint="f" * 64,
    engine="e" * 64,
    product_packs={"carpet": "a" * 64},
    sizes={"e" * 64: 3, "a" * 64: 4},
    scores={"carpet": {"golden/000.png": 1.5}},
    must_alarm={"carpet": ("golden/001.png",)},
    tolerance=1,
    made_at=1_800_000_000,
    notes="threads are fine",
)


def test_a_release_has_these_bytes() -> None:
    data = encode_release(SMALL)
    assert data == (
        b'{"counter":7,"engine":"' + b"e" * 64 + b'","fingerprint":"' + b"f" * 64 + b'","made_at":1800000000,'
        b'"must_alarm":{"carpet":["golden/001.png"]},"name":"carpet-7","notes":"threads are fine",'
        b'"product_packs":{"carpet":"' + b"a" * 64 + b'"},"schema":1,"scores":{"carpet":{"golden/000.png":1.5}},'
        b'"sizes":{"' + b"a" * 64 + b'":4,"' + b"e" * 64 + b'":3},"tolerance":1.0}'
    )
    assert decode_release(data) == msgspec.structs.replace(SMALL, tolerance=1.0)
    assert digest_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def changed(**fields: object) -> bytes:
    content = json.loads(encode_release(SMALL)) | fields
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\0" * 100,
        b"[" * 100_000,
        encode_release(SMALL)[:-1],
        encode_release(SMALL) + b"\n",
        encode_release(SMALL).replace(b":1.0}", b":1}"),
        encode_release(SMALL).replace(b":1.0}", b":NaN}"),
        encode_release(SMALL).replace(b":1.0}", b":1e999}"),
        encode_release(SMALL).replace(b'{"counter":7,', b'{"counter":6,"counter":7,'),
        changed(counter=-1),
        changed(counter=2**60),
        changed(counter=7.0),
        changed(name="../up"),
        changed(name="a/b"),
        changed(engine="E" * 64),
        changed(engine="e" * 63),
        changed(fingerprint="f" * 64 + "\n"),
        changed(product_packs={}, sizes={"e" * 64: 3}, scores={}, must_alarm={}),
        changed(product_packs={"../x": "a" * 64}, scores={}, must_alarm={}),
        changed(sizes={"e" * 64: 3}),
        changed(sizes={"e" * 64: 3, "a" * 64: -4}),
        changed(sizes={"e" * 64: 3, "a" * 64: 4, "b" * 64: 5}),
        changed(scores={"bolt": {"golden/000.png": 1.5}}),
        changed(must_alarm={"bolt": ["golden/000.png"]}),
        changed(tolerance=-1.0),
        changed(notes="x" * 20_000),
        changed(more=1),
        changed(schema=2),
        changed(notes="x").replace(b'"x"', b'"\\ud800"'),
        changed(notes="x" * (RELEASE_BYTES + 1)),
    ],
    ids=range(31),
)
def test_what_is_no_release_is_one_typed_error(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        decode_release(data)


def test_a_newer_schema_says_what_to_update() -> None:
    with pytest.raises(ReleaseError, match="Update edgead"):
        decode_release(changed(schema=2))


def test_a_release_that_breaks_a_rule_is_not_written() -> None:
    for wrong in (
        msgspec.structs.replace(SMALL, tolerance=float("nan")),
        msgspec.structs.replace(SMALL, sizes={}),
        msgspec.structs.replace(SMALL, name="a/b"),
    ):
        with pytest.raises(ReleaseError):
            encode_release(wrong)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_one_typed_error(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        decode_release(data)


@settings(max_examples=200)
@given(st.integers(0, len(encode_release(SMALL)) - 1), st.integers(1, 255))
def test_an_edited_release_is_another_one_or_an_error(place: int, flip: int) -> None:
    data = bytearray(encode_release(SMALL))
    data[place] ^= flip
    try:
        release = decode_release(bytes(data))
    except EdgeadError as error:
        assert isinstance(error, ReleaseError)  # noqa: PT017
    else:
        assert encode_release(release) == bytes(data)
        assert release != SMALL


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "engine.edgead"
    path.write_bytes(OLD.engine)
    return path


def test_engine_and_packs_of_one_release_belong_together(engine: Path) -> None:
    release = decode_release(OLD.record)
    manifest = open_bundle(engine).manifest
    packs = {product: decode_pack(data) for product, data in OLD.packs.items()}
    check_whole(release, manifest, packs)
    with pytest.raises(ReleaseError, match="'bolt' under that name"):
        check_whole(release, manifest, {"bolt": packs["nut"], "nut": packs["nut"]})
    with pytest.raises(ReleaseError, match="feature space"):
        check_whole(msgspec.structs.replace(release, fingerprint="0" * 64), manifest, packs)
    foreign = faults.pack("bolt", 1, faults.detector(b"\1" * 32))
    with pytest.raises(KnowledgeError, match="feature space"):
        check_whole(release, manifest, packs | {"bolt": foreign})
    with pytest.raises(ReleaseError, match="golden"):
        check_whole(msgspec.structs.replace(release, scores={"nut": {"golden/999.png": 1.0}}), manifest, packs)
    with pytest.raises(ReleaseError, match="golden"):
        check_whole(msgspec.structs.replace(release, must_alarm={"nut": ("manifest.json",)}), manifest, packs)
