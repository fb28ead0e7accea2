"""Statuses on their way: nothing leaves the spool before a collector said that it has it, whatever lies between."""

from __future__ import annotations

import json
import random
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edgead.runtime.device_status import DeviceStatus, decode_status, encode_status
from edgead.runtime.errors import FetchContentError, FetchStatusError, FetchTimeoutError, InputError
from edgead.runtime.fetch_rules import FetchLimits
from edgead.runtime.status_sender import BATCH_BYTES, StatusSender, checked_address, read_sent
from edgead.runtime.status_spool import SPOOL_FILES, StatusSpool

SEED = bytes(range(32))
QUICK = FetchLimits(connect_s=2.0, gap_s=0.5, total_s=3.0, first_wait_s=30.0, longest_wait_s=3600.0)


def status(number: int, dropped: int = 0) -> bytes:
    return encode_status(DeviceStatus("cam", "carpet", number, 1, "1", dropped=dropped), SEED)


class Collector(ThreadingHTTPServer):
    """Takes statuses as the contract says, or misbehaves.

    Attributes:
        fault: answers instead; None for none.
        known: statuses by device and number.
        refuse: numbers that are refused.
        log: path, headers and number of lines of each request.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault: Callable[[Handler, list[bytes]], object] | None = None
        self.known: dict[int, bytes] = {}
        self.refuse: set[int] = set()
        self.log: list[tuple[str, Any, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are what this server is for."""


class Handler(BaseHTTPRequestHandler):
    server: Collector
    timeout = 10.0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
        self.server.log.append((self.path, self.headers, len(lines)))
        if self.server.fault is not None:
            self.server.fault(self, lines)
        else:
            self.honest(lines)

    def honest(self, lines: list[bytes]) -> None:
        counts: dict[str, Any] = {"accepted": 0, "known": 0, "refused": []}
        for place, line in enumerate(lines):
            number = decode_status(line).status.sequence
            if number in self.server.refuse:
                counts["refused"].append({"line": place, "reason": "another key"})
            elif number in self.server.known:
                counts["known"] += 1
            else:
                counts["accepted"] += 1
                self.server.known[number] = line
        self.answer(200, json.dumps(counts).encode())

    def answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


