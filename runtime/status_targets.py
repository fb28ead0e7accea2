"""Where a device's statuses go: to a collector over HTTP, to a broker over MQTT, or into a folder.

The rules are those of `edgead.runtime.fetch`: redirections are not followed, a slow line is ended, whatever goes wrong
is an error that names no password. A status counts as received when who received it said so in the form that a
collector has; a login page that answers 200 to anything receives nothing.
"""

from __future__ import annotations

import abc
import contextlib
import http.client
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

import msgspec
from msgspec import Struct

from edgead import __version__
from edgead.runtime.device_status import plain_text
from edgead.runtime.disk import Disk, put_file
from edgead.runtime.errors import (
    EdgeadError,
    FetchContentError,
    FetchError,
    FetchStatusError,
    FetchTimeoutError,
    InputError,
    storage_errors,
)
from edgead.runtime.fetch_rules import FetchLimits, seconds_of, shown
from edgead.runtime.net import authorization, ended_after
from edgead.runtime.release import Counter
from edgead.runtime.status_spool import SPOOL_FILES

if TYPE_CHECKING:
    from edgead.runtime.mqtt import MqttLink

ANSWER_BYTES = 64 * 2**10
"""Largest answer that is read."""
MOST_REASONS = 8
"""Reasons of refusals that are kept."""
_STANDARD_PATH = "/statuses"


class _Refusal(Struct, frozen=True):
    line: int
    reason: str


class _Answer(Struct, frozen=True):
    accepted: Counter
    known: Counter
    refused: tuple[_Refusal, ...]


@dataclass(frozen=True)
class Sent:
    """What a call of `StatusSender.send` came to.

    Attributes:
        accepted: statuses that were new to whoever received them.
        known: those that it had already.
        refused: those that it refused; they are not sent again.
        refusals: its last reasons for that.
        waiting: statuses that are still in the spool.
        error: why they are.
    """

    accepted: int = 0
    known: int = 0
    refused: int = 0
    refusals: tuple[str, ...] = ()
    waiting: int = 0
    error: EdgeadError | None = None


class TooLargeError(Exception):
    """The collector wants less at a time."""


class Target(abc.ABC):
    """Where statuses go."""

    @abc.abstractmethod
    def deliver(self, numbers: list[int], lines: list[bytes], end: float) -> Sent:
        """Hand over statuses; all of them are received when it returns.

        Raises:
            EdgeadError: they are not.
            TooLargeError: they are too many at a time.
        """

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass
class Collector(Target):
    """A collector over HTTP. Attributes as in `StatusSender`."""

    address: str
    limits: FetchLimits
    context: ssl.SSLContext | None

    def deliver(self, numbers: list[int], lines: list[bytes], end: float) -> Sent:
        where, name = urlsplit(self.address), shown(self.address)
        try:
            status, headers, body = self._post(b"".join(line + b"\n" for line in lines), end)
        except (OSError, http.client.HTTPException, ValueError) as error:
            kind = FetchTimeoutError if isinstance(error, TimeoutError) else FetchError
            reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
            raise kind(
                wanted=f"an answer of the collector {name}",
                got=f"{type(error).__name__}: {reason}"[:300],
                next_step="Check the network and the address for statuses; it is tried again by itself.",
                transient=not isinstance(error, ssl.SSLCertVerificationError),
            ) from error
        if status == 413 and len(lines) > 1:
            raise TooLargeError
        if status != 200:
            raise FetchStatusError(
                wanted=f"that {where.hostname} takes statuses at {name}",
                got=f"the answer {status}",
                next_step="Check the address for statuses and the collector; it is tried again by itself.",
                status=status,
                retry_after=seconds_of(headers.get("retry-after", "")),
            )
        return _judged(name, body, len(lines))

    def _post(self, body: bytes, end: float) -> tuple[int, dict[str, str], bytes]:
        where = urlsplit(self.address)
        timeout = max(0.01, min(self.limits.connect_s, end - time.monotonic()))
        connection: http.client.HTTPConnection
        if where.scheme == "https":
            context = self.context or ssl.create_default_context()
            connection = http.client.HTTPSConnection(str(where.hostname), where.port, timeout=timeout, context=context)
        else:
            connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=timeout)
        headers = {
            "Accept-Encoding": "identity",
            "Connection": "close",
            "Content-Type": "application/x-ndjson",
            "User-Agent": f"edgead/{__version__}",
            **authorization(where),
        }
        path = where.path if where.path not in ("", "/") else _STANDARD_PATH
        target = quote(path + (f"?{where.query}" if where.query else ""), safe="!#$%&'()*+,/:;=?@[]~")
        with contextlib.closing(connection):
            connection.connect()
            # A line that drips is ended as a whole; a socket's own timeout begins anew with each byte.
            with ended_after(connection, max(0.01, end - time.monotonic())):
                connection.sock.settimeout(max(0.01, min(self.limits.gap_s, end - time.monotonic())))
                connection.request("POST", target, body=body, headers=headers)
                answer = connection.getresponse()
                found = answer.read(ANSWER_BYTES + 1)
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, found


