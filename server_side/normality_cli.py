"""`edgead normality`: sentences that say what is normal, as kilobytes for cameras that run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.files import refuse_existing
from edgead.server_side.prompts.cli_llm import Asking, ask_options, llm_options, opened_model, wants_llm

if TYPE_CHECKING:
    from edgead.runtime.bundle import Bundle
    from edgead.runtime.knowledge import Pack
    from edgead.runtime.spec import NormalityRecord
    from edgead.server_side.prompts import PromptSet

_PATH = click.Path(path_type=Path)
_KNOWLEDGE = click.option(
    "--knowledge",
    type=_PATH,
    multiple=True,
    help="Pack or delta that the cameras have on top of the bundle's own; may be repeated, in their order.",
)
_PRODUCT = click.option("--product", help="Whose knowledge; the bundle's default if left out.")
_OUTPUT = click.option(
    "-o", "--output", required=True, type=_PATH, help="What to write: NAME.delta, or the whole NAME.safetensors."
)
_FORCE = click.option("--force", is_flag=True, help="Replace an existing output.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_CHECK = click.option(
    "--check", type=_PATH, metavar="DIR", help="Labelled images (MVTec layout): count misses and false alarms."
)
_NOW_NORMAL = click.option(
    "--now-normal", multiple=True, metavar="TYPE", help="With --check: a defect type that is normal from now on."
)
_TARGET = click.option("--target", help="With --check: which engine; the best of this machine if left out.")


@click.group(epilog="Needs a bundle that was exported --with-normality.")
def normality() -> None:
    """Tell a bundle by a sentence what is normal, see what it was told, take it back.

    \b
    Example:
      edgead normality add part.bundle --class carpet "thread" -o thread.delta
      edgead run part.bundle photos/ --knowledge thread.delta
      edgead normality remove part.bundle --knowledge thread.delta "thread" -o back.delta
    """


@normality.command()
@click.argument("bundle", type=_PATH)
@click.argument("sentence")
@click.option("--class", "class_name", required=True, help="What the part is, such as carpet.")
@click.option("--domain", default="industrial", show_default=True, help="The kind of image.")
@click.option(
    "--phrases",
    type=_PATH,
    metavar="FILE",
    help="Your own descriptions of that look: one a line, or a prompt set (.json) of `edgead prompts normality`.",
)
@click.option("--model", help="Name or open_clip config of the text encoder; the bundle's if left out.")
@click.option("--model-weights", help="Its pretrained tag, checkpoint or TAG=FILE; the bundle's if left out.")
@_KNOWLEDGE
@_PRODUCT
@_CHECK
@_NOW_NORMAL
@_TARGET
@_OUTPUT
@_FORCE
@_JSON
@llm_options
def add(
    bundle: Path,
    sentence: str,
    class_name: str,
    domain: str,
    phrases: Path | None,
    model: str | None,
    model_weights: str | None,
    knowledge: tuple[Path, ...],
    product: str | None,
    check: Path | None,
    now_normal: tuple[str, ...],
    target: str | None,
    output: Path,
    force: bool,
    as_json: bool,
    **words: Any,
) -> None:
    """Let what SENTENCE names pass from now on, such as "thread" on a carpet.

    Curated phrases describe that look; --phrases gives your own, --llm asks a language model. What is written goes
    to the cameras: nothing is exported again, and thresholds stay as they are.

    \b
    Example:
      edgead normality add part.bundle --class carpet "thread" -o thread.delta
      edgead normality add part.bundle --class carpet "thread" --check labelled/ --now-normal thread -o thread.delta
      edgead normality add part.bundle --class carpet "stain" --knowledge thread.delta -o stain.delta
    """
    from edgead.runtime.bundle import open_bundle
    from edgead.server_side import normalities as room

    refuse_existing(output, force)
    opened = open_bundle(bundle, verify=False)
    room.normality_of(opened)
    before = room.current(opened, knowledge, product)
    after = taught(opened, before, sentence, class_name, domain, phrases, model, model_weights, words, as_json)
    _finish(opened, before, after, output, force, as_json, check, now_normal, target, f"added {sentence!r}")


@normality.command("list")
@click.argument("bundle", type=_PATH)
@_KNOWLEDGE
@_PRODUCT
@_JSON
def list_command(bundle: Path, knowledge: tuple[Path, ...], product: str | None, as_json: bool) -> None:
    """What BUNDLE was told to be normal, and which model reads such sentences.

    \b
    Example:
      edgead normality list part.bundle
      edgead normality list part.bundle --knowledge thread.delta --json
    """
    from edgead.runtime.bundle import open_bundle
    from edgead.runtime.tables import table
    from edgead.server_side import normalities as room

    opened = open_bundle(bundle, verify=False)
    record = room.normality_of(opened)
    pack = room.current(opened, knowledge, product)
    rows = room.sentences(pack)
    if as_json:
        content = {
            "product": pack.product,
            "knowledge": pack.version,
            "digest": pack.digest,
            "model": record.model,
            "weights": record.weights,
            "sentences": rows,
        }
        click.echo(json.dumps(content, sort_keys=True))
        return
    weights = f", weights {record.weights[:12]}" if record.weights else ""
    click.echo(
        f"{pack.product}, knowledge {pack.version}; sentences are read by {record.model or 'an unknown model'}{weights}"
    )
    if not rows:
        click.echo(f'nothing added yet: edgead normality add {bundle} --class CLASS "WHAT IS NORMAL" -o normal.delta')
        return
    lines = [[str(row["text"]), str(row.get("class", "")), str(row.get("prompts", ""))] for row in rows]
    click.echo(table([["normal", "class", "prompts"], *lines]))


@normality.command()
@click.argument("bundle", type=_PATH)
@click.argument("sentence")
@_KNOWLEDGE
@_PRODUCT
@_CHECK
@_NOW_NORMAL
@_TARGET
@_OUTPUT
@_FORCE
@_JSON
def remove(
    bundle: Path,
    sentence: str,
    knowledge: tuple[Path, ...],
    product: str | None,
    check: Path | None,
    now_normal: tuple[str, ...],
    target: str | None,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Take SENTENCE back: the knowledge is then to the byte as if it had never been added.

    \b
    Example:
      edgead normality remove part.bundle "thread" --knowledge thread.delta -o back.delta
    """
    from edgead.runtime.bundle import open_bundle
    from edgead.server_side import normalities as room

    refuse_existing(output, force)
    opened = open_bundle(bundle, verify=False)
    room.normality_of(opened)
    before = room.current(opened, knowledge, product)
    after = room.without_sentence(before, sentence)
    _finish(opened, before, after, output, force, as_json, check, now_normal, target, f"removed {sentence!r}")


