"""`edgead ota prune`: what no device needs any more."""

from __future__ import annotations

from pathlib import Path

import click

from edgead.server_side.ota.cli_options import FOLDER, finish, key_options, open_for_change
from edgead.server_side.ota.custodians_cli import DRAFT, commit_or_draft


@click.command()
@FOLDER
@click.option("--keep", type=click.IntRange(1, 1000), metavar="N", help="Releases of each product; as init said.")
@click.option(
    "--grace",
    type=click.FloatRange(0, 3650),
    default=7.0,
    show_default=True,
    metavar="DAYS",
    help="How long a file stays that nothing names any more, for devices that are fetching it.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@DRAFT
@key_options
def prune(
    folder: Path,
    keep: int | None,
    grace: float,
    dry_run: bool,
    draft: Path | None,
    keys: tuple[Path, ...],
    passphrase_env: tuple[str, ...],
    as_json: bool,
) -> None:
    """Drop releases beyond the last N, what only they need, and files that nothing has named for some days.

    What is dropped goes out of the signed metadata at once and from the disk by a run after the grace; so run it now
    and then. Kept is what the roll-outs name, and what was never released. Roots are never removed. May be interrupted
    and run again at any time.

    \b
    Example:
      edgead ota prune updates/ --keep 3 --dry-run --keys keys/
      edgead ota prune updates/ --keep 3 --keys keys/ --passphrase-env EDGEAD_KEYS
    """
    from edgead.runtime.tables import bytes_text
    from edgead.server_side.ota import prune as room

    with open_for_change(folder, keys, passphrase_env) as (repository, keyring):
        dropped = room.drop_old(repository, keep or repository.settings.keep)
        if dropped and not dry_run:
            commit_or_draft(repository, keyring, draft, f"prune {len(dropped)} targets")
        # A draft is not in force yet: what it drops is still named.
        swept = room.Swept() if draft else room.sweep(repository, grace * 86400, dry_run=dry_run)
    content = {
        "dropped": dropped,
        "removed": [{"path": path, "bytes": size} for path, size in swept.removed],
        "waiting": [{"path": path, "bytes": size, "days": days} for path, size, days in swept.waiting],
        "freed": swept.freed,
        "dry_run": dry_run,
    }
    later = sum(size for _, size, _ in swept.waiting)
    finish(
        as_json,
        content,
        *(f"dropped  {path}" for path in dropped),
        *(f"removed  {path}  {bytes_text(size)}" for path, size in swept.removed),
        f"{'would free' if dry_run else 'freed'} {bytes_text(swept.freed)} in {len(swept.removed)} files; "
        f"{bytes_text(later)} in {len(swept.waiting)} files wait for the end of their grace",
    )


COMMANDS = (prune,)
