"""`edgead ota add-normality`, `add-normal`, `add-anomaly`: one command from the wish to a pilot group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgead.runtime.errors import InputError
from edgead.server_side.ota.cli_options import FOLDER, PATH, PRODUCT, finish, key_options, open_for_change
from edgead.server_side.ota.cli_pins import pin_line, pin_options, pin_pack
from edgead.server_side.prompts.cli_llm import llm_options

if TYPE_CHECKING:
    from edgead.runtime.knowledge import Pack
    from edgead.runtime.provenance import Provenance
    from edgead.server_side.knowledge_tools import BankChange
    from edgead.server_side.ota.flows import Shipped
    from edgead.server_side.ota.keys import Keyring
    from edgead.server_side.ota.repository import Repository

_SHOWN = 12
_Command = TypeVar("_Command", bound=Callable[..., Any])


def shipping_options(command: _Command) -> _Command:
    """The options of every flow."""
    options = [
        click.option(
            "--group",
            "groups",
            multiple=True,
            default=("pilot",),
            show_default=True,
            help="Devices that take it first.",
        ),
        click.option("--now-normal", multiple=True, metavar="GOLDEN", help="Golden image whose verdict is to change."),
        click.option("--notes", help="For people; what was taught if left out."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def teaching_options(command: _Command) -> _Command:
    """The options of flows that change a bank."""
    options = [
        click.option(
            "--held-out",
            type=PATH,
            required=True,
            envvar="EDGEAD_HELD_OUT",
            show_envvar=True,
            metavar="DIR",
            help="Good parts that the bank was never taught: the threshold is set anew on them.",
        ),
        click.option("--defects", type=PATH, metavar="DIR", help="Known defects, to count what would be missed."),
        click.option("--most", type=click.IntRange(1), default=512, show_default=True, help="Most rows to each bank."),
        click.option("--target", help="Engine of the bundle to embed with; the best of this machine if left out."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("add-normality")
@FOLDER
@PRODUCT
@click.argument("sentence")
@click.option("--class", "class_name", required=True, help="What the part is, such as carpet.")
@click.option("--domain", default="industrial", show_default=True, help="The kind of image.")
@click.option(
    "--phrases", type=PATH, metavar="FILE", help="Your own descriptions, one a line, or a prompt set (.json)."
)
@click.option("--model", help="Name or config of the text encoder; the bundle's if left out.")
@click.option("--model-weights", help="Its pretrained tag, checkpoint or TAG=FILE; the bundle's if left out.")
@shipping_options
@pin_options
@key_options
@llm_options
def add_normality(
    folder: Path,
    product: str,
    sentence: str,
    class_name: str,
    domain: str,
    phrases: Path | None,
    model: str | None,
    model_weights: str | None,
    groups: tuple[str, ...],
    now_normal: tuple[str, ...],
    notes: str | None,
    keys: tuple[Path, ...],
    passphrase_env: tuple[str, ...],
    as_json: bool,
    **words: Any,
) -> None:
    """Let what SENTENCE names pass on the devices of PRODUCT, such as "thread" on a carpet.

    The sentence becomes a row of knowledge, the row a delta of kilobytes, and that a signed release for a pilot
    group. Needs a bundle that was exported --with-normality.

    \b
    Example:
      edgead ota add-normality updates/ carpet "thread" --class carpet --keys keys/ --passphrase-env EDGEAD_KEYS
      edgead ota rollout updates/ carpet --percent 100 --keys keys/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.server_side.normality_cli import taught
    from edgead.server_side.ota.flows import current_of

    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        bundle, before = current_of(repository, product)
        after = taught(bundle, before, sentence, class_name, domain, phrases, model, model_weights, words, as_json)
        told = notes or f"normal from now on: {sentence}"
        shipped, pin = _ship(repository, keyring, after, groups, now_normal, told, words)
    finish_flow(folder, product, before, after, shipped, None, pin, as_json)


@click.command("add-normal")
@FOLDER
@PRODUCT
@click.argument("images", type=PATH)
@teaching_options
@shipping_options
@pin_options
@key_options
def add_normal(folder: Path, product: str, images: Path, **words: Any) -> None:
    """Teach the devices of PRODUCT that the pictures in the folder IMAGES are normal.

    Rows that the bank lacks are added, the threshold is set anew on held-out pictures, false alarms and misses are
    counted before and after, and a pilot group gets the release.

    \b
    Example:
      edgead ota add-normal updates/ carpet new-pattern/ --held-out good/ --defects bad/ --keys keys/
    """
    from edgead.runtime.image import list_images

    _teach(folder, product, [(path, None) for path in list_images(images)], False, f"normal: {images.name}", words)


