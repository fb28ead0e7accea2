"""`edgead ota pin`, and the options with which other commands pin what they publish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgead.runtime.errors import InputError
from edgead.server_side.ota.cli_options import FOLDER, PATH, PRODUCT, finish, key_options, open_for_change

if TYPE_CHECKING:
    from edgead.runtime.provenance import Provenance
    from edgead.server_side.ota.repository import Repository

_Command = TypeVar("_Command", bound=Callable[..., Any])
_SHOWN = 12


def pin_options(command: _Command) -> _Command:
    """Who vouches for the knowledge that a command publishes."""
    options = [
        click.option("--pin-key", type=PATH, metavar="FILE", help="Vouch for the pack with this Ed25519 key (PEM)."),
        click.option("--pin-key-id", metavar="NAME", help="Name of that key; made from it if left out."),
        click.option("--signer", help="With --pin-key: who vouches, for people."),
        click.option(
            "--pin-days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long it counts."
        ),
        click.option(
            "--pin-passphrase-env",
            default="EDGEAD_KEY_PASSPHRASE",
            show_default=True,
            help="Environment variable with the passphrase of --pin-key; asked for at a terminal if it is not set.",
        ),
        click.option(
            "--with-provenance",
            is_flag=True,
            help="Publish where the rows are from, too: names and digests of photographs. Cameras do not fetch it.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def pin_pack(
    repository: Repository, product: str, digest: str, words: dict[str, Any], *more: Provenance
) -> dict[str, Any] | None:
    """Put the pin, and if wished the provenance, of a published pack; `Repository.commit` then signs.

    Args:
        repository: where to.
        product, digest: which pack.
        words: of `pin_options`.
        more: further records of its rows, the most trusted first.

    Returns:
        what to tell of the pin; None without a key.

    Raises:
        InputError: options that do not go together, or no such key.
        KnowledgeError: no published engine has the pack's feature space.
    """
    from edgead.runtime.pins import key_name
    from edgead.server_side.knowledge_view import pinned
    from edgead.server_side.ota.pins import PinSigner, kept_record, put_provenance, sign_pack
    from edgead.server_side.signing import open_key

    path, signer = words["pin_key"], words["signer"]
    if (path is None) != (signer is None):
        raise InputError(
            wanted="--pin-key with --signer",
            got="only one of them",
            next_step='Add: --pin-key KEY.pem --signer "Anna, quality"',
        )
    if words["with_provenance"]:
        pack, record = kept_record(repository, product, digest, more)
        put_provenance(repository, pack, record)
    if path is None:
        return None
    key = open_key(path, words["pin_passphrase_env"])
    kid = words["pin_key_id"] or key_name(key.public_key().public_bytes_raw())
    pin = sign_pack(repository, product, digest, PinSigner(key.sign, kid, signer, words["pin_days"]), more=more)
    return pinned(pin)


def pin_line(told: dict[str, Any]) -> str:
    """A pin in one line."""
    return f"pinned by {told['signer']}, key {told['kid']}, until {told['not_after']}"


@click.command()
@FOLDER
@PRODUCT
@click.option("--pack", metavar="DIGEST", help="Beginning of a published pack's digest; the latest release's.")
@pin_options
@key_options
def pin(
    folder: Path,
    product: str,
    pack: str | None,
    keys: tuple[Path, ...],
    passphrase_env: tuple[str, ...],
    as_json: bool,
    **words: Any,
) -> None:
    """Vouch for a published pack of PRODUCT, or renew its pin before it ends.

    Cameras that were given the public key (`edgead device init --pin-key`) take a release only if its knowledge is
    pinned by it. `edgead ota publish` also takes NAME.pin files that were signed elsewhere.

    \b
    Example:
      edgead ota pin updates/ carpet --pin-key quality.pem --signer "Anna, quality" --keys keys/
    """
    from edgead.server_side.ota.publish import packs_of, releases_of, resolve

    if words["pin_key"] is None and not words["with_provenance"]:
        raise InputError(
            wanted="--pin-key, --with-provenance, or both", got="none", next_step="Name the key to vouch with."
        )
    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        releases = releases_of(repository, product)
        if pack is None and not releases:
            raise InputError(
                wanted="--pack with the beginning of a digest, as nothing is released yet",
                got="none",
                next_step=f"Name one of {', '.join(item[:_SHOWN] for item in packs_of(repository, product)) or 'none'}",
            )
        if pack is None:
            digest = releases[-1].product_packs[product]
        else:
            digest = resolve(pack, packs_of(repository, product), "published pack")
        told = pin_pack(repository, product, digest, words)
        repository.commit(keyring)
    lines = [f"knowledge {digest[:_SHOWN]} of {product}"] + ([] if told is None else [pin_line(told)])
    finish(as_json, {"product": product, "pack": digest, "pin": told}, *lines)


COMMANDS = (pin,)
