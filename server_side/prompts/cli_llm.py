"""The options that name a language model, shared by the commands, and the showing of what it said."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from edgead.runtime.errors import InputError
from edgead.server_side.prompts.generators import AskOptions
from edgead.server_side.prompts.prompt_set import Exchange
from edgead.server_side.prompts.requests import LanguageModel, ModelName

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--llm", "llm_url", metavar="URL", help="An OpenAI-compatible end point, as http://host:11434/v1."),
    click.option("--llm-model", metavar="NAME", help="The model's name at that end point."),
    click.option("--llm-key-env", metavar="VAR", help="The environment variable with the key, if one is needed."),
    click.option("--llm-local", metavar="PATH", help="Instead: a folder with a transformers model, or its hub name."),
    click.option("--cache", metavar="DIR", type=click.Path(path_type=Path),
                 help="Folder of kept answers; ~/.cache/edgead/llm if left out."),
    click.option("--offline-cache", is_flag=True, help="Take the answers from the cache alone; ask no one."),
    click.option("--llm-timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True,
                 help="Seconds for one answer."),
    click.option("--llm-attempts", type=click.IntRange(1, 20), default=4, show_default=True,
                 help="Tries for one answer."),
    click.option("--llm-per-minute", type=click.FloatRange(0), default=60.0, show_default=True,
                 help="Requests in a minute; 0 for no limit."),
    click.option("--llm-max-tokens", type=click.IntRange(16, 32768), default=1024, show_default=True,
                 help="Length of one answer."),
    click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True,
                 help="0 takes the likeliest words."),
    click.option("--seed", default=0, show_default=True, help="Of the language model."),
    click.option("--yes", is_flag=True, help="Use what the language model said without asking."),
)  # fmt: skip


def llm_options(command: Command) -> Command:
    """The options of `Asking`, for a click command that takes them as `**words`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def wants_llm(words: dict[str, Any]) -> bool:
    """Whether the words name a language model.

    Raises:
        InputError: half of one, or two.
    """
    if words["llm_url"] is not None and words["llm_local"] is not None:
        raise InputError(wanted="one language model", got="--llm and --llm-local", next_step="Leave one out.")
    if words["llm_url"] is not None and not words["llm_model"]:
        raise InputError(
            wanted="the name of a model at the end point",
            got="--llm without --llm-model",
            next_step="Add: --llm-model NAME",
        )
    chosen = words["llm_url"] is not None or words["llm_local"] is not None
    loose = [f"--{name.replace('_', '-')}" for name in ("llm_model", "llm_key_env", "offline_cache") if words[name]]
    if loose and not chosen:
        raise InputError(
            wanted="a language model with --llm or --llm-local",
            got=f"{loose[0]} alone",
            next_step="Add: --llm URL, or leave it out.",
        )
    return chosen


@dataclass
class Asking:
    """What the language model said in this run, shown as it comes."""

    err: bool
    """Show on the error stream, because the output is JSON."""
    exchanges: list[tuple[Exchange, tuple[str, ...]]] = field(default_factory=list)

    def show(self, exchange: Exchange, phrases: tuple[str, ...]) -> None:
        """Print the question and the cleaned phrases."""
        self.exchanges.append((exchange, phrases))
        click.echo(f"asked {exchange.model}: {exchange.prompt}", err=self.err)
        click.echo(f"  {len(phrases)} phrases after cleaning, answered {exchange.time}:", err=self.err)
        for number, phrase in enumerate(phrases, 1):
            click.echo(f"  {number:3d}. {phrase}", err=self.err)

    def confirm(self, yes: bool) -> None:
        """Let a person agree with what was shown.

        Raises:
            InputError: nobody is there to agree, and --yes was not given.
            click.Abort: the person said no.
        """
        if yes or not self.exchanges:
            return
        if not sys.stdin.isatty():
            raise InputError(
                wanted="a person's agreement with what the language model said",
                got="no terminal to ask on; nothing was written",
                next_step="Read the phrases above and run the same again with --yes: the cache gives the same ones.",
            )
        count = sum(len(phrases) for _, phrases in self.exchanges)
        if not click.confirm(f"use these {count} phrases?", err=self.err):
            raise InputError(
                wanted="a person's agreement with what the language model said",
                got="no; nothing was written",
                next_step="Take another --seed with a --temperature, another model, or the templates.",
            )


@contextlib.contextmanager
def opened_model(words: dict[str, Any]) -> Iterator[LanguageModel]:
    """The language model that the words name, behind its cache.

    Raises:
        InputError: an address, key, folder or model that cannot be used.
    """
    from edgead.server_side.prompts.llm_cache import CachedModel, default_cache

    folder: Path = words["cache"] or default_cache()
    with contextlib.ExitStack() as stack:
        name, inner = _model(words, stack)
        yield CachedModel(folder, inner, model=name, note=_note)


def ask_options(words: dict[str, Any], asking: Asking) -> AskOptions:
    """How to ask, from the words of `llm_options`."""
    return AskOptions(
        temperature=words["temperature"],
        max_tokens=words["llm_max_tokens"],
        seed=words["seed"],
        shown=asking.show,
    )


def _model(words: dict[str, Any], stack: contextlib.ExitStack) -> tuple[ModelName, LanguageModel | None]:
    offline = words["offline_cache"]
    if words["llm_local"] is not None:
        from edgead.server_side.prompts.llm_local import TransformersModel, local_name

        local = None if offline else TransformersModel(words["llm_local"])
        return (local_name(words["llm_local"]) if local is None else local.model), local
    from edgead.server_side.prompts.llm import OpenAiLimits, OpenAiModel, checked_url

    if offline:
        return ModelName(words["llm_model"], checked_url(words["llm_url"])), None
    limits = OpenAiLimits(
        timeout_s=words["llm_timeout"],
        attempts=words["llm_attempts"],
        requests_per_minute=words["llm_per_minute"],
    )
    model = OpenAiModel(words["llm_url"], words["llm_model"], words["llm_key_env"], limits=limits, note=_note)
    stack.callback(model.close)
    return model.model, model


def _note(line: str) -> None:
    click.echo(f"note: {line}", err=True)
