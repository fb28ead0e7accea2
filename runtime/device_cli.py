"""`edgead device`: a camera that keeps itself up to date."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime import candidates_cli, device_reports
from edgead.runtime.device_folder import (
    ROOT_BYTES,
    init_device,
    last_outcome,
    note_outcome,
    outcome_fields,
    read_device,
)
from edgead.runtime.errors import MissingDependencyError, StorageError, StoreDamagedError, storage_errors
from edgead.runtime.slots import Store
from edgead.runtime.status_report import STATUS_EVERY_S
from edgead.runtime.update_outcome import Device, shadow_text

if TYPE_CHECKING:
    from edgead.runtime.update_outcome import Outcome

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_SHOWN = 12


@click.group(epilog="FOLDER is that of the device: who it is, whom it trusts, and the releases that it has.")
def device() -> None:
    """Keep a camera up to date, with a way back.

    \b
    Example:
      edgead device init camera/ --root root.json --id cam-17 --repository https://updates.plant/ --product carpet
      edgead device update camera/ --once
      edgead device status camera/
      edgead device confirm camera/
      edgead device rollback camera/
    """


@device.command()
@FOLDER
@click.option(
    "--root",
    "root_file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Trusted root metadata; the publisher's key folder has it as root.json.",
)
@click.option("--id", "device_id", required=True, help="Name of this device; no other may have it.")
@click.option("--repository", required=True, help="http://, https:// or file:// address, or a folder.")
@click.option("--product", required=True, help="What it inspects.")
@click.option("--group", "groups", multiple=True, help="Group for roll-outs, such as pilot; may be repeated.")
@click.option(
    "--pin-key",
    "pin_keys",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Public key, Ed25519 as PEM: releases are taken only if a pin by such a key vouches for their knowledge; may "
    "be repeated. NAME is the --key-id that it signs with; made from the key if left out.",
)
@click.option(
    "--statuses", default="", metavar="ADDRESS", help="Where statuses go: http[s]://, mqtt[s]:// or a folder."
)
@click.option("--mqtt", default="", metavar="ADDRESS", help="Broker that says when to poll: mqtt[s]://host[:port].")
@click.option("--force", is_flag=True, help="Replace who the device is; its releases and its key for statuses stay.")
def init(
    folder: Path,
    root_file: Path,
    device_id: str,
    repository: str,
    product: str,
    groups: tuple[str, ...],
    pin_keys: tuple[str, ...],
    statuses: str,
    mqtt: str,
    force: bool,
) -> None:
    """Say who a device is and whom it trusts; asks no server.

    \b
    Example:
      edgead device init camera/ --root root.json --id cam-17 --repository /media/usb/updates --product carpet
      edgead device init camera/ --root root.json --id cam-17 --repository https://updates.plant/ --product carpet \\
        --statuses https://collector.plant/
    """
    from edgead.runtime.device_pins import load_pin_keys

    with storage_errors(root_file, "to read the trusted root"), open(root_file, "rb") as stream:
        root = stream.read(ROOT_BYTES + 1)
    pins = load_pin_keys(pin_keys)
    init_device(folder, Device(device_id, repository, product, root, groups, pins, statuses, mqtt), force=force)
    click.echo(f"{folder}: device {device_id} for {product}; next: edgead device update {folder}")
    # Without the package for signatures nothing is sent yet; `edgead device key` shows the key later.
    with contextlib.suppress(MissingDependencyError):
        click.echo(f"key for statuses: {device_reports.public_key(folder)}")


@device.command()
@FOLDER
def key(folder: Path) -> None:
    """Show the public key that the device signs its statuses with, after its name; the publisher registers both.

    \b
    Example:
      edgead device key camera/
    """
    who = read_device(folder)
    click.echo(f"{who.device_id} {device_reports.public_key(folder)}")


@device.command()
@FOLDER
@click.option("--once", is_flag=True, help="Poll once (the default).")
@click.option("--every", type=click.FloatRange(min=1.0), metavar="SECONDS", help="Poll for ever.")
@click.option(
    "--jitter",
    type=click.FloatRange(0.0, 1.0),
    default=0.2,
    show_default=True,
    help="Share of the pause by which it differs each time.",
)
@click.option(
    "--confirm",
    "confirming",
    is_flag=True,
    help="Take the tests on this device for proof; else whoever inspects confirms, or `edgead device confirm`.",
)
@click.option("--target", help="Engine for the tests, such as openvino:fp16; by default the best one here.")
@click.option("--mqtt", metavar="ADDRESS", help="Broker that says when to poll, in place of that of `init`.")
@click.option(
    "--status-every",
    type=click.FloatRange(min=1.0),
    default=STATUS_EVERY_S,
    show_default=True,
    metavar="SECONDS",
    help="Write a status at least so often, with --every.",
)
@JSON
def update(
    folder: Path,
    once: bool,
    every: float | None,
    jitter: float,
    confirming: bool,
    target: str | None,
    mqtt: str | None,
    status_every: float,
    as_json: bool,
) -> None:
    """Take the release that this device should have, if it passes its tests here.

    The program that inspects takes it when it starts; one that uses `DeviceUpdater` takes it between two frames.
    Exits with 1 if the update failed; the active release is then as it was.

    \b
    Example:
      edgead device update camera/ --once
      edgead device update camera/ --every 60 --json
    """
    from edgead.runtime.updater import DeviceUpdater

    if once and every is not None:
        raise click.UsageError("--once and --every exclude each other.")
    store, who = Store(folder), read_device(folder)
    reports = device_reports.opened(folder, store, who, every_s=status_every, mqtt=mqtt if every is not None else "")
    updater = DeviceUpdater(store, who, target=target, reporter=reports.reporter)

    def report(outcome: Outcome) -> None:
        # A disk that is full or read-only does not keep a device from saying so.
        with contextlib.suppress(StorageError):
            state = store.state()
            if confirming and state.active is not None and not state.confirmed:
                updater.confirm()
            note_outcome(folder, outcome, updater.failures)
        sent = None if every is not None else reports.send(outcome, updater.failures)
        more = {} if sent is None else {"statuses": device_reports.sent_fields(sent)}
        click.echo(json.dumps(outcome_fields(outcome) | more) if as_json else _line(outcome))
        if sent is not None and not as_json:
            click.echo(device_reports.sent_line(sent))

    if every is not None:
        with reports.listening(updater.poke):
            updater.run(every, jitter, report=report)
        return
    outcome = updater.poll()
    report(outcome)
    if outcome.error is not None:
        raise outcome.error


@device.command()
@FOLDER
@JSON
def status(folder: Path, as_json: bool) -> None:
    """Show who a device is, what it inspects with, and how its last poll went.

    \b
    Example:
      edgead device status camera/ --json
    """
    who, store = read_device(folder), Store(folder)
    state = store.state()
    found: dict[str, Any] = {
        "id": who.device_id,
        "repository": _without_password(who.repository),
        "product": who.product,
        "groups": list(who.groups),
        "active": None,
        "confirmed": state.confirmed,
        "starts": state.starts,
        "counter": state.counter,
        "last_seen": state.last_seen,
        "attempts": device_reports.attempts(store),
        "quarantined": [digest[:_SHOWN] for digest in state.quarantined],
        "alarm": state.warning,
        "damaged": [],
        "last": last_outcome(folder),
        "statuses": device_reports.spool_fields(who, store),
    }
    try:
        active = store.active()
        found["active"] = {
            "name": active.release.name,
            "release": active.release.counter,
            "digest": active.digest[:_SHOWN],
            "engine": active.release.engine[:_SHOWN],
            "packs": {product: pack.version for product, pack in active.packs.items()},
        }
    except StoreDamagedError as error:
        found["damaged"] = list(error.fetch)
    if as_json:
        click.echo(json.dumps(found))
        return
    _show(found)


@device.command()
@FOLDER
def confirm(folder: Path) -> None:
    """Say that the active release has proved itself; the device goes back to it from then on.

    \b
    Example:
      edgead device confirm camera/
    """
    from edgead.runtime.updater import DeviceUpdater

    store, who = Store(folder), read_device(folder)
    DeviceUpdater(store, who).confirm()
    device_reports.note(folder, store, who)
    click.echo(f"{store.active().release.name} is confirmed")


@device.command()
@FOLDER
@click.option("--reason", default="by hand", show_default=True, help="For people.")
def rollback(folder: Path, reason: str) -> None:
    """Go back to the release before; the active one is quarantined and never taken again.

    \b
    Example:
      edgead device rollback camera/ --reason "false alarms on line 3"
    """
    store, who = Store(folder), read_device(folder)
    active = store.rollback(reason)
    device_reports.note(folder, store, who)
    click.echo(f"{active.release.name} is active again; restart the program that inspects")


def _line(outcome: Outcome) -> str:
    parts = [f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status]
    if outcome.way:
        parts.append(f"knowledge: {outcome.way}")
    parts.append(f"{outcome.received} bytes in {outcome.seconds:.2f} s")
    if outcome.shadow is not None:
        parts.append(shadow_text(outcome.shadow))
    if outcome.restart:
        parts.append("on probation; whoever inspects takes it at the next start")
    return "; ".join(parts)


def _show(found: dict[str, Any]) -> None:
    active, last = found["active"], found["last"]
    groups = f"group {', '.join(found['groups'])}" if found["groups"] else "no group"
    _row("device", f"{found['id']}, {groups}, product {found['product']}")
    _row("repository", found["repository"])
    if active is None:
        _row("release", f"none{': damaged, fetch with edgead device update' if found['damaged'] else ''}")
    else:
        state = "confirmed" if found["confirmed"] else f"on probation, {found['starts']} starts"
        packs = ", ".join(f"{product} {version}" for product, version in active["packs"].items())
        _row("release", f"{active['name']} ({state}); engine {active['engine']}; knowledge {packs}")
    for attempt in found["attempts"]:
        if attempt["outcome"] in ("rolled back", "rejected"):
            why = f": {attempt['reason']}" if attempt["reason"] else ""
            _row("failed here", f"release {attempt['release']} {attempt['outcome']}{why}")
    if found["quarantined"]:
        _row("quarantine", ", ".join(found["quarantined"]))
    if found["alarm"]:
        _row("alarm", found["alarm"])
    if last is not None:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(last.get("time", 0)))
        _row("last poll", f"{when}: {last.get('status')}: {last.get('reason')}")
    _row("statuses", device_reports.spool_text(found["statuses"]))


def _row(label: str, text: str) -> None:
    """A line, or as many as it takes on a terminal; whoever reads it through a pipe has one."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    lines = textwrap.wrap(text, max(40, width - 12), break_long_words=False, break_on_hyphens=False) or [""]
    for place, line in enumerate(lines):
        click.echo(f"{'' if place else label:<12}{line}")


def _without_password(address: str) -> str:
    from edgead.runtime.fetch_rules import shown

    return shown(address)


for _command in candidates_cli.COMMANDS:
    device.add_command(_command)

__all__ = ["device"]
