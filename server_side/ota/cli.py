"""`edgead ota`: the publisher's commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime.errors import InputError
from edgead.server_side.ota import (
    candidates_cli,
    cli_flows,
    cli_keys,
    cli_pins,
    collector_cli,
    custodians_cli,
    fleet_cli,
    guard_cli,
    prune_cli,
)
from edgead.server_side.ota.cli_options import (
    FOLDER,
    PATH,
    PRODUCT,
    finish,
    key_options,
    open_for_change,
)
from edgead.server_side.ota.cli_pins import pin_line, pin_options, pin_pack

if TYPE_CHECKING:
    from edgead.runtime.rollout import Rollout
    from edgead.server_side.ota.publish import Published

_SHOWN = 12


@click.group(epilog="FOLDER is static files: any web server, object store, CDN or USB stick serves it.")
def ota() -> None:
    """Publish signed updates for a fleet of cameras.

    \b
    Example:
      export EDGEAD_KEYS="a long passphrase"
      edgead ota init updates/ --product carpet --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota publish updates/ carpet.edgead --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota release updates/ carpet --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota rollout updates/ carpet --release 1 --group pilot --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota serve updates/
    """


for _command in (*cli_keys.COMMANDS, *cli_flows.COMMANDS, *cli_pins.COMMANDS, *candidates_cli.COMMANDS):
    ota.add_command(_command)
for _command in (
    *custodians_cli.COMMANDS,
    *fleet_cli.COMMANDS,
    *guard_cli.COMMANDS,
    *collector_cli.COMMANDS,
    *prune_cli.COMMANDS,
):
    ota.add_command(_command)


@ota.command()
@FOLDER
@click.argument("files", type=PATH, nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--calibrated", is_flag=True, help="The calibration was made again for the changed bank and came out the same."
)
@click.option(
    "--with-provenance",
    is_flag=True,
    help="Publish NAME.provenance, too: names and digests of photographs. Cameras do not fetch it.",
)
@custodians_cli.DRAFT
@key_options
def publish(
    folder: Path,
    files: tuple[Path, ...],
    calibrated: bool,
    with_provenance: bool,
    draft: Path | None,
    keys: tuple[Path, ...],
    passphrase_env: tuple[str, ...],
    as_json: bool,
) -> None:
    """Put bundles, packs, deltas or pins into the repository; devices take nothing until it is released.

    Deltas from what the devices have are made on the way, and NAME.pin beside a file goes with it. Refused are a pack
    that no published engine can take, and one whose bank changed without its calibration.

    \b
    Example:
      edgead ota publish updates/ carpet.edgead --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota publish updates/ thread.delta --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota publish updates/ thread.delta.pin --keys keys/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.runtime.provenance_file import PIN_SUFFIX, provenance_beside, read_pin
    from edgead.server_side.ota import publish as room
    from edgead.server_side.ota.pins import publish_beside, put_pin
    from edgead.server_side.ota.provenance import keep_provenance

    if draft is not None and len(files) != 1:
        raise InputError(wanted="one FILE for a draft", got=str(len(files)), next_step="Draft them one after another.")
    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        done: list[Published] = []
        for path in files:
            if path.suffix == PIN_SUFFIX:
                done.append(room.Published(put_pin(repository, read_pin(path))))
            elif path.is_dir() or path.suffix == ".edgead":
                done.append(room.publish_bundle(repository, path))
                done[-1].files += publish_beside(repository, path, sources=with_provenance)
            else:
                pack = room.read_knowledge(repository, path)
                done.append(room.publish_pack(repository, pack, calibrated=calibrated))
                done[-1].files += publish_beside(repository, path, pack, sources=with_provenance)
            if done[-1].files:
                custodians_cli.commit_or_draft(repository, keyring, draft, f"publish {path.name}")
            record = provenance_beside(path)
            if record is not None and record.product in repository.settings.products:
                keep_provenance(repository, record)
    put = [item for one in done for item in one.files]
    skipped = [reason for one in done for reason in one.skipped]
    content = {
        "files": [{"path": path, "bytes": size} for path, size in put],
        "skipped": skipped,
        "dropped": [path for one in done for path in one.dropped],
    }
    lines = [f"{path}  {size} bytes" for path, size in put] or ["all of it was there already"]
    finish(as_json, content, *lines, *(f"no delta {reason}" for reason in skipped))


