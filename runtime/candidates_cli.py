"""`edgead device mark` and `edgead device marks`: what somebody at a camera wants the publisher to know."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime.errors import InputError

if TYPE_CHECKING:
    from edgead.runtime.candidates import Kind
    from edgead.runtime.spec import Region

_PATH = click.Path(path_type=Path)
_FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_SHOWN = 12


@click.command()
@_FOLDER
@click.argument("image", type=_PATH)
@click.option("--normal", is_flag=True, help="The part is good: a false alarm, or a new kind of good part.")
@click.option("--anomalous", is_flag=True, help="The part is bad: a missed defect, or one worth knowing.")
@click.option(
    "--mask", type=_PATH, metavar="IMAGE", help="Where the defect is: a picture of the same size, bright there."
)
@click.option("--box", metavar="X,Y,W,H", help="Where the defect is: a rectangle in pixels, from the upper left.")
@click.option("--note", default="", help="A line for the people at the publisher.")
@click.option("--target", help="Engine that inspects the picture, such as openvino:fp16; by default the best one here.")
@_JSON
def mark(
    folder: Path,
    image: Path,
    normal: bool,
    anomalous: bool,
    mask: Path | None,
    box: str | None,
    note: str,
    target: str | None,
    as_json: bool,
) -> None:
    """Propose IMAGE to the publisher, as good or as a defect; nothing changes on this device.

    The picture is inspected with the active release, so that the publisher sees what the camera said, and signed with
    the key of the device. It waits in the device's folder until it is sent: edgead device marks FOLDER --to WHERE

    \b
    Example:
      edgead device mark camera/ missed.png --anomalous --box 40,32,16,12 --note "dent, shift 2"
      edgead device mark camera/ thread.png --normal
    """
    if normal == anomalous:
        raise click.UsageError("Say what the picture shows: --normal or --anomalous.")
    if normal and (mask or box):
        raise click.UsageError("--mask and --box say where a defect is; a normal picture has none.")
    if mask and box:
        raise click.UsageError("--mask and --box exclude each other.")
    digest, new, verdict = _mark(
        folder, image, "normal" if normal else "anomalous", mask, _box(box) if box else None, note, target
    )
    if as_json:
        click.echo(json.dumps({"id": digest, "new": new, "verdict": verdict}))
        return
    click.echo(f"{digest[:_SHOWN]}  {'marked' if new else 'was marked already'}; the camera said {verdict}")
    click.echo(f"next: edgead device marks {folder} --to WHERE")


@click.command()
@_FOLDER
@click.option(
    "--to", "where", metavar="WHERE", help="Bring them to http(s)://collector, or into a folder such as a stick."
)
@click.option("--keep", is_flag=True, help="Remove nothing here; with --to.")
@click.option("--remove", metavar="ID", help="Take a mark back; the beginning of its id is enough.")
@_JSON
def marks(folder: Path, where: str | None, keep: bool, remove: str | None, as_json: bool) -> None:
    """List what was marked here and waits, send it, or take it back. What arrived is removed here.

    `edgead device update` sends it by itself where statuses go over HTTP or into a folder.

    Exits with 1 if something did not arrive; it stays, and is sent the next time.

    \b
    Example:
      edgead device marks camera/
      edgead device marks camera/ --to https://collector.plant/
      edgead device marks camera/ --to /media/usb
      edgead device marks camera/ --remove 3f2a9c
    """
    from edgead.runtime.device_folder import read_device
    from edgead.runtime.marks import Marks

    read_device(folder)
    room = Marks(folder)
    if remove is not None:
        if where is not None:
            raise click.UsageError("--to and --remove exclude each other.")
        room.remove(remove)
    elif where is not None:
        _send(room.send(where, keep=keep), as_json)
        return
    found = [_facts(digest, mark) for digest, mark in ((item.digest, item.mark) for _, item in room)]
    damaged = room.damaged()
    if as_json:
        click.echo(json.dumps({"marks": found, "damaged": damaged}))
        return
    for item in found:
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(item["time"]))
        click.echo(
            f"{item['id'][:_SHOWN]}  {when}  {item['kind']:<9}  the camera said {item['verdict']}"
            + (f"  {item['note']}" if item["note"] else "")
        )
    for name in damaged:
        click.echo(f"{name}  is no candidate; remove the file", err=True)
    if not found:
        click.echo("nothing waits")


def _mark(
    folder: Path, image: Path, kind: Kind, mask: Path | None, box: Region | None, note: str, target: str | None
) -> tuple[str, bool, str]:
    from edgead.runtime.bundle import open_bundle
    from edgead.runtime.device_folder import read_device
    from edgead.runtime.device_key import read_key
    from edgead.runtime.image import read_image
    from edgead.runtime.inspector import Inspector
    from edgead.runtime.marks import Marks, marked
    from edgead.runtime.slots import Store

    device, key = read_device(folder), read_key(folder)
    if key is None:
        raise InputError(
            wanted=f"the key of a device in {folder}",
            got="none that is sound",
            next_step="See, and make one: edgead device key FOLDER; register it with: edgead ota devices add",
        )
    frame = read_image(image)
    drawn = None if mask is None else read_image(mask)
    active = Store(folder).active()
    pack = active.packs.get(device.product)
    if pack is None:
        raise InputError(
            wanted=f"an active release that knows {device.product!r}",
            got=f"one of {', '.join(active.packs)}",
            next_step="Correct the product with: edgead device init --force",
        )
    # The store checked every byte of the file when it loaded the release.
    bundle = open_bundle(active.engine, verify=False)
    with Inspector(bundle, target=target, packs=[pack], products=[device.product]) as inspector:
        inspection = inspector.inspect(frame, product=device.product)
    data = marked(
        frame,
        inspection,
        kind,
        device=device.device_id,
        private_key=key,
        fingerprint=pack.fingerprint,
        release=active.release.counter,
        preprocessing=bundle.manifest.detector.preprocessing,
        mask=drawn,
        box=box,
        note=note,
    )
    return (*Marks(folder).add(data), inspection.verdict.value)


def _box(text: str) -> Region:
    from edgead.runtime.spec import Region

    numbers = []
    with contextlib.suppress(ValueError):
        numbers = [int(part) for part in text.split(",")]
    if len(numbers) != 4 or min(numbers) < 0 or min(numbers[2:]) < 1 or max(numbers) > 65536:
        raise InputError(
            wanted="--box as X,Y,W,H in pixels, such as 40,32,16,12",
            got=repr(text[:40]),
            next_step="Count from the upper left corner of the picture.",
        )
    return Region(*numbers)


def _facts(digest: str, mark: Any) -> dict[str, Any]:
    import msgspec

    return {"id": digest, **msgspec.to_builtins(mark)}


def _send(sent: list[Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([{"id": item.digest, "outcome": item.outcome, "reason": item.reason} for item in sent]))
    else:
        for item in sent:
            click.echo(f"{item.digest[:_SHOWN]}  {item.outcome}{': ' if item.reason else ''}{item.reason}")
        if not sent:
            click.echo("nothing waits")
    if any(item.outcome != "arrived" for item in sent):
        click.get_current_context().exit(1)


COMMANDS = (mark, marks)
