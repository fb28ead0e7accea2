"""The registry of devices as a table of the database that keeps their statuses."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Engine, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from edgead.server_side.ota.devices import DeviceKey, another_key, no_device
from edgead.server_side.ota.status_tables import DEVICES, STATUSES, database_errors, shown, writing


class DeviceTable:
    """The registry of devices in a database of statuses; see `edgead.server_side.ota.devices.Devices`.

    Args:
        engine: of `edgead.server_side.ota.status_tables.open_engine`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def all(self) -> list[DeviceKey]:
        """All devices, by name.

        Raises:
            StorageError: the database is away, or refuses.
        """
        query = select(DEVICES.c.id, DEVICES.c.key, DEVICES.c.added, DEVICES.c.note).order_by(DEVICES.c.id)
        with database_errors(self._engine), self._engine.connect() as connection:
            return [DeviceKey(*row) for row in connection.execute(query)]

    def add(self, new: Sequence[DeviceKey], *, replace: bool = False) -> int:
        """See `Devices.add`."""
        changed = 0
        with database_errors(self._engine), writing(self._engine) as connection:
            for record in sorted(new, key=lambda one: one.device):
                if put_devices(connection, [record]):
                    changed += 1
                    continue
                query = select(DEVICES.c.key).where(DEVICES.c.id == record.device).with_for_update()
                known = connection.execute(query).scalar_one()
                if known == record.key and not replace:
                    continue
                if not replace:
                    raise another_key(record, known)
                _forget(connection, record.device)
                put_devices(connection, [record])
                changed += 1
        return changed

    def remove(self, device: str) -> None:
        """See `Devices.remove`."""
        with database_errors(self._engine), writing(self._engine) as connection:
            if not _forget(connection, device):
                raise no_device(device, shown(self._engine.url))


def put_devices(connection: Connection, new: list[DeviceKey]) -> int:
    """Register who is not there yet; how many these were."""
    rows = [{"id": one.device, "key": one.key, "added": one.added, "note": one.note} for one in new]
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    put = dialect.insert(DEVICES).values(rows).on_conflict_do_nothing().returning(DEVICES.c.id)
    return len(connection.execute(put).all())


def _forget(connection: Connection, device: str) -> bool:
    gone = connection.execute(delete(DEVICES).where(DEVICES.c.id == device)).rowcount
    connection.execute(delete(STATUSES).where(STATUSES.c.device == device))
    return bool(gone)


__all__ = ["DeviceTable", "put_devices"]
