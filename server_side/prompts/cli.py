"""`edgead prompts`: make, show, check and extend prompt sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgead.runtime.errors import InputError
from edgead.runtime.files import refuse_existing
from edgead.server_side.prompts.cli_llm import Asking, ask_options, llm_options, opened_model, wants_llm
from edgead.server_side.prompts.prompt_set import (
    STATES,
    PromptSet,
    format_prompt_set,
    read_prompt_set,
    write_prompt_set,
)

_PATH = click.Path(path_type=Path)
_OUTPUT = click.option("-o", "--output", type=_PATH, required=True, help="The prompt set, a JSON file.")
_FORCE = click.option("--force", is_flag=True, help="Replace an existing file.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_DRY = click.option("--dry-run", is_flag=True, help="Print what would be written; write nothing.")
_DOMAIN = click.option("--domain", default="industrial", show_default=True, help="The kind of image.")
_SHOWN = 5
"""Prompts of each kind that a summary prints."""


@click.group(epilog="Example: edgead prompts new carpet -o carpet.json")
def prompts() -> None:
    """Sentences that say what normal and anomalous look like: a JSON file that a person can edit.

    \b
      edgead prompts new carpet -o carpet.json
      edgead prompts normality "thread" --class carpet -o thread.json
      edgead prompts add carpet.json "a photo of a wet carpet." --state anomalous
    """


@prompts.command()
@click.argument("class_name", metavar="CLASS")
@_DOMAIN
@click.option(
    "--method",
    type=click.Choice(["winclip", "april-gan", "alfa", "descriptors"]),
    default="winclip",
    show_default=True,
    help="Whose ensemble; descriptors are for explanations.",
)
@click.option("--detail", "details", multiple=True, help="ALFA: what a defect shows, as 'scratches'. Repeatable.")
@llm_options
@_OUTPUT
@_FORCE
@_DRY
@_JSON
def new(
    class_name: str,
    domain: str,
    method: str,
    details: tuple[str, ...],
    output: Path,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **words: Any,
) -> None:
    """Make the prompt set of CLASS, such as carpet or metal_nut.

    Without a language model, from published templates. With one, ALFA's set and the descriptors get its sentences
    as well; they are shown, and used only after a yes.

    \b
    Example:
      edgead prompts new carpet -o carpet.json
      edgead prompts new metal_nut --method alfa --detail scratches --detail "a bent edge" -o nut.json
      edgead prompts new carpet --method alfa --llm http://127.0.0.1:11434/v1 --llm-model qwen3 -o carpet.json
    """
    if details and method != "alfa":
        raise InputError(wanted="--method alfa with --detail", got=f"--method {method}", next_step="Leave one out.")
    _check_output(output, force, dry_run)
    asking = Asking(err=as_json)
    if not wants_llm(words):
        from edgead.server_side.prompts import ensembles

        made = {
            "winclip": lambda: ensembles.winclip(class_name, domain),
            "april-gan": lambda: ensembles.april_gan(class_name, domain),
            "alfa": lambda: ensembles.alfa(class_name, domain, details or None),
            "descriptors": lambda: ensembles.descriptors(class_name, domain),
        }[method]()
    else:
        from edgead.server_side.prompts import generators

        if method not in ("alfa", "descriptors"):
            raise InputError(
                wanted="a method that asks a language model: alfa or descriptors",
                got=f"--method {method}, which is templates alone",
                next_step="Add --method alfa, or leave the language model out.",
            )
        options = ask_options(words, asking)
        with opened_model(words) as model:
            if method == "alfa":
                made = generators.alfa(model, class_name, domain, details or None, options)
            else:
                made = generators.descriptors(model, class_name, domain, options)
    _finish(made, output, asking, yes=words["yes"], force=force, dry_run=dry_run, as_json=as_json)


@prompts.command()
@click.argument("text")
@click.option("--class", "class_name", required=True, help="The object, such as carpet.")
@_DOMAIN
@click.option("--phrase", "phrases", multiple=True, help="Your own description of that look. Repeatable.")
@llm_options
@_OUTPUT
@_FORCE
@_DRY
@_JSON
def normality(
    text: str,
    class_name: str,
    domain: str,
    phrases: tuple[str, ...],
    output: Path,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **words: Any,
) -> None:
    """Make the prompts of TEXT as an added normality: what is to pass from now on.

    Without a language model, from curated phrases. With one, from its phrases for that defect type; they are shown,
    and used only after a yes.

    \b
    Example:
      edgead prompts normality "thread" --class carpet -o thread.json
      edgead prompts normality "thread" --class carpet --phrase "carpet with a loose fibre" -o thread.json
      edgead prompts normality "thread" --class carpet --llm-local models/qwen -o thread.json
    """
    _check_output(output, force, dry_run)
    asking = Asking(err=as_json)
    if not wants_llm(words):
        from edgead.server_side.prompts import ensembles

        author = "person" if phrases else "template"
        made = ensembles.normality(text, class_name, phrases=phrases or None, author=author, domain=domain)
    else:
        from edgead.server_side.prompts import generators

        if phrases:
            raise InputError(
                wanted="phrases from a person or from a language model",
                got="--phrase and a language model",
                next_step="Leave one out; `edgead prompts add` takes more later.",
            )
        with opened_model(words) as model:
            made = generators.normality(model, text, class_name, domain, ask_options(words, asking))
    _finish(made, output, asking, yes=words["yes"], force=force, dry_run=dry_run, as_json=as_json)


@prompts.command()
@click.argument("file", type=_PATH)
@click.option("--all", "everything", is_flag=True, help="Print every prompt.")
@_JSON
def show(file: Path, everything: bool, as_json: bool) -> None:
    """What is in a prompt set: how many prompts of each state, who wrote them, what the language model said.

    \b
    Example:
      edgead prompts show carpet.json
      edgead prompts show carpet.json --all
    """
    found = read_prompt_set(file)
    if as_json:
        click.echo(format_prompt_set(found).decode(), nl=False)
        return
    _print(found, everything=everything)
    for exchange in found.exchanges:
        click.echo(f"asked {exchange.model} at {exchange.time}: {exchange.prompt}")
        for line in exchange.answer.splitlines()[: None if everything else _SHOWN]:
            click.echo(f"  {line}")


@prompts.command()
@click.argument("file", type=_PATH)
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@click.option("--state", type=click.Choice(STATES), required=True, help="What TEXT describes.")
@_DRY
@_JSON
def add(file: Path, texts: tuple[str, ...], state: Any, dry_run: bool, as_json: bool) -> None:
    """Add a person's sentences to a prompt set.

    A TEXT with a {} is a state of the class: it goes through all templates of the set.

    \b
    Example:
      edgead prompts add carpet.json "a photo of a wet carpet." --state anomalous
      edgead prompts add carpet.json "frayed {}" --state anomalous
    """
    from edgead.server_side.prompts.checks import check_prompt_set
    from edgead.server_side.prompts.words import LIMITS, check_words

    before = read_prompt_set(file)
    after = before.add((check_words(text, "a prompt", LIMITS.text_chars) for text in texts), state)
    check_prompt_set(after)
    new_ones = after.prompts[len(before.prompts) :]
    if new_ones and not dry_run:
        write_prompt_set(file, after, force=True)
    if as_json:
        added = [prompt.text for prompt in new_ones]
        click.echo(json.dumps({"file": str(file), "state": state, "added": added, "written": not dry_run}))
        return
    verb = "would add" if dry_run else "added"
    click.echo(f"{verb} {len(new_ones)} {state} prompts; {file} has {len(after.prompts)}")
    for prompt in new_ones[:_SHOWN]:
        click.echo(f"  {prompt.text}")


@prompts.command()
@click.argument("file", type=_PATH)
@_JSON
def check(file: Path, as_json: bool) -> None:
    """Is FILE a well-formed prompt set? Names the place that is not; exit code 2 then.

    \b
    Example:
      edgead prompts check carpet.json
    """
    found = read_prompt_set(file)
    # A rough measure: a token of a text encoder is a short word or half of a long one.
    long = [
        number
        for number, prompt in enumerate(found.prompts, 1)
        if sum(1 + len(w) // 8 for w in prompt.text.split()) > 70
    ]
    if as_json:
        click.echo(json.dumps({**_summary(found), "perhaps_too_long": long}, sort_keys=True))
        return
    click.echo(f"{file}: a well-formed prompt set of {len(found.prompts)} prompts for {found.class_name!r}")
    for number in long[:_SHOWN]:
        click.echo(f"  prompt {number} may be longer than the 77 tokens that a text encoder reads", err=True)


def _check_output(output: Path, force: bool, dry_run: bool) -> None:
    """Before any language model is asked: is there a place for the result?"""
    if not dry_run:
        refuse_existing(output, force)


def _finish(
    made: PromptSet, output: Path, asking: Asking, *, yes: bool, force: bool, dry_run: bool, as_json: bool
) -> None:
    if not dry_run:
        asking.confirm(yes)
        write_prompt_set(output, made, force=force)
    if as_json:
        click.echo(json.dumps({"output": str(output), "written": not dry_run, **_summary(made)}, sort_keys=True))
        return
    _print(made, everything=dry_run)
    click.echo(f"nothing written (--dry-run): {output}" if dry_run else f"wrote {output}")


def _summary(found: PromptSet) -> dict[str, Any]:
    return {
        "class_name": found.class_name,
        "domain": found.domain,
        "method": found.method,
        "prompts": len(found.prompts),
        **{state: len(found.texts(state)) for state in STATES},
        "normalities": {name: len(found.normality_texts(name)) for name in found.normalities()},
        "authors": found.authors(),
        "exchanges": [exchange.digest for exchange in found.exchanges],
    }


def _print(found: PromptSet, *, everything: bool) -> None:
    authors = ", ".join(f"{count} by {author}" for author, count in found.authors().items())
    click.echo(f"{found.class_name} ({found.domain}), {found.method}: {len(found.prompts)} prompts, {authors}")
    groups: list[tuple[str, tuple[str, ...]]] = [(state, found.texts(state)) for state in STATES]
    groups += [(f"normality {name!r}", found.normality_texts(name)) for name in found.normalities()]
    for title, texts in groups:
        click.echo(f"  {title}: {len(texts)}")
        for text in texts if everything else texts[:_SHOWN]:
            click.echo(f"    {text}")
        if not everything and len(texts) > _SHOWN:
            click.echo("    ...")
