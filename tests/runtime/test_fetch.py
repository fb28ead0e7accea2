"""Downloads from a server that misbehaves over real sockets; numbers are the rows of the table of faults."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import importlib.util
import ipaddress
import json
import random
import socket
import ssl
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import FetchContentError, FetchError, FetchStatusError, FetchTimeoutError
from edgead.runtime.fetch import Fetcher
from edgead.runtime.fetch_rules import FetchLimits, pause

QUICK = FetchLimits(
    connect_s=1.0,
    gap_s=0.3,
    total_s=5.0,
    least_rate=500.0,
    rate_window_s=0.5,
    tries=3,
    first_wait_s=0.01,
    longest_wait_s=1.5,
)
CONTENT = random.Random(1).randbytes(200_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="session")
def bad() -> ModuleType:
    path = Path(__file__).parents[1] / "misbehaving_server.py"
    spec = importlib.util.spec_from_file_location("edgead_tests_misbehaving", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(bad: ModuleType) -> Iterator[Any]:
    with bad.misbehaving() as running:
        running.files["/file"] = CONTENT
        yield running


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    one = Fetcher(QUICK, rng=random.Random(0))
    yield one
    one.close()


def saved(fetcher: Fetcher, server: Any, folder: Path) -> bytes:
    fetcher.save(f"{server.url}/file", folder / "here", RealDisk(), length=len(CONTENT), sha256=SHA)
    assert sorted(path.name for path in folder.iterdir()) == ["here"]
    return (folder / "here").read_bytes()


def test_an_honest_server_needs_one_request_and_one_connection(fetcher: Fetcher, server: Any, tmp_path: Path) -> None:
    assert saved(fetcher, server, tmp_path) == CONTENT
    assert fetcher.read(f"{server.url}/file", len(CONTENT), sha256=SHA) == CONTENT
    assert server.log == [("/file", None)] * 2
    assert fetcher.received == 2 * len(CONTENT)


def test_one_connection_serves_files_empty_ones_and_refusals(fetcher: Fetcher, server: Any, tmp_path: Path) -> None:
    seen = set()
    server.files |= {"/small": b"small", "/empty": b""}

    def noted(handler: Any, content: bytes) -> bool:
        seen.add(handler.client_address)
        return True

    server.fault = noted
    for _ in range(3):
        assert fetcher.read(f"{server.url}/small", 10) == b"small"
        with pytest.raises(FetchStatusError):
            fetcher.read(f"{server.url}/missing", 10)
        assert fetcher.read(f"{server.url}/empty", 10) == b""
    assert saved(fetcher, server, tmp_path) == CONTENT
    assert len(server.log) == 10
    assert len(seen) == 1


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("tenth", range(10))
def test_row_7_a_cut_connection_goes_on_where_it_stopped(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path, tenth: int, reset: bool
) -> None:
    server.fault = bad.times(1, bad.cut_after(tenth * len(CONTENT) // 10, reset=reset))
    assert saved(fetcher, server, tmp_path) == CONTENT
    assert fetcher.received == len(CONTENT)  # no byte twice
    assert len(server.log) == 2


def test_row_7_a_connection_cut_after_every_tenth_gives_the_identical_file(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path
) -> None:
    server.fault = bad.cut_after(len(CONTENT) // 10)
    assert saved(fetcher, server, tmp_path) == CONTENT
    assert fetcher.received == len(CONTENT)
    assert [begin for _, begin in server.log[1:3]] == ["bytes=20000-", "bytes=40000-"]


def test_row_7_what_a_killed_download_left_is_not_fetched_again(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path
) -> None:
    server.fault = bad.cut_after(60_000)
    with pytest.raises(FetchError):
        Fetcher(FetchLimits(tries=1)).save(
            f"{server.url}/file", tmp_path / "here", RealDisk(), length=len(CONTENT), sha256=SHA
        )
    assert not (tmp_path / "here").exists()
    server.fault = None
    assert saved(fetcher, server, tmp_path) == CONTENT
    assert fetcher.received == len(CONTENT) - 60_000


def test_row_7_remains_of_another_file_are_thrown_away(fetcher: Fetcher, server: Any, tmp_path: Path) -> None:
    (tmp_path / "here.part").write_bytes(b"z" * 100)
    assert saved(fetcher, server, tmp_path) == CONTENT
    (tmp_path / "here.part").write_bytes(b"z" * len(CONTENT))
    assert saved(fetcher, server, tmp_path) == CONTENT


@pytest.mark.parametrize("left", [0, 60_000])
def test_row_24_a_download_that_is_killed_at_any_step_can_be_done_again(
    fetcher: Fetcher, server: Any, tmp_path: Path, left: int
) -> None:
    class Killed(BaseException):
        """The power goes."""

    class Dying(RealDisk):
        def __init__(self, steps: int) -> None:
            self.left = steps

        def step(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise Killed

        def write(self, path: Path, chunks: Any) -> None:
            self.step()

            def dying() -> Iterator[bytes]:
                for chunk in chunks:
                    yield chunk
                    self.step()

            super().write(path, dying())

        def replace(self, source: Path, target: Path) -> None:
            self.step()
            super().replace(source, target)

        def remove(self, path: Path) -> None:
            self.step()
            super().remove(path)

        def sync(self, path: Path) -> None:
            self.step()
            super().sync(path)

        def sync_folder(self, folder: Path) -> None:
            self.step()
            super().sync_folder(folder)

    for steps in range(100):
        folder = tmp_path / str(steps)
        folder.mkdir()
        (folder / "here.part").write_bytes(CONTENT[:left])
        try:
            fetcher.save(f"{server.url}/file", folder / "here", Dying(steps), length=len(CONTENT), sha256=SHA)
            break
        except Killed:
            if (folder / "here").exists():
                assert (folder / "here").read_bytes() == CONTENT
            assert saved(fetcher, server, folder) == CONTENT
    assert 6 < steps < 99


def test_row_8_a_whole_answer_to_a_range_is_taken_from_its_beginning(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path
) -> None:
    server.fault = bad.ignores_range(70_000)
    assert saved(fetcher, server, tmp_path) == CONTENT


@pytest.mark.parametrize("shift", [-1000, 1000])
def test_row_8_another_range_than_was_asked_for_restarts(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path, shift: int
) -> None:
    server.fault = bad.wrong_range(70_000, shift, honest_after=1)
    assert saved(fetcher, server, tmp_path) == CONTENT


def test_row_8_a_server_that_never_has_the_right_range_is_given_up(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path
) -> None:
    server.fault = bad.wrong_range(70_000, 1)
    with pytest.raises(FetchContentError, match="each attempt"):
        saved(fetcher, server, tmp_path)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("tags", [True, False], ids=["tagged", "untagged"])
def test_row_8_an_object_swapped_between_ranges_never_gives_a_mixed_file(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path, tags: bool
) -> None:
    server.fault = bad.swaps(70_000, CONTENT[::-1], tags=tags)
    with pytest.raises(FetchContentError, match="SHA-256"):
        saved(fetcher, server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_row_1_a_flipped_bit_is_refused(bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path) -> None:
    server.fault = bad.flipped
    with pytest.raises(FetchContentError, match="SHA-256"):
        saved(fetcher, server, tmp_path)
    with pytest.raises(FetchContentError, match="SHA-256"):
        fetcher.read(f"{server.url}/file", len(CONTENT), sha256=SHA)
    assert list(tmp_path.iterdir()) == []


def test_row_2_a_truncated_file_with_an_honest_length_is_refused_at_once(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path
) -> None:
    server.fault = bad.truncated
    with pytest.raises(FetchContentError, match="200000 bytes; got 100000"):
        saved(fetcher, server, tmp_path)
    assert len(server.log) == 1


@pytest.mark.parametrize("fault", ["oversize", "endless"])
def test_row_3_a_target_stops_at_its_signed_length(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path, fault: str
) -> None:
    server.fault = getattr(bad, fault)
    with pytest.raises(FetchContentError, match="bytes; got"):
        saved(fetcher, server, tmp_path)
    assert fetcher.received <= len(CONTENT)


def test_row_4_an_endless_answer_stops_at_the_most_that_it_may_have(
    bad: ModuleType, fetcher: Fetcher, server: Any
) -> None:
    server.fault = bad.endless
    with pytest.raises(FetchContentError, match="at most 16384 bytes; got more"):
        fetcher.read(f"{server.url}/timestamp.json", 16384)
    assert fetcher.received <= 16384


@pytest.mark.parametrize("after", [None, 0, 5000])
def test_row_5_a_stalled_transfer_ends_and_is_tried_again(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path, after: int | None
) -> None:
    server.fault = bad.times(1, bad.silent if after is None else bad.stalls(after))
    begin = time.monotonic()
    assert saved(fetcher, server, tmp_path) == CONTENT
    assert 0.3 <= time.monotonic() - begin < 2.0
    server.fault = bad.silent
    with pytest.raises(FetchTimeoutError):
        fetcher.read(f"{server.url}/file", len(CONTENT), sha256=SHA)
    assert time.monotonic() - begin < 4.0


def test_row_5_pauses_double_differ_between_devices_and_end() -> None:
    limits = FetchLimits(tries=5, first_wait_s=1.0, longest_wait_s=3.0)
    waits = [[pause(n, limits, random.Random(seed), None) for n in range(1, 6)] for seed in range(50)]
    for row in waits:
        assert row[4] is None
        for wait, most in zip(row[:4], (1.0, 2.0, 3.0, 3.0), strict=True):
            assert wait is not None
            assert most / 2 <= wait <= most
    assert len({row[0] for row in waits}) == 50


def test_row_6_a_drip_under_the_gap_timeout_ends_at_the_least_rate(
    bad: ModuleType, server: Any, tmp_path: Path
) -> None:
    server.fault = bad.drips(0.05)
    fetcher = Fetcher(FetchLimits(gap_s=0.3, least_rate=500.0, rate_window_s=0.5, tries=1))
    begin = time.monotonic()
    with pytest.raises(FetchTimeoutError, match="bytes per second"):
        saved(fetcher, server, tmp_path)
    assert time.monotonic() - begin < 1.5


def test_row_6_a_drip_ends_at_the_total_deadline(bad: ModuleType, server: Any) -> None:
    server.fault = bad.drips(0.05)
    fetcher = Fetcher(FetchLimits(gap_s=0.3, total_s=0.6, least_rate=0.0))
    begin = time.monotonic()
    with pytest.raises(FetchTimeoutError, match=r"within 0\.6 s"):
        fetcher.read(f"{server.url}/file", len(CONTENT), sha256=SHA)
    assert time.monotonic() - begin < 1.2


def test_row_6_a_head_that_drips_is_ended_too(bad: ModuleType, server: Any) -> None:
    server.fault = bad.drips_head(0.05)
    begin = time.monotonic()
    with pytest.raises(FetchError):
        Fetcher(FetchLimits(gap_s=0.3, tries=1)).read(f"{server.url}/file", 100)
    assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize("code", [403, 404, 302])
def test_row_9_an_answer_that_is_final_is_not_asked_for_again(
    bad: ModuleType, fetcher: Fetcher, server: Any, code: int
) -> None:
    server.fault = bad.status(code)
    with pytest.raises(FetchStatusError) as caught:
        fetcher.read(f"{server.url}/file", 100)
    assert caught.value.status == code
    assert len(server.log) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_row_9_an_answer_that_may_pass_is_tried_again(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path, code: int
) -> None:
    server.fault = bad.times(2, bad.status(code))
    assert saved(fetcher, server, tmp_path) == CONTENT
    server.fault = bad.status(code)
    with pytest.raises(FetchStatusError) as caught:
        fetcher.read(f"{server.url}/file", 100)
    assert caught.value.status == code
    assert len(server.log) == 3 + QUICK.tries


def test_row_9_retry_after_is_waited_for_and_a_long_one_handed_on(
    bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path
) -> None:
    server.fault = bad.times(1, bad.status(429, Retry_After="1"))
    begin = time.monotonic()
    assert saved(fetcher, server, tmp_path) == CONTENT
    assert time.monotonic() - begin >= 1.0
    server.log.clear()
    server.fault = bad.status(503, Retry_After="3600")
    with pytest.raises(FetchStatusError) as caught:
        fetcher.read(f"{server.url}/file", 100)
    assert caught.value.retry_after == 3600.0
    assert len(server.log) == 1


def test_row_9_a_login_page_is_no_file(bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path) -> None:
    server.fault = bad.portal
    with pytest.raises(FetchContentError, match="login page"):
        saved(fetcher, server, tmp_path)


def test_row_9_a_refused_connection_and_an_unknown_name_are_errors_of_one_kind(fetcher: Fetcher) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/x", "http://no-such-host.invalid/x"):
        with pytest.raises(FetchError) as caught:
            fetcher.read(url, 100)
        assert caught.value.transient


@pytest.fixture(scope="session")
def self_signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that nobody vouches for, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_row_9_a_certificate_that_nobody_vouches_for_is_refused(server: Any, self_signed: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    url = f"https://127.0.0.1:{server.server_port}/file"
    with pytest.raises(FetchError, match="certificate") as caught:
        Fetcher(QUICK).read(url, len(CONTENT), sha256=SHA)
    assert not caught.value.transient
    trusting = Fetcher(QUICK, context=ssl.create_default_context(cafile=str(self_signed)))
    assert trusting.read(url, len(CONTENT), sha256=SHA) == CONTENT
    trusting.close()


def test_a_server_without_tls_is_no_server_for_https(server: Any) -> None:
    with pytest.raises(FetchError, match="SSL"):
        Fetcher(QUICK).read(f"https://127.0.0.1:{server.server_port}/file", 100)


def test_a_folder_is_read_by_the_same_rules(fetcher: Fetcher, tmp_path: Path) -> None:
    (tmp_path / "a stick").mkdir()
    source = tmp_path / "a stick" / "file"
    source.write_bytes(CONTENT)
    fetcher.save(source.as_uri(), tmp_path / "here", RealDisk(), length=len(CONTENT), sha256=SHA)
    assert (tmp_path / "here").read_bytes() == CONTENT
    with pytest.raises(FetchContentError):
        fetcher.read(source.as_uri(), 100)
    with pytest.raises(FetchStatusError) as caught:
        fetcher.read((tmp_path / "none").as_uri(), 100)
    assert caught.value.status == 404
    with pytest.raises(FetchContentError, match="plain file"):
        fetcher.read((tmp_path / "a stick").as_uri(), 100)


def test_no_password_stands_in_a_message(fetcher: Fetcher) -> None:
    with pytest.raises(FetchError) as caught:
        fetcher.read("http://user:secret@127.0.0.1:1/x?token=secret", 100)
    assert "secret" not in str(caught.value)


def test_a_wait_ends_when_it_is_told_to(bad: ModuleType, server: Any) -> None:
    stop = threading.Event()
    stop.set()
    server.fault = bad.status(503)
    begin = time.monotonic()
    with pytest.raises(FetchStatusError):
        Fetcher(FetchLimits(first_wait_s=30.0), stop=stop).read(f"{server.url}/file", 100)
    assert time.monotonic() - begin < 5.0


# Metadata in gzip

TEXT = json.dumps({"signatures": [random.Random(number).randbytes(64).hex() for number in range(400)]}).encode()
PACKED = gzip.compress(TEXT, 9, mtime=0)


def encoded(body: bytes, encoding: str = "gzip", *, length: int | None = None) -> Any:
    """An answer whose body is encoded, for who asks for it; as it is for everybody else."""

    def answer(handler: Any, content: bytes) -> bool | None:
        if "gzip" not in (handler.headers["Accept-Encoding"] or ""):
            return True
        headers = {"Content-Encoding": encoding, "Content-Length": str(len(body) if length is None else length)}
        handler.send_status(200, {**headers, "ETag": '"packed"'}, body)
        return None

    return answer


def text(fetcher: Fetcher, server: Any, most: int = 10**6) -> bytes:
    server.files["/text"] = TEXT
    return fetcher.read(f"{server.url}/text", most, packed=True)


def test_gzip_is_unpacked_and_counted_as_it_came(fetcher: Fetcher, server: Any) -> None:
    server.fault = encoded(PACKED)
    assert text(fetcher, server) == TEXT
    assert fetcher.received == len(PACKED) < 0.7 * len(TEXT)
    assert text(fetcher, server, len(TEXT)) == TEXT


def test_a_server_that_ignores_what_it_is_asked_for_is_understood(fetcher: Fetcher, server: Any) -> None:
    assert text(fetcher, server) == TEXT
    assert fetcher.received == len(TEXT)


def test_files_that_are_continued_are_never_asked_for_in_gzip(fetcher: Fetcher, server: Any, tmp_path: Path) -> None:
    server.fault = encoded(gzip.compress(CONTENT))
    assert saved(fetcher, server, tmp_path) == CONTENT
    assert fetcher.read(f"{server.url}/file", len(CONTENT), sha256=SHA) == CONTENT
    assert fetcher.received == 2 * len(CONTENT)


def test_gzip_of_several_members_is_one_file(fetcher: Fetcher, server: Any) -> None:
    parts = [gzip.compress(TEXT[start : start + 20_000]) for start in range(0, len(TEXT), 20_000)]
    server.fault = encoded(b"".join([parts[0], gzip.compress(b""), *parts[1:]]))
    assert text(fetcher, server) == TEXT


def test_a_bomb_ends_at_the_most_that_the_file_may_have(fetcher: Fetcher, server: Any) -> None:
    bomb = gzip.compress(bytes(200 * 2**20), 9)
    server.fault = encoded(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(FetchContentError, match="at most 300000 bytes"):
            text(fetcher, server, 300_000)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_gzip_that_goes_on_without_content_ends(fetcher: Fetcher, server: Any) -> None:
    server.fault = encoded(gzip.compress(b"") * 1000)
    with pytest.raises(FetchContentError):
        text(fetcher, server, 1000)
    assert fetcher.received < 100_000


@pytest.mark.parametrize(
    "body",
    [
        PACKED[:-1],
        PACKED[: len(PACKED) // 2],
        PACKED[:5],
        b"",
        TEXT,
        PACKED + b"more",
        PACKED[:-8] + bytes(8),
        PACKED[:1000] + bytes([PACKED[1000] ^ 1]) + PACKED[1001:],
        gzip.compress(PACKED)[:-3],
    ],
)
def test_broken_gzip_is_an_error_and_the_next_poll_does_without(fetcher: Fetcher, server: Any, body: bytes) -> None:
    server.fault = encoded(body)
    with pytest.raises(FetchContentError, match="gzip"):
        text(fetcher, server)
    assert len(server.log) == 1
    assert text(fetcher, server) == TEXT


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "compress"])
def test_another_encoding_than_was_asked_for_is_refused(fetcher: Fetcher, server: Any, encoding: str) -> None:
    server.fault = encoded(PACKED, encoding)
    with pytest.raises(FetchContentError, match="encoded as"):
        text(fetcher, server)


def test_gzip_that_nobody_asked_for_is_refused(bad: ModuleType, fetcher: Fetcher, server: Any, tmp_path: Path) -> None:
    server.fault = bad.status(200, Content_Encoding="gzip")
    with pytest.raises(FetchContentError, match="encoded as gzip"):
        saved(fetcher, server, tmp_path)
    with pytest.raises(FetchContentError, match="encoded as gzip"):
        fetcher.read(f"{server.url}/file", len(CONTENT), sha256=SHA)


def test_gzip_that_is_cut_is_begun_anew_as_it_is(bad: ModuleType, fetcher: Fetcher, server: Any) -> None:
    def cuts(handler: Any, content: bytes) -> bool | None:
        if encoded(PACKED[: len(PACKED) // 2], length=len(PACKED))(handler, content):
            return True
        time.sleep(0.01)
        handler.cut()
        return None

    server.fault = cuts
    assert text(fetcher, server) == TEXT
    assert server.log == [("/text", None), ("/text", None)]


def test_a_length_in_gzip_that_the_file_cannot_have_is_refused_at_once(fetcher: Fetcher, server: Any) -> None:
    server.fault = encoded(PACKED, length=10**6)
    with pytest.raises(FetchContentError, match="1000000"):
        text(fetcher, server, 10_000)
    assert fetcher.received == 0
