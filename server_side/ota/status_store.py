"""The statuses of a fleet in a database: SQLite in a file, or PostgreSQL. Any number of processes may add at once.

Each device has a bounded history; its newest status is never dropped. A transaction locks the rows of the devices that
it is about, in the order of their names, so that two processes that hear the same status take it once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from sqlalchemy import Connection, bindparam, case, delete, func, select, text, tuple_, update

from edgead.runtime.device_status import Envelope, decode_status
from edgead.runtime.errors import StatusError
from edgead.server_side.ota.device_table import DeviceTable, put_devices
from edgead.server_side.ota.devices import DeviceKey
from edgead.server_side.ota.status_tables import (
    DEVICES,
    STATUSES,
    database_errors,
    database_url,
    open_engine,
    shown,
    writing,
)
from edgead.server_side.ota.statuses import Refused, RefusedStatusError, Seen, check_key, opened, seen

Outcome = Literal["accepted", "known"]
KEEP = 100
"""Statuses of a device that are kept."""
DAYS = 30.0
"""Days for which they are kept."""
MOST_ENROLLED = 100_000
"""Devices from which on none enrols by itself."""
_CHUNK = 500
_LOG = logging.getLogger("edgead.collect")


@dataclass
class _Known:
    """A device's row while its statuses are added."""

    key: str
    top: int
    floor: int
    time: int


