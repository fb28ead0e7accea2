"""What a device tests before a release becomes active, on its own machine and with its own engine.

The *engine test* asks whether the engine is intact here: golden images under the bundle's frozen initial pack have the
scores that torch gave them. The *release test* asks whether the knowledge is good: under the new pack they have the
scores that the release carries, and golden defects still alarm. The *shadow replay* only tells: which of the device's
last frames would be judged differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.errors import SelfTestError
from edgead.runtime.golden import golden_inspections
from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack
from edgead.runtime.release import Release

_ROOM = 0.02
"""Share of the scores' range that an engine without a measured tolerance may differ by."""
_ROUNDING = 1e-4
"""Least tolerance, as a share of the range: two processors add up in different orders."""


@dataclass(frozen=True)
class Change:
    """A frame that is judged differently.

    Attributes:
        frame: its name.
        before, after: verdicts under the old and the new knowledge.
        score_before, score_after: image scores; None where it was not inspected.
    """

    frame: str
    before: Verdict
    after: Verdict
    score_before: float | None
    score_after: float | None


@dataclass(frozen=True)
class Shadow:
    """What a shadow replay found.

    Attributes:
        frames: how many were replayed.
        changed: those that are judged differently.
    """

    frames: int
    changed: tuple[Change, ...] = ()


def engine_test(bundle: Bundle | Path, *, target: str | None = None, threads: int | None = None) -> int:
    """Check that a bundle's engine does on this machine what torch did.

    Args:
        bundle: an open bundle, or the path of one.
        target: which engine; None for the best of this machine.
        threads: processor threads per inference.

    Returns:
        golden images that were compared.

    Raises:
        SelfTestError: a score that is off, or no score.
        EngineError: the engine's library refused the engine.
        MissingDependencyError: the engine's library is not installed.
        BundleError: the bundle is damaged.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if not opened.manifest.golden:
        return 0
    pack = opened.pack()
    found = golden_inspections(opened, [pack], target=target, threads=threads)[pack.product]
    room = _engine_tolerance(opened, target)
    for record in opened.manifest.golden:
        _compare("the engine test", record.path, found[record.path], record.score, room)
    return len(opened.manifest.golden)


def release_test(
    bundle: Bundle | Path,
    release: Release,
    packs: Mapping[str, Pack],
    *,
    target: str | None = None,
    threads: int | None = None,
) -> int:
    """Check that a release says of the golden images here what it said on its publisher's machine.

    Args:
        bundle: the release's engine.
        release: carries the scores.
        packs: the release's, by product.
        target, threads: see `engine_test`.

    Returns:
        scores that were compared.

    Raises:
        SelfTestError: a score that is off, none at all, or a golden defect that no longer alarms.
        EngineError, MissingDependencyError, BundleError, KnowledgeError: see `engine_test`, or a pack does not fit.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    count = 0
    found = golden_inspections(opened, packs.values(), target=target, threads=threads)
    for product in release.product_packs:
        scores = release.scores.get(product, {})
        if opened.manifest.golden and not scores:
            raise SelfTestError(
                wanted=f"scores of golden images for {product!r} in the release",
                got="none",
                next_step="Make the release with: edgead ota release",
            )
        for path, score in scores.items():
            _compare("the release test", path, found[product][path], score, release.tolerance)
            count += 1
        for path in release.must_alarm.get(product, ()):
            inspection = found[product][path]
            if inspection.verdict is not Verdict.NG:
                shown = "none" if inspection.score is None else f"{inspection.score:.6g}"
                raise SelfTestError(
                    wanted=f"the golden defect {path} to alarm under the new knowledge of {product!r}",
                    got=f"{inspection.verdict.value}, a score of {shown} at a threshold of {inspection.threshold:.6g}",
                    next_step="Correct the knowledge and release it under a new counter.",
                )
    return count


def shadow_replay(
    frames: Sequence[tuple[str, NDArray[np.uint8]]],
    before: tuple[Path, Pack],
    after: tuple[Path, Pack],
    *,
    target: str | None = None,
    threads: int | None = None,
) -> Shadow:
    """Inspect frames with an old and a new release.

    Args:
        frames: name and uint8 RGB picture [H, W, 3] of each.
        before, after: bundle file and pack of the old and the new release, of one product.
        target, threads: see `engine_test`.

    Raises:
        EngineError, MissingDependencyError, BundleError, KnowledgeError: see `engine_test`.
    """
    if not frames:
        return Shadow(0)
    old = _inspected(frames, *before, target, threads)
    new = _inspected(frames, *after, target, threads)
    changed = tuple(
        Change(name, one.verdict, two.verdict, one.score, two.score)
        for (name, _), one, two in zip(frames, old, new, strict=True)
        if one.verdict is not two.verdict
    )
    return Shadow(len(frames), changed)


def _inspected(
    frames: Sequence[tuple[str, NDArray[np.uint8]]],
    bundle: Path,
    pack: Pack,
    target: str | None,
    threads: int | None,
) -> list[Inspection]:
    # The files were checked when they were put into the store.
    opened = open_bundle(bundle, verify=False)
    with Inspector(opened, target=target, threads=threads, packs=[pack], products=[pack.product]) as inspector:
        return [inspector.inspect(frame, product=pack.product) for _, frame in frames]


def _compare(test: str, path: str, found: Inspection, wanted: float, room: float) -> None:
    if found.score is None or abs(found.score - wanted) > room:
        raise SelfTestError(
            wanted=f"a score of {wanted:.6g} for the golden image {path} in {test}, within {room:.3g}",
            got=found.reason or "none" if found.score is None else f"{found.score:.6g}",
            next_step="The release is quarantined on this device; check its engine and its knowledge.",
        )


def _engine_tolerance(bundle: Bundle, target: str | None) -> float:
    """In score units."""
    records = bundle.manifest.engines if target is None else (bundle.engine(target),)
    shares = [record.tolerance.score if record.tolerance else _ROOM for record in records]
    maps = bundle.golden_maps()
    values = [abs(record.score) for record in bundle.manifest.golden]
    if maps is not None and maps.size:
        values.append(float(np.abs(maps).max()))
    return max(*shares, _ROUNDING) * max(values)


__all__ = ["Change", "Shadow", "engine_test", "release_test", "shadow_replay"]
