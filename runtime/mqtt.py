"""A device's line to an MQTT broker: it sends its statuses, and hears that it should poll.

    edgead/status/<device>       statuses, QoS 1: one signed envelope each; kept until a collector has them
    edgead/poke, edgead/poke/<product>   "there is something new", from whoever may write there

Nothing that comes from a broker is believed. The payload of a poke is never looked at, it is signed by nobody, and all
that it can bring about is one poll more per interval. A broker that floods is not listened to for a while; one that
sends what nobody asked for, too much of it, or nothing, is left and tried again later. Inspecting, polling and updating
need no broker.

MQTT 5, as only that lets a device refuse large messages, leave out retained ones, and learn whether anybody took what
it sent. The package is paho-mqtt; it is imported when a line is opened.
"""

from __future__ import annotations

import random
import secrets
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from edgead.runtime.errors import InputError, missing_dependency
from edgead.runtime.fetch_rules import shown

if TYPE_CHECKING:
    from paho.mqtt.client import Client

POKE_TOPIC = "edgead/poke"
STATUS_TOPIC = "edgead/status"
MESSAGE_BYTES = 64 * 2**10
"""Largest message that is sent."""
HEARD_BYTES = 4 * 2**10
"""Largest packet that a broker may send."""
POKES = 20
"""Pokes after which a device stops listening for a while."""
QUIET_S = 60.0
"""Seconds for which it then does not listen, or as little as half of that."""

_PORT, _TLS_PORT = 1883, 8883
_CONNECT_S, _KEEPALIVE_S, _STEADY_S = 10.0, 30, 30.0
_TICK_S = 0.2
_UNASKED = 50
"""Messages after the broker said that it sends none any more."""


@dataclass(frozen=True)
class Broker:
    """Where a broker is, and who one is to it. Name and password do not show.

    Attributes:
        host, port: of the broker.
        tls: whether its certificate is asked for.
        user, password: None for none.
    """

    host: str
    port: int
    tls: bool
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)


def parse_broker(address: str) -> Broker:
    """An address of the form mqtt[s]://[user:password@]host[:port].

    Raises:
        InputError: it is none.
    """
    try:
        where = urlsplit(address)
        port = where.port
        good = where.scheme in ("mqtt", "mqtts") and where.hostname and where.path in ("", "/") and not where.query
    except ValueError:
        good, where, port = False, urlsplit(""), None
    if not good or port == 0:
        raise InputError(
            wanted="a broker as mqtt://host:port or mqtts://host:port",
            got=_shown(address) or "another address",
            next_step="Name and password may stand before the host: mqtts://name:password@host",
        )
    tls = where.scheme == "mqtts"
    return Broker(
        host=str(where.hostname),
        port=port or (_TLS_PORT if tls else _PORT),
        tls=tls,
        user=None if where.username is None else unquote(where.username),
        password=None if where.password is None else unquote(where.password),
    )


