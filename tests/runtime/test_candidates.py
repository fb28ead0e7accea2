"""A picture that was marked at a camera: its bytes, what is refused, where it waits and how it leaves."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cryptography")
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.runtime import candidates as room
from edgead.runtime.candidates import CANDIDATE_BYTES, Mark, decode_candidate, encode_candidate, signed_bytes
from edgead.runtime.device_status import new_device_key, public_of
from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import CandidateError, InputError, StorageError
from edgead.runtime.image import encode_jpeg, encode_png, prepare
from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.marks import Marks, marked
from edgead.runtime.marks_post import MarksPost, candidates_address
from edgead.runtime.preprocess import Frame
from edgead.runtime.spec import Preprocessing, Region, canonical_json
from edgead.runtime.tensors import decode_tensors, encode_tensors

SEED = bytes(range(32))
SIZE = Preprocessing(16, 16)


def frame(level: int = 100, side: int = 16) -> Frame:
    return np.full((side, side, 3), level, np.uint8)


def inspection(**other: Any) -> Inspection:
    fields: dict[str, Any] = {
        "verdict": Verdict.OK,
        "score": 1.5,
        "normalised": 0.1,
        "threshold": 2.0,
        "anomaly_map": None,
        "regions": (),
        "evidence": (),
        "product": "part",
        "knowledge": "0123456789ab",
    }
    return Inspection(**(fields | other))


def made(picture: Frame | None = None, kind: room.Kind = "anomalous", **other: Any) -> bytes:
    words: dict[str, Any] = {
        "device": "cam-1",
        "private_key": SEED,
        "fingerprint": "ab" * 32,
        "release": 7,
        "preprocessing": SIZE,
        "now": 1_790_000_000,
    }
    seen = other.pop("seen", None) or inspection()
    return marked(frame() if picture is None else picture, seen, kind, **(words | other))


def rebuilt(data: bytes, metadata: dict[str, str] | None = None, **arrays: np.ndarray[Any, Any]) -> bytes:
    """The same file with other metadata or arrays, in the canonical form."""
    found, facts = decode_tensors(data, header_limit=2**20)
    return encode_tensors(dict(found) | arrays, facts | (metadata or {}))


def forged(data: bytes, **fields: Any) -> bytes:
    """The same file with another record under the old signature."""
    record = json.loads(decode_tensors(data, header_limit=2**20)[1]["record"]) | fields
    return rebuilt(data, {"record": canonical_json(record).decode()})


def test_a_candidate_has_these_bytes() -> None:
    picture = encode_png(frame())
    mark = Mark(
        device="cam-1",
        product="part",
        kind="anomalous",
        picture=hashlib.sha256(picture).hexdigest(),
        width=16,
        height=16,
        time=1_790_000_000,
        fingerprint="ab" * 32,
        verdict="OK",
        score=1.5,
        threshold=2.0,
        knowledge="0123456789ab",
        release=7,
        box=Region(1, 2, 3, 4),
        note="dent, shift 2",
    )
    record = (
        '{"box":{"height":4,"width":3,"x":1,"y":2},"device":"cam-1","fingerprint":"' + "ab" * 32 + '","height":16,'
        '"kind":"anomalous","knowledge":"0123456789ab","mask":null,"note":"dent, shift 2","picture":"'
        + hashlib.sha256(picture).hexdigest()
        + '","product":"part","release":7,"resized":false,"schema":1,"score":1.5,"threshold":2.0,"time":1790000000,'
        '"verdict":"OK","width":16}'
    )
    assert signed_bytes(mark) == b"edgead/candidate/v1\0" + record.encode()
    data = encode_candidate(mark, picture, None, SEED)
    header = (
        '{"__metadata__":{"edgead.candidate":"1","key":"'
        + public_of(SEED).hex()
        + '","record":'
        + json.dumps(record)
        + ',"signature":"'
        + decode_candidate(data).signature.hex()
        + '"},'
        f'"picture":{{"data_offsets":[0,{len(picture)}],"dtype":"U8","shape":[{len(picture)}]}}}}'
    ).encode()
    header += b" " * (-(8 + len(header)) % 64)
    assert data == len(header).to_bytes(8, "little") + header + picture
    found = decode_candidate(data)
    found.verify(public_of(SEED))
    assert found.digest == hashlib.sha256(signed_bytes(mark)).hexdigest()
    region = found.region()
    assert region is not None
    assert (int((region > 0).sum()), region[2, 1, 0], region[5, 3, 0]) == (3 * 4 * 3, 255, 255)
    assert (found.frame() == frame()).all()


def test_what_was_said_and_drawn_comes_back_the_same() -> None:
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[4:8, 4:8] = 200
    seen = inspection(verdict=Verdict.NOT_INSPECTED, score=None)
    found = decode_candidate(made(mask=mask, note="a dent", seen=seen))
    assert (found.mark.verdict, found.mark.score, found.mark.note, found.mark.resized) == (
        "NOT_INSPECTED",
        None,
        "a dent",
        False,
    )
    region = found.region()
    assert region is not None
    assert (region == np.where(mask > 0, 255, 0)).all()
    assert decode_candidate(made(kind="normal")).region() is None


def test_an_edited_candidate_and_one_of_another_key_are_refused() -> None:
    data = made(box=Region(1, 2, 3, 4))
    for name, value in (
        ("device", "cam-2"),
        ("product", "other"),
        ("kind", "normal"),
        ("time", 1),
        ("box", {"x": 0, "y": 0, "width": 16, "height": 16}),
        ("verdict", "NG"),
        ("score", 9.0),
        ("note", "all of it"),
        ("release", 8),
        ("fingerprint", "cd" * 32),
        ("knowledge", "x"),
    ):
        with pytest.raises(CandidateError):
            decode_candidate(forged(data, **{name: value})).verify(public_of(SEED))
    other = new_device_key()
    with pytest.raises(CandidateError, match="the key"):
        decode_candidate(made(private_key=other)).verify(public_of(SEED))
    # A thief who puts the right key beside a signature of his own.
    with pytest.raises(CandidateError, match="edited or forged"):
        decode_candidate(rebuilt(made(private_key=other), {"key": public_of(SEED).hex()})).verify(public_of(SEED))
    picture = np.frombuffer(encode_png(frame(101)), np.uint8)
    with pytest.raises(CandidateError, match="picture that its record names"):
        decode_candidate(rebuilt(data, picture=picture))


def test_a_signature_over_a_status_is_none_over_a_candidate() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = made()
    content = canonical_json(decode_candidate(data).mark)
    foreign = Ed25519PrivateKey.from_private_bytes(SEED).sign(b"edgead/status/v1\0" + content)
    with pytest.raises(CandidateError, match="edited or forged"):
        decode_candidate(rebuilt(data, {"signature": foreign.hex()})).verify(public_of(SEED))


def png(picture: Frame) -> Any:
    return np.frombuffer(encode_png(picture), np.uint8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema 1"),
        ({"more": 1}, "every field"),
        ({"kind": "odd"}, "every field"),
        ({"device": "../cam"}, "every field"),
        ({"score": None}, "finite score"),
        ({"verdict": "NOT_INSPECTED"}, "finite score"),
        ({"note": "two\nlines"}, "plain texts"),
        ({"note": "\u202egnp.exe"}, "plain texts"),
        ({"note": "x" * 1001}, "every field"),
        ({"width": 17}, "PNG of 17 x 16"),
        ({"mask": "ab" * 32}, "picture and mask"),
        ({"kind": "normal", "box": {"x": 0, "y": 0, "width": 1, "height": 1}}, "no place on a normal picture"),
        ({"box": {"x": 10, "y": 0, "width": 7, "height": 1}}, "box inside"),
    ],
)
def test_a_value_outside_of_the_format_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CandidateError, match=said):
        decode_candidate(forged(made(), **change))


def test_numbers_that_read_as_infinity_and_other_spellings_are_refused() -> None:
    data = made()
    record = decode_tensors(data, header_limit=2**20)[1]["record"]
    for old, new in (('"score":1.5', '"score":1e999'), ('"score":1.5', '"score":1.50'), ('"time"', ' "time"')):
        with pytest.raises(CandidateError):
            decode_candidate(rebuilt(data, {"record": record.replace(old, new)}))


def test_a_picture_that_is_none_another_kind_or_turned_is_refused() -> None:
    data = made()
    turned = bytearray(encode_png(frame()))
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    chunk = len(exif).to_bytes(4, "big") + b"eXIf" + exif + zlib.crc32(b"eXIf" + exif).to_bytes(4, "big")
    turned[33:33] = chunk
    for picture, said in (
        (b"no picture", "as PNG"),
        (b"", "as PNG"),
        (encode_jpeg(frame()), "JPEG"),
        (encode_png(frame(side=32)), "32 x 32"),
        (bytes(turned), "orientation 6"),
        (encode_png(frame())[:-4], "truncated"),
    ):
        other = forged(data, picture=hashlib.sha256(picture).hexdigest())
        with pytest.raises(CandidateError, match=said):
            decode_candidate(rebuilt(other, picture=np.frombuffer(picture, np.uint8)))


def test_what_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(CandidateError, match="at most"):
        decode_candidate(bytes(CANDIDATE_BYTES + 1))
    # A picture of few bytes and many pixels: its header is enough to refuse it.
    wide = np.zeros((1, 1, 3), np.uint8)
    small = bytearray(encode_png(wide))
    small[16:24] = (60_000).to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    bomb = forged(made(), picture=hashlib.sha256(small).hexdigest(), width=60_000, height=60_000)
    with pytest.raises(CandidateError, match="limit"):
        decode_candidate(rebuilt(bomb, picture=np.frombuffer(bytes(small), np.uint8)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_the_same_candidate_or_one_kind_of_error(data: st.DataObject) -> None:
    whole = made(box=Region(1, 2, 3, 4))
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    try:
        found = decode_candidate(bytes(content))
        found.verify(public_of(SEED))
    except CandidateError:
        return
    assert bytes(content) == whole
    assert found.mark.device == "cam-1"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_one_kind_of_error(content: bytes) -> None:
    with pytest.raises(CandidateError):
        decode_candidate(content)
    with pytest.raises(CandidateError):
        decode_candidate(len(content).to_bytes(8, "little") + content)


def test_a_frame_too_large_to_be_sent_is_kept_as_the_engine_sees_it() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2000, 2000, 3), np.uint8)
    size = Preprocessing(500, 500)
    found = decode_candidate(made(noise, preprocessing=size, box=Region(101, 0, 3, 2000)))
    assert found.mark.resized
    assert (found.frame() == prepare(noise, size)[0]).all()
    assert (prepare(found.frame(), size) == prepare(noise, size)).all()  # the same rows for the engine
    assert found.mark.box == Region(25, 0, 1, 500)
    mask = np.zeros_like(noise)
    mask[8:12, 8:12] = 255
    region = decode_candidate(made(noise, preprocessing=size, mask=mask)).region()
    assert region is not None
    assert np.argwhere(region[..., 0]).tolist() == [[2, 2]]
    with pytest.raises(CandidateError, match="looks at parts"):
        made(noise, preprocessing=Preprocessing(500, 500, roi=Region(0, 0, 1000, 1000)))


def test_a_mask_that_does_not_fit_and_a_box_outside_are_refused() -> None:
    with pytest.raises(InputError, match="mask of 16 x 16"):
        made(mask=np.ones((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="black"):
        made(mask=np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(InputError, match="box inside"):
        made(box=Region(10, 10, 10, 10))
    with pytest.raises(CandidateError, match="normal picture"):
        made(kind="normal", box=Region(1, 1, 1, 1))


def test_the_same_mark_is_kept_once_and_the_newest_is_refused_when_there_is_no_room(tmp_path: Path) -> None:
    marks = Marks(tmp_path, most_files=2)
    first, new = marks.add(made())
    assert new
    assert marks.add(made(now=1_790_000_500)) == (first, False)
    second, _ = marks.add(made(frame(150), now=1_790_000_001))
    with pytest.raises(InputError, match="room among at most 2"):
        marks.add(made(frame(160)))
    assert [candidate.digest for _, candidate in marks] == [first, second]
    with pytest.raises(InputError, match="room"):
        Marks(tmp_path, most_bytes=1000).add(made(frame(160)))
    marks.remove(first[:10])
    with pytest.raises(InputError, match="one mark"):
        marks.remove(first[:10])
    marks.add(made(frame(160)))
    (tmp_path / "candidates" / f"{'0' * 64}.candidate").write_bytes(b"rot")
    assert marks.damaged() == [f"{'0' * 64}.candidate"]
    assert len(list(marks)) == 2


class Refusing(RealDisk):
    """A disk on which a step fails, or that is nearly full."""

    def __init__(self, step: str = "", free: int = 2**40) -> None:
        self.step, self.free = step, free

    def sync(self, path: Path) -> None:
        if self.step == "sync":
            raise OSError(28, "No space left on device")
        super().sync(path)

    def free_space(self, folder: Path) -> int:
        return self.free


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Marks(tmp_path, disk=Refusing("sync")).add(made())
    assert [path.name for path in (tmp_path / "candidates").iterdir()] == [".lock"]
    with pytest.raises(StorageError, match="stay free for updates"):
        Marks(tmp_path, disk=Refusing(free=2**20)).add(made())
    # What a process left that was killed while it wrote is removed by the next mark.
    (tmp_path / "candidates" / "x.candidate.part").write_bytes(b"half")
    Marks(tmp_path).add(made())
    assert not (tmp_path / "candidates" / "x.candidate.part").exists()


def test_marks_leave_by_a_folder_and_are_gone_only_when_they_are_there(tmp_path: Path) -> None:
    marks, stick = Marks(tmp_path / "camera"), tmp_path / "stick"
    first, _ = marks.add(made())
    stick.mkdir()
    assert [item.outcome for item in marks.send(str(stick), keep=True)] == ["arrived"]
    assert len(list(marks)) == 1
    assert [item.outcome for item in marks.send(stick.as_uri())] == ["arrived"]
    assert list(marks) == []
    decode_candidate((stick / f"{first}.candidate").read_bytes()).verify(public_of(SEED))
    for nowhere in ("ftp://host/x", str(tmp_path / "none"), "http://host:port/"):
        with pytest.raises(InputError, match="collector"):
            marks.send(nowhere)


@contextmanager
def answering(status: int, body: bytes | None) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server with one answer; None for the collector's own."""
    taken: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append((self.path, data))
            answer = json.dumps({"id": decode_candidate(data).digest}).encode() if body is None else body
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", taken
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_marks_leave_by_http_and_stay_unless_the_collector_names_them(tmp_path: Path) -> None:
    marks = Marks(tmp_path)
    marks.add(made())
    marks.add(made(frame(150)))
    for status, body, outcome, asked in (
        (503, b"", "kept", 1),
        (429, b'{"reason":"full"}', "kept", 1),
        (302, b"", "kept", 1),
        (200, b"<html>please log in</html>", "kept", 1),
        (200, b'{"id":"' + b"0" * 64 + b'"}', "kept", 1),
        (403, b'{"reason":"an unknown device\\u0007"}', "refused", 2),
    ):
        with answering(status, body) as (address, taken):
            sent = marks.send(address)
        assert [item.outcome for item in sent] == [outcome] * 2
        assert len(taken) == asked
        assert len(list(marks)) == 2
    assert sent[0].reason == "an unknown device"
    assert [item.outcome for item in marks.send("http://127.0.0.1:9/", timeout_s=2)] == ["kept", "kept"]
    with answering(201, None) as (address, taken):
        assert [item.outcome for item in marks.send(address)] == ["arrived", "arrived"]
    assert [path for path, _ in taken] == ["/candidates", "/candidates"]
    assert list(marks) == []


