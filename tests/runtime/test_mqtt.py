"""A device on a real MQTT broker that floods, dies and comes back, and on others that lie: row 35 of the faults."""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("paho.mqtt.client")

import paho.mqtt.client as mqtt

from edgead.runtime.errors import InputError
from edgead.runtime.mqtt import HEARD_BYTES, MESSAGE_BYTES, POKES, MqttLink, parse_broker
from edgead.runtime.update_loop import UpdateLoop
from edgead.runtime.update_outcome import Outcome

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="Mosquitto is not installed here")


def until(what: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


class Mosquitto:
    """A broker of its own on a free port of loopback."""

    def __init__(self, folder: Path, *lines: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.config = folder / "mosquitto.conf"
        # As root it would become another user, who may not read a folder of tests.
        lines = (f"user {getpass.getuser()}", f"listener {self.port} 127.0.0.1", "allow_anonymous true", *lines, "")
        self.config.write_text("\n".join(lines))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> Mosquitto:
        assert MOSQUITTO is not None
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self.config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(self.answers)
        return self

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    made = Mosquitto(tmp_path)
    yield made
    made.kill()


@pytest.fixture
def links() -> Iterator[Callable[..., MqttLink]]:
    made: list[MqttLink] = []

    def link(address: str, **options: Any) -> MqttLink:
        defaults = {"device_id": "camera-1", "product": "part", "spread_s": 0.0, "first_wait_s": 0.05}
        made.append(MqttLink(address, **(defaults | options)))
        made[-1].start()
        return made[-1]

    yield link
    for one in made:
        one.close()


class Client:
    """Somebody else on the broker, whom nobody knows."""

    def __init__(self, broker: Mosquitto, topic: str = "") -> None:
        self.got: list[tuple[str, bytes]] = []
        ready = threading.Event()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self.client.on_message = lambda client, data, message: self.got.append((message.topic, message.payload))
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        if topic:
            self.client.subscribe(topic, 1)
            assert ready.wait(20.0)

    def send(self, topic: str, payload: bytes = b"", *, times: int = 1, retain: bool = False) -> None:
        sent = [self.client.publish(topic, payload, qos=1, retain=retain) for _ in range(times)]
        sent[-1].wait_for_publish(20.0)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Counting(UpdateLoop):
    """A device whose polls bring nothing."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.polls = 0

    def poll(self) -> Outcome:
        self.polls += 1
        return Outcome("current", "nothing new")

    def watch(self) -> Outcome | None:
        return None


@contextlib.contextmanager
def running(loop: UpdateLoop, interval: float) -> Iterator[list[Outcome]]:
    seen: list[Outcome] = []
    stop = threading.Event()
    thread = loop.start(interval, 0.0, stop, seen.append)
    until(lambda: seen)
    yield seen
    stop.set()
    thread.join(20.0)


# Pokes


@needs_mosquitto
def test_row_35_a_flood_of_forged_messages_costs_one_poll_more(
    broker: Mosquitto, links: Callable[..., MqttLink], camera: Any
) -> None:
    broker.start()
    updater = camera.updater()
    link = links(broker.url, on_poke=updater.poke)
    until(lambda: link.connected)
    with running(updater, 60.0) as seen, Client(broker, "edgead/status/+") as stranger:
        stranger.send("edgead/poke", b'{"release": 7, "url": "http://elsewhere"}', times=1000)
        stranger.send("edgead/poke/part", b"x" * 2 * HEARD_BYTES, times=300)
        stranger.send("edgead/poke", b"again and again", times=1000, retain=True)
        stranger.send("edgead/poke/part", b"\0\xff\xfe" * 300, times=700)
        until(lambda: len(seen) == 2)
        time.sleep(1.5)
        assert [outcome.status for outcome in seen] == ["current", "current"]
        # The line is not held up by it.
        assert link.publish_status(b"status", 20.0)
        until(lambda: stranger.got == [("edgead/status/camera-1", b"status")])


@needs_mosquitto
def test_row_35_a_steady_stream_of_repeated_messages_costs_one_poll_more_per_interval(
    broker: Mosquitto, links: Callable[..., MqttLink]
) -> None:
    broker.start()
    loop = Counting()
    link = links(broker.url, on_poke=loop.poke)
    until(lambda: link.connected)
    begin = time.monotonic()
    with running(loop, 1.0), Client(broker) as stranger:
        for _ in range(POKES - 2):
            stranger.send("edgead/poke/part", b"poll now", times=1)
            time.sleep(0.2)
        polls, seconds = loop.polls, time.monotonic() - begin
    assert polls <= 2.0 * seconds + 2.0


@needs_mosquitto
def test_row_35_a_retained_message_or_one_for_another_product_costs_nothing(
    broker: Mosquitto, links: Callable[..., MqttLink]
) -> None:
    broker.start()
    with Client(broker) as stranger:
        stranger.send("edgead/poke", b"from last year", retain=True)
        pokes: list[float] = []
        link = links(broker.url, on_poke=lambda: pokes.append(time.monotonic()))
        until(lambda: link.connected)
        stranger.send("edgead/poke/another")
        time.sleep(0.5)
        assert pokes == []
        stranger.send("edgead/poke/part")
        until(lambda: len(pokes) == 1)


@needs_mosquitto
def test_row_35_a_device_polls_whether_there_is_a_broker_or_not(
    broker: Mosquitto, links: Callable[..., MqttLink]
) -> None:
    loop = Counting()
    link = links(broker.url, on_poke=loop.poke)
    with running(loop, 0.2):
        until(lambda: "refused" in link.trouble)
        assert not link.publish_status(b"1", 0.2)
        for number in range(2):
            broker.start()
            until(lambda: link.connected)
            assert link.trouble == ""
            with Client(broker, "edgead/status/camera-1") as collector:
                assert link.publish_status(b"%d" % number, 20.0)
                until(lambda one=collector, what=b"%d" % number: one.got == [("edgead/status/camera-1", what)])
            broker.kill()
            until(lambda: not link.connected)
            assert not link.publish_status(b"3", 0.2)
            polls = loop.polls
            until(lambda seen=polls: loop.polls > seen + 2)


@needs_mosquitto
def test_a_poke_that_fails_costs_neither_the_line_nor_the_next_one(
    broker: Mosquitto, links: Callable[..., MqttLink]
) -> None:
    broker.start()
    pokes: list[int] = []

    def breaks() -> None:
        pokes.append(1)
        raise RuntimeError("no")

    link = links(broker.url, on_poke=breaks)
    until(lambda: link.connected)
    with Client(broker) as stranger:
        for number in range(1, 3):
            stranger.send("edgead/poke")
            until(lambda most=number: len(pokes) == most)
    assert link.connected


# Statuses


@needs_mosquitto
def test_a_status_that_nobody_would_receive_is_not_taken_as_sent(
    broker: Mosquitto, links: Callable[..., MqttLink]
) -> None:
    broker.start()
    link = links(broker.url)
    until(lambda: link.connected)
    assert not link.publish_status(b"status", 20.0)
    assert link.connected
    with Client(broker, "edgead/status/+"):
        assert link.publish_status(b"status", 20.0)
        assert link.publish_status(b"x" * MESSAGE_BYTES, 20.0)
    with pytest.raises(InputError, match="65537"):
        link.publish_status(b"x" * (MESSAGE_BYTES + 1))


@needs_mosquitto
def test_a_status_that_the_broker_forbids_is_not_taken_as_sent(tmp_path: Path, links: Callable[..., MqttLink]) -> None:
    rules = tmp_path / "rules"
    rules.write_text("topic read edgead/poke/#\ntopic readwrite edgead/status/camera-1\n")
    broker = Mosquitto(tmp_path, f"acl_file {rules}").start()
    try:
        good, other = links(broker.url), links(broker.url, device_id="camera-2")
        until(lambda: good.connected and other.connected)
        with Client(broker, "edgead/status/camera-1"):
            assert good.publish_status(b"mine", 20.0)
            assert not other.publish_status(b"not mine", 20.0)
    finally:
        broker.kill()


@needs_mosquitto
def test_a_broker_of_mqtts_needs_a_certificate_that_somebody_vouches_for(
    tmp_path: Path, links: Callable[..., MqttLink]
) -> None:
    certificate, key = certificate_for_loopback(tmp_path)
    broker = Mosquitto(tmp_path, f"certfile {certificate}", f"keyfile {key}").start()
    try:
        address = f"mqtts://camera:hush@127.0.0.1:{broker.port}"
        doubtful = links(address)
        until(lambda: "certificate" in doubtful.trouble.lower())
        assert not doubtful.connected
        good = links(address, tls=ssl.create_default_context(cafile=str(certificate)))
        until(lambda: good.connected)
        assert "hush" not in f"{doubtful.trouble} {good.address} {doubtful.address}"
    finally:
        broker.kill()


def certificate_for_loopback(folder: Path) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, secret = folder / "broker.pem", folder / "broker.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, secret


# Brokers that lie

CONNACK = bytes([0x20, 3, 0, 0, 0])


@contextlib.contextmanager
def lying(behave: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[int]]]:
    """A broker that answers CONNECT and then does what it likes."""
    visits: list[int] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = server.accept()
                visits.append(1)
                line.settimeout(20.0)
                with line, contextlib.suppress(OSError):
                    line.recv(1000)
                    behave(line)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"mqtt://127.0.0.1:{server.getsockname()[1]}", visits
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(20.0)


def packet(first: int, body: bytes) -> bytes:
    assert len(body) < 128
    return bytes([first, len(body)]) + body


def huge(line: socket.socket) -> None:
    line.sendall(CONNACK + bytes([0x30, 0xFF, 0xFF, 0xFF, 0x7F]))
    while True:
        line.sendall(b"x" * 65536)


def noise(line: socket.socket) -> None:
    line.sendall(CONNACK + bytes(range(255, 0, -1)) * 40)
    line.recv(1000)


def exactly_twice(line: socket.socket) -> None:
    """Messages that are to be delivered exactly once, and never are."""
    line.sendall(CONNACK)
    for number in range(1, 65536):
        body = b"\0\x0bedgead/poke" + number.to_bytes(2, "big") + b"\0"
        line.sendall(packet(0x34, body))
    line.recv(1000)


def unasked(line: socket.socket) -> None:
    """Goes on after it said that it will not."""
    line.sendall(CONNACK)
    poke = packet(0x30, b"\0\x0bedgead/poke\0")
    line.sendall(poke * POKES)
    while True:
        asked = line.recv(1000)
        if not asked:
            return
        at = asked.find(0xA2)
        if at >= 0:
            line.sendall(packet(0xB0, asked[at + 2 : at + 4] + b"\0\0\0") + poke * 2000)


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        (huge, "more than it may"),
        (noise, ""),
        (exactly_twice, "more than it may"),
        (unasked, "nobody asked for"),
    ],
    ids=["too large", "noise", "never done", "not asked for"],
)
def test_a_broker_that_sends_what_it_should_not_is_left(
    links: Callable[..., MqttLink], behave: Callable[[socket.socket], None], says: str
) -> None:
    pokes: list[int] = []
    with lying(behave) as (address, visits):
        link = links(address, on_poke=lambda: pokes.append(1))
        until(lambda: len(visits) >= 2 and says in link.trouble and "ConnectionError" in link.trouble)
        assert not link.publish_status(b"status", 0.1)
        link.close()
    assert len(pokes) <= POKES * len(visits)


def test_a_broker_that_acknowledges_nothing_is_left(links: Callable[..., MqttLink]) -> None:
    def deaf(line: socket.socket) -> None:
        line.sendall(CONNACK)
        while line.recv(1000):
            pass

    with lying(deaf) as (address, visits):
        link = links(address)
        until(lambda: link.connected)
        assert not link.publish_status(b"status", 0.3)
        until(lambda: len(visits) >= 2)
        link.close()


def test_a_line_that_is_closed_sends_nothing_and_leaves_no_thread(links: Callable[..., MqttLink]) -> None:
    link = links("mqtt://127.0.0.1:1")
    link.close()
    link.close()
    assert not link.publish_status(b"status", 0.1)
    assert not [thread for thread in threading.enumerate() if thread.name == "edgead-mqtt"]


# Words


@pytest.mark.parametrize(
    "address",
    ["http://host", "mqtt://", "mqtt://host:0", "mqtt://host:70000", "mqtt://host:x", "mqtt://host/topic", "host", ""],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="mqtt://host:port"):
        parse_broker(address)


def test_a_password_stands_in_no_message() -> None:
    broker = parse_broker("mqtts://camera:h%75sh@broker.example")
    assert (broker.host, broker.port, broker.tls) == ("broker.example", 8883, True)
    assert (broker.user, broker.password) == ("camera", "hush")
    assert "hush" not in repr(broker)
    with pytest.raises(InputError) as raised:
        parse_broker("mqtts://camera:hush@broker.example:99999")
    assert "hush" not in str(raised.value)
    assert parse_broker("mqtt://broker.example").port == 1883


@pytest.mark.parametrize("name", ["a/b", "+", "#", "", "x" * 129, "a\0"])
def test_names_that_would_change_a_topic_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="topic"):
        MqttLink("mqtt://host", device_id=name, product="part")
    with pytest.raises(InputError, match="topic"):
        MqttLink("mqtt://host", device_id="camera", product=name)


def test_without_the_package_a_line_says_how_to_install_it() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'paho':
            raise ModuleNotFoundError('refused', name=name)
sys.meta_path.insert(0, Refuse())
from edgead.runtime.errors import MissingDependencyError
from edgead.runtime.mqtt import MqttLink
try:
    MqttLink('mqtt://host', device_id='camera', product='part')
except MissingDependencyError as error:
    print(error.next_step)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Run: pip install 'edgead[service]'"