def taught(
    bundle: Bundle,
    before: Pack,
    sentence: str,
    class_name: str,
    domain: str,
    phrases: Path | None,
    model: str | None,
    model_weights: str | None,
    words: dict[str, Any],
    as_json: bool,
) -> Pack:
    """Knowledge with one sentence more.

    Args:
        bundle: with a normality detector.
        before: what the cameras have.
        sentence: what is normal from now on.
        class_name, domain: what the part is, and the kind of image.
        phrases: own descriptions; None for curated ones, or those of a language model.
        model, model_weights: the text encoder; the bundle's if None.
        words: options of `llm_options`.
        as_json: whether what a language model says goes to standard error.

    Raises:
        BundleError, InputError, KnowledgeError, PromptError: see `edgead normality add`.
    """
    from edgead.runtime.bundle_manifest import NORMALITY_TABLE
    from edgead.runtime.notes import read_note
    from edgead.server_side import normalities as room

    record = room.normality_of(bundle)
    room.refuse_known(before, sentence)
    prompts = _prompts(sentence, class_name, domain, phrases, words, as_json)
    note = read_note(before, NORMALITY_TABLE)
    name, weights = _encoder(record, note, model, model_weights)
    # torch comes with these imports, so mistakes in words and files are told before.
    from edgead.server_side.detectors.sentences import normality_rows
    from edgead.server_side.vision_language import load_model

    encoder = load_model(name, weights)
    room.check_model(record, encoder.name, encoder.weights_sha256)
    added, normal, rows = normality_rows(encoder, prompts)
    place = [row["text"] for row in rows].index(_only(prompts, sentence))
    return room.with_sentence(bundle, before, added[place], normal[place], rows[place])


