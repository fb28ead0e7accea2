"""The database of statuses: its tables, how it is opened, and its errors as edgead's. SQLAlchemy stays in here and in
`edgead.server_side.ota.status_store`.

    edgead_schema     version: 1
    edgead_devices    id, key, added, note: the registry; top: sequence of the newest status, time, product and release:
                      what it says; floor: statuses up to this sequence were dropped from the history
    edgead_statuses   device, sequence, received, envelope: the bytes as they were signed
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from edgead.runtime.errors import InputError, StorageError, missing_dependency

SCHEMA = 1
METADATA = MetaData()
VERSION = Table(
    "edgead_schema",
    METADATA,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True),
    Column("version", Integer, nullable=False),
)
DEVICES = Table(
    "edgead_devices",
    METADATA,
    Column("id", String(128), primary_key=True),
    Column("key", String(64), nullable=False),
    Column("added", Float, nullable=False),
    Column("note", String(300), nullable=False, server_default=""),
    Column("top", BigInteger, nullable=False, server_default="0"),
    Column("floor", BigInteger, nullable=False, server_default="0"),
    Column("time", BigInteger, nullable=False, server_default="0"),
    Column("product", String(128), nullable=False, server_default=""),
    Column("release", BigInteger),
)
STATUSES = Table(
    "edgead_statuses",
    METADATA,
    Column("device", String(128), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("received", Float, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
WRITES = "edgead_writes"
"""Execution option of a connection that will write."""
_BUSY_SECONDS = 15
_LOCK = 0x45444745
"""Number of the advisory lock under which PostgreSQL makes the tables."""


def database_url(source: str) -> URL:
    """A database's address from a URL or the path of an SQLite file.

    Raises:
        InputError: it is none of SQLite or PostgreSQL.
    """
    if "://" not in source:
        return URL.create("sqlite", database=source)
    try:
        url = make_url(source)
    except (ArgumentError, ValueError) as error:
        raise InputError(
            wanted="a database's URL", got="one that cannot be read", next_step="See: edgead ota collect --help"
        ) from error
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg") or (url.drivername == "sqlite" and not url.database):
        raise InputError(
            wanted="sqlite:///FILE, the path of a .db file, or postgresql://USER@HOST/NAME",
            got=url.render_as_string(hide_password=True)[:200],
            next_step="Take one of these.",
        )
    return url


def open_engine(url: URL, *, create: bool, connections: int) -> Engine:
    """A pool of connections to a database whose tables are there and of this schema.

    Args:
        url: as `database_url` gave it.
        create: make what is not there.
        connections: most at a time.

    Raises:
        InputError: there is no database of statuses, or it is of a newer schema.
        StorageError: the database is away, or refuses.
        MissingDependencyError: the package for PostgreSQL is not installed.
    """
    engine = _sqlite(url, create, connections) if url.drivername == "sqlite" else _postgresql(url, connections)
    try:
        with database_errors(engine), writing(engine) as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            _check_schema(connection, create)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that may write; it is committed, durably, when the block ends well."""
    with engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
        yield connection


@contextlib.contextmanager
def database_errors(engine: Engine) -> Iterator[None]:
    """Turn SQLAlchemy's errors from the block into `StorageError`; no password is in it.

    Raises:
        StorageError: the database is away, busy, full, or refused.
    """
    try:
        yield
    except SQLAlchemyError as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise StorageError(
            wanted=f"the database {shown(engine.url)} to do its part",
            got=_without(lines[0], engine.url)[:300],
            next_step="See that it runs, has room, and lets this user in. Devices keep what was not taken.",
        ) from error


def shown(url: URL) -> str:
    """An address as messages may have it."""
    return url.set(query={}).render_as_string(hide_password=True)


def _without(line: str, url: URL) -> str:
    return line.replace(str(url.password), "***") if url.password else line


def _check_schema(connection: Connection, create: bool) -> None:
    known = set(inspect(connection).get_table_names())
    if VERSION.name not in known:
        if not create:
            raise InputError(
                wanted=f"a database of statuses at {shown(connection.engine.url)}",
                got="one without them",
                next_step="edgead ota collect makes it.",
            )
        METADATA.create_all(connection)
        connection.execute(insert(VERSION).values(id=1, version=SCHEMA))
        return
    version = connection.execute(select(VERSION.c.version)).scalar_one_or_none()
    if version != SCHEMA:
        raise InputError(
            wanted=f"a database of statuses of schema {SCHEMA} at {shown(connection.engine.url)}",
            got=f"schema {version}",
            next_step="Install the edgead that wrote it, or name another database.",
        )


def _sqlite(url: URL, create: bool, connections: int) -> Engine:
    if not create and url.database != ":memory:" and not Path(str(url.database)).is_file():
        raise InputError(
            wanted=f"a database at {url.database}", got="no file there", next_step="edgead ota collect makes it."
        )
    if url.database == ":memory:":
        raise InputError(wanted="a database on disk", got=":memory:", next_step="Name a .db file.")
    engine = create_engine(
        url, connect_args={"timeout": _BUSY_SECONDS, "isolation_level": None}, pool_size=connections, max_overflow=0
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: Any) -> None:
        cursor = connection.cursor()
        # WAL: who reads does not wait for who writes. FULL: what was answered for is on the disk.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that read first could not become a writer while another one is.
        kind = "BEGIN IMMEDIATE" if connection.get_execution_options().get(WRITES) else "BEGIN"
        connection.exec_driver_sql(kind)

    return engine


def _postgresql(url: URL, connections: int) -> Engine:
    settings: dict[str, Any] = {"connect_timeout": 5, "application_name": "edgead"}
    if "options" not in url.query:
        settings["options"] = f"-c lock_timeout={_BUSY_SECONDS}s -c statement_timeout=60s"
    settings = {name: value for name, value in settings.items() if name not in url.query}
    try:
        return create_engine(
            url, connect_args=settings, pool_size=connections, max_overflow=0, pool_timeout=10, pool_pre_ping=True
        )
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise missing_dependency("psycopg", "fleet", "a PostgreSQL database") from error


__all__ = [
    "DEVICES",
    "SCHEMA",
    "STATUSES",
    "VERSION",
    "database_errors",
    "database_url",
    "open_engine",
    "shown",
    "writing",
]
