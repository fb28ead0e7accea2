"""The collector: a real server and real requests, good ones, hostile ones, and a database that goes away."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from edgead.runtime.device_status import DeviceStatus, encode_status, new_device_key, public_of
from edgead.runtime.errors import StorageError
from edgead.server_side.ota.collector import CollectorLimits, Rates, Tokens
from edgead.server_side.ota.collector_server import CollectorServer, collecting
from edgead.server_side.ota.devices import checked
from edgead.server_side.ota.intake import Intake
from edgead.server_side.ota.status_store import StatusStore

FAST = CollectorLimits(rate=10_000.0, burst=10_000)
Answer = tuple[int, dict[str, str], bytes]


class Camera:
    """A device that signs."""

    def __init__(self, name: str = "cam-1") -> None:
        self.name, self.seed = name, new_device_key()
        self.key = public_of(self.seed).hex()

    def says(self, sequence: int, **fields: Any) -> bytes:
        fields = {"product": "part", "time": int(time.time()), "version": "1.0"} | fields
        return encode_status(DeviceStatus(device=self.name, sequence=sequence, **fields), self.seed)


def ask(url: str, method: str = "GET", path: str = "/statuses", body: Any = None, **headers: str) -> Answer:
    host, _, port = url.rpartition("/")[2].partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def send(url: str, *envelopes: bytes, **headers: str) -> tuple[int, Any]:
    status, _, body = ask(url, "POST", body=b"".join(one + b"\n" for one in envelopes), **headers)
    return status, json.loads(body) if body else None


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StatusStore]:
    with StatusStore(str(tmp_path / "fleet.db")) as made:
        yield made


@pytest.fixture
def camera(store: StatusStore) -> Camera:
    made = Camera()
    store.devices.add([checked(made.name, made.key)])
    return made


@pytest.fixture
def serve(store: StatusStore) -> Iterator[Callable[..., str]]:
    """Starts a collector, and gives its address."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> str:
            server = CollectorServer(Intake(store), **({"limits": FAST} | options))
            return stack.enter_context(collecting(server)).url

        yield start


# Good ones


def test_statuses_are_taken_line_by_line_and_refusals_name_their_line(
    serve: Callable[..., str], store: StatusStore, camera: Camera
) -> None:
    url, first = serve(), camera.says(1, release=3)
    assert send(url, first) == (200, {"accepted": 1, "known": 0, "refused": []})
    status, told = send(url, first, b"{rubbish", camera.says(2), Camera().says(3), Camera("cam-2").says(1))
    assert (status, told["accepted"], told["known"]) == (200, 1, 1)
    assert [one["line"] for one in told["refused"]] == [1, 3, 4]
    assert [one["reason"].partition(":")[0] for one in told["refused"]] == [
        "malformed",
        "another key",
        "unknown device",
    ]
    assert [one.status.sequence for one in store.history("cam-1")] == [1, 2]


def test_a_device_empties_its_spool_into_the_collector(
    serve: Callable[..., str], store: StatusStore, camera: Camera, tmp_path: Path
) -> None:
    from edgead.runtime.status_sender import StatusSender
    from edgead.runtime.status_spool import StatusSpool

    spool = StatusSpool(tmp_path / "spool")
    for _ in range(30):
        assert spool.add(lambda sequence, dropped: camera.says(sequence, dropped=dropped)) is not None
    url = serve(tokens=Tokens("device-token"))
    address = url.replace("http://", "http://cam-1:device-token@")
    sent = StatusSender(address, spool, device_id="cam-1", product="part").send()
    assert (sent.error, sent.accepted, sent.waiting) == (None, 30, 0)
    assert len(store.history("cam-1")) == 30