def _prompts(
    sentence: str, class_name: str, domain: str, phrases: Path | None, words: dict[str, Any], as_json: bool
) -> PromptSet:
    """The prompts of one normality: from a file, from a language model, or curated."""
    from edgead.server_side.prompts import ensembles, read_prompt_set

    asks = wants_llm(words)
    if asks and phrases is not None:
        raise InputError(wanted="--phrases or a language model", got="both", next_step="Leave one out.")
    if phrases is not None and phrases.suffix == ".json":
        return read_prompt_set(phrases)
    if phrases is not None:
        with storage_errors(phrases, "to read phrases"):
            data = phrases.read_bytes()
        try:
            lines = [line.strip() for line in data.decode().splitlines()]
        except UnicodeDecodeError as error:
            raise InputError(
                wanted=f"phrases as UTF-8 text in {phrases}", got="other bytes", next_step="Write one phrase a line."
            ) from error
        kept = [line for line in lines if line]
        return ensembles.normality(sentence, class_name, phrases=kept, author="person", domain=domain)
    if not asks:
        return ensembles.normality(sentence, class_name, domain=domain)
    from edgead.server_side.prompts import generators

    ensembles.normality(sentence, class_name, domain=domain)  # words that are refused cost no question
    asking = Asking(err=as_json)
    with opened_model(words) as llm:
        made = generators.normality(llm, sentence, class_name, domain, ask_options(words, asking))
    asking.confirm(words["yes"])
    return made


def _only(prompts: PromptSet, sentence: str) -> str:
    """The normality of a prompt set that is asked for: that of this name, or the only one."""
    names = prompts.normalities()
    for name in names:
        if name.casefold() == " ".join(sentence.replace("_", " ").split()).casefold():
            return name
    raise InputError(
        wanted=f"the normality {sentence!r} in the prompt set",
        got=", ".join(map(repr, names)) or "none",
        next_step="Name one of these, or make the set with: edgead prompts normality",
    )


def _encoder(
    record: NormalityRecord, note: dict[str, Any], model: str | None, weights: str | None
) -> tuple[str, str | None]:
    """Name and weights of the text encoder: as named, else what bundle and pack say."""
    name = model or record.model
    if name is None:
        raise InputError(
            wanted="the name of the text encoder",
            got="a bundle whose card does not say it",
            next_step="Add: --model NAME --model-weights TAG_OR_FILE",
        )
    return name, weights or note.get("weights")


def _finish(
    bundle: Bundle,
    before: Pack,
    after: Pack,
    output: Path,
    force: bool,
    as_json: bool,
    check: Path | None,
    now_normal: tuple[str, ...],
    target: str | None,
    done: str,
) -> None:
    from edgead.runtime.chain import DELTA_SUFFIX, write_knowledge
    from edgead.runtime.tables import bytes_text, table
    from edgead.server_side import normalities as room

    if now_normal and check is None:
        raise InputError(wanted="--check DIR with --now-normal", got="--now-normal alone", next_step="Add: --check DIR")
    change = None
    if check is not None:
        change = room.compare(bundle, before, after, check, now_normal=now_normal, target=target)
    size = write_knowledge(output, before, after, force=force)
    if as_json:
        content: dict[str, Any] = {
            "output": str(output),
            "bytes": size,
            "base": before.digest,
            "result": after.digest,
            "sentences": [row["text"] for row in room.sentences(after)],
        }
        if change is not None:
            content["check"] = {
                when: {"misses": change.misses(when), "false_alarms": change.false_alarms(when)}
                for when in ("before", "after")
            }
        click.echo(json.dumps(content, sort_keys=True))
        return
    kind = "delta" if output.suffix == DELTA_SUFFIX else "pack"
    click.echo(f"{done}: {before.version} -> {after.version}; wrote {output} ({kind}, {bytes_text(size)})")
    if change is not None:
        lines = [
            [
                item.kind,
                "anomalous" if item.anomalous else "normal",
                str(item.images),
                str(item.before),
                str(item.after),
            ]
            for item in change.kinds
        ]
        click.echo(table([["type", "label", "images", "NG before", "NG after"], *lines]))
        for what, count in (("misses", change.misses), ("false alarms", change.false_alarms)):
            click.echo(f"{what} {count('before')} -> {count('after')}")
    click.echo(f"next: edgead run {bundle.path} PICTURES --knowledge {output}")
