"""One connection to an MQTT broker, which is not believed. See `edgead.runtime.mqtt`.

MQTT 5, as only that lets a device refuse large messages, leave out retained ones, and learn whether anybody took what
it sent. The package is paho-mqtt; it is imported when a line is opened.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from edgead.runtime.errors import InputError, missing_dependency
from edgead.runtime.fetch_rules import shown

if TYPE_CHECKING:
    from paho.mqtt.client import Client

HEARD_BYTES = 4 * 2**10
"""Largest packet that a broker may send."""
POKES = 20
"""Pokes after which a device stops listening for a while."""
QUIET_S = 60.0
"""Seconds for which it then does not listen, or as little as half of that."""

_PORT, _TLS_PORT = 1883, 8883
_CONNECT_S, _KEEPALIVE_S = 10.0, 30
TICK_S = 0.2
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
            got=without_password(address) or "another address",
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


class Line:
    """One connection, from its beginning to its end. All but `send` and `fail` on one thread.

    Args:
        broker: at the other end.
        client_id: one that no other process has.
        topics: of pokes; none to hear of none.
        poked: called for each of the first pokes.
        tls: for mqtts, in place of the system's certificates.
        rng: for jitter.

    Attributes:
        up: whether the broker answered, and no end is known.
        answers: whether the broker took a message, by its number; of the one that was sent last.
        changed: notified when one of the two is.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        topics: Sequence[str],
        poked: Callable[[], object],
        tls: ssl.SSLContext | None,
        rng: random.Random,
    ) -> None:
        self._broker, self._client_id, self._tls, self._rng = broker, client_id, tls, rng
        self._topics, self._poked = list(topics), poked
        self.changed = threading.Condition()
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
        mqtt, packets, properties = paho()
        broker = self._broker
        client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        client.max_queued_messages_set(1)
        client.connect_timeout = _CONNECT_S
        if broker.user is not None:
            client.username_pw_set(broker.user, broker.password)
        if broker.tls:
            client.tls_set_context(self._tls or ssl.create_default_context())
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
        code = client.loop(TICK_S)
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
        with self.changed:
            self.up = False
            self.changed.notify_all()
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
        with self.changed:
            self.answers.clear()
        info = client.publish(topic, payload, qos=1)
        return info.mid if info.rc == 0 else None

    def fail(self, reason: str) -> None:
        """Have the line ended."""
        self._fault = self._fault or reason

    def _listen(self, client: Client) -> None:
        mqtt, _, _ = paho()
        self._heard, self._unasked = 0, None
        how = mqtt.SubscribeOptions(qos=0, retainHandling=mqtt.SubscribeOptions.RETAIN_DO_NOT_SEND)
        client.subscribe([(topic, how) for topic in self._topics])

    def _on_connect(self, client: Client, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.fail(f"the broker refused: {reason}")
            return
        if self._topics:
            self._listen(client)
        self.up = True

    def _on_disconnect(self, client: Client, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.fail(f"the line ended: {reason}")
        with self.changed:
            self.up = False
            self.changed.notify_all()

    def _on_message(self, client: Client, data: Any, message: Any) -> None:
        self._heard += 1
        if self._heard <= POKES:
            self._poked()
        if self._heard == POKES:
            self._hears_again = time.monotonic() + QUIET_S * self._rng.uniform(0.5, 1.0)
            self._heard += 1
            client.unsubscribe(self._topics)
        if self._unasked is not None:
            self._unasked += 1
            if self._unasked > _UNASKED:
                self.fail("a broker that sends what nobody asked for")

    def _on_unsubscribe(self, client: Client, data: Any, mid: int, reasons: Any, properties: Any) -> None:
        self._unasked = 0

    def _on_publish(self, client: Client, data: Any, mid: int, reason: Any, properties: Any) -> None:
        with self.changed:
            # 16 says that nobody subscribes, so the broker has thrown it away.
            self.answers[mid] = not reason.is_failure and reason.value != 16
            self.changed.notify_all()


def _overfull(client: Client) -> bool:
    """Whether the broker sends more than it was allowed to.

    The package has no public way to see what has come in so far; where these are missing, the broker's word is all.
    """
    coming = getattr(client, "_in_packet", {}).get("remaining_length", 0)
    waiting = len(getattr(client, "_in_messages", ()))
    return bool(coming > HEARD_BYTES or waiting > 8)


def paho() -> tuple[Any, Any, Any]:
    """The parts of the package that are used here.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import paho.mqtt.client as mqtt
        from paho.mqtt import properties
        from paho.mqtt.packettypes import PacketTypes
    except ImportError as error:
        raise missing_dependency("paho", "service", "messages over MQTT") from error
    return mqtt, PacketTypes, properties


def without_password(address: str) -> str:
    """An address as messages may have it; empty if it is none."""
    try:
        return shown(address)
    except ValueError:
        return ""


__all__ = ["HEARD_BYTES", "POKES", "QUIET_S", "TICK_S", "Broker", "Line", "paho", "parse_broker", "without_password"]