def test_page_counters_and_health_are_there_for_people_and_for_prometheus(
    serve: Callable[..., str], camera: Camera
) -> None:
    url = serve(page=lambda found: f"<html>{found.latest[0].status.device} of {len(found.devices or [])}</html>")
    send(url, camera.says(1, release=7), camera.says(1, release=7), Camera().says(1))
    assert ask(url, path="/healthz")[::2] == (200, b'{"database":true}')
    text = ask(url, path="/metrics")[2].decode()
    assert 'edgead_statuses_total{outcome="accepted",way="http"} 1.0' in text
    assert 'edgead_statuses_total{outcome="known",way="http"} 1.0' in text
    assert 'edgead_statuses_refused_total{reason="another key",way="http"} 1.0' in text
    assert 'edgead_devices{product="part",release="7"} 1.0' in text
    status, headers, body = ask(url, path="/")
    assert (status, body) == (200, b"<html>cam-1 of 1</html>")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert json.loads(ask(url, path="/summary.json")[2])["devices"] == 1


# Tokens


def test_who_has_no_token_or_another_one_is_refused(
    serve: Callable[..., str], store: StatusStore, camera: Camera
) -> None:
    url, one = serve(tokens=Tokens("device-token", "reader-token")), camera.says(1)

    def basic(password: str) -> str:
        return "Basic " + base64.b64encode(f"cam-1:{password}".encode()).decode()

    wrong = [
        "",
        "Bearer",
        "Bearer x",
        "Bearer reader-token",
        "Basic !!",
        "Basic /w==",
        "Digest device-token",
        basic("x"),
    ]
    for given in wrong:
        assert ask(url, "POST", body=one, Authorization=given)[0] == 401, given
    assert ask(url, "POST", body=b"x" * 200_000)[0] == 401
    assert store.latest() == []
    assert send(url, one, Authorization="Bearer device-token")[0] == 200
    assert send(url, one, Authorization=basic("device-token"))[1]["known"] == 1
    for path in ("/", "/metrics", "/summary.json"):
        assert ask(url, path=path)[0] == 401
        assert ask(url, path=path, Authorization="Bearer device-token")[0] == 401
        assert ask(url, path=path, Authorization="Bearer reader-token")[0] == 200
    assert ask(url, path="/healthz")[0] == 200


# Hostile ones


def test_too_much_garbage_and_what_drips_is_refused_and_the_next_one_is_served(
    serve: Callable[..., str], store: StatusStore, camera: Camera
) -> None:
    limits = CollectorLimits(rate=10_000.0, burst=10_000, body_seconds=1.0, head_seconds=1.0)
    url = serve(limits=limits)
    assert ask(url, "POST", body=b"{" * 300_000)[0] == 413
    assert ask(url, "POST", body=iter([b"{" * 100_000] * 4))[0] == 413, "without a length"
    assert ask(url, "POST", body=b"{}\n" * 2000)[0] == 413
    for garbage in (b"", b"\n\n", b"\0" * 1000, b"[]", b"a=b&c=d", os.urandom(1000).replace(b"{", b"")):
        assert ask(url, "POST", body=garbage)[0] == 400, garbage[:20]
    assert ask(url, "POST", body=b"{" * 16_000 + b"\n" + b'{"a":' * 3000)[0] == 200, "refused by line"
    host, port = url.rpartition("/")[2].split(":")
    head = b"POST /statuses HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    for start in (head, b"POST /statuses HTTP/1.1\r\nX-", b"", b"\0\xff" * 50):
        with socket.create_connection((host, int(port)), 30) as line:
            line.sendall(start)
            answer = b"".join(iter(lambda: line.recv(4096), b""))
        assert answer[:12] in (b"HTTP/1.1 408", b"HTTP/1.1 400", b""), answer[:100]
    assert ask(url, "GET")[0] == 405
    assert ask(url, path="/other")[0] == 404
    assert store.latest() == []
    assert send(url, camera.says(1))[0] == 200


def test_an_address_that_asks_too_often_is_told_when_to_come_again(serve: Callable[..., str], camera: Camera) -> None:
    url = serve(limits=CollectorLimits(rate=0.1, burst=3))
    assert [send(url, camera.says(n))[0] for n in (1, 2, 3)] == [200] * 3
    status, headers, _ = ask(url, "POST", body=camera.says(4))
    assert status == 429
    assert 1 <= int(headers["retry-after"]) <= 10
    assert ask(url, path="/")[0] == 429


