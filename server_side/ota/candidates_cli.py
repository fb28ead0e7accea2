"""`edgead ota candidates`: see what people at the cameras marked, and accept it into a release or decline it."""

from __future__ import annotations

import getpass
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgead.runtime.errors import InputError
from edgead.server_side.ota.cli_flows import finish_flow, shipping_options, teach_and_ship, teaching_options
from edgead.server_side.ota.cli_options import FOLDER, JSON, PATH, finish, key_options, open_for_change
from edgead.server_side.ota.cli_pins import pin_options

if TYPE_CHECKING:
    from edgead.server_side.ota.candidates import Entry, Keys

_SHOWN = 12
_Command = TypeVar("_Command", bound=Callable[..., Any])
_DEVICES = click.option(
    "--devices",
    metavar="WHERE",
    help="Registry of devices: a folder with devices.json, or the database of the collector. By default the "
    "devices.json in FOLDER or above it.",
)
_BY = click.option("--by", "who", help="Who decides; the name of this account if left out.")


@click.group("candidates", epilog="FOLDER is where the collector keeps candidates.")
def candidates() -> None:
    """What people at the cameras marked: look at it, then accept or decline. Nothing of it is active before.

    \b
    Example:
      edgead ota candidates list collected/candidates
      edgead ota candidates show collected/candidates -o marked.html
      edgead ota candidates accept updates/ collected/candidates 3f2a9c --held-out good/ --keys keys/
      edgead ota candidates decline collected/candidates 77b1e0 --reason "a reflection"
    """


@candidates.command()
@FOLDER
@click.argument("files", type=PATH, nargs=-1, required=True, metavar="FILE...")
@_DEVICES
@JSON
def take(folder: Path, files: tuple[Path, ...], devices: str | None, as_json: bool) -> None:
    """Take candidates that came as files or folders, such as on a stick; each is verified.

    Exits with 1 if one of them was refused.

    \b
    Example:
      edgead ota candidates take collected/candidates /media/usb --devices collected/
    """
    from edgead.runtime.candidates import CANDIDATE_BYTES, SUFFIX
    from edgead.runtime.disk import RealDisk
    from edgead.runtime.errors import CandidateError, storage_errors
    from edgead.server_side.ota.candidates import CandidateStore

    keys, store = _keys(folder, devices), CandidateStore(folder)
    found = [path for file in files for path in (sorted(file.glob(f"*{SUFFIX}")) if file.is_dir() else [file])]
    told: list[dict[str, str]] = []
    for path in found:
        with storage_errors(path, "to read a candidate"):
            data = RealDisk().read(path, CANDIDATE_BYTES + 1)
        try:
            entry, new = store.put(data, keys)
        except CandidateError as error:
            told.append({"file": path.name, "outcome": "refused", "reason": error.got})
        else:
            told.append({"file": path.name, "outcome": "taken" if new else "known", "reason": "", "id": entry.id})
    lines = [f"{item['file']}  {item['outcome']}{': ' if item['reason'] else ''}{item['reason']}" for item in told]
    finish(as_json, {"files": told}, *(lines or ["no candidates there"]))
    if any(item["outcome"] == "refused" for item in told):
        click.get_current_context().exit(1)


@candidates.command("list")
@FOLDER
@click.option("--all", "every", is_flag=True, help="Those that were decided on, too.")
@JSON
def list_(folder: Path, every: bool, as_json: bool) -> None:
    """List candidates that nobody decided on, the oldest first.

    \b
    Example:
      edgead ota candidates list collected/candidates --all
    """
    entries = [entry for entry in _store(folder) if every or entry.decision is None]
    content = {"candidates": [_facts(entry) for entry in entries]}
    finish(as_json, content, *([_line(entry) for entry in entries] or ["nothing to decide on"]))


