"""`edgead ota sign`, `finish`, `new-key`, `hand-over`: keys that never lie on one machine together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgead.runtime.errors import InputError, OutputExistsError, storage_errors
from edgead.server_side.ota.cli_options import FOLDER, PATH, finish, key_options, keyring_of, open_for_change

if TYPE_CHECKING:
    from tuf.api.metadata import Metadata, Root

    from edgead.server_side.ota.drafts import Draft
    from edgead.server_side.ota.keys import Keyring
    from edgead.server_side.ota.repository import Repository

DRAFT = click.option(
    "--draft",
    type=PATH,
    metavar="FILE",
    help="Sign nothing: write what is to be signed into FILE, for custodians with `edgead ota sign`.",
)


def commit_or_draft(
    repository: Repository, keyring: Keyring, file: Path | None, title: str, root: Metadata[Root] | None = None
) -> None:
    """Sign and write what was changed, or write a draft of it.

    Raises:
        InputError: keys are missing.
        OutputExistsError: `file` is there.
        StorageError: the disk refused.
    """
    from edgead.runtime.files import write_file
    from edgead.server_side.ota.custodians import stage
    from edgead.server_side.ota.drafts import encode_draft

    if file is None:
        repository.commit(keyring)
        return
    if file.exists():
        raise OutputExistsError(wanted=f"a new file {file}", got="one that is there", next_step="Name another file.")
    draft = stage(repository, title, root)
    write_file(file, encode_draft(draft))
    click.echo(
        f"draft {draft.digest[:12]} in {file}; nothing is signed yet. Next: edgead ota sign {file} --keys DIR", err=True
    )


@click.command()
@click.argument("draft", type=PATH)
@click.option("--show", is_flag=True, help="Say what it is, and sign nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before signing.")
@key_options
def sign(
    draft: Path, show: bool, yes: bool, keys: tuple[Path, ...], passphrase_env: tuple[str, ...], as_json: bool
) -> None:
    """Show what DRAFT says, and add one custodian's signature to it.

    Needs no repository: DRAFT and a key folder with keyring.json, root.json and the private key are enough. Everything
    shown is verified from that root.json. DRAFT is changed in place; send it to the next custodian, or back.

    \b
    Example:
      edgead ota sign release-7.draft --keys alice/ --passphrase-env ALICE
      edgead ota sign release-7.draft --keys alice/ --show
    """
    from edgead.runtime.files import write_file
    from edgead.server_side.ota import custodians as room
    from edgead.server_side.ota.custodians_view import told
    from edgead.server_side.ota.drafts import encode_draft
    from edgead.server_side.ota.keys import ROOT

    keyring = keyring_of(keys, passphrase_env)
    trusted = keyring.root
    if trusted is None:
        raise InputError(
            wanted=f"the trusted root {ROOT} in a key folder, to judge the draft by",
            got="key folders without it",
            next_step=f"Copy {ROOT} there from the publisher's key folder, once, in person.",
        )
    found = _read(draft)
    case = room.Case(found, trusted)
    lines = told(case)
    if not as_json:
        click.echo("\n".join(lines))
    added: list[tuple[str, str]] = []
    if not show:
        if not yes:
            if not sys.stdin.isatty():
                raise InputError(wanted="--yes, where nobody can be asked", got="neither", next_step="Add it.")
            click.confirm("Sign this?", abort=True, err=True)
        found, added = room.sign(found, keyring, trusted)
        write_file(draft, encode_draft(found))
        keyring.keep_root(case.root.to_bytes())
    after = room.Case(found, trusted)
    missing = {part.role: max(after.missing(part)) for part in found.parts}
    content = {"draft": found.digest, "shown": lines, "added": [list(one) for one in added], "missing": missing}
    short = [f"{role} needs {count} more" for role, count in missing.items() if count]
    finish(as_json, content, *(f"signed {role} with {keyid}" for role, keyid in added), ", ".join(short) or "complete")


@click.command("finish")
@FOLDER
@click.argument("drafts", type=PATH, nargs=-1, required=True, metavar="DRAFT...")
@key_options
def finish_draft(
    folder: Path, drafts: tuple[Path, ...], keys: tuple[Path, ...], passphrase_env: tuple[str, ...], as_json: bool
) -> None:
    """Put a signed DRAFT in force; snapshot and timestamp are signed here. Copies signed apart may be given together.

    Refused are a draft with too few signatures or a false one, and one that was made before something that it
    changes was changed by another.

    \b
    Example:
      edgead ota finish updates/ release-7.draft --keys online/ --passphrase-env EDGEAD_KEYS
      edgead ota finish updates/ alice.draft bob.draft --keys online/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.server_side.ota import custodians as room
    from edgead.server_side.ota.drafts import merged

    draft = merged([_read(path) for path in drafts])
    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        roles = room.finish(repository, draft, keyring)
        version = repository.timestamp.signed.version
    content = {"draft": draft.digest, "roles": roles, "timestamp": version}
    finish(as_json, content, f"in force: {', '.join(roles)}; timestamp {version}")


@click.command("new-key")
@click.argument("role")
@key_options
def new_key(role: str, keys: tuple[Path, ...], passphrase_env: tuple[str, ...], as_json: bool) -> None:
    """Make a key for ROLE in a key folder, and its public half as a file to be sent to the publisher.

    \b
    Example:
      edgead ota new-key releases --keys carol/ --passphrase-env CAROL
    """
    from edgead.server_side.ota.handover import new_key as make
    from edgead.server_side.ota.roles import ROLES

    if role not in ROLES:
        raise InputError(wanted=f"one of the roles {', '.join(ROLES)}", got=repr(role), next_step="Name one of these.")
    place = make(keyring_of(keys, passphrase_env, new=True), role)
    finish(as_json, {"role": role, "public": str(place)}, f"{place}: send it to whoever drafts the hand-over")


@click.command("hand-over")
@FOLDER
@click.argument("role")
@click.option("--give", type=PATH, multiple=True, metavar="FILE.pub", help="A new key of the role; may be repeated.")
@click.option("--take", multiple=True, metavar="KEYID", help="A key that is to sign nothing any more; repeatable.")
@click.option("--draft", type=PATH, required=True, metavar="FILE", help="Where the draft is written.")
@key_options
def hand_over(
    folder: Path,
    role: str,
    give: tuple[Path, ...],
    take: tuple[str, ...],
    draft: Path,
    keys: tuple[Path, ...],
    passphrase_env: tuple[str, ...],
    as_json: bool,
) -> None:
    """Draft other keys for ROLE, for custodians to sign; with neither --give nor --take, ROLE as it is for a new term.

    A root needs the signatures of its old threshold and of its new one; other roles those of their new keys and of
    the role above.

    \b
    Example:
      edgead ota hand-over updates/ releases --give releases-1a2b.pub --take 4fd0f8b4 --draft carol.draft --keys keys/
      edgead ota hand-over updates/ root --draft root-2027.draft --keys online/
    """
    from edgead.server_side.ota import handover as room

    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        root = room.hand_over(repository, role, [room.read_key(path) for path in give], take)
        commit_or_draft(repository, keyring, draft, f"hand over {role}", root)
    finish(as_json, {"draft": str(draft), "role": role}, f"{draft}: to be signed by the custodians")


def _read(path: Path) -> Draft:
    from edgead.server_side.ota.drafts import DRAFT_BYTES, decode_draft

    with storage_errors(path, "to read a draft"), path.open("rb") as stream:
        return decode_draft(stream.read(DRAFT_BYTES + 1))


COMMANDS = (sign, finish_draft, new_key, hand_over)
