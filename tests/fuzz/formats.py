"""What arrives at a camera or a publisher: how it is read, what sound files of it look like, and what an error is."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from edgead.runtime import candidates, device_status, image, notes
from edgead.runtime.bundle import open_bundle
from edgead.runtime.bundle_manifest import parse_manifest
from edgead.runtime.deltas import apply_delta, make_delta, read_delta
from edgead.runtime.errors import EdgeadError
from edgead.runtime.knowledge import Pack, decode_pack, encode_pack, new_pack
from edgead.runtime.pins import decode_pin, encode_pin, make_pin
from edgead.runtime.provenance import SourceImage, decode_provenance, encode_provenance
from edgead.runtime.release import RELEASE_SCHEMA, Release, decode_release, encode_release
from edgead.runtime.rollout import decode_rollout, encode_rollout, new_rollout
from edgead.runtime.spec import Calibration, Limits, canonical_json
from edgead.runtime.tensors import decode_tensors, encode_tensors
from edgead.server_side import sources

HERE = Path(__file__).parent
FINGERPRINT = "0123456789abcdef" * 4
SEED = bytes(range(32))
SMALL = Limits(delta_bytes=2**20, image_pixels=4_000_000, image_bytes=2**20)
"""Limits low enough that a mutation can reach them."""


def loaded(name: str, path: Path) -> ModuleType:
    """A module by its path: tests are no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


mutations = loaded("edgead_tests_mutations", HERE / "mutations.py")


@dataclass(frozen=True)
class Format:
    """One parser under test.

    Attributes:
        read: the parser, and whatever uses what it returned; raises EdgeadError and nothing else.
        corpus: sound files.
        again: the bytes that what was read is encoded as, which must be those that were read; None where a content has
            more than one encoding, and `read` itself checks what it can.
        rewrite: reaches JSON inside, see `mutations`.
        layer: reaches what lies under a compression.
        inputs: how many are tried, at a factor of 1.
        extra: to be read as they are.
        seeds: further files to begin from, which are not sound.
    """

    read: Callable[[bytes], Any]
    corpus: Sequence[bytes]
    again: Callable[[Any], bytes] | None = None
    rewrite: Callable[..., bytes] | None = None
    layer: Callable[..., bytes] | None = None
    inputs: int = 6000
    extra: Sequence[bytes] = ()
    seeds: Sequence[bytes] = ()


def pack(rows: int = 6, *, more: int = 0, words: bool = True) -> Pack:
    rng = np.random.default_rng(rows)
    table = rng.normal(size=(rows + more, 4)).astype(np.float32)
    arrays: dict[str, Any] = {
        "bank.normal": table,
        "bank.anomalous": table[:2] + 9,
        "anomalous.weight": np.ones(1, "f4"),
    }
    if words:
        note = {"rows": [{"text": "a thread"}, {"text": "ein Faden, köstlich"}]}
        arrays |= {"normality.rows": table[:2].astype(np.float16), "normality.rows.text": notes.encode_note(note)}
    return new_pack(
        product="part", fingerprint=FINGERPRINT, calibration=Calibration(threshold=1.5 + more), arrays=arrays
    )


def packs() -> Format:
    found = [encode_pack(pack(6)), encode_pack(pack(6, words=False)), encode_pack(pack(40, more=3))]
    return Format(decode_pack, found, encode_pack, mutations.after_length)


def headers() -> Format:
    """safetensors below packs, deltas, provenance and candidates."""
    found = [
        encode_tensors({"a": np.arange(6, dtype="<u8"), "b.c": np.zeros((2, 3), "<f2")}, {"key": "value"}),
        encode_tensors({}, {}),
        encode_tensors({f"n{place}": np.zeros((0, 4), "<f4") for place in range(30)}, {}),
    ]

    def read(data: bytes) -> Any:
        return decode_tensors(data, header_limit=64 * 1024)

    return Format(read, found, lambda seen: encode_tensors(*seen), mutations.after_length)


