"""A fleet as its devices tell it: who has what, how a roll-out goes, and which devices somebody should look at. Pure.

What stands in a status is the claim of a device. One whose key the publisher does not know is shown as such, and texts
are bounded and have no control characters by the format; whoever puts them into HTML or a terminal escapes the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from edgead.runtime.rollout import Rollout
from edgead.server_side.ota.adoption import SILENT_SECONDS, Counts, State, counted, state_of
from edgead.server_side.ota.fleet_scores import Scores, score_groups
from edgead.server_side.ota.fleet_signs import KINDS, Fault, Kind, Odd, Reason, failures, faults_of, signs_of
from edgead.server_side.ota.guard import Decision
from edgead.server_side.ota.statuses import Found, Seen

NO_GROUP = "no group"
OTHERS = "other groups"
LISTED = 60
"""Up to so many devices are named each."""
_GROUPS = 40
_LABELS = 12
_POINTS = 240


@dataclass(frozen=True)
class Group:
    """The devices of a group; one that is in two counts in both.

    Attributes:
        name: of the group.
        devices: how many.
        releases: devices by the counter of their release, as text.
        silent, alarms: devices.
        counts: devices that the roll-out has reached; None without one.
    """

    name: str
    devices: int
    releases: dict[str, int]
    silent: int
    alarms: int
    counts: Counts | None


@dataclass(frozen=True)
class Product:
    """The devices of a product.

    Attributes:
        name, devices, releases, silent, alarms: as in `Group`.
        groups: most devices first.
        record: the roll-out; None if there is none, or no repository was named.
        counts: devices that it has reached.
        beyond: devices that have its release and that it has not reached.
        timeline: what a guard saw of this release, oldest first.
    """

    name: str
    devices: int
    releases: dict[str, int]
    silent: int
    alarms: int
    groups: tuple[Group, ...]
    record: Rollout | None
    counts: Counts | None
    beyond: int
    timeline: tuple[Decision, ...] = ()


@dataclass(frozen=True)
class Fleet:
    """The whole of it.

    Attributes:
        time: when it was looked at, seconds since 1970.
        silent_after: seconds without a status after which a device is silent.
        devices: that were heard of.
        verified: those with a key that the publisher knows.
        never: devices that are registered and were never heard of.
        refused: statuses that do not count, by reason.
        software: devices by version of edgead.
        products: most devices first.
        failures: reasons for which releases failed, most devices first.
        faults: last errors, most devices first.
        quarantined: devices by digest of a release that failed on them.
        signs: devices by what is odd about them.
        odd: those devices, the worst first.
        listed: all devices, if they are few.
        scores: by product and release.
    """

    time: float
    silent_after: float
    devices: int
    verified: int
    never: tuple[str, ...] = ()
    refused: dict[str, int] = field(default_factory=dict)
    software: dict[str, int] = field(default_factory=dict)
    products: tuple[Product, ...] = ()
    failures: tuple[Reason, ...] = ()
    faults: tuple[Fault, ...] = ()
    quarantined: dict[str, int] = field(default_factory=dict)
    signs: dict[Kind, int] = field(default_factory=dict)
    odd: tuple[Odd, ...] = ()
    listed: tuple[Odd, ...] = ()
    scores: tuple[Scores, ...] = ()


def summary(
    found: Found,
    now: float,
    *,
    records: Mapping[str, Rollout] | None = None,
    digests: Mapping[str, str] | None = None,
    product: str | None = None,
    silent_after: float = SILENT_SECONDS,
    history: Sequence[Decision] = (),
) -> Fleet:
    """What a fleet looks like.

    Args:
        found: newest statuses, and the registry.
        now: seconds since 1970.
        records: roll-outs by product.
        digests: of the records of the releases that these name, by product.
        product: only its devices; all if None.
        silent_after: seconds without a status after which a device is silent.
        history: the log of a guard.
    """
    records, digests = records or {}, digests or {}
    statuses = [seen for seen in found.latest if product in (None, seen.status.product)]
    states = {
        seen.status.device: state_of(
            records[seen.status.product],
            seen,
            now,
            digest=digests.get(seen.status.product, ""),
            silent_after=silent_after,
        )
        for seen in statuses
        if seen.status.product in records
    }
    scores = score_groups(statuses)
    strange = {outlier.device: outlier.told for group in scores for outlier in group.outliers}
    told = []
    for seen in statuses:
        state = states.get(seen.status.device)
        signs = signs_of(
            seen,
            now,
            silent_after,
            state,
            records.get(seen.status.product),
            strange,
            registry=found.devices is not None,
        )
        status = seen.status
        told.append(
            Odd(
                status.device,
                status.product,
                status.groups,
                status.release,
                status.confirmed,
                seen.received,
                seen.verified,
                signs,
            )
        )
    odd = [one for one in told if one.signs]
    odd.sort(key=lambda one: (KINDS.index(one.signs[0].kind), -len(one.signs), one.device))
    heard = {seen.status.device for seen in found.latest}
    by_product: dict[str, list[Seen]] = {}
    for seen in statuses:
        by_product.setdefault(seen.status.product, []).append(seen)
    for name in records:
        if product in (None, name):
            by_product.setdefault(name, [])
    products = [
        _product(name, some, records.get(name), states, now, silent_after, history) for name, some in by_product.items()
    ]
    kinds = Counter(sign.kind for one in odd for sign in one.signs)
    return Fleet(
        time=now,
        silent_after=silent_after,
        devices=len(statuses),
        verified=sum(seen.verified for seen in statuses),
        never=tuple(sorted(record.device for record in found.devices or () if record.device not in heard)),
        refused=dict(Counter(one.reason for one in found.refused).most_common()),
        software=_most(Counter(seen.status.version or "unknown" for seen in statuses)),
        products=tuple(sorted(products, key=lambda one: (-one.devices, one.name))),
        failures=failures(statuses, records, digests),
        faults=faults_of(statuses),
        quarantined=_most(Counter(digest for seen in statuses for digest in seen.status.quarantined)),
        signs={kind: kinds[kind] for kind in KINDS if kinds[kind]},
        odd=tuple(odd),
        listed=tuple(told) if len(told) <= LISTED else (),
        scores=scores,
    )


def _product(
    name: str,
    statuses: Sequence[Seen],
    record: Rollout | None,
    states: Mapping[str, State | None],
    now: float,
    silent_after: float,
    history: Sequence[Decision],
) -> Product:
    members: dict[str, list[Seen]] = {}
    for seen in statuses:
        for group in seen.status.groups or (NO_GROUP,):
            members.setdefault(group, []).append(seen)
    ordered = sorted(members, key=lambda group: (-len(members[group]), group))
    # Names of groups are claims too: a device that invents one for each status must not fill the page.
    if len(ordered) > _GROUPS:
        rest = {seen.status.device: seen for group in ordered[_GROUPS:] for seen in members[group]}
        ordered = [*ordered[:_GROUPS], OTHERS]
        members[OTHERS] = list(rest.values())
    groups = tuple(_group(group, members[group], record, states, now, silent_after) for group in ordered)
    whole = _group(name, statuses, record, states, now, silent_after)
    timeline: list[Decision] = []
    if record is not None:
        timeline = [line for line in history if (line.product, line.release) == (name, record.release)]
        step = -(-len(timeline) // _POINTS)
        timeline = timeline[-1::-step][::-1] if timeline else []
    return Product(
        name=name,
        devices=len(statuses),
        releases=_releases(statuses),
        silent=whole.silent,
        alarms=whole.alarms,
        groups=groups,
        record=record,
        counts=whole.counts,
        beyond=0
        if record is None
        else sum(seen.status.release == record.release and states.get(seen.status.device) is None for seen in statuses),
        timeline=tuple(timeline),
    )


def _group(
    name: str,
    statuses: Sequence[Seen],
    record: Rollout | None,
    states: Mapping[str, State | None],
    now: float,
    silent_after: float,
) -> Group:
    return Group(
        name=name,
        devices=len(statuses),
        releases=_releases(statuses),
        silent=sum(now - seen.received > silent_after for seen in statuses),
        alarms=sum(bool(seen.status.alarm) for seen in statuses),
        counts=None if record is None else counted(states.get(seen.status.device) for seen in statuses),
    )


def _releases(statuses: Iterable[Seen]) -> dict[str, int]:
    numbers = Counter(-1 if seen.status.release is None else seen.status.release for seen in statuses)
    kept = sorted((release for release, _ in numbers.most_common(_LABELS)), reverse=True)
    named = {"none" if release < 0 else str(release): numbers[release] for release in kept}
    rest = sum(numbers.values()) - sum(named.values())
    return named | ({"others": rest} if rest else {})


def _most(numbers: Counter[str]) -> dict[str, int]:
    named = dict(numbers.most_common(_LABELS))
    rest = sum(numbers.values()) - sum(named.values())
    return named | ({"others": rest} if rest else {})


__all__ = ["LISTED", "NO_GROUP", "OTHERS", "Fleet", "Group", "Product", "summary"]
