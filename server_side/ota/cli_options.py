"""What the commands of `edgead ota` share: options, passphrases, and the opened repository."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgead.runtime.errors import InputError

if TYPE_CHECKING:
    from edgead.server_side.ota.keys import Keyring, Secrets
    from edgead.server_side.ota.repository import Repository

PATH = click.Path(path_type=Path)
FOLDER = click.argument("folder", type=PATH)
PRODUCT = click.argument("product")
KEYS = click.option(
    "--keys",
    type=PATH,
    multiple=True,
    required=True,
    metavar="DIR",
    help="Key folder; may be repeated, as for offline keys on a stick. New keys go into the first.",
)
PASSPHRASE = click.option(
    "--passphrase-env",
    multiple=True,
    metavar="NAME",
    help="Environment variable with the passphrase of the keys; asked for if left out. "
    "Twice: the first for offline keys, the second for online ones.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

Command = TypeVar("Command", bound=Callable[..., Any])


def key_options(command: Command) -> Command:
    """--keys, --passphrase-env and --json."""
    return KEYS(PASSPHRASE(JSON(command)))


def keyring_of(folders: tuple[Path, ...], variables: tuple[str, ...], *, new: bool = False) -> Keyring:
    """The keyring of some folders.

    Raises:
        InputError: there is none, unless it is to be made.
    """
    from edgead.server_side.ota.keys import KEYRING, Keyring, environment

    if not new:
        for folder in folders:
            if not (folder / KEYRING).is_file():
                raise InputError(
                    wanted=f"a key folder at {folder}",
                    got=f"no {KEYRING} there",
                    next_step="Name the folder that edgead ota init made with --keys.",
                )
    return Keyring(folders, environment(*variables) if variables else _asked(new))


@contextlib.contextmanager
def open_for_change(
    folder: Path, keys: tuple[Path, ...], variables: tuple[str, ...]
) -> Iterator[tuple[Repository, Keyring]]:
    """A repository and the keys to sign it with.

    Raises:
        InputError: no repository, no keys, or something forged.
        StorageError: a file cannot be read.
    """
    from edgead.server_side.ota.keys import ROOT
    from edgead.server_side.ota.repository import opened

    keyring = keyring_of(keys, variables)
    trusted = keyring.root
    if trusted is None:
        raise InputError(
            wanted=f"the trusted root {ROOT} in a key folder",
            got="key folders without it",
            next_step="Name the folder that edgead ota init made first; restore the file if it is gone.",
        )
    with opened(folder, trusted) as repository:
        yield repository, keyring


def finish(as_json: bool, content: dict[str, Any], *lines: str) -> None:
    """Print a result for a program or for people."""
    click.echo(json.dumps(content, sort_keys=True) if as_json else "\n".join(lines))


def _asked(confirm: bool) -> Secrets:
    """Passphrases from the terminal, each asked for once."""
    from edgead.server_side.ota.roles import ONLINE

    known: dict[str, str] = {}

    def ask(purpose: str) -> list[str]:
        group = "online" if purpose == "online" or purpose in ONLINE else "offline"
        if group not in known:
            if not sys.stdin.isatty():
                raise InputError(
                    wanted=f"the passphrase of the {group} keys",
                    got="no terminal to ask at",
                    next_step="Put it into an environment variable and name that: --passphrase-env NAME",
                )
            known[group] = click.prompt(
                f"Passphrase of the {group} keys", hide_input=True, confirmation_prompt=confirm, err=True
            )
        return [known[group]]

    return ask