@dataclass
class Folder(Target):
    """Statuses as files `DEVICE/NUMBER.json`; the last `SPOOL_FILES` of each device."""

    folder: Path
    disk: Disk

    def deliver(self, numbers: list[int], lines: list[bytes], end: float) -> Sent:
        place = self.folder
        with storage_errors(place, "to make a folder"):
            self.disk.size(place.parent)  # a medium that is not there is not replaced by a folder in its place
            self.disk.make_folder(place)
        for number, line in zip(numbers, lines, strict=True):
            put_file(self.disk, place / f"{number:012d}.json", [line])
        with storage_errors(place, "to remove old statuses"):
            names = [name for name in self.disk.names(place) if name.endswith(".json")]
            for name in names[:-SPOOL_FILES]:
                self.disk.remove(place / name)
        return Sent(accepted=len(lines))


@dataclass
class Topic(Target):
    """A broker; `owned` says whether the line ends with the sender."""

    link: MqttLink
    limits: FetchLimits
    owned: bool

    def deliver(self, numbers: list[int], lines: list[bytes], end: float) -> Sent:
        self.link.start()
        patience = min(end, time.monotonic() + self.limits.connect_s)
        while not self.link.connected and time.monotonic() < patience:
            time.sleep(0.02)
        for line in lines:
            left = min(self.limits.gap_s, end - time.monotonic())
            if left <= 0.0 or not self.link.publish_status(line, left):
                raise FetchError(
                    wanted=f"the word of the broker {self.link.address} that it has a status for somebody",
                    got=self.link.trouble or "none",
                    next_step="Check the broker, and that a collector subscribes there; it is tried again by itself.",
                    transient=True,
                )
        return Sent(accepted=len(lines))

    def close(self) -> None:
        if self.owned:
            self.link.close()


def target_of(
    address: str,
    *,
    device_id: str,
    product: str,
    limits: FetchLimits,
    disk: Disk,
    context: ssl.SSLContext | None = None,
    link: MqttLink | None = None,
) -> Target:
    """Where an address leads to. Arguments as in `StatusSender`.

    Raises:
        InputError: it is none.
        MissingDependencyError: the package for MQTT is not installed.
    """
    where = urlsplit(checked_address(address))
    if where.scheme in ("http", "https"):
        return Collector(address, limits, context)
    if where.scheme == "file":
        return Folder(Path(url2pathname(where.path)) / device_id, disk)
    if link is not None:
        return Topic(link, limits, owned=False)
    from edgead.runtime.mqtt import MqttLink

    return Topic(MqttLink(address, device_id=device_id, product=product), limits, owned=True)


def checked_address(address: str) -> str:
    """An address for statuses; the path of a folder becomes one.

    Raises:
        InputError: it is none.
    """
    if "://" not in address and address:
        return Path(address).resolve().as_uri()
    try:
        where = urlsplit(address)
        port = where.port
    except ValueError:
        where, port = urlsplit(""), None
    local = where.scheme == "file" and where.netloc in ("", "localhost")
    if port == 0 or not (local or (where.scheme in ("http", "https", "mqtt", "mqtts") and where.hostname)):
        raise InputError(
            wanted="an address for statuses (http://, https://, mqtt://, mqtts://, file:// or a folder)",
            got=repr(shown(address)),
            next_step="Correct --statuses.",
        )
    if where.scheme.startswith("mqtt"):
        from edgead.runtime.mqtt_line import parse_broker

        parse_broker(address)
    return address


def _judged(name: str, body: bytes, lines: int) -> Sent:
    """What a collector's answer says of so many lines.

    Raises:
        FetchContentError: it is none of a collector.
    """
    answer: _Answer | None = None
    with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
        answer = msgspec.json.decode(body, type=_Answer) if len(body) <= ANSWER_BYTES else None
    if answer is None or answer.accepted + answer.known + len(answer.refused) != lines:
        raise FetchContentError(
            wanted=f"an answer of the collector {name} for {lines} statuses",
            got="something else: a login page of this network?" if answer is None else "one for another number",
            next_step="Check the address for statuses, and what lies between it and this device.",
        )
    reasons = tuple(plain_text(refusal.reason) or "no reason" for refusal in answer.refused)
    return Sent(answer.accepted, answer.known, len(reasons), reasons[-MOST_REASONS:])


__all__ = ["Collector", "Folder", "Sent", "Target", "TooLargeError", "Topic", "checked_address", "target_of"]
