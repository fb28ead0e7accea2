"""A device's line to an MQTT broker: it sends its statuses, and hears that it should poll.

    edgead/status/<device>       statuses, QoS 1: one signed envelope each; kept until a collector has them
    edgead/poke, edgead/poke/<product>   "there is something new", from whoever may write there

Nothing that comes from a broker is believed. The payload of a poke is never looked at, it is signed by nobody, and all
that it can bring about is one poll more per interval. A broker that floods is not listened to for a while; one that
sends what nobody asked for, too much of it, or nothing, is left and tried again later. Inspecting, polling and updating
need no broker. It has to speak MQTT 5.
"""

from __future__ import annotations

import random
import secrets
import ssl
import threading
import time
from collections.abc import Callable

from edgead.runtime.errors import InputError
from edgead.runtime.mqtt_line import (
    HEARD_BYTES,
    POKES,
    QUIET_S,
    TICK_S,
    Broker,
    Line,
    paho,
    parse_broker,
    without_password,
)

POKE_TOPIC = "edgead/poke"
STATUS_TOPIC = "edgead/status"
MESSAGE_BYTES = 64 * 2**10
"""Largest message that is sent."""

_STEADY_S = 30.0


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
        paho()
        self.address = without_password(address)
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
        self._line: Line | None = None
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
            with line.changed:
                while mid is not None and line.up and not self._stop.is_set():
                    if mid in line.answers:
                        return line.answers[mid]
                    left = until - time.monotonic()
                    if left <= 0.0:
                        # What is on its way would pile up in a line that brings no answers.
                        line.fail("the broker did not acknowledge a status in time")
                        break
                    line.changed.wait(left)
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
            self._line = None
            failures = 0 if time.monotonic() - begin >= _STEADY_S else failures + 1
            first, longest = self._waits
            wait = min(longest, first * 2.0 ** min(failures, 20)) * self._rng.uniform(0.5, 1.0)
            end = time.monotonic() + wait
            while not self._stop.is_set() and (left := end - time.monotonic()) > 0.0:
                self._pass_on()
                self._stop.wait(min(TICK_S, left))

    def _hold(self) -> None:
        """One line, from its beginning to its end."""
        # Two processes of a device must not throw each other out.
        client_id = self._client_id + secrets.token_hex(4)
        topics = () if self._on_poke is None else self._poke_topics
        line = Line(self._broker, client_id, topics, self._poked, self._tls, self._rng)
        try:
            line.open()
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