class Clock:
    """A device's clock."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spool(tmp_path: Path) -> StatusSpool:
    made = StatusSpool(tmp_path / "spool")
    for _ in range(3):
        made.add(status)
    return made


def sender(spool: StatusSpool, address: str, clock: Clock, **options: Any) -> StatusSender:
    fields: dict[str, Any] = {"limits": QUICK, "rng": random.Random(1)} | options
    return StatusSender(address, spool, device_id="cam", product="carpet", clock=clock, **fields)


def test_what_a_collector_has_leaves_the_spool(collector: Collector, spool: StatusSpool, clock: Clock) -> None:
    collector.refuse = {2}
    collector.known[1] = b""
    one = sender(spool, collector.url, clock)
    sent = one.send()
    assert (sent.accepted, sent.known, sent.refused, sent.waiting, sent.error) == (1, 1, 1, 0, None)
    assert sent.refusals == ("another key",)
    assert collector.known[3] == status(3)
    ((path, headers, lines),) = collector.log
    assert (path, lines, headers["Content-Type"]) == ("/statuses", 3, "application/x-ndjson")
    record = read_sent(spool.folder)
    assert (record.time, record.accepted, record.known, record.refused) == (1_800_000_000, 1, 1, 1)
    assert (record.refusal, record.error) == ("another key", "")
    assert one.send().waiting == 0
    assert len(collector.log) == 1  # nothing waits, nobody is asked


def test_a_path_of_its_own_and_a_password_are_kept(collector: Collector, spool: StatusSpool, clock: Clock) -> None:
    address = collector.url.replace("http://", "http://cam:s%65cret@") + "/plant/7?a=b"
    assert sender(spool, address, clock).send().accepted == 3
    ((path, headers, _),) = collector.log
    assert path == "/plant/7?a=b"
    assert headers["Authorization"] == "Basic Y2FtOnNlY3JldA=="


def html(handler: Handler, lines: list[bytes]) -> None:
    handler.answer(200, b"<html>Welcome! Please log in.</html>", {"Content-Type": "text/html"})


def hang(handler: Handler, lines: list[bytes]) -> None:
    time.sleep(3.0)


def drip(handler: Handler, lines: list[bytes]) -> None:
    body = json.dumps({"accepted": len(lines), "known": 0, "refused": []}).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(10_000 + len(body)))
    handler.end_headers()
    for letter in b" " * 10_000 + body:
        handler.wfile.write(bytes([letter]))
        handler.wfile.flush()
        time.sleep(0.05)


def endless_head(handler: Handler, lines: list[bytes]) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(200):
        handler.wfile.write(b"X-%d: y\r\n" % number)
        handler.wfile.flush()
        time.sleep(0.05)


def reset(handler: Handler, lines: list[bytes]) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def body(content: bytes, code: int = 200) -> Callable[[Handler, list[bytes]], None]:
    return lambda handler, lines: handler.answer(code, content)


@pytest.mark.parametrize(
    "fault",
    [
        html,
        hang,
        drip,
        endless_head,
        reset,
        body(b""),
        body(b"OK"),
        body(b"null"),
        body(b"{}"),
        body(b'{"accepted":true,"known":0,"refused":[]}'),
        body(b'{"accepted":4,"known":-1,"refused":[]}'),
        body(b'{"accepted":2,"known":0,"refused":[]}'),
        body(b'{"accepted":3,"known":0,"refused":[{"line":0,"reason":"no"}]}'),
        body(b'{"accepted":3,"known":0}'),
        body(b'{"accepted":3,"known":0,"refused":[], "x":"' + b"y" * 100_000 + b'"}'),
        body(b'{"x":' * 10_000),
        body(b"\xff\xfe"),
        body(b'{"accepted":3,"known":0,"refused":[]}', 201),
        body(b'{"accepted":3,"known":0,"refused":[]}', 302),
        body(b"", 400),
        body(b"", 401),
        body(b"", 403),
        body(b"", 404),
        body(b"", 500),
        body(b"", 503),
        lambda handler, lines: handler.answer(307, b"", {"Location": "/elsewhere"}),
        lambda handler, lines: handler.connection.sendall(b"SSH-2.0-OpenSSH\r\n"),
    ],
)
def test_any_other_answer_keeps_all_of_them(
    collector: Collector, spool: StatusSpool, clock: Clock, fault: Callable[[Handler, list[bytes]], None]
) -> None:
    collector.fault = fault
    one = sender(spool, collector.url.replace("http://", "http://cam:secret@"), clock)
    begin = time.monotonic()
    sent = one.send()
    assert time.monotonic() - begin < 20.0
    assert (sent.accepted, sent.known, sent.refused, sent.waiting) == (0, 0, 0, 3)
    assert sent.error is not None
    record = read_sent(spool.folder)
    assert record.failures == 1
    assert record.error
    assert "secret" not in str(sent.error) + (spool.folder / "sent.json").read_text()
    assert clock.now + 15.0 <= record.not_before <= clock.now + 30.0
    # Until then nobody is asked; then all of it goes.
    asked = len(collector.log)
    collector.fault = None
    assert one.send().waiting == 3
    assert sender(spool, collector.url, clock).send().waiting == 3
    assert len(collector.log) == asked
    clock.now = record.not_before
    assert one.send().waiting == 0
    assert (read_sent(spool.folder).failures, read_sent(spool.folder).error) == (0, "")


def test_a_login_page_is_told_as_one(collector: Collector, spool: StatusSpool, clock: Clock) -> None:
    collector.fault = html
    error = sender(spool, collector.url, clock).send().error
    assert isinstance(error, FetchContentError)
    assert "login page" in error.got


def test_a_line_that_hangs_is_ended(collector: Collector, spool: StatusSpool, clock: Clock) -> None:
    collector.fault = hang
    assert isinstance(sender(spool, collector.url, clock).send().error, FetchTimeoutError)


@pytest.mark.parametrize("asked", ["600", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_collector_that_asks_for_patience_gets_it(
    collector: Collector, spool: StatusSpool, clock: Clock, asked: str
) -> None:
    collector.fault = lambda handler, lines: handler.answer(429, b"", {"Retry-After": asked})
    error = sender(spool, collector.url, clock).send().error
    assert isinstance(error, FetchStatusError)
    assert error.status == 429
    wait = read_sent(spool.folder).not_before - clock.now
    assert 600 <= wait <= 720 if asked == "600" else 60 <= wait <= 72


def test_failures_in_a_row_wait_longer_with_jitter_and_no_longer_than_an_hour(spool: StatusSpool, clock: Clock) -> None:
    waits = []
    for seed in range(12):
        one = sender(spool, "http://127.0.0.1:1", clock, rng=random.Random(seed))
        one.send()
        waits.append(one.record.not_before - clock.now)
        clock.now = one.record.not_before
    assert all(15.0 * 2**n <= wait <= 30.0 * 2**n for n, wait in enumerate(waits[:6]))
    assert max(waits) <= 3600.0
    assert len({round(wait, 3) for wait in waits}) == len(waits)


def test_a_clock_that_was_set_back_does_not_silence_a_device(
    collector: Collector, spool: StatusSpool, clock: Clock
) -> None:
    sender(spool, "http://127.0.0.1:1", clock).send()
    clock.now = 1000.0
    assert sender(spool, collector.url, clock).send().accepted == 3


def test_a_collector_that_wants_less_at_a_time_gets_less(
    collector: Collector, spool: StatusSpool, clock: Clock
) -> None:
    for _ in range(37):
        spool.add(status)

    def small(handler: Handler, lines: list[bytes]) -> None:
        if len(lines) > 5:
            handler.answer(413)
        else:
            handler.honest(lines)

    collector.fault = small
    sent = sender(spool, collector.url, clock).send()
    assert (sent.accepted, sent.waiting, sent.error) == (40, 0, None)
    collector.fault = body(b"", 413)
    spool.add(status)
    assert sender(spool, collector.url, clock).send().waiting == 1


def test_a_full_spool_goes_in_bodies_of_bounded_size(collector: Collector, spool: StatusSpool, clock: Clock) -> None:
    long = encode_status(DeviceStatus("cam", "carpet", 1, 1, "1", quarantined=("c" * 64,) * 32), SEED)
    for _ in range(150):
        spool.add(
            lambda number, dropped: encode_status(
                DeviceStatus("cam", "carpet", number, 1, "1", quarantined=("c" * 64,) * 32), SEED
            )
        )
    sent = sender(spool, collector.url, clock).send()
    assert (sent.accepted, sent.waiting) == (153, 0)
    assert len(collector.log) >= 150 * len(long) // BATCH_BYTES
    assert all(int(headers["Content-Length"]) <= BATCH_BYTES for _, headers, _ in collector.log)


def test_a_collector_that_dies_half_way_costs_only_what_it_did_not_confirm(
    collector: Collector, spool: StatusSpool, clock: Clock
) -> None:
    def once(handler: Handler, lines: list[bytes]) -> None:
        for line in lines:  # it had them, and could not say so any more
            handler.server.known[decode_status(line).status.sequence] = line
        reset(handler, lines)

    collector.fault = once
    one = sender(spool, collector.url, clock)
    assert one.send().waiting == 3
    collector.fault = None
    clock.now += 60.0
    sent = one.send()
    assert (sent.accepted, sent.known, sent.waiting) == (0, 3, 0)


def test_a_server_that_proves_nothing_is_told_nothing(spool: StatusSpool, clock: Clock, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, which makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    server = Collector()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        address = f"https://localhost:{server.server_port}"
        sent = sender(spool, address, clock).send()
        assert sent.waiting == 3
        assert "certificate" in str(sent.error)
        assert not server.log
        clock.now += 60.0
        trusting = ssl.create_default_context(cafile=str(certificate))
        assert sender(spool, address, clock, context=trusting).send().accepted == 3
    finally:
        server.shutdown()
        server.server_close()


def test_a_folder_takes_statuses_as_whole_files(spool: StatusSpool, clock: Clock, tmp_path: Path) -> None:
    stick = tmp_path / "a stick"
    address = checked_address(str(stick))
    assert address.startswith("file:///")
    sent = sender(spool, address, clock).send()
    assert sent.waiting == 3  # a stick that is not there is not made up
    assert not stick.exists()
    stick.mkdir()
    clock.now += 60.0
    sent = sender(spool, address, clock).send()
    assert (sent.accepted, sent.waiting) == (3, 0)
    assert sorted(path.name for path in (stick / "cam").iterdir()) == [f"{n:012d}.json" for n in (1, 2, 3)]
    assert (stick / "cam" / "000000000002.json").read_bytes() == status(2)


def test_a_folder_keeps_the_last_ones_of_a_device(spool: StatusSpool, clock: Clock, tmp_path: Path) -> None:
    place = tmp_path / "here" / "cam"
    place.mkdir(parents=True)
    for number in range(SPOOL_FILES):
        (place / f"{number:012d}.json").write_bytes(b"")
    spool.remove([1, 2])
    (place / "000000000003.json").unlink()
    sender(spool, str(tmp_path / "here"), clock).send()
    clock.now += 60
    spool.add(lambda number, dropped: status(number))
    names = sorted(path.name for path in place.iterdir())
    assert len(names) <= SPOOL_FILES
    assert (place / "000000000003.json").read_bytes() == status(3)


def test_a_thread_sends_what_comes(collector: Collector, spool: StatusSpool) -> None:
    one = StatusSender(collector.url, spool, device_id="cam", product="carpet", limits=QUICK)
    stop, seen = threading.Event(), []
    thread = one.start(stop, seen.append)
    try:
        for wanted in (3, 4, 5):
            end = time.monotonic() + 20.0
            while len(collector.known) < wanted and time.monotonic() < end:
                time.sleep(0.02)
            assert len(collector.known) == wanted
            spool.add(status)
            one.wake()
    finally:
        stop.set()
        thread.join(20.0)
    assert not thread.is_alive()
    assert seen[0].accepted == 3


@pytest.mark.parametrize(
    "address", ["", "ftp://x", "http://", "http://x:0", "http://x:y", "file://host/x", "mqtt://", "mqtt://x/y", "://"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InputError):
        checked_address(address)


def test_an_address_in_an_error_has_no_password() -> None:
    with pytest.raises(InputError) as caught:
        checked_address("ftp://me:secret@host/x?token=secret")
    assert "secret" not in str(caught.value)