def test_rates_are_those_of_addresses_and_the_oldest_are_forgotten() -> None:
    now = [0.0]
    rates = Rates(1.0, 2, 3, lambda: now[0])
    assert [rates.wait("10.0.0.1") for _ in range(3)] == [0.0, 0.0, 1.0]
    assert rates.wait("10.0.0.2") == 0.0
    now[0] = 1.0
    assert [rates.wait("10.0.0.1") for _ in range(2)] == [0.0, 1.0]
    assert [rates.wait(f"2001:db8::{n}") for n in (1, 2, 3)] == [0.0, 0.0, 1.0], "one network"
    for n in range(10):
        rates.wait(f"10.1.0.{n}")
    assert len(rates._left) == 3


def test_500_requests_at_once_are_all_answered_within_bounded_memory(
    serve: Callable[..., str], store: StatusStore
) -> None:
    store.enrol_unknown = True
    url = serve(limits=CollectorLimits(rate=10_000.0, burst=10_000, parallel=16, wait_seconds=60.0))
    large = b"{" + b"x" * 250_000
    bodies = [large if n % 2 else Camera(f"cam-{n}").says(1) for n in range(500)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda body: ask(url, "POST", body=body)[0], bodies))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert set(answers) == {200}
    assert len(store.latest()) == 250
    assert grown < 150_000, f"{grown} KiB"  # all bodies at once, and what is made of them, would be several times that