@ota.command()
@FOLDER
@PRODUCT
@click.option("--engine", metavar="DIGEST", help="Beginning of a published bundle's digest; found if left out.")
@click.option("--pack", metavar="DIGEST", help="Beginning of a published pack's digest; the new one if left out.")
@click.option("--counter", type=int, help="Greater than the last; one more if left out.")
@click.option("--now-normal", multiple=True, metavar="GOLDEN", help="Golden image whose verdict is meant to change.")
@click.option("--target", help="Engine of the bundle to run the release test with; the best of this machine.")
@click.option("--notes", default="", help="For people.")
@pin_options
@custodians_cli.DRAFT
@key_options
def release(
    folder: Path,
    product: str,
    engine: str | None,
    pack: str | None,
    counter: int | None,
    now_normal: tuple[str, ...],
    target: str | None,
    notes: str,
    draft: Path | None,
    keys: tuple[Path, ...],
    passphrase_env: tuple[str, ...],
    as_json: bool,
    **words: Any,
) -> None:
    """Bind an engine and a pack of PRODUCT together, with the scores that every device must see again.

    The bundle's golden images are inspected with the pack: what alarmed before must still alarm, what passed must
    still pass. The release is signed by a threshold of the releases role; a roll-out brings it to devices.

    \b
    Example:
      edgead ota release updates/ carpet --notes "threads are fine" --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota release updates/ carpet --pack 3f2a --keys keys/ --keys stick/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.server_side.ota.releases import make_release, release_path

    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        made = make_release(
            repository,
            product,
            engine=engine,
            pack=pack,
            counter=counter,
            now_normal=now_normal,
            notes=notes,
            target=target,
        )
        digest = made.product_packs[product]
        told = pin_pack(repository, product, digest, words)
        custodians_cli.commit_or_draft(repository, keyring, draft, f"release {made.counter} of {product}")
    content = {
        "release": release_path(product, made.counter),
        "counter": made.counter,
        "engine": made.engine,
        "pack": digest,
        "scores": made.scores[product],
        "must_alarm": list(made.must_alarm[product]),
        "tolerance": made.tolerance,
        "pin": told,
    }
    finish(
        as_json,
        content,
        f"release {made.counter} of {product}: engine {made.engine[:_SHOWN]}, pack {digest[:_SHOWN]}",
        f"golden images: {len(made.scores[product])}, {len(made.must_alarm[product])} of them alarm",
        *([] if told is None else [pin_line(told)]),
        f"next: edgead ota rollout {folder} {product} --release {made.counter} --group pilot",
    )


@ota.command()
@FOLDER
@PRODUCT
@click.option("--release", type=int, metavar="COUNTER", help="A signed release; the current one if left out.")
@click.option("--group", "groups", multiple=True, help="Device group that takes it; may be repeated.")
@click.option("--percent", type=float, help="Share of all other devices that takes it, 0 to 100.")
@click.option("--error-threshold", type=float, help="Share of failures above which the roll-out stops, 0 to 1.")
@click.option("--window", type=int, metavar="SECONDS", help="How long a device watches it before it confirms.")
@click.option("--pause", is_flag=True, help="No further device takes it.")
@click.option("--resume", is_flag=True, help="End a pause.")
@click.option("--stop", is_flag=True, help="Emergency stop, for good: devices that have it go back.")
@key_options
def rollout(
    folder: Path,
    product: str,
    release: int | None,
    groups: tuple[str, ...],
    percent: float | None,
    error_threshold: float | None,
    window: int | None,
    pause: bool,
    resume: bool,
    stop: bool,
    keys: tuple[Path, ...],
    passphrase_env: tuple[str, ...],
    as_json: bool,
) -> None:
    """Bring a signed release of PRODUCT to devices: begin, widen, pause, resume or stop.

    Signed by the rollout key alone, which cannot make or change a release. Groups and percentage only grow.

    \b
    Example:
      edgead ota rollout updates/ carpet --release 2 --group pilot --keys online/ --passphrase-env EDGEAD_KEYS
      edgead ota rollout updates/ carpet --percent 25 --keys online/ --passphrase-env EDGEAD_KEYS
      edgead ota rollout updates/ carpet --stop --keys online/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.server_side.ota import rollouts as room

    wider = any(value is not None for value in (release, percent, error_threshold, window)) or bool(groups)
    if pause + resume + stop + wider != 1:
        raise InputError(
            wanted="one of --pause, --resume, --stop, or what to roll out how far",
            got="none of them" if not (pause or resume or stop) else "several",
            next_step="See: edgead ota rollout --help",
        )
    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        if stop:
            record = room.stop(repository, product)
        elif pause or resume:
            record = room.pause(repository, product, pause)
        else:
            record = room.roll_out(
                repository,
                product,
                release=release,
                groups=groups,
                percent=percent,
                error_threshold=error_threshold,
                window=window,
            )
        repository.commit(keyring)
    finish(as_json, _record(record), _told(record))


@ota.command()
@FOLDER
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port; 0 for any free one.")
@click.option("--quiet", is_flag=True, help="Print no requests.")
def serve(folder: Path, host: str, port: int, quiet: bool) -> None:
    """Serve a repository for trials. What it holds is signed, so any web server will do in a plant.

    \b
    Example:
      edgead ota serve updates/
      edgead ota serve updates/ --host 0.0.0.0 --port 8080
    """
    from edgead.server_side.ota.repository import SETTINGS
    from edgead.server_side.ota.serve import RepositoryServer

    if not (folder / SETTINGS).is_file():
        raise InputError(
            wanted=f"an update repository in {folder}", got="none", next_step="Make one with: edgead ota init"
        )
    with RepositoryServer(folder, host, port, quiet=quiet) as server:
        click.echo(f"{server.url}  (metadata/ and targets/; end with Ctrl-C)")
        server.serve_forever()


def _record(record: Rollout) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(record)
    return found


def _told(record: Rollout) -> str:
    if record.stopped:
        return f"release {record.release} of {record.product} is stopped; devices that have it go back"
    who = f"{', '.join(record.groups) or 'no group'} and {record.percent:g} % of the others"
    return f"release {record.release} of {record.product} {'is paused for' if record.paused else 'goes to'} {who}"
