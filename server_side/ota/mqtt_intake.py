"""Collects the statuses of a fleet from an MQTT broker.

It subscribes `edgead/status/+` with QoS 1 and a session that the broker keeps while it is away, and acknowledges a
message once its status is on the disk: a database that is away makes the broker wait, and loses nothing. The broker is
told the largest message and how many may be under way, so that neither it nor a stranger fills this memory. What comes
beyond that is dropped and counted; of one topic it is dropped before others lose anything by it. A status counts by its
signature, never by its topic; one on the topic of another device is refused all the same.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgead.runtime.device_status import STATUS_BYTES, decode_status
from edgead.runtime.errors import StatusError, StorageError
from edgead.runtime.mqtt_line import paho, parse_broker, without_password
from edgead.server_side.ota.intake import Intake
from edgead.server_side.ota.statuses import RefusedStatusError

if TYPE_CHECKING:
    from paho.mqtt.client import Client

TOPIC = "edgead/status/+"
PACKET_BYTES = STATUS_BYTES + 1024
"""Largest packet that the broker may send."""
UNDER_WAY = 100
"""Messages that the broker may send before the first of them is acknowledged."""
SESSION_SECONDS = 7 * 86_400
"""How long the broker keeps what comes while nobody collects."""
_WAITING = 1000
_OF_TOPIC = 100
"""Messages of one topic that wait, of those that nobody acknowledges (QoS 0)."""
_BATCH = 100
_KEEPALIVE_S = 30
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1, 60


@dataclass(frozen=True)
class _Message:
    topic: str
    payload: bytes
    number: int
    qos: int
    line: int


class MqttIntake:
    """Takes statuses from a broker, on threads of its own, until it is closed.

    Args:
        intake: takes the statuses.
        address: mqtt[s]://[user:password@]host[:port].
        client_id: one that no other process has, and this one keeps over restarts.
        tls: for mqtts, in place of the system's certificates.

    Raises:
        InputError: an address that is none.
        MissingDependencyError: paho-mqtt is not installed.
    """

    def __init__(
        self, intake: Intake, address: str, *, client_id: str | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._intake = intake
        self._broker = parse_broker(address)
        self.address = without_password(address)
        """Where it listens, without name and password."""
        self._waiting: queue.Queue[_Message] = queue.Queue(_WAITING)
        self._of_topic: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._line = 0
        self.connected = threading.Event()
        """Set while it is subscribed."""
        self._client = self._made(client_id or f"edgead-collect-{socket.gethostname()}"[:64], tls)
        self._thread = threading.Thread(target=self._work, name="edgead-mqtt-intake", daemon=True)

    def __enter__(self) -> MqttIntake:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin to listen, in the background; a broker that is away is tried again, longer apart each time."""
        _, packets, properties = paho()
        wishes = properties.Properties(packets.CONNECT)
        wishes.SessionExpiryInterval = SESSION_SECONDS
        wishes.MaximumPacketSize = PACKET_BYTES
        wishes.ReceiveMaximum = UNDER_WAY
        self._thread.start()
        self._client.connect_async(
            self._broker.host, self._broker.port, _KEEPALIVE_S, clean_start=False, properties=wishes
        )
        self._client.loop_start()

    def close(self) -> None:
        """Take leave of the broker; what was not stored yet it sends again the next time."""
        self._stop.set()
        self._client.disconnect()
        self._client.loop_stop()
        self._thread.join(30.0)

    def _made(self, client_id: str, tls: ssl.SSLContext | None) -> Client:
        mqtt, _, _ = paho()
        client: Client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5, manual_ack=True)
        if self._broker.user is not None:
            client.username_pw_set(self._broker.user, self._broker.password)
        if self._broker.tls:
            client.tls_set_context(tls or ssl.create_default_context())
        client.reconnect_delay_set(_FIRST_WAIT_S, _LONGEST_WAIT_S)
        client.on_connect = self._on_connect
        client.on_subscribe = lambda *_: self.connected.set()
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        return client

    def _on_connect(self, client: Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not reason.is_failure:
            client.subscribe(TOPIC, 1)

    def _on_disconnect(self, *_: Any) -> None:
        # Numbers of messages are those of a connection; on the next one the broker gives them anew.
        self._line += 1
        self.connected.clear()

    def _on_message(self, _client: Client, _data: Any, message: Any) -> None:
        one = _Message(message.topic, message.payload, message.mid, message.qos, self._line)
        if len(one.payload) > STATUS_BYTES:
            self._drop("too large", one)
            return
        with self._lock:
            # What is acknowledged is bounded by what may be under way; the rest must leave room for it.
            crowded = self._waiting.qsize() >= _WAITING - 2 * UNDER_WAY
            many = not one.qos and (crowded or self._of_topic[one.topic] >= _OF_TOPIC)
            if not many:
                self._of_topic[one.topic] += 1
        if many:
            self._drop("flood", one)
            return
        try:
            self._waiting.put_nowait(one)
        except queue.Full:
            self._forget([one])
            # Not acknowledged: the broker sends it again.
            self._intake.dropped.labels("full").inc()

    def _drop(self, reason: str, message: _Message) -> None:
        self._intake.dropped.labels(reason).inc()
        self._acknowledge(message)

    def _acknowledge(self, message: _Message) -> None:
        if message.qos and message.line == self._line:
            self._client.ack(message.number, message.qos)

    def _work(self) -> None:
        while not self._stop.is_set():
            batch = self._batch()
            if not batch:
                continue
            good = [message for message in batch if self._own(message)]
            wait = float(_FIRST_WAIT_S)
            while good and not self._stop.is_set():
                try:
                    self._intake.take([message.payload for message in good], "mqtt")
                except StorageError:
                    self._stop.wait(wait)
                    wait = min(2 * wait, float(_LONGEST_WAIT_S))
                    continue
                self._forget(batch)
                for message in good:
                    self._acknowledge(message)
                break
            else:
                self._forget(batch)

    def _batch(self) -> list[_Message]:
        batch: list[_Message] = []
        while len(batch) < _BATCH:
            try:
                batch.append(self._waiting.get(timeout=0.2) if not batch else self._waiting.get_nowait())
            except queue.Empty:
                break
        return batch

    def _own(self, message: _Message) -> bool:
        """Whether a status is on the topic of its device; else it is refused."""
        try:
            device = decode_status(message.payload).status.device
        except StatusError:
            return True  # refused as malformed with the others
        if message.topic.rpartition("/")[2] == device:
            return True
        error = RefusedStatusError(
            wanted=f"statuses of {device!r} on its own topic", got=repr(message.topic[:150]), reason="another topic"
        )
        self._intake.refuse(error, "mqtt")
        self._acknowledge(message)
        return False

    def _forget(self, batch: list[_Message]) -> None:
        with self._lock:
            for message in batch:
                self._of_topic[message.topic] -= 1
                if self._of_topic[message.topic] <= 0:
                    del self._of_topic[message.topic]


__all__ = ["PACKET_BYTES", "TOPIC", "UNDER_WAY", "MqttIntake"]