def test_what_there_is_no_room_for_is_told_to_come_again(serve: Callable[..., str], camera: Camera) -> None:
    limits = CollectorLimits(rate=10_000.0, burst=10_000, parallel=1, wait_seconds=0.1, body_seconds=20.0)
    url = serve(limits=limits)
    host, port = url.rpartition("/")[2].split(":")
    with socket.create_connection((host, int(port)), 30) as line:
        line.sendall(b"POST /statuses HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        deadline = time.monotonic() + 30
        while (found := ask(url, "POST", body=camera.says(1)))[0] != 503:
            assert time.monotonic() < deadline
        assert "retry-after" in found[1]
    deadline = time.monotonic() + 30
    while send(url, camera.says(2))[0] != 200:
        assert time.monotonic() < deadline, "the turn of one who left comes back"


def test_logs_and_answers_have_no_token(
    serve: Callable[..., str], camera: Camera, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    url = serve(tokens=Tokens("s3cret-token"))
    answers = [
        ask(url, "POST", body=b"{rubbish", Authorization="Bearer s3cret-token"),
        ask(url, "POST", body=b"x", Authorization="Bearer s3cret-token2"),
        ask(url, path="/metrics", Authorization="Bearer s3cret-token"),
    ]
    assert "refused: malformed" in caplog.text
    assert "s3cret" not in caplog.text
    assert all(b"s3cret" not in body for _, _, body in answers)
    assert "s3cret" not in repr(Tokens("s3cret-token"))


def test_a_port_that_is_taken_is_a_clear_error(serve: Callable[..., str], store: StatusStore) -> None:
    port = int(serve().rpartition(":")[2])
    with pytest.raises(StorageError, match="listen"):
        CollectorServer(Intake(store), port=port)


# A database that goes away


def test_nothing_that_was_answered_for_is_lost_when_the_database_is_killed(postgres: Any) -> None:
    cameras = [Camera(f"cam-{n}") for n in range(4)]
    accepted: list[tuple[str, int]] = []
    away = threading.Event()
    stop = threading.Event()
    with StatusStore(postgres.database(), enrol_unknown=True) as store:
        with collecting(CollectorServer(Intake(store), limits=FAST)) as server:

            def run(camera: Camera) -> None:
                sequence = 1
                while not stop.is_set():
                    status, told = send(server.url, camera.says(sequence))
                    assert status in (200, 503), status
                    if status == 503:
                        away.set()
                        time.sleep(0.05)
                        continue
                    # One that was stored although its answer was lost is known when it comes again.
                    assert told["accepted"] + told["known"] == 1
                    accepted.append((camera.name, sequence))
                    sequence += 1

            with ThreadPoolExecutor(4) as pool:
                runs = [pool.submit(run, one) for one in cameras]
                _until(lambda: len(accepted) > 40)
                postgres.kill()
                try:
                    _until(away.is_set)
                    health = ask(server.url, path="/healthz")
                    assert (health[0], "retry-after" in health[1]) == (503, True)
                    assert ask(server.url, path="/")[0] == 503
                    assert b"edgead_database_errors_total" in ask(server.url, path="/metrics")[2]
                finally:
                    postgres.start()
                before = len(accepted)
                _until(lambda: len(accepted) > before + 40)
                stop.set()
                for one in runs:
                    one.result(60)
        store.keep = 10_000
        kept = {(one.name, seen.status.sequence) for one in cameras for seen in store.history(one.name)}
        newest = {name: max(n for who, n in accepted if who == name) for name, _ in accepted}
    # The history is bounded; what is older than it was dropped on purpose.
    assert {(name, n) for name, n in accepted if n > newest[name] - 100} <= kept


def _until(what: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


# The command


def test_the_command_registers_devices_collects_and_ends_when_asked(tmp_path: Path) -> None:
    camera, database = Camera(), str(tmp_path / "fleet.db")
    listed = tmp_path / "cameras.txt"
    listed.write_text(f"cam-1 {camera.key}\n")
    command = [sys.executable, "-m", "edgead", "ota", "collect", "--database", database, "--listen", "127.0.0.1:0"]
    command += ["--devices", str(listed), "--token-env", "EDGEAD_TEST_TOKEN", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"EDGEAD_TEST_TOKEN": "device-token"},
    )
    try:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        assert (started["devices"], started["registered"]) == (1, 1)
        token = {"Authorization": "Bearer device-token"}
        assert send(started["url"], camera.says(1, release=2), **token)[1]["accepted"] == 1
        status, headers, body = ask(started["url"], path="/", **token)
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/html")
        assert b"cam-1" in body
        assert re.search(rb"(?i)<!doctype html", body)
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, -15, 143)
    assert "Traceback" not in errors
    assert "device-token" not in errors


def test_the_registry_is_kept_by_command(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgead.runtime.errors import InputError
    from edgead.server_side.ota.collector_cli import devices

    one, two = Camera(), Camera()

    def call(*words: str) -> Any:
        done = CliRunner().invoke(devices, words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    for source in (str(tmp_path / "fleet.db"), str(tmp_path / "folder")):
        assert "1 added" in call("add", source, "cam-1", one.key, "--note", "above the belt")
        assert "0 added, 1 were known" in call("add", source, "cam-1", one.key)
        with pytest.raises(InputError, match="--replace"):
            call("add", source, "cam-1", two.key)
        assert json.loads(call("add", source, "cam-1", two.key, "--replace", "--json")) == {"added": 1, "known": 0}
        assert [entry["key"] for entry in json.loads(call("list", source, "--json"))["devices"]] == [two.key]
        assert "cam-1" in call("list", source)
        call("remove", source, "cam-1")
        assert "no device" in call("list", source)
        with pytest.raises(InputError, match="cam-1"):
            call("remove", source, "cam-1")
    with pytest.raises(InputError, match="no file"):
        call("list", str(tmp_path / "none.db"))
    assert not (tmp_path / "none.db").exists()


def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path: Path) -> None:
    # A path without site packages of the extra: what the camera's install has, and nothing of the fleet's.
    code = (
        "import sys\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('starlette', 'uvicorn', 'sqlalchemy', 'prometheus_client', 'paho'):\n"
        "            raise ModuleNotFoundError('none of it', name=name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "from edgead.cli import main\n"
        f"main(['ota', 'collect', '--database', {str(tmp_path / 'x.db')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'edgead[fleet]'" in done.stderr