class MqttLink:
    """Keeps a line to a broker, on a thread of its own that never raises and ends with the process.

    `publish_status` may be called from any thread; one message at a time is on its way.

    Args:
        address: mqtt[s]://[user:password@]host[:port].
        device_id: names the topic of the statuses.
        product: names the topic of pokes for that product.
        on_poke: called on the thread of the line when a poke came, and should return at once: `UpdateLoop.poke`.
        tls: for mqtts, in place of the system's certificates.
        rng: for jitter; differs from device to device.
        spread_s: a poke is passed on after a random part of so many seconds, so that a fleet does not poll as one.
        first_wait_s, longest_wait_s: between two attempts to connect; doubled each time, with jitter.

    Raises:
        InputError: an address, device or product that makes no topic.
        MissingDependencyError: paho-mqtt is not installed.
    """

    def __init__(
        self,
        address: str,
        *,
        device_id: str,
        product: str,
        on_poke: Callable[[], object] | None = None,
        tls: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
        spread_s: float = 5.0,
        first_wait_s: float = 1.0,
        longest_wait_s: float = 120.0,
    ) -> None:
        self._broker = parse_broker(address)
        for name in (device_id, product):
            if not 0 < len(name) <= 128 or set(name) & set("/+#\0") or not name.isprintable():
                raise InputError(
                    wanted="names of device and product that can stand in a topic of MQTT",
                    got=repr(name[:40]),
                    next_step="Take letters, digits, '.', '_' and '-'.",
                )
        _paho()
        self.address = _shown(address)
        """Where it connects to, without name and password."""
        self._status_topic = f"{STATUS_TOPIC}/{device_id}"
        self._poke_topics = (POKE_TOPIC, f"{POKE_TOPIC}/{product}")
        self._client_id = f"edgead-{device_id}-"
        self._on_poke = on_poke
        self._tls = tls
        self._rng = rng or random.Random()
        self._spread, self._waits = spread_s, (first_wait_s, longest_wait_s)
        self._stop = threading.Event()
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._line: _Line | None = None
        self._thread: threading.Thread | None = None
        self._due: float | None = None
        self._trouble = "not connected yet"

    @property
    def connected(self) -> bool:
        """Whether the broker answered, and the line is up as far as is known."""
        line = self._line
        return line is not None and line.up

    @property
    def trouble(self) -> str:
        """Why there is no line, for people; empty while there is one."""
        return "" if self.connected else self._trouble

    def start(self) -> None:
        """Begin to connect, in the background. Once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="edgead-mqtt", daemon=True)
            self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Take leave of the broker. May be called twice.

        Args:
            timeout: seconds to wait for that.
        """
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def publish_status(self, payload: bytes, timeout: float = 10.0) -> bool:
        """Send one status and wait for the broker's word that it has it.

        Args:
            payload: an envelope.
            timeout: seconds, for a message before it too.

        Returns:
            whether the broker acknowledged it for somebody. False also where nobody subscribes to statuses there, so
            that it would be lost: keep it, and send it again later. One that was sent and is not acknowledged in time
            may arrive nevertheless.

        Raises:
            InputError: it is larger than `MESSAGE_BYTES`.
        """
        if len(payload) > MESSAGE_BYTES:
            raise InputError(
                wanted=f"a status of at most {MESSAGE_BYTES} bytes",
                got=f"{len(payload)}",
                next_step="Leave out what is long in it.",
            )
        until = time.monotonic() + timeout
        if not self._sending.acquire(timeout=max(0.0, timeout)):
            return False
        try:
            line = self._line
            if line is None or not line.up or self._stop.is_set():
                return False
            mid = line.send(self._status_topic, payload)
            with self._changed:
                while mid is not None and line.up and not self._stop.is_set():
                    if mid in line.answers:
                        return line.answers[mid]
                    left = until - time.monotonic()
                    if left <= 0.0:
                        # What is on its way would pile up in a line that brings no answers.
                        line.fail("the broker did not acknowledge a status in time")
                        break
                    self._changed.wait(left)
            return False
        finally:
            self._sending.release()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            begin = time.monotonic()
            try:
                self._hold()
            except Exception as error:  # whatever a broker or a foreign library comes up with costs this line alone
                self._trouble = f"{self.address}: {type(error).__name__}: {error}"[:300]
            with self._changed:
                self._line = None
                self._changed.notify_all()
            failures = 0 if time.monotonic() - begin >= _STEADY_S else failures + 1
            first, longest = self._waits
            wait = min(longest, first * 2.0 ** min(failures, 20)) * self._rng.uniform(0.5, 1.0)
            end = time.monotonic() + wait
            while not self._stop.is_set() and (left := end - time.monotonic()) > 0.0:
                self._pass_on()
                self._stop.wait(min(_TICK_S, left))

    def _hold(self) -> None:
        """One line, from its beginning to its end."""
        line = _Line(self)
        try:
            line.open()
            with self._changed:
                self._line = line
            while not self._stop.is_set():
                line.step()
                self._pass_on()
        finally:
            line.close()

    def _pass_on(self) -> None:
        """Hand a poke on when its time has come."""
        if self._due is None or time.monotonic() < self._due:
            return
        self._due = None
        if self._on_poke is not None:
            try:
                self._on_poke()
            except Exception as error:  # what the other side does with a poke must not cost the line
                self._trouble = f"a poke: {type(error).__name__}: {error}"[:300]

    def _poked(self) -> None:
        if self._due is None:
            self._due = time.monotonic() + self._rng.uniform(0.0, self._spread)