@click.command("add-anomaly")
@FOLDER
@PRODUCT
@click.argument("image", type=PATH)
@click.option("--mask", type=PATH, metavar="IMAGE", help="Where the defect is; found by its distance if left out.")
@teaching_options
@shipping_options
@pin_options
@key_options
def add_anomaly(folder: Path, product: str, image: Path, mask: Path | None, **words: Any) -> None:
    """Teach the devices of PRODUCT the defect on IMAGE, so that its like is found.

    Needs a detector with a bank of defects. A pilot group gets the release.

    \b
    Example:
      edgead ota add-anomaly updates/ carpet missed.png --mask dent.png --held-out good/ --keys keys/
    """
    _teach(folder, product, [(image, mask)], True, f"defect: {image.name}", words)


def _teach(
    folder: Path,
    product: str,
    pictures: list[tuple[Path, Path | None]],
    anomalous: bool,
    told: str,
    words: dict[str, Any],
) -> None:
    if not pictures:
        raise InputError(wanted="pictures to teach", got="none", next_step="Name a folder with pictures.")
    with open_for_change(folder, words["keys"], words["passphrase_env"]) as (repository, keyring):
        change, shipped, pin = teach_and_ship(repository, keyring, product, pictures, anomalous, told, words)
    finish_flow(folder, product, change.before, change.after, shipped, change, pin, words["as_json"])


def teach_and_ship(
    repository: Repository,
    keyring: Keyring,
    product: str,
    pictures: list[tuple[Path, Path | None]],
    anomalous: bool,
    told: str,
    words: dict[str, Any],
) -> tuple[BankChange, Shipped, dict[str, Any] | None]:
    """Rows of pictures, in a signed release for some groups.

    Args:
        repository, keyring: to be changed and signed.
        product: whose.
        pictures: with their masks, or None.
        anomalous: whether they show defects.
        told: notes of the release, if nobody gave others.
        words: of `teaching_options`, `shipping_options` and `pin_options`.

    Returns:
        what changed, what was released, and what to tell of the pin.
    """
    from edgead.server_side.ota.flows import teach
    from edgead.server_side.ota.provenance import keep_provenance

    change = teach(
        repository,
        product,
        pictures,
        anomalous=anomalous,
        held_out=words["held_out"],
        defects=words["defects"],
        most=words["most"],
        target=words["target"],
    )
    notes = words["notes"] or told
    # Defects unlike every good part move no score of one, and the thresholds set anew come out as they were.
    groups, now_normal = words["groups"], words["now_normal"]
    shipped, pin = _ship(repository, keyring, change.after, groups, now_normal, notes, words, change.provenance)
    keep_provenance(repository, change.provenance)
    return change, shipped, pin


def _ship(
    repository: Repository,
    keyring: Keyring,
    pack: Pack,
    groups: tuple[str, ...],
    now_normal: tuple[str, ...],
    notes: str,
    words: dict[str, Any],
    record: Provenance | None = None,
) -> tuple[Shipped, dict[str, Any] | None]:
    """Put and sign pack, release, roll-out and pin; with the record of a bank whose thresholds were set anew."""
    from edgead.server_side.ota.flows import ship

    calibrated = record is not None
    shipped = ship(repository, pack, groups=groups, now_normal=now_normal, notes=notes, calibrated=calibrated)
    pin = pin_pack(repository, pack.product, pack.digest, words, *([] if record is None else [record]))
    repository.commit(keyring)
    return shipped, pin


def finish_flow(
    folder: Path,
    product: str,
    before: Pack,
    after: Pack,
    shipped: Shipped,
    change: BankChange | None,
    pin: dict[str, Any] | None,
    as_json: bool,
    more: dict[str, Any] | None = None,
) -> None:
    """Tell what a flow did; `more` is for programs."""
    from edgead.runtime.tables import bytes_text
    from edgead.server_side.ota.publish import delta_path

    sizes = dict(shipped.published.files)
    delta = sizes.get(delta_path(product, before.digest, after.digest))
    record = shipped.rollout
    content: dict[str, Any] = {
        "release": shipped.release.counter,
        "base": before.digest,
        "pack": after.digest,
        "delta_bytes": delta,
        "groups": list(record.groups),
        "percent": record.percent,
        "threshold": [before.calibration.threshold, after.calibration.threshold],
        "pin": pin,
    }
    lines = [
        f"release {shipped.release.counter} of {product}: {before.version} -> {after.version}, "
        + ("the whole pack" if delta is None else f"a delta of {bytes_text(delta)}"),
        *shipped.published.skipped,
    ]
    if change is not None:
        judged = change.judged
        content |= {
            "added": dict(change.added),
            "false_alarms": [judged.false_alarms.before, judged.false_alarms.after],
            "misses": None if judged.misses is None else [judged.misses.before, judged.misses.after],
        }
        lines += [*change.notes, judged.summary()]
    lines += [
        *([] if pin is None else [pin_line(pin)]),
        f"goes to {', '.join(record.groups) or 'no group'} and {record.percent:g} % of the others",
        f"next: edgead ota rollout {folder} {product} --percent 100",
    ]
    finish(as_json, content | (more or {}), *lines)


COMMANDS = (add_normality, add_normal, add_anomaly)