@pytest.mark.parametrize(
    ("statuses", "candidates"),
    [
        ("http://host:8000", "http://host:8000/candidates"),
        ("https://user:word@host/?site=1", "https://user:word@host/candidates?site=1"),
        ("https://host/plant/statuses", "https://host/plant/candidates"),
        ("file:///mnt/share/statuses/", "file:///mnt/share/statuses/candidates"),
        ("mqtt://broker", ""),
        ("", ""),
    ],
)
def test_marks_go_where_statuses_go(statuses: str, candidates: str) -> None:
    assert candidates_address(statuses) == candidates


def test_the_post_tries_again_what_did_not_arrive_and_not_what_was_refused(tmp_path: Path) -> None:
    marks = Marks(tmp_path)
    digests = [marks.add(made(frame(level), now=1_790_000_000 + level))[0] for level in (100, 150)]
    nobody = MarksPost(tmp_path, "http://127.0.0.1:9/", timeout_s=2)
    assert [item.outcome for item in nobody.send()] == ["kept", "kept"]
    assert "no answer" in nobody.trouble
    with answering(403, b'{"reason":"an unknown device"}') as (address, taken):
        post = MarksPost(tmp_path, address)
        assert [item.outcome for item in post.send()] == ["refused", "refused"]
        assert post.send() == []
        marks.add(made(frame(160), now=1_790_000_200))
        assert [item.outcome for item in post.send()] == ["refused"]
    assert len(taken) == 3
    assert MarksPost(tmp_path, "mqtt://broker").send() == []
    share = tmp_path / "share"
    post = MarksPost(tmp_path, share.as_uri())
    assert post.send() == []
    assert post.trouble
    assert not share.exists()  # a medium that is not there is not made
    share.mkdir()
    assert [item.outcome for item in post.send()] == ["arrived"] * 3
    assert post.trouble == ""
    assert {f"{digest}.candidate" for digest in digests} < {path.name for path in (share / "candidates").iterdir()}
    assert list(marks) == []


def test_a_disk_that_fails_costs_the_post_an_attempt(tmp_path: Path) -> None:
    Marks(tmp_path).add(made())
    (tmp_path / "share").mkdir()
    post = MarksPost(tmp_path, (tmp_path / "share").as_uri(), disk=Refusing("sync"))
    assert [item.outcome for item in post.send()] == ["kept"]
    assert len(list(Marks(tmp_path))) == 1