class _Line:
    """One connection. All but `send` and `fail` on the thread of the link."""

    def __init__(self, link: MqttLink) -> None:
        self._link = link
        self._client: Client | None = None
        self._made = time.monotonic()
        self._fault: str | None = None
        self._heard = 0
        self._unasked: int | None = None
        self._hears_again = float("-inf")
        self.up = False
        self.answers: dict[int, bool] = {}

    def open(self) -> None:
        """Connect.

        Raises:
            OSError: nobody there, or a certificate that nobody vouches for.
        """
        mqtt, packets, properties = _paho()
        link, broker = self._link, self._link._broker
        client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            # Two processes of a device must not throw each other out.
            client_id=link._client_id + secrets.token_hex(4),
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        client.max_queued_messages_set(1)
        client.connect_timeout = _CONNECT_S
        if broker.user is not None:
            client.username_pw_set(broker.user, broker.password)
        if broker.tls:
            client.tls_set_context(link._tls or ssl.create_default_context())
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_unsubscribe = self._on_unsubscribe
        # With this set, other threads only queue what they send and wake the thread of the line, which writes it.
        client.on_socket_register_write = lambda client, data, sock: None
        wishes = properties.Properties(packets.CONNECT)
        wishes.MaximumPacketSize = HEARD_BYTES
        wishes.ReceiveMaximum = 4
        self._client = client
        client.connect(broker.host, broker.port, keepalive=_KEEPALIVE_S, clean_start=True, properties=wishes)
        self._made = time.monotonic()

    def step(self) -> None:
        """Wait a moment for something to do, and do it.

        Raises:
            ConnectionError: the line is at its end, and why.
        """
        client = self._client
        assert client is not None
        code = client.loop(_TICK_S)
        if self._fault is None and code:
            self._fault = f"the line ended ({code.name})"
        if self._fault is None and not self.up and time.monotonic() - self._made > _CONNECT_S:
            self._fault = "a broker that does not answer"
        if self._fault is None and _overfull(client):
            self._fault = "a broker that sends more than it may"
        if self._fault is not None:
            raise ConnectionError(self._fault)
        if self._heard > POKES and time.monotonic() >= self._hears_again:
            self._listen(client)

    def close(self) -> None:
        """Say goodbye if there is anybody to hear it."""
        self.up = False
        if self._client is not None:
            self._client.disconnect()
            for _ in range(3):
                if not self._client.want_write() or self._client.loop(0.05):
                    break
            self._client = None

    def send(self, topic: str, payload: bytes) -> int | None:
        """Queue a message; its number, or None if it cannot be."""
        client = self._client
        if client is None:
            return None
        with self._link._changed:
            self.answers.clear()
        info = client.publish(topic, payload, qos=1)
        return info.mid if info.rc == 0 else None

    def fail(self, reason: str) -> None:
        """Have the line ended."""
        self._fault = self._fault or reason

    def _listen(self, client: Client) -> None:
        mqtt, _, _ = _paho()
        self._heard, self._unasked = 0, None
        how = mqtt.SubscribeOptions(qos=0, retainHandling=mqtt.SubscribeOptions.RETAIN_DO_NOT_SEND)
        client.subscribe([(topic, how) for topic in self._link._poke_topics])

    def _on_connect(self, client: Client, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.fail(f"the broker refused: {reason}")
            return
        if self._link._on_poke is not None:
            self._listen(client)
        self.up = True

    def _on_disconnect(self, client: Client, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.fail(f"the line ended: {reason}")
        with self._link._changed:
            self.up = False
            self._link._changed.notify_all()

    def _on_message(self, client: Client, data: Any, message: Any) -> None:
        self._heard += 1
        if self._heard <= POKES:
            self._link._poked()
        if self._heard == POKES:
            self._hears_again = time.monotonic() + QUIET_S * self._link._rng.uniform(0.5, 1.0)
            self._heard += 1
            client.unsubscribe(list(self._link._poke_topics))
        if self._unasked is not None:
            self._unasked += 1
            if self._unasked > _UNASKED:
                self.fail("a broker that sends what nobody asked for")

    def _on_unsubscribe(self, client: Client, data: Any, mid: int, reasons: Any, properties: Any) -> None:
        self._unasked = 0

    def _on_publish(self, client: Client, data: Any, mid: int, reason: Any, properties: Any) -> None:
        with self._link._changed:
            # 16 says that nobody subscribes, so the broker has thrown it away.
            self.answers[mid] = not reason.is_failure and reason.value != 16
            self._link._changed.notify_all()


def _overfull(client: Client) -> bool:
    """Whether the broker sends more than it was allowed to.

    The package has no public way to see what has come in so far; where these are missing, the broker's word is all.
    """
    coming = getattr(client, "_in_packet", {}).get("remaining_length", 0)
    waiting = len(getattr(client, "_in_messages", ()))
    return bool(coming > HEARD_BYTES or waiting > 8)


def _paho() -> tuple[Any, Any, Any]:
    try:
        import paho.mqtt.client as mqtt
        from paho.mqtt import properties
        from paho.mqtt.packettypes import PacketTypes
    except ImportError as error:
        raise missing_dependency("paho", "service", "messages over MQTT") from error
    return mqtt, PacketTypes, properties


def _shown(address: str) -> str:
    try:
        return shown(address)
    except ValueError:
        return ""


__all__ = [
    "HEARD_BYTES",
    "MESSAGE_BYTES",
    "POKES",
    "POKE_TOPIC",
    "QUIET_S",
    "STATUS_TOPIC",
    "Broker",
    "MqttLink",
    "parse_broker",
]
