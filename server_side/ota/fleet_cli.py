"""`edgead ota status`: what is in a repository, and what the devices make of it."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime.errors import InputError
from edgead.server_side.ota.cli_options import JSON, PATH, finish, keyring_of
from edgead.server_side.ota.guard_cli import LOG

if TYPE_CHECKING:
    from edgead.runtime.rollout import Rollout
    from edgead.server_side.ota.fleet import Fleet
    from edgead.server_side.ota.repository import Repository
    from edgead.server_side.ota.statuses import Found

_FEW = 12
_UNITS: Mapping[str, float] = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType[float]):
    """A time such as 90s, 15m, 2h or 1d."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """In seconds."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip())
        if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
            self.fail(f"{value!r} is no time such as 90s, 15m, 2h or 1d", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


@click.command()
@click.argument("folder", type=PATH, required=False)
@click.option("--keys", type=PATH, multiple=True, metavar="DIR", help="Key folder: says which keys are in it.")
@click.option("--statuses", metavar="SOURCE", help="Database (file or URL) or folder of statuses: shows the fleet.")
@click.option("--repository", type=PATH, metavar="FOLDER", help="The repository, for the fleet's roll-outs alone.")
@click.option("--product", help="Only its devices.")
@click.option("--silent-after", type=Duration(), default="15m", show_default=True, help="Silence that is told.")
@click.option("--all", "everything", is_flag=True, help="Name every device that somebody should look at.")
@click.option("--html", type=PATH, metavar="FILE", help="Write the fleet as a page; nothing in it is fetched.")
@click.option("--log", type=PATH, metavar="FILE", help=f"The guard's log, for the page; {LOG} in --keys if left out.")
@JSON
def status(
    folder: Path | None,
    keys: tuple[Path, ...],
    statuses: str | None,
    repository: Path | None,
    product: str | None,
    silent_after: float,
    everything: bool,
    html: Path | None,
    log: Path | None,
    as_json: bool,
) -> None:
    """What is in the repository FOLDER, and with --statuses what the devices make of it. Opens no private key.

    Of a repository: roles and when they expire, engines, each product's releases and roll-out. Of a fleet: who has
    which release, how roll-outs go, what failed and why, and which devices somebody should look at.

    \b
    Example:
      edgead ota status updates/ --keys keys/
      edgead ota status --statuses fleet.db --repository updates/ --html fleet.html
      edgead ota status --statuses usb-stick/ --silent-after 1d --all
    """
    from edgead.server_side.ota.repository import opened
    from edgead.server_side.ota.status import status as look
    from edgead.server_side.ota.status import status_text

    place = folder or repository
    if place is None and statuses is None:
        raise InputError(
            wanted="a repository FOLDER, or --statuses",
            got="neither",
            next_step="For example: edgead ota status updates/",
        )
    if statuses is None and (html is not None or product is not None or everything or repository is not None):
        raise InputError(
            wanted="--statuses with --repository, --product, --all and --html",
            got="none",
            next_step="Name the database or folder that edgead ota collect fills.",
        )
    content: dict[str, Any] = {}
    lines: list[str] = []
    records: dict[str, Rollout] = {}
    digests: dict[str, str] = {}
    if place is not None:
        keyring = keyring_of(keys, ()) if keys else None
        with opened(place, keyring.root if keyring else None) as found:
            records, digests = rollouts(found)
            if folder is not None:
                content = look(found, keyring)
                lines.append(status_text(content))
    if statuses is not None:
        import msgspec

        from edgead.server_side.ota.fleet_text import fleet_text
        from edgead.server_side.ota.statuses import read_statuses

        source = read_statuses(statuses)
        fleet = fleet_of(source, records, digests, product, silent_after, log or (keys[0] / LOG if keys else None))
        content["fleet"] = msgspec.to_builtins(fleet)
        seen = [one for one in source.latest if product in (None, one.status.product)]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
        lines.append(
            fleet_text(fleet, seen if everything or len(seen) <= _FEW else (), everything=everything, width=width)
        )
        if html is not None:
            from edgead.runtime.files import write_file
            from edgead.server_side.ota.fleet_page import page_of

            write_file(html, page_of(fleet).encode())
            lines.append(f"page: {html}")
    finish(as_json, content, "\n\n".join(lines))


def rollouts(repository: Repository) -> tuple[dict[str, Rollout], dict[str, str]]:
    """Each product's roll-out, and the digest of the release that it names."""
    from edgead.server_side.ota.releases import release_path
    from edgead.server_side.ota.rollouts import rollout_of

    records, digests = {}, {}
    for product in repository.settings.products:
        record = rollout_of(repository, product)
        if record is not None:
            records[product] = record
            entry = repository.find(release_path(product, record.release))
            if entry is not None:
                digests[product] = str(entry.hashes["sha256"])
    return records, digests


def fleet_of(
    source: Found,
    records: Mapping[str, Rollout],
    digests: Mapping[str, str],
    product: str | None,
    silent_after: float,
    log: Path | None,
) -> Fleet:
    """The fleet as it is now.

    Args:
        source: statuses and the registry.
        records, digests: as `rollouts` gives them.
        product: only its devices; all if None.
        silent_after: seconds without a status after which a device is silent.
        log: of a guard; None or a file that is not there for no history.

    Raises:
        InputError: no device and no roll-out of the product.
        StorageError: the log cannot be read.
    """
    from edgead.runtime.disk import RealDisk
    from edgead.runtime.errors import storage_errors
    from edgead.server_side.ota.fleet import summary
    from edgead.server_side.ota.guard import LOG_BYTES, read_log

    products = {one.status.product for one in source.latest} | set(records)
    if product is not None and product not in products:
        raise InputError(
            wanted=f"a product of these devices: {', '.join(sorted(products)[:20]) or 'none was heard of'}",
            got=product,
            next_step="Leave --product out to see all.",
        )
    history = []
    if log is not None and log.is_file():
        with storage_errors(log, "to read the log of decisions"):
            history = read_log(RealDisk().read(log, 2 * LOG_BYTES))
    return summary(
        source,
        time.time(),
        records=records,
        digests=digests,
        product=product,
        silent_after=silent_after,
        history=history,
    )


COMMANDS = (status,)
