"""`edgead knowledge`: look at packs, compare and apply them, follow a row to its photograph, sign and verify.

The commands that change banks are in `edgead.server_side.knowledge_change_cli`. None of them imports torch.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime.errors import InputError
from edgead.runtime.files import refuse_existing
from edgead.server_side.knowledge_change_cli import add, merge, remove
from edgead.server_side.knowledge_sentences import sentences

if TYPE_CHECKING:
    from edgead.server_side.knowledge_view import Loaded

_PATH = click.Path(path_type=Path)
_PRODUCT = click.option("--product", help="Whose knowledge, in a bundle of several; its default if left out.")
_FORCE = click.option("--force", is_flag=True, help="Replace an existing output.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_KEY_ID = click.option("--key-id", help="Name of the key; made from the public key if left out.")


@click.group()
def knowledge() -> None:
    """See, change, sign and trace what a detector compares with.

    \b
    Example:
      edgead knowledge show part.bundle
      edgead knowledge add part.bundle --normal new-pattern/ --held-out good/ --defects bad/ -o pattern.delta
      edgead run part.bundle photos/ --knowledge pattern.delta
    """


knowledge.add_command(add)
knowledge.add_command(remove)
knowledge.add_command(merge)
knowledge.add_command(sentences)


@knowledge.command()
@click.argument("pack", type=_PATH)
@_PRODUCT
@_JSON
def show(pack: Path, product: str | None, as_json: bool) -> None:
    """What is in PACK, or in the initial pack of a bundle.

    \b
    Example:
      edgead knowledge show part.safetensors
      edgead knowledge show part.bundle --json
    """
    from edgead.runtime.tables import bytes_text, table
    from edgead.server_side import knowledge_view as room

    loaded = room.load(pack, product)
    record = room.described(loaded)
    if as_json:
        click.echo(json.dumps(record, sort_keys=True))
        return
    click.echo(f"{record['product']}, knowledge {record['version']}, {bytes_text(record['bytes'])}")
    lines = [["bank", "rows", "dimensions", "dtype", "size", "ids", "sources known"]]
    for name, bank in record["banks"].items():
        ids = f"{bank['first_id']}-{bank['last_id']}" if bank["rows"] else "none"
        known = "?" if bank["known_sources"] is None else str(bank["known_sources"])
        size = bytes_text(bank["bytes"])
        lines.append([name, str(bank["rows"]), str(bank["dimensions"]), bank["dtype"], size, ids, known])
    click.echo(table(lines))
    for name, shape in record["arrays"].items():
        click.echo(f"{name}  {shape[0]} {shape[1:]}")
    calibration = record["calibration"]
    click.echo(f"threshold {calibration['threshold']:.6g}, from {calibration['held_out']} held-out normals")
    if loaded.provenance is None:
        click.echo("provenance: none beside it")
    else:
        click.echo(f"provenance: {len(loaded.provenance.images)} images, root {loaded.provenance.root[:12]}")
    if loaded.pin is not None:
        click.echo(f"pin: says {loaded.pin.signer} with key {loaded.pin.kid}; check it with: edgead knowledge verify")


@knowledge.command()
@click.argument("before", type=_PATH)
@click.argument("after", type=_PATH)
@_PRODUCT
@_JSON
def diff(before: Path, after: Path, product: str | None, as_json: bool) -> None:
    """What differs between two packs: rows, sentences, thresholds, and what the change costs on the wire.

    \b
    Example:
      edgead knowledge diff part.bundle pattern.safetensors
    """
    from edgead.runtime.tables import bytes_text, table
    from edgead.server_side import knowledge_view as room

    record = room.difference(room.load(before, product), room.load(after, product))
    if as_json:
        click.echo(json.dumps(record, sort_keys=True))
        return
    click.echo(f"{record['before'][:12]} -> {record['after'][:12]}")
    if record["before"] == record["after"]:
        click.echo("the same knowledge")
        return
    if not record["same_feature_space"]:
        click.echo("other feature spaces: rows of one mean nothing to the other")
    if record["banks"]:
        lines = [["bank", "added", "removed", "rewritten"]]
        for name, bank in record["banks"].items():
            lines.append([name, str(bank["added"]), str(bank["removed"]), str(bank["rewritten"])])
        click.echo(table(lines))
    for what, names in (*record["arrays"].items(), *((f"images {k}", v) for k, v in record["images"].items())):
        if names:
            click.echo(f"{what}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}")
    for name, (old, new) in record["calibration"].items():
        click.echo(f"{name} {_figure(old)} -> {_figure(new)}")
    whole = bytes_text(record["pack_bytes"])
    cost = "no delta is possible" if record["delta_bytes"] is None else bytes_text(record["delta_bytes"])
    click.echo(f"delta {cost}, whole pack {whole}")


@knowledge.command()
@click.argument("pack", type=_PATH)
@click.argument("deltas", type=_PATH, nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=_PATH, help="The whole pack to write: NAME.safetensors.")
@_PRODUCT
@_FORCE
@_JSON
def apply(pack: Path, deltas: tuple[Path, ...], output: Path, product: str | None, force: bool, as_json: bool) -> None:
    """The pack that DELTAS, one upon the other, make of PACK or of a bundle's initial pack.

    \b
    Example:
      edgead knowledge apply part.bundle pattern.delta thread.delta -o part-now.safetensors
    """
    from edgead.runtime.knowledge import write_pack
    from edgead.runtime.provenance_file import write_with_provenance
    from edgead.server_side import knowledge_view as room

    if output.suffix == ".delta":
        raise InputError(wanted="-o NAME.safetensors", got=str(output), next_step="A delta is what there is already.")
    refuse_existing(output, force)
    loaded = room.load(pack, product)
    made, record = room.applied(loaded, deltas)
    if record is None:
        write_pack(output, made, force=force)
    else:
        write_with_provenance(output, loaded.pack, made, record, force=force)
    content = {"output": str(output), "base": loaded.pack.digest, "result": made.digest}
    click.echo(
        json.dumps(content, sort_keys=True)
        if as_json
        else f"{loaded.pack.version} -> {made.version}; wrote {output}"
        + ("" if record is None else " and its provenance")
    )


@knowledge.command()
@click.argument("pack", type=_PATH)
@click.argument("row", type=click.IntRange(0, 2**64 - 1))
@click.option("--bank", help="Which bank, where several have such a row.")
@click.option("--photos", type=_PATH, metavar="DIR", help="Look for the photograph here, by its content.")
@click.option("--bundle", type=_PATH, help="With --photos, and a PACK that is none: tells the patch in pixels.")
@click.option("--provenance", type=_PATH, help="With a device's folder: the record of its pack, as cameras have none.")
@_PRODUCT
@_JSON
def trace(
    pack: Path,
    row: int,
    bank: str | None,
    photos: Path | None,
    bundle: Path | None,
    provenance: Path | None,
    product: str | None,
    as_json: bool,
) -> None:
    """Which photograph, which patch of it and which model made the row with id ROW, and who signed it.

    PACK may be the folder of a device: what it inspects with is then traced. A result's evidence
    names rows: see "evidence" in the lines of `edgead run --json`.

    \b
    Example:
      edgead knowledge trace part.safetensors 1742 --photos photos/good --bundle part.bundle
      edgead knowledge trace camera/ 1742 --provenance part.safetensors.provenance
    """
    from edgead.runtime.bundle import open_bundle
    from edgead.server_side import knowledge_view as room

    made_by: Path | None
    if room.is_device(pack):
        loaded, engine = room.load_device(pack, product, provenance)
        made_by = bundle or engine
    elif provenance is not None:
        raise InputError(wanted="--provenance with a device's folder", got=str(pack), next_step="Leave it out.")
    else:
        loaded = room.load(pack, product)
        made_by = pack if bundle is None and room.is_bundle(pack) else bundle
    detector = None if made_by is None else open_bundle(made_by, verify=False).manifest.detector
    record = room.traced(loaded, row, bank, photos, detector)
    if as_json:
        click.echo(json.dumps(record, sort_keys=True))
        return
    click.echo(f"row {row} of {record['bank']}")
    if record["image"] is None:
        click.echo("  photo   not known")
    else:
        click.echo(f"  photo   {record['image']} (sha256 {record['sha256']})")
        if photos is not None:
            click.echo(f"  file    {record['file'] or f'not in {photos}'}")
        if record["tile"] < 0:
            click.echo(f"  place   row {record['x']} of that file")
        else:
            pixels = record["pixels"]
            where = "" if pixels is None else f": {pixels[2]} x {pixels[3]} pixels at {pixels[0]},{pixels[1]}"
            click.echo(f"  patch   x {record['x']}, y {record['y']} of tile {record['tile']}{where}")
    click.echo(f"  model   {record['model']}")
    pin = record["pin"]
    said = "nobody: no pin beside the pack" if pin is None else f"says {pin['signer']}, key {pin['kid']}, {pin['ts']}"
    click.echo(f"  signed  {said}{'' if pin is None else '; check it with: edgead knowledge verify'}")


@knowledge.command()
@click.argument("pack", type=_PATH)
@click.option("--pin", type=_PATH, help="The pin; PACK.pin if there is one.")
@click.option("--key", type=_PATH, help="Trusted public key, Ed25519 as PEM.")
@_KEY_ID
@_PRODUCT
@_JSON
def verify(
    pack: Path, pin: Path | None, key: Path | None, key_id: str | None, product: str | None, as_json: bool
) -> None:
    """Check the format of PACK, every row against its provenance, and with --key who signed it.

    \b
    Example:
      edgead knowledge verify part.safetensors --key quality.pub.pem
    """
    from edgead.runtime.pins import TrustedKey, key_name, load_public_key, verify_pin
    from edgead.runtime.provenance_file import read_pin
    from edgead.server_side import knowledge_view as room
    from edgead.server_side.signing import read_key

    loaded = room.load(pack, product)
    found = loaded.pin if pin is None else read_pin(pin)
    if (pin is not None or key_id is not None) and key is None:
        raise InputError(wanted="--key, the public key that is trusted", got="none", next_step="Add: --key FILE")
    if key is not None and (found is None or loaded.provenance is None):
        missing = "pin" if found is None else "provenance"
        raise InputError(
            wanted=f"a {missing} of {pack}",
            got="none",
            next_step=f"Sign it with: edgead knowledge sign {pack} --key KEY",
        )
    if key is not None and found is not None and loaded.provenance is not None:
        public = load_public_key(read_key(key))
        verify_pin(found, loaded.pack, loaded.provenance, {key_id or key_name(public): TrustedKey(public)})
    content: dict[str, Any] = {
        "product": loaded.pack.product,
        "digest": loaded.pack.digest,
        "rows": loaded.rows,
        "known_sources": loaded.known_rows,
        "root": None if loaded.provenance is None else loaded.provenance.root,
        "signature": "none" if found is None else ("checked" if key is not None else "not checked"),
        "pin": None if found is None else room.pinned(found),
    }
    if as_json:
        click.echo(json.dumps(content, sort_keys=True))
        return
    click.echo(f"pack        sound: {loaded.pack.product}, {loaded.pack.digest}")
    if loaded.provenance is None:
        click.echo("provenance  none beside it: nothing is known of its rows")
    else:
        click.echo(f"provenance  true: {loaded.known_rows} of {loaded.rows} rows have a source, root {content['root']}")
    if found is None:
        click.echo("signature   none")
    elif key is None:
        click.echo(f"signature   NOT CHECKED: says {found.signer}, key {found.kid}; add --key PUBLIC.pem")
    else:
        click.echo(f"signature   true: {found.signer}, key {found.kid}, {found.ts}, until {found.not_after}")


@knowledge.command()
@click.argument("pack", type=_PATH)
@click.option("--key", required=True, type=_PATH, help="Private key, Ed25519 as PEM (PKCS #8), best encrypted.")
@_KEY_ID
@click.option("--signer", required=True, help="Who signs, for people: a name and a role.")
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long it counts.")
@click.option("-o", "--output", type=_PATH, help="The pin; PACK.pin if left out.")
@click.option(
    "--passphrase-env",
    default="EDGEAD_KEY_PASSPHRASE",
    show_default=True,
    help="Environment variable with the key's passphrase; asked for on a terminal if it is not set.",
)
@_PRODUCT
@_FORCE
@_JSON
def sign(
    pack: Path,
    key: Path,
    key_id: str | None,
    signer: str,
    days: int,
    output: Path | None,
    passphrase_env: str,
    product: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Pin PACK and the sources of its rows with an Ed25519 key.

    A pack without provenance gets one first, which says of every row that its source is not known.

    \b
    Example:
      openssl genpkey -algorithm ed25519 -aes256 -out quality.pem
      openssl pkey -in quality.pem -pubout -out quality.pub.pem
      edgead knowledge sign part.safetensors --key quality.pem --signer "Anna, quality"
    """
    from edgead.runtime.pins import key_name, make_pin
    from edgead.runtime.provenance_file import pin_path, provenance_path, write_pin, write_provenance
    from edgead.server_side import knowledge_view as room
    from edgead.server_side.signing import open_key
    from edgead.server_side.sources import provenance_of

    place = output or pin_path(pack)
    refuse_existing(place, force)
    loaded = room.load(pack, product)
    secret = open_key(key, passphrase_env)
    record = loaded.provenance or provenance_of(loaded.pack, fingerprint=_row_fingerprint(loaded, pack))
    now = datetime.now(timezone.utc).replace(microsecond=0)
    pin = make_pin(
        loaded.pack,
        record,
        secret.sign,
        kid=key_id or key_name(secret.public_key().public_bytes_raw()),
        signer=signer,
        ts=now,
        not_before=now,
        not_after=now + timedelta(days=days),
    )
    if loaded.provenance is None:
        refuse_existing(provenance_path(pack), force)
        write_provenance(provenance_path(pack), record)
    write_pin(place, pin)
    if as_json:
        click.echo(json.dumps({"output": str(place), "root": record.root, **room.pinned(pin)}, sort_keys=True))
        return
    click.echo(f"wrote {place}: {pin.signer} with key {pin.kid}, until {pin.not_after}")
    if loaded.provenance is None:
        click.echo(f"wrote {provenance_path(pack)}: no source of its {loaded.rows} rows is known")


def _row_fingerprint(loaded: Loaded, path: Path) -> str:
    """Feature space of the rows: in a bundle of two detectors it is not the pack's own."""
    from edgead.runtime.bundle import open_bundle
    from edgead.server_side.knowledge_view import is_bundle

    if is_bundle(path):
        return open_bundle(path, verify=False).manifest.detector.fingerprint
    return loaded.pack.fingerprint


def _figure(value: Any) -> str:
    return "none" if value is None else f"{value:.6g}"
