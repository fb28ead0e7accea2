"""Roll-outs: how far a signed release goes. Signed by the rollout role alone, which can do nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from edgead.runtime.errors import InputError
from edgead.runtime.rollout import Rollout, changed, decode_rollout, encode_rollout, new_rollout, widens
from edgead.server_side.ota.repository import Repository


def rollout_path(product: str) -> str:
    """Target path of a product's roll-out record."""
    return f"rollout/{product}.json"


def rollout_of(repository: Repository, product: str) -> Rollout | None:
    """A product's roll-out, or None if nothing was rolled out yet.

    Raises:
        InputError: its file was changed.
    """
    path = rollout_path(product)
    return None if repository.find(path) is None else decode_rollout(repository.read(path))


def roll_out(
    repository: Repository,
    product: str,
    *,
    release: int | None = None,
    groups: Sequence[str] | None = None,
    percent: float | None = None,
    error_threshold: float | None = None,
    window: int | None = None,
) -> Rollout:
    """Begin the roll-out of a release, or widen the one that goes on. `Repository.commit` then signs.

    Args:
        repository: where to.
        product: whose devices.
        release: counter of a signed release; by default the one that is rolled out.
        groups: device groups that take it; added to those that have it already.
        percent: share of all other devices, 0 to 100.
        error_threshold, window: see `Rollout`.

    Raises:
        InputError: no such release is signed, a release before the current one, a roll-out that would become
            narrower, or one that was stopped.
    """
    old = rollout_of(repository, product)
    wanted = release if release is not None else old.release if old else None
    if wanted is None:
        raise InputError(wanted="--release with its counter", got="nothing rolled out yet", next_step="Name a release.")
    if repository.find(f"releases/{product}/{wanted}.json") is None:
        signed = ", ".join(sorted(path.rpartition("/")[2][:-5] for path in repository.entries("releases", product)))
        raise InputError(
            wanted=f"a signed release of {product!r}",
            got=f"{wanted}, where there is {signed or 'none'}",
            next_step="Make it with: edgead ota release",
        )
    fields: dict[str, object] = {}
    if error_threshold is not None:
        fields["error_threshold"] = error_threshold
    if window is not None:
        fields["window"] = window
    if old is not None and wanted < old.release:
        raise InputError(
            wanted=f"release {old.release} or a later one",
            got=str(wanted),
            next_step="Devices refuse older counters. Release the old pack again under a new one.",
        )
    if old is None or wanted > old.release:
        fields |= {"groups": tuple(sorted(set(groups or ()))), "percent": float(percent or 0.0)}
        if old is not None:
            done = not old.stopped and not old.paused and old.percent >= 100
            fields["previous"] = old.release if done else old.previous
        record = new_rollout(product, wanted, 1 if old is None else old.sequence + 1, **fields)
    else:
        _refuse_stopped(old)
        fields["groups"] = tuple(sorted({*old.groups, *(groups or ())}))
        if percent is not None:
            fields["percent"] = float(percent)
        record = changed(old, **fields)
        if not widens(old, record):
            raise InputError(
                wanted=f"at least the {old.percent:g} % that have it",
                got=f"{record.percent:g} %",
                next_step="A roll-out is widened, paused or stopped; what devices have they keep until then.",
            )
    repository.add(rollout_path(product), encode_rollout(record))
    return record


def pause(repository: Repository, product: str, paused: bool = True) -> Rollout:
    """Hold a roll-out, or let it go on. `Repository.commit` then signs.

    Raises:
        InputError: there is none, or it was stopped.
    """
    record = changed(_refuse_stopped(_current(repository, product)), paused=paused)
    repository.add(rollout_path(product), encode_rollout(record))
    return record


def stop(repository: Repository, product: str) -> Rollout:
    """Stop a roll-out for good: devices that took the release go back. `Repository.commit` then signs.

    Raises:
        InputError: there is none.
    """
    record = changed(_current(repository, product), stopped=True)
    repository.add(rollout_path(product), encode_rollout(record))
    return record


def _current(repository: Repository, product: str) -> Rollout:
    record = rollout_of(repository, product)
    if record is None:
        raise InputError(
            wanted=f"a roll-out of {product!r}", got="none", next_step="Begin one with: edgead ota rollout --release N"
        )
    return record


def _refuse_stopped(record: Rollout) -> Rollout:
    if record.stopped:
        raise InputError(
            wanted=f"a roll-out of {record.product!r} that goes on",
            got=f"release {record.release}, which was stopped",
            next_step="Stopping is for good: release the corrected knowledge under a new counter.",
        )
    return record
