"""`edgead ota collect` and `edgead ota devices`: who receives the statuses of cameras, and whose statuses count."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgead.runtime.errors import InputError, missing_dependency
from edgead.server_side.ota.cli_options import JSON, PATH, finish

if TYPE_CHECKING:
    from edgead.server_side.ota.collector import Page
    from edgead.server_side.ota.devices import Devices
    from edgead.server_side.ota.statuses import Found

_KEEP, _DAYS, _RATE = 100, 30.0, 50.0
SOURCE = click.argument("source")


@click.command()
@click.option(
    "--database",
    required=True,
    envvar="EDGEAD_DATABASE",
    metavar="URL",
    help="FILE.db, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME; or in the variable EDGEAD_DATABASE.",
)
@click.option("--listen", default="127.0.0.1:8080", show_default=True, metavar="HOST:PORT", help="Port 0: a free one.")
@click.option("--mqtt", metavar="URL", help="Broker, mqtt[s]://[USER:PASSWORD@]HOST[:PORT], to collect from as well.")
@click.option("--devices", type=PATH, metavar="FILE", help="Register these: lines ID HEX, as edgead device key prints.")
@click.option(
    "--enrol-unknown",
    is_flag=True,
    help="Register a device that is not known with the key of its first status; nobody else is that device from then.",
)
@click.option("--token-env", metavar="NAME", help="Environment variable with the token that devices must send.")
@click.option("--reader-token-env", metavar="NAME", help="The same for page and counters; by default the devices'.")
@click.option("--keep", type=click.IntRange(1, 100_000), default=_KEEP, show_default=True, help="Statuses per device.")
@click.option("--days", type=click.FloatRange(min=0.01), default=_DAYS, show_default=True, help="How long at most.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0.1),
    default=_RATE,
    show_default=True,
    help="Requests of one address per second; ten times as many at once.",
)
@click.option("--candidates", type=PATH, metavar="FOLDER", help="Take pictures that cameras were shown, too, into it.")
@click.option("--tls-certificate", type=PATH, metavar="FILE", help="PEM; with --tls-key.")
@click.option("--tls-key", type=PATH, metavar="FILE", help="PEM; with --tls-certificate.")
@JSON
def collect(
    database: str,
    listen: str,
    mqtt: str | None,
    devices: Path | None,
    enrol_unknown: bool,
    token_env: str | None,
    reader_token_env: str | None,
    keep: int,
    days: float,
    rate: float,
    candidates: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    as_json: bool,
) -> None:
    """Receive the signed statuses of cameras over HTTP, and MQTT if named, and keep them; runs until it is ended.

    The address shows the fleet as a page, /metrics has counters for Prometheus, /healthz says whether the database
    answers. Cameras are given the address with: edgead device init --statuses URL

    \b
    Example:
      edgead ota devices add fleet.db --file cameras.txt
      edgead ota collect --database fleet.db --listen 0.0.0.0:8080
      edgead ota collect --database postgresql://edgead@db/fleet --mqtt mqtts://broker.plant --token-env EDGEAD_TOKEN
    """
    if (tls_certificate is None) != (tls_key is None):
        raise click.UsageError("--tls-certificate and --tls-key go together.")
    host, port = _address(listen)
    device_token, reader_token = _token(token_env), _token(reader_token_env)
    with _needed():
        from edgead.server_side.ota.collector import CollectorLimits, Tokens
        from edgead.server_side.ota.collector_server import CollectorServer
        from edgead.server_side.ota.intake import Intake
        from edgead.server_side.ota.mqtt_intake import MqttIntake
        from edgead.server_side.ota.status_store import StatusStore
    from edgead.server_side.ota.devices import read_list

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(StatusStore(database, enrol_unknown=enrol_unknown, keep=keep, days=days))
        new = 0 if devices is None else store.devices.add(read_list(devices))
        routes = []
        if candidates is not None:
            from edgead.server_side.ota.candidates import CandidateStore, keys_of
            from edgead.server_side.ota.candidates_http import candidate_routes

            routes = candidate_routes(CandidateStore(candidates), keys_of(store.devices))
        intake = Intake(store)
        server = CollectorServer(
            intake,
            host,
            port,
            tokens=Tokens(device_token, reader_token),
            limits=CollectorLimits(rate=rate, burst=max(1, round(10 * rate))),
            page=_page(),
            routes=routes,
            certificate=tls_certificate,
            key=tls_key,
        )
        listener = None if mqtt is None else stack.enter_context(MqttIntake(intake, mqtt))
        content = {
            "url": server.url,
            "database": store.shown,
            "mqtt": None if listener is None else listener.address,
            "devices": len(store.devices.all()),
            "registered": new,
            "enrol_unknown": enrol_unknown,
        }
        lines = [f"{server.url}  (statuses go to {server.url}/statuses; end with Ctrl-C)"]
        lines.append(f"{store.shown}: {content['devices']} devices are registered" + (f", {new} new" if new else ""))
        lines += [] if listener is None else [f"and what comes over {listener.address}"]
        finish(as_json, content, *lines)
        server.run()


@click.group()
def devices() -> None:
    """Register the keys by which devices are known. SOURCE is a database, or a folder with its devices.json.

    \b
    Example:
      edgead ota devices add fleet.db cam-17 3f0c...64 hex digits
      edgead ota devices list fleet.db
      edgead ota devices remove fleet.db cam-17
    """


@devices.command()
@SOURCE
@click.argument("device", required=False)
@click.argument("key", required=False)
@click.option("--file", "listed", type=PATH, help="Lines ID HEX, as edgead device key prints, or a devices.json.")
@click.option("--note", default="", help="For people.")
@click.option(
    "--replace", is_flag=True, help="Give a known device this key and begin its history anew, as after a repair."
)
@JSON
def add(
    source: str, device: str | None, key: str | None, listed: Path | None, note: str, replace: bool, as_json: bool
) -> None:
    """Register DEVICE with its public KEY of 64 hex digits, or all devices of a file.

    \b
    Example:
      edgead ota devices add fleet.db cam-17 3f0c...64 hex digits
      edgead ota devices add postgresql://edgead@db/fleet --file cameras.txt
    """
    from edgead.server_side.ota.devices import checked, read_list

    if (listed is None) == (device is None) or (device is None) != (key is None):
        raise click.UsageError("Name DEVICE and KEY, or --file FILE.")
    new = read_list(listed) if listed is not None else [checked(str(device), str(key), note)]
    with registry_at(source) as registry:
        changed = registry.add(new, replace=replace)
    finish(
        as_json, {"added": changed, "known": len(new) - changed}, f"{changed} added, {len(new) - changed} were known"
    )


@devices.command("list")
@SOURCE
@JSON
def list_devices(source: str, as_json: bool) -> None:
    """Show who is registered.

    \b
    Example:
      edgead ota devices list fleet.db --json
    """
    from edgead.runtime.tables import table
    from edgead.server_side.ota.statuses import when

    with registry_at(source, create=False) as registry:
        found = registry.all()
    if as_json:
        fields = [{"id": one.device, "key": one.key, "added": one.added, "note": one.note} for one in found]
        click.echo(json.dumps({"devices": fields}))
        return
    rows = [["device", "key", "added", "note"]]
    rows += [[one.device, one.key[:16], when(one.added) if one.added else "", one.note] for one in found]
    click.echo(table(rows) if found else "no device is registered")


@devices.command()
@SOURCE
@click.argument("device")
@JSON
def remove(source: str, device: str, as_json: bool) -> None:
    """Forget DEVICE and what was heard from it; its statuses do not count any more.

    \b
    Example:
      edgead ota devices remove fleet.db cam-17
    """
    with registry_at(source, create=False) as registry:
        registry.remove(device)
    finish(as_json, {"removed": device}, f"{device} is forgotten")


@contextlib.contextmanager
def registry_at(source: str, *, create: bool = True) -> Iterator[Devices]:
    """The registry of a database, or of a folder.

    Raises:
        InputError: there is none, and it is not to be made.
        StorageError: the database is away.
        MissingDependencyError: a database, and the package for it is not installed.
    """
    from edgead.server_side.ota.devices import DeviceFile
    from edgead.server_side.ota.statuses import is_database

    if is_database(source):
        with _needed():
            from edgead.server_side.ota.status_store import StatusStore
        with StatusStore(source, create=create) as store:
            yield store.devices
        return
    folder = Path(source.removeprefix("file://"))
    if not create and not folder.is_dir():
        raise InputError(
            wanted=f"a registry of devices at {folder}",
            got="no folder there",
            next_step="Name a folder with devices.json, a .db file, or a database's URL.",
        )
    yield DeviceFile(folder)


def _page() -> Page:
    def page(found: Found) -> str:
        import time

        from edgead.server_side.ota.fleet import summary
        from edgead.server_side.ota.fleet_page import page_of

        return page_of(summary(found, time.time()))

    return page


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(wanted="--listen as HOST:PORT", got=repr(listen[:80]), next_step="As in: 0.0.0.0:8080")
    return host.strip("[]"), int(port)


def _token(name: str | None) -> str | None:
    if name is None:
        return None
    token = os.environ.get(name, "").strip()
    if len(token) < 8:
        raise InputError(
            wanted=f"a token of 8 letters or more in the environment variable {name}",
            got="none" if not token else "a shorter one",
            next_step=f"export {name}=...",
        )
    return token


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    """Turn the absence of a package of the block into the error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name == "edgead":
            raise
        raise missing_dependency(name, "fleet", "statuses of a fleet") from error


COMMANDS = (collect, devices)

__all__ = ["COMMANDS", "registry_at"]
