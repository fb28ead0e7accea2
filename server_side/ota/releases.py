"""Releases: an engine and a pack that become active together, with the scores that a device must see again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgead.runtime.bundle import Bundle
from edgead.runtime.errors import EngineError, InputError, ReleaseError
from edgead.runtime.golden import golden_inspections, golden_scores
from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.knowledge import Pack
from edgead.runtime.release import RELEASE_SCHEMA, Release, check_whole, encode_release
from edgead.server_side.ota.publish import engine_path, engines_of, load_pack, pack_path, packs_of, releases_of, resolve
from edgead.server_side.ota.repository import Repository
from edgead.server_side.ota.rollouts import rollout_of

_ROOM = 0.02
"""Share of the scores' range that engines without a measured tolerance may differ by."""
_ROUNDING = 1e-4
"""Least tolerance, as a share of the range: two processors add up in different orders."""
_SHOWN = 12


def release_path(product: str, counter: int) -> str:
    """Target path of a release."""
    return f"releases/{product}/{counter}.json"


def make_release(
    repository: Repository,
    product: str,
    *,
    engine: str | None = None,
    pack: str | None = None,
    counter: int | None = None,
    now_normal: Sequence[str] = (),
    notes: str = "",
    target: str | None = None,
) -> Release:
    """Put a release, after its release test passed here. `Repository.commit` then signs.

    The bundle's golden images are inspected with the new pack. What alarmed under the bundle's own pack must still
    alarm, and what passed must still pass, but for images that are named.

    Args:
        repository: where to.
        product: whose devices it is for.
        engine: beginning of the digest of a published bundle; the latest release's, or the only one that fits.
        pack: beginning of the digest of a published pack; the only one that is in no release yet.
        counter: greater than those before; by default one more than the last.
        now_normal: golden images whose verdict is meant to change.
        notes: for people.
        target: which engine of the bundle to test with.

    Raises:
        InputError: nothing, or more than one thing, of that name.
        ReleaseError: a counter that does not grow, a pack that does not fit, or a verdict that changed.
        EngineError: a golden image cannot be inspected.
    """
    before = releases_of(repository, product)
    last = before[-1].counter if before else 0
    if counter is not None and counter <= last:
        raise ReleaseError(
            wanted=f"a counter greater than {last}, the last release of {product!r}",
            got=str(counter),
            next_step="Leave it out; an old pack is released again under a new counter.",
        )
    digest = _choose_pack(repository, product, pack, before)
    knowledge = load_pack(repository, product, digest)
    engines = engines_of(repository)
    chosen = _choose_engine(engines, knowledge, engine, before)
    bundle = engines[chosen]
    found = golden_inspections(bundle, [knowledge], target=target)[product]
    must_alarm = _test(bundle, found, now_normal)
    made = Release(
        schema=RELEASE_SCHEMA,
        name=f"{product}-{counter or last + 1}",
        counter=counter or last + 1,
        fingerprint=bundle.manifest.knowing.fingerprint,
        engine=chosen,
        product_packs={product: digest},
        sizes={chosen: _size(repository, engine_path(chosen)), digest: _size(repository, pack_path(product, digest))},
        scores={product: golden_scores(found)},
        must_alarm={product: must_alarm},
        tolerance=_tolerance(bundle, found),
        made_at=int(repository.clock().timestamp()),
        notes=notes,
    )
    check_whole(made, bundle.manifest, {product: knowledge})
    repository.add(release_path(product, made.counter), encode_release(made))
    _prune(repository, product, before)
    return made


def _choose_pack(repository: Repository, product: str, prefix: str | None, before: list[Release]) -> str:
    published = packs_of(repository, product)
    if prefix is not None:
        return resolve(prefix, published, "published pack")
    named = {release.product_packs[product] for release in before}
    fresh = [digest for digest in published if digest not in named]
    if len(fresh) == 1:
        return fresh[0]
    raise InputError(
        wanted=f"--pack with the beginning of a digest, as {len(fresh)} packs of {product!r} are in no release",
        got=", ".join(digest[:_SHOWN] for digest in published) or "no published pack",
        next_step="Name the one to release.",
    )


def _choose_engine(engines: Mapping[str, Bundle], pack: Pack, prefix: str | None, before: list[Release]) -> str:
    if prefix is not None:
        return resolve(prefix, sorted(engines), "published engine")
    fitting = [
        digest for digest, bundle in sorted(engines.items()) if bundle.manifest.knowing.fingerprint == pack.fingerprint
    ]
    if before and before[-1].engine in fitting:
        return before[-1].engine
    own = [digest for digest in fitting if pack.product in engines[digest].products]
    choice = own or fitting
    if len(choice) == 1:
        return choice[0]
    raise InputError(
        wanted=f"--engine with the beginning of a digest, as {len(choice)} published engines fit the pack",
        got=", ".join(digest[:_SHOWN] for digest in choice) or "none that fits",
        next_step="Name the one to release." if choice else "Publish its bundle.",
    )


def _test(bundle: Bundle, found: Mapping[str, Inspection], now_normal: Sequence[str]) -> tuple[str, ...]:
    """Golden images that must alarm on a device; refuses verdicts that changed without being meant to."""
    unknown = sorted(set(now_normal) - found.keys())
    if unknown:
        raise InputError(
            wanted="golden images of the bundle", got=unknown[0], next_step=f"Name one of {', '.join(found) or 'none'}."
        )
    alarms = []
    for record in bundle.manifest.golden:
        inspection = found[record.path]
        if inspection.verdict is Verdict.NOT_INSPECTED:
            raise EngineError(
                wanted=f"a score of the golden image {record.path}",
                got=inspection.reason or "none",
                next_step="Check the pack and the engine with: edgead run",
            )
        alarm = inspection.verdict is Verdict.NG
        if alarm != record.anomalous and record.path not in now_normal:
            raise ReleaseError(
                wanted=f"the golden image {record.path} to {'alarm' if record.anomalous else 'pass'} as before",
                got=f"a score of {inspection.score:.4g} at the threshold {inspection.threshold:.4g}",
                next_step=f"Correct the knowledge; if it is meant so, add: --now-normal {record.path}",
            )
        if alarm:
            alarms.append(record.path)
    return tuple(alarms)


def _tolerance(bundle: Bundle, found: Mapping[str, Inspection]) -> float:
    """In score units: what the bundle's engines differ by at most, here and on a device."""
    shares = [record.tolerance.score if record.tolerance else _ROOM for record in bundle.manifest.engines]
    scores = [item.score for item in found.values() if item.score is not None]
    maps = [item.anomaly_map for item in found.values() if item.anomaly_map is not None]
    values = (
        np.concatenate([np.array(scores, np.float32), *(one.ravel() for one in maps)])
        if scores
        else np.zeros(1, np.float32)
    )
    # Both this machine and the device may be off by that much.
    return 2.0 * max(*shares, _ROUNDING) * float(np.abs(values).max())


def _prune(repository: Repository, product: str, before: list[Release]) -> None:
    """Keep the last releases, and those that the roll-out names."""
    record = rollout_of(repository, product)
    named = {record.release, record.previous} if record else set()
    for release in before[: max(0, len(before) + 1 - repository.settings.keep)]:
        if release.counter not in named:
            repository.drop(release_path(product, release.counter))


def _size(repository: Repository, path: str) -> int:
    entry = repository.find(path)
    if entry is None:
        raise InputError(wanted=f"the target {path}", got="none", next_step="Publish it first.")
    return entry.length
