"""`edgead ota guard`: stops a roll-out by itself when too many devices report that it failed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgead.runtime.errors import EdgeadError, InputError
from edgead.server_side.ota.cli_options import FOLDER, PATH, finish, key_options, keyring_of

if TYPE_CHECKING:
    from edgead.server_side.ota.guard import Caution, Decision
    from edgead.server_side.ota.keys import Keyring

LOG = "guard.jsonl"
"""Name of the log in the first key folder."""


class Percentages(click.ParamType[tuple[float, ...]]):
    """Percentages with commas between them."""

    name = "percentages"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """`"10,50,100"` as numbers."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of percentages such as 10,50,100", param, ctx)


@click.command()
@FOLDER
@click.option("--statuses", required=True, metavar="SOURCE", help="Database (file or URL) or folder of statuses.")
@click.option("--product", "products", multiple=True, help="Whose roll-out; may be repeated; all if left out.")
@click.option("--once", is_flag=True, help="Look once, then end: for a timer.")
@click.option("--every", type=click.FloatRange(1), default=60.0, show_default=True, metavar="SECONDS")
@click.option(
    "--widen", type=Percentages(), default=None, metavar="P,P,...", help="Widen step by step while it is healthy."
)
@click.option(
    "--after", type=click.FloatRange(0), default=3600.0, show_default=True, metavar="SECONDS", help="Healthy so long."
)
@click.option(
    "--minimum", type=click.IntRange(1), default=5, show_default=True, help="Reports before a share means anything."
)
@click.option(
    "--failures", type=click.IntRange(1), default=2, show_default=True, help="Failed devices that stop, at the least."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done; sign nothing.")
@click.option("--log", type=PATH, metavar="FILE", help=f"Log of decisions; {LOG} in the first key folder if left out.")
@key_options
def guard(
    folder: Path,
    statuses: str,
    products: tuple[str, ...],
    once: bool,
    every: float,
    widen: tuple[float, ...] | None,
    after: float,
    minimum: int,
    failures: int,
    dry_run: bool,
    log: Path | None,
    keys: tuple[Path, ...],
    passphrase_env: tuple[str, ...],
    as_json: bool,
) -> None:
    """Watch roll-outs through what the devices report, and stop one when too many fail.

    Counts devices that are registered by hand, each once. A roll-out stops when the share of those on which its
    release failed is above its --error-threshold; devices that have it then go back. Needs the rollout key and the
    online ones, never an offline key.

    \b
    Example:
      edgead ota guard updates/ --statuses fleet.db --keys online/ --passphrase-env EDGEAD_KEYS
      edgead ota guard updates/ --statuses fleet.db --widen 10,50,100 --after 3600 --keys online/
      edgead ota guard updates/ --statuses fleet.db --once --dry-run --json --keys online/
    """
    from edgead.server_side.ota.guard import Caution

    caution = Caution(minimum=minimum, failures=failures, steps=widen or (), after=after)
    keyring = keyring_of(keys, passphrase_env)
    place = log or keys[0] / LOG
    end = threading.Event()
    first = True
    with _ended_by_signals(end):
        while not end.is_set():
            try:
                decisions = look(folder, keyring, statuses, caution, place, products=products, dry_run=dry_run)
                for decided in decisions:
                    finish(as_json, msgspec.to_builtins(decided), told(decided, dry_run))
            except EdgeadError as error:
                # A wrong option shows at once; a database or disk that is away for a while must not end the guard.
                if first or once:
                    raise
                click.echo(f"not looked: {error}", err=True)
            first = False
            if once:
                return
            end.wait(every)


def look(
    folder: Path,
    keyring: Keyring,
    statuses: str,
    caution: Caution,
    log: Path,
    *,
    products: Sequence[str] = (),
    dry_run: bool = False,
) -> list[Decision]:
    """One round: read the statuses, lock the repository, decide, sign, write the log.

    Args:
        folder: of the repository.
        keyring: with the rollout key and the trusted root.
        statuses: database or folder.
        caution: when reports mean something.
        log: file of decisions, which also says since when a roll-out is healthy.
        products: which ones; all if empty.
        dry_run: sign and log nothing.

    Raises:
        InputError: no such repository, product, key or source, or something was tampered with.
        StorageError: a file or the database cannot be read or written.
    """
    from edgead.runtime.disk import RealDisk
    from edgead.runtime.errors import storage_errors
    from edgead.runtime.files import write_file
    from edgead.server_side.ota.guard import LOG_BYTES, log_of, read_log, watch
    from edgead.server_side.ota.keys import ROOT
    from edgead.server_side.ota.repository import opened
    from edgead.server_side.ota.statuses import read_statuses

    trusted = keyring.root
    if trusted is None:
        raise InputError(
            wanted=f"the trusted root {ROOT} in a key folder",
            got="key folders without it",
            next_step="Name the folder that edgead ota init made first, or copy its root.json beside the online keys.",
        )
    found = read_statuses(statuses)
    if found.devices is None:
        raise InputError(
            wanted="a list of devices with the statuses, so that a forged one does not count",
            got=f"none with {statuses.rpartition('@')[2]}",
            next_step="Register them with: edgead ota devices add",
        )
    with opened(folder, trusted) as repository:
        unknown = sorted(set(products) - set(repository.settings.products))
        if unknown:
            raise InputError(
                wanted=f"one of the products {', '.join(repository.settings.products)}",
                got=", ".join(unknown),
                next_step="Leave --product out to watch all.",
            )
        with storage_errors(log, "to read the log of decisions"):
            past = read_log(RealDisk().read(log, 2 * LOG_BYTES)) if log.exists() else []
        last = {decided.product: decided for decided in past}
        signing = None if dry_run else keyring
        decisions = watch(repository, signing, found, caution, last, now=time.time(), products=products or None)
        news = [decided for decided in decisions if not decided.same(last.get(decided.product))]
        if news and not dry_run:
            # Two guards may share a log; what the repository lock covers is written by one at a time.
            write_file(log, log_of([*past, *news]))
    return decisions


def told(decided: Decision, dry_run: bool = False) -> str:
    """A decision in one line."""
    what = {"none": "nothing to do", "wait": "waits", "widen": "WIDENS", "stop": "STOPS"}[decided.action]
    if dry_run and decided.action in ("widen", "stop"):
        what = f"would {what[:-1].lower()}"
    release = f" release {decided.release}" if decided.release else ""
    ignored = f"; {decided.ignored} statuses of unregistered devices do not count" if decided.ignored else ""
    when = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(decided.time))
    return f"{when}  {decided.product}{release}: {what}: {decided.reason}{ignored}"


@contextlib.contextmanager
def _ended_by_signals(end: threading.Event) -> Iterator[None]:
    """A service manager ends the guard between two rounds, never within one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, lambda *_: end.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


COMMANDS = (guard,)