def deltas() -> Format:
    first, second = pack(6), pack(6, more=2)
    third = new_pack(
        product="part",
        fingerprint=FINGERPRINT,
        calibration=Calibration(threshold=2.0),
        arrays={
            **second.arrays,
            "normality.rows": np.zeros((3, 4), np.float16),
            "normality.rows.text": notes.encode_note({"rows": [{"text": word} for word in "abc"]}),
        },
    )
    found = [make_delta(pack(6), pack(6, words=False)), make_delta(second, third), make_delta(first, first)]

    def read(data: bytes) -> Any:
        delta = read_delta(data, limits=SMALL)
        for base in (first, second):
            if base.digest == delta.base:
                # What comes out is what it says, or nothing.
                assert apply_delta(base, delta).digest == delta.result
        return delta

    def layer(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
        content = change(zlib.decompress(data[16:]))
        return data[:8] + len(content).to_bytes(8, "little") + zlib.compress(content, 1)

    bombs = [
        b"edgead.d" + length.to_bytes(8, "little") + zlib.compress(bytes(64 * 2**20))
        for length in (0, 100, 2**20, 2**20 + 1, 2**40, 2**64 - 1)
    ]
    return Format(read, found, None, mutations.after_length, layer, extra=bombs)


def provenances() -> Format:
    owner = pack(6)
    images = [SourceImage(f"{place:064x}", f"photo {place}.png") for place in range(3)]
    origins = sources.Origins(images, np.arange(6) % 3, np.zeros((6, 3), np.int32))
    made = {"bank.normal": (owner.ids("bank.normal"), origins)}
    found = [
        encode_provenance(sources.provenance_of(owner, fingerprint=FINGERPRINT, made=made)),
        encode_provenance(sources.provenance_of(pack(40), fingerprint=FINGERPRINT)),
    ]
    return Format(decode_provenance, found, encode_provenance, mutations.after_length)


def pins() -> Format:
    from datetime import datetime, timedelta, timezone

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    now = datetime(2026, 6, 1, tzinfo=timezone.utc)
    owner = pack(6)
    pin = make_pin(
        owner,
        sources.provenance_of(owner, fingerprint=FINGERPRINT),
        Ed25519PrivateKey.from_private_bytes(SEED).sign,
        kid="quality",
        signer="Änna, quality",
        ts=now,
        not_before=now,
        not_after=now + timedelta(days=9),
    )
    return Format(decode_pin, [encode_pin(pin)], encode_pin, mutations.whole)


def releases() -> Format:
    release = Release(
        schema=RELEASE_SCHEMA,
        name="part-7",
        counter=7,
        fingerprint=FINGERPRINT,
        engine="e" * 64,
        product_packs={"part": "a" * 64},
        sizes={"e" * 64: 3, "a" * 64: 4},
        scores={"part": {"golden/000.png": 1.5, "golden/001.png": 2.25}},
        must_alarm={"part": ("golden/001.png",)},
        tolerance=0.5,
        made_at=1_800_000_000,
        notes="threads are fine",
    )
    return Format(decode_release, [encode_release(release)], encode_release, mutations.whole)


def rollouts() -> Format:
    found = [
        encode_rollout(new_rollout("part", 7, 3, previous=6, groups=("line-2", "pilot"), percent=12.5)),
        encode_rollout(new_rollout("part", 1, 1)),
    ]
    return Format(decode_rollout, found, encode_rollout, mutations.whole)


def statuses() -> Format:
    status = device_status.DeviceStatus(
        device="cam-17",
        product="part",
        sequence=7,
        time=1_800_000_000,
        version="0.4.0",
        groups=("pilot",),
        release=3,
        digest="a" * 64,
        engine="e" * 64,
        packs={"part": "v3"},
        confirmed=True,
        counter=3,
        quarantined=("c" * 64,),
        alarm="rolled back",
        attempts=(device_status.Attempt(2, "rolled back", "3 of 9"), device_status.Attempt(3, "confirmed")),
        poll=device_status.Poll("current", "", 1_799_999_999, 0),
        scores=(device_status.ScoreStatistics("part", 1000, 990, 9, 1, 1_799_990_000, (0.25, 0.5, 0.75, 1, 1.5)),),
        error=device_status.Failure("FetchError", "wanted x; got y", 1_799_999_000, 2),
    )
    return Format(
        device_status.decode_status, [device_status.encode_status(status, SEED)], canonical_json, mutations.whole
    )


def marked_pictures() -> Format:
    made = loaded("edgead_tests_fuzz_candidates", HERE.parent / "runtime" / "test_candidates.py")
    picture = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    found = [made.made(picture, "normal"), made.made(picture, "anomalous", note="a dent")]

    def again(seen: candidates.Candidate) -> bytes:
        arrays = {"picture": np.frombuffer(seen.picture, np.uint8)}
        if seen.mask is not None:
            arrays["mask"] = np.frombuffer(seen.mask, np.uint8)
        record = canonical_json(seen.mark).decode()
        return encode_tensors(
            arrays,
            {"edgead.candidate": "1", "key": seen.key.hex(), "record": record, "signature": seen.signature.hex()},
        )

    return Format(candidates.decode_candidate, found, again, mutations.after_length)


def written_notes() -> Format:
    owner = pack(6)

    def read(data: bytes) -> Any:
        array = np.frombuffer(data, np.uint8)
        notes.check_note("normality.rows.text", array, 2)
        return notes.read_note(
            new_pack(
                product="part",
                fingerprint=FINGERPRINT,
                calibration=Calibration(threshold=1.0),
                arrays={"normality.rows": owner.arrays["normality.rows"], "normality.rows.text": array},
            ),
            "normality.rows",
        )

    found = [owner.arrays["normality.rows.text"].tobytes()]
    return Format(read, found, lambda note: notes.encode_note(note).tobytes(), mutations.whole)


def prompt_sets() -> Format:
    from edgead.server_side.prompts import ensembles
    from edgead.server_side.prompts.checks import parse_prompt_set
    from edgead.server_side.prompts.prompt_set import format_prompt_set

    found = [format_prompt_set(ensembles.normality("thread", "carpet"))]

    def read(data: bytes) -> Any:
        prompts = parse_prompt_set(data, "a fuzzed file")
        assert parse_prompt_set(format_prompt_set(prompts), "again") == prompts
        return prompts

    return Format(read, found, None, mutations.whole, inputs=150)


def manifests() -> Format:
    with zipfile.ZipFile(io.BytesIO(_bundle(Path(tempfile.mkdtemp(prefix="edgead-fuzz-"))))) as archive:
        data = archive.read("manifest.json")

    def read(content: bytes) -> Any:
        manifest = parse_manifest(content)
        assert parse_manifest(canonical_json(manifest)) == manifest
        return manifest

    return Format(read, [data], None, mutations.whole)


def bundles() -> Format:
    folder = Path(tempfile.mkdtemp(prefix="edgead-fuzz-"))
    sound = _bundle(folder)
    place = folder / "fuzzed.edgead"

    def read(data: bytes) -> Any:
        place.write_bytes(data)
        bundle = open_bundle(place)
        for name in bundle.manifest.files:
            bundle.read(name)
        for product in bundle.products:
            bundle.pack(product)
        return bundle

    return Format(read, [sound], inputs=2000)


def pictures() -> Format:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (24, 30), np.uint8)
    colour, deep = np.dstack([grey, grey.T[:24, :24].repeat(2, 1)[:, :30], 255 - grey]), grey.astype(np.uint16) * 257
    found = []
    for suffix, frame, options in (
        (".png", colour, []),
        (".png", grey, []),
        (".png", deep, []),
        (".png", np.dstack([colour, grey]), []),
        (".jpg", colour, [cv2.IMWRITE_JPEG_QUALITY, 80]),
        (".jpg", colour, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        (".bmp", colour, []),
        (".tiff", colour, []),
        (".tiff", deep, []),
        (".webp", colour, []),
    ):
        done, data = cv2.imencode(suffix, frame, options)
        assert done
        found.append(data.tobytes())

    def read(data: bytes) -> Any:
        frame = image.decode(data, limits=SMALL)
        assert frame.dtype == np.uint8
        assert frame.ndim == 3
        assert frame.shape[2] == 3
        assert 0 < frame.shape[0] * frame.shape[1] <= SMALL.image_pixels
        return frame

    return Format(read, found)


def metadata() -> Format:
    """Each of the signed files of a repository in turn, as it comes and signed again by its own keys."""
    from securesystemslib.formats import encode_canonical

    from edgead.runtime.fetch import Fetcher
    from edgead.runtime.trust import TrustedRepository
    from edgead.server_side.ota.init import create
    from edgead.server_side.ota.keys import Keyring
    from edgead.server_side.ota.roles import Settings

    home = Path(tempfile.mkdtemp(prefix="edgead-fuzz-"))
    ring = Keyring([home / "keys"], lambda purpose: ["correct horse battery staple"])
    create(home / "updates", ring, Settings(products=("part",)))
    root = ring.root
    assert root is not None
    signers = {record.role: ring._open(record) for record in ring.records.values()}
    folder = home / "updates" / "metadata"
    names = ("timestamp.json", "1.snapshot.json", "1.targets.json", "1.knowledge.part.json", "2.root.json")
    roles = ("timestamp", "snapshot", "targets", "knowledge", "root")
    sound = [(folder / name).read_bytes() if (folder / name).exists() else root for name in names]
    fetcher = Fetcher()

    def read(data: bytes) -> Any:
        number = data[0] & 127 if data else 0
        place, content = folder / names[number % len(names)], data[1:]
        if data and data[0] & 128:
            content = signed(content, signers[roles[number % len(names)]])
        before = place.read_bytes() if place.exists() else None
        place.write_bytes(content)
        try:
            with tempfile.TemporaryDirectory(dir=home) as cache:
                uri = (home / "updates").as_uri()
                repository = TrustedRepository(uri, root, Path(cache), fetcher, now=time.time())
                made = repository.refresh()
                repository.listed("knowledge.part")
                return made, repository.find("knowledge/part/x.safetensors")
        finally:
            if before is None:
                place.unlink()
            else:
                place.write_bytes(before)

    def signed(content: bytes, signer: Any) -> bytes:
        """The content with a good signature, if it can be signed at all."""
        try:
            found = json.loads(content)
            body = str(encode_canonical(found["signed"])).encode()
            found["signatures"] = [{"keyid": signer.public_key.keyid, "sig": signer.sign(body).signature}]
            return json.dumps(found).encode()
        except Exception:  # whatever it is, it goes as it came
            return content

    def rewrite(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
        return data[:1] + change(data[1:])

    found = [bytes([number + flag]) + content for number, content in enumerate(sound) for flag in (0, 128)]
    return Format(read, found[:-2], None, rewrite, inputs=600, seeds=found[-2:])


def _bundle(folder: Path) -> bytes:
    """A small sound bundle with graphs that are none: nothing opens an engine here."""
    tiny = loaded("edgead_tests_fuzz_tiny", HERE.parent / "runtime" / "tiny.py")
    path: Path = tiny.bundle(folder / "tiny.edgead").path
    return path.read_bytes()


FORMATS: dict[str, Callable[[], Format]] = {
    "bundle": bundles,
    "candidate": marked_pictures,
    "delta": deltas,
    "image": pictures,
    "manifest": manifests,
    "metadata": metadata,
    "note": written_notes,
    "pack": packs,
    "pin": pins,
    "prompts": prompt_sets,
    "provenance": provenances,
    "release": releases,
    "rollout": rollouts,
    "status": statuses,
    "tensors": headers,
}


def allowed(error: BaseException) -> bool:
    """Whether a parser may end like this."""
    return isinstance(error, EdgeadError)


def generator(name: str, seed: int, number: int) -> random.Random:
    """Of one input alone, so that it can be made again without those before it."""
    return random.Random(f"{name}/{seed}/{number}")