class StatusStore:
    """A database of statuses. Safe to use from several threads.

    Args:
        source: `sqlite:///FILE`, `postgresql://USER@HOST/NAME`, or the path of an SQLite file.
        enrol_unknown: register a device that is not known with the key that its first status names. From then on it is
            known by that key.
        keep: statuses of a device that are kept.
        days: for how long.
        create: make the database's tables, and the file, if they are not there.
        connections: to the database, at most.
        clock: what time it is, in seconds since 1970.

    Raises:
        InputError: no database of that kind or place, or one of a newer schema.
        StorageError: the database is away, or refuses.
        MissingDependencyError: the package for PostgreSQL is not installed.
    """

    def __init__(
        self,
        source: str,
        *,
        enrol_unknown: bool = False,
        keep: int = KEEP,
        days: float = DAYS,
        create: bool = True,
        connections: int = 4,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.enrol_unknown, self.keep, self.days, self.clock = enrol_unknown, max(1, keep), days, clock
        self.most_enrolled = MOST_ENROLLED
        self._engine = open_engine(database_url(source), create=create, connections=connections)
        self.shown = shown(self._engine.url)
        """Where it is, without a password."""
        self.devices = DeviceTable(self._engine)
        """The registry of devices."""

    def __enter__(self) -> StatusStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the database."""
        self._engine.dispose()

    def add(self, data: bytes, received: float | None = None) -> Outcome:
        """Take one status.

        Args:
            data: an envelope.
            received: when it came, in seconds since 1970; now if left out.

        Returns:
            `accepted`, or `known` if it was there before or is older than the history that is kept.

        Raises:
            RefusedStatusError: it does not count; nothing changed.
            StorageError: the database is away, or refuses; nothing changed.
        """
        (outcome,) = self.add_many([data], received)
        if isinstance(outcome, RefusedStatusError):
            raise outcome
        return outcome

    def add_many(self, envelopes: Sequence[bytes], received: float | None = None) -> list[Outcome | RefusedStatusError]:
        """Take statuses in one transaction: once this returns, what was accepted is on the disk.

        Returns:
            for each what `add` returns or raises.

        Raises:
            StorageError: the database is away, or refuses; nothing changed.
        """
        now = self.clock() if received is None else received
        found: list[Outcome | RefusedStatusError | Envelope] = []
        for data in envelopes:
            try:
                found.append(opened(data))
            except RefusedStatusError as error:
                found.append(error)
        good = [(index, one) for index, one in enumerate(found) if isinstance(one, Envelope)]
        results: dict[int, Outcome | RefusedStatusError] = {}
        if good:
            with database_errors(self._engine), writing(self._engine) as connection:
                results = self._add(connection, good, envelopes, now)
        return [results[index] if isinstance(one, Envelope) else one for index, one in enumerate(found)]

    def latest(self) -> list[Seen]:
        """The newest status of each device, by name.

        Raises:
            StorageError: the database is away, or refuses.
        """
        statuses, refused = self.read_latest()
        for one in refused:
            _LOG.warning("row of %s is damaged: %s", one.where, one.message)
        return statuses

    def read_latest(self) -> tuple[list[Seen], list[Refused]]:
        """The same, and the rows that are damaged.

        Raises:
            StorageError: the database is away, or refuses.
        """
        query = (
            select(STATUSES.c.device, STATUSES.c.received, STATUSES.c.envelope)
            .join(DEVICES, (DEVICES.c.id == STATUSES.c.device) & (DEVICES.c.top == STATUSES.c.sequence))
            .order_by(STATUSES.c.device)
        )
        with database_errors(self._engine), self._engine.connect() as connection:
            return _read(connection.execute(query))

    def history(self, device: str) -> list[Seen]:
        """What is kept of a device, oldest first; empty if nothing was heard from it.

        Raises:
            StorageError: the database is away, or refuses.
        """
        query = (
            select(STATUSES.c.device, STATUSES.c.received, STATUSES.c.envelope)
            .where(STATUSES.c.device == device)
            .order_by(STATUSES.c.sequence)
        )
        with database_errors(self._engine), self._engine.connect() as connection:
            return _read(connection.execute(query))[0]

    def releases(self) -> list[tuple[str, int | None, int]]:
        """Product, release and how many devices have it; devices that were never heard from have the product ''.

        Raises:
            StorageError: the database is away, or refuses.
        """
        columns = (DEVICES.c.product, DEVICES.c.release)
        query = select(*columns, func.count()).group_by(*columns).order_by(*columns)
        with database_errors(self._engine), self._engine.connect() as connection:
            return [(str(product), release, int(count)) for product, release, count in connection.execute(query)]

    def ping(self) -> None:
        """Ask the database whether it is there.

        Raises:
            StorageError: it is not.
        """
        with database_errors(self._engine), self._engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    def prune(self, now: float | None = None) -> int:
        """Drop statuses that are older than the days that are kept, but for the newest of each device.

        Returns:
            how many.

        Raises:
            StorageError: the database is away, or refuses.
        """
        oldest = (self.clock() if now is None else now) - self.days * 86_400
        last_old = (
            select(func.coalesce(func.max(STATUSES.c.sequence), 0))
            .where(STATUSES.c.device == DEVICES.c.id, STATUSES.c.received < oldest, STATUSES.c.sequence < DEVICES.c.top)
            .scalar_subquery()
        )
        floor = select(DEVICES.c.floor).where(DEVICES.c.id == STATUSES.c.device).scalar_subquery()
        with database_errors(self._engine), writing(self._engine) as connection:
            # Locked in the order in which `add` does it; else the two could wait for each other.
            connection.execute(select(DEVICES.c.id).order_by(DEVICES.c.id).with_for_update()).all()
            connection.execute(update(DEVICES).where(DEVICES.c.floor < last_old).values(floor=last_old))
            return connection.execute(delete(STATUSES).where(STATUSES.c.sequence <= floor)).rowcount

    def _add(
        self, connection: Connection, new: list[tuple[int, Envelope]], data: Sequence[bytes], now: float
    ) -> dict[int, Outcome | RefusedStatusError]:
        names = sorted({envelope.status.device for _, envelope in new})
        known = self._known(connection, names)
        if self.enrol_unknown:
            self._enrol(connection, new, known, now)
        there = self._there(connection, new)
        results: dict[int, Outcome | RefusedStatusError] = {}
        rows: list[dict[str, Any]] = []
        tops: dict[str, Envelope] = {}
        for index, envelope in new:
            status = envelope.status
            device = known.get(status.device)
            place = (status.device, status.sequence)
            try:
                check_key(envelope, None if device is None else device.key)
                assert device is not None  # check_key refuses it otherwise
                if _old(device, envelope, there.get(place), data[index]):
                    results[index] = "known"
                    continue
            except RefusedStatusError as error:
                results[index] = self._full(error)
                continue
            results[index] = "accepted"
            there[place] = data[index]
            rows.append({"device": place[0], "sequence": place[1], "received": now, "envelope": data[index]})
            if status.sequence > device.top:
                device.top, device.time = status.sequence, status.time
                tops[status.device] = envelope
        if rows:
            connection.execute(STATUSES.insert(), rows)
            self._tops(connection, tops)
            self._drop(connection, sorted({row["device"] for row in rows}))
        return results

    def _known(self, connection: Connection, names: Iterable[str]) -> dict[str, _Known]:
        query = select(DEVICES.c.id, DEVICES.c.key, DEVICES.c.top, DEVICES.c.floor, DEVICES.c.time)
        found: dict[str, _Known] = {}
        ordered = sorted(names)
        for start in range(0, len(ordered), _CHUNK):
            some = query.where(DEVICES.c.id.in_(ordered[start : start + _CHUNK])).order_by(DEVICES.c.id)
            for name, *values in connection.execute(some.with_for_update()):
                found[name] = _Known(*values)
        return found

    def _enrol(
        self, connection: Connection, new: list[tuple[int, Envelope]], known: dict[str, _Known], now: float
    ) -> None:
        first: dict[str, str] = {}
        for _, envelope in new:
            if envelope.status.device not in known:
                first.setdefault(envelope.status.device, envelope.key)
        if not first:
            return
        count = connection.execute(select(func.count()).select_from(DEVICES)).scalar_one()
        names = sorted(first)[: max(0, self.most_enrolled - count)]
        if names:
            put_devices(
                connection, [DeviceKey(name, first[name], now, "enrolled by its first status") for name in names]
            )
            known.update(self._known(connection, names))

    def _full(self, error: RefusedStatusError) -> RefusedStatusError:
        if not self.enrol_unknown or error.reason != "unknown device":
            return error
        return RefusedStatusError(
            wanted=f"at most {self.most_enrolled} devices that enrol by themselves",
            got="one more",
            next_step="Register it: edgead ota devices add",
            reason="too many devices",
        )

    def _there(self, connection: Connection, new: list[tuple[int, Envelope]]) -> dict[tuple[str, int], bytes]:
        places = sorted({(envelope.status.device, envelope.status.sequence) for _, envelope in new})
        found: dict[tuple[str, int], bytes] = {}
        for start in range(0, len(places), _CHUNK):
            query = select(STATUSES.c.device, STATUSES.c.sequence, STATUSES.c.envelope).where(
                tuple_(STATUSES.c.device, STATUSES.c.sequence).in_(places[start : start + _CHUNK])
            )
            for device, sequence, envelope in connection.execute(query):
                found[device, sequence] = bytes(envelope)
        return found

    def _tops(self, connection: Connection, tops: dict[str, Envelope]) -> None:
        if not tops:
            return
        change = (
            update(DEVICES)
            .where(DEVICES.c.id == bindparam("device"))
            .values(
                top=bindparam("new_top"),
                time=bindparam("new_time"),
                product=bindparam("new_product"),
                release=bindparam("new_release"),
            )
        )
        rows = [
            {
                "device": name,
                "new_top": tops[name].status.sequence,
                "new_time": tops[name].status.time,
                "new_product": tops[name].status.product,
                "new_release": tops[name].status.release,
            }
            for name in sorted(tops)
        ]
        connection.execute(change, rows)

    def _drop(self, connection: Connection, names: list[str]) -> None:
        """Keep the last `keep` statuses of each device."""
        counts = (
            select(STATUSES.c.device)
            .where(STATUSES.c.device.in_(bindparam("names", expanding=True)))
            .group_by(STATUSES.c.device)
            .having(func.count() > self.keep)
        )
        for start in range(0, len(names), _CHUNK):
            some = names[start : start + _CHUNK]
            for device in connection.execute(counts, {"names": some}).scalars().all():
                last = connection.execute(
                    select(STATUSES.c.sequence)
                    .where(STATUSES.c.device == device)
                    .order_by(STATUSES.c.sequence.desc())
                    .offset(self.keep)
                    .limit(1)
                ).scalar_one()
                floor = case((DEVICES.c.floor < last, last), else_=DEVICES.c.floor)
                connection.execute(update(DEVICES).where(DEVICES.c.id == device).values(floor=floor))
                connection.execute(delete(STATUSES).where(STATUSES.c.device == device, STATUSES.c.sequence <= last))


def _old(device: _Known, envelope: Envelope, there: bytes | None, data: bytes) -> bool:
    """Whether a status was taken before.

    Raises:
        RefusedStatusError: `sequence`: the device counts anew, so that nobody can tell old from new.
    """
    status = envelope.status
    if there == data:
        return True
    dropped = there is None and status.sequence <= device.floor
    if there is not None or (dropped and status.time > device.time):
        raise RefusedStatusError(
            wanted=f"a status of {status.device!r} after number {device.top}",
            got=f"another one with number {status.sequence}",
            next_step="If it was set up anew and kept its key: edgead ota devices add --replace",
            reason="sequence",
        )
    return dropped


def _read(rows: Iterable[Any]) -> tuple[list[Seen], list[Refused]]:
    statuses: list[Seen] = []
    refused: list[Refused] = []
    for device, received, data in rows:
        try:
            # The signature was asked for when it came; the database is the publisher's own.
            statuses.append(seen(decode_status(bytes(data)), received, verified=True))
        except StatusError as error:
            refused.append(Refused(device, "malformed", str(error)))
    return statuses, refused


__all__ = ["DAYS", "KEEP", "Outcome", "StatusStore"]