@candidates.command()
@FOLDER
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE", help="Page to write, such as marked.html.")
@JSON
def show(folder: Path, ids: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Write a page with the pictures, what was marked on them, and what the cameras had said.

    Without ID: all that nobody decided on.

    \b
    Example:
      edgead ota candidates show collected/candidates -o marked.html
    """
    from edgead.runtime.errors import storage_errors
    from edgead.server_side.ota.candidates_page import candidates_page

    store = _store(folder)
    entries = [store.find(one) for one in ids] if ids else [entry for entry in store if entry.decision is None]
    page = candidates_page(entries)
    with storage_errors(output, "to write a page"):
        output.write_text(page, encoding="utf-8")
    finish(as_json, {"page": str(output), "candidates": len(entries)}, f"{output}: {len(entries)} candidates")


@candidates.command()
@click.argument("repository", type=PATH)
@FOLDER
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@_DEVICES
@_BY
@teaching_options
@shipping_options
@pin_options
@key_options
def accept(
    repository: Path, folder: Path, ids: tuple[str, ...], devices: str | None, who: str | None, **words: Any
) -> None:
    """Teach the product's devices what the candidates ID show, as one signed release for a pilot group.

    All of them are of one product, and all normal or all defects. Rows are made here, by the engine of the product's
    latest release, and get ids that no other row had. Each signature is checked against the devices known today.

    \b
    Example:
      edgead ota candidates accept updates/ collected/candidates 3f2a9c 51bb04 --held-out good/ --keys keys/
      edgead ota rollout updates/ carpet --percent 100 --keys keys/
    """
    from edgead.server_side.ota import candidates_accept as room

    keys, store, by = _keys(folder, devices), _store(folder), who or _account()
    with open_for_change(repository, words["keys"], words["passphrase_env"]) as (updates, keyring):
        chosen = room.choose(updates, store, ids, keys)
        room.keep_accepted(store, chosen.before, by)
        if not chosen.entries:
            have = {entry.id: counter for entry, counter in chosen.before}
            lines = [f"{key[:_SHOWN]}  is in release {counter} already" for key, counter in have.items()]
            finish(words["as_json"], {"release": max(have.values()), "accepted": sorted(have)}, *lines)
            return
        told = room.notes_of(chosen.entries)
        # The ids stand in the notes whatever else is said: by them an interrupted acceptance is recognised.
        words["notes"] = f"{words['notes']}; {told}" if words["notes"] else told
        with tempfile.TemporaryDirectory() as place:
            pictures = room.write_pictures(chosen, Path(place))
            product, anomalous = chosen.product, chosen.anomalous
            change, shipped, pin = teach_and_ship(updates, keyring, product, pictures, anomalous, told, words)
        room.keep_accepted(store, [(entry, shipped.release.counter) for entry in chosen.entries], by)
    more = {"accepted": [entry.id for entry in chosen.entries]}
    finish_flow(repository, product, change.before, change.after, shipped, change, pin, words["as_json"], more)


@candidates.command()
@FOLDER
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("--reason", required=True, help="Why, for whoever asks later.")
@_BY
@JSON
def decline(folder: Path, ids: tuple[str, ...], reason: str, who: str | None, as_json: bool) -> None:
    """Decide that nothing is learned from the candidates ID. They stay, and are not offered again.

    \b
    Example:
      edgead ota candidates decline collected/candidates 77b1e0 --reason "a reflection"
    """
    from edgead.server_side.ota.candidates import REASON, Decision

    if len(reason) > REASON or not reason.isprintable():
        raise InputError(
            wanted=f"a reason of at most {REASON} letters in one line", got=repr(reason[:60]), next_step="Shorten it."
        )
    store, by = _store(folder), who or _account()
    entries = [store.find(one) for one in ids]
    for entry in entries:
        store.decide(entry, Decision(entry.id, "declined", by, int(time.time()), reason))
    declined = [entry.id for entry in entries]
    finish(as_json, {"declined": declined}, *(f"{key[:_SHOWN]}  declined" for key in declined))


def _store(folder: Path) -> Any:
    from edgead.server_side.ota.candidates import CandidateStore

    if not folder.is_dir():
        raise InputError(
            wanted=f"a folder of candidates at {folder}",
            got="a file" if folder.exists() else "nothing there",
            next_step="Name the folder where the collector keeps them, or take some: edgead ota candidates take",
        )
    return CandidateStore(folder)


def _keys(folder: Path, devices: str | None) -> Keys:
    """Keys of the registry, read once."""
    from edgead.server_side.ota.devices import DEVICES, DeviceFile
    from edgead.server_side.ota.statuses import is_database

    if devices is not None and is_database(devices):
        from edgead.server_side.ota.status_store import StatusStore

        with StatusStore(devices, create=False) as store:
            return {one.device: bytes.fromhex(one.key) for one in store.devices.all()}
    places = [folder, folder.parent] if devices is None else [Path(devices.removeprefix("file://"))]
    place = next((one for one in places if (one / DEVICES).is_file()), None)
    if place is None:
        raise InputError(
            wanted=f"a registry of devices ({DEVICES}) in {' or '.join(map(str, places))}",
            got="none",
            next_step="Name it with --devices; register devices with: edgead ota devices add",
        )
    return {one.device: bytes.fromhex(one.key) for one in DeviceFile(place).all()}


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


def _facts(entry: Entry) -> dict[str, Any]:
    import msgspec

    mark: dict[str, Any] = msgspec.to_builtins(entry.candidate.mark)
    return {
        "id": entry.id,
        "state": entry.state,
        **mark,
        "decision": None if entry.decision is None else msgspec.to_builtins(entry.decision),
    }


def _line(entry: Entry) -> str:
    mark = entry.candidate.mark
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(mark.time))
    parts = [entry.id[:_SHOWN], when, mark.device, mark.product, mark.kind, f"the camera said {mark.verdict}"]
    return "  ".join(parts + ([mark.note] if mark.note else []) + ([] if entry.decision is None else [entry.state]))


COMMANDS = (candidates,)
