"""Golden images under any knowledge: what the release test compares, on the publisher's machine and on the device.

Golden images are engine-sized frames: they have been through rotation, region of interest and tiling already, so
they are inspected as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.inspection import Inspection
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack
from edgead.runtime.spec import Preprocessing


def golden_inspections(
    bundle: Bundle | str | Path, packs: Iterable[Pack], *, target: str | None = None, threads: int | None = None
) -> dict[str, dict[str, Inspection]]:
    """Inspect a bundle's golden images under given knowledge.

    Args:
        bundle: an open bundle, or the path of one.
        packs: one for each product.
        target: which engine; None for the best of this machine.
        threads: processor threads per inference.

    Returns:
        by product and path of the golden image, what an inspector says of it.

    Raises:
        BundleError: the bundle is damaged.
        KnowledgeError: a pack does not fit.
        EngineError: the engine's library refused the engine.
        MissingDependencyError: the engine's library is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    images = opened.golden_images()
    given = {pack.product: pack for pack in packs}
    # Eager, since a score just above the threshold here may lie just below it on another engine.
    with Inspector(
        _as_they_are(opened),
        target=target,
        threads=threads,
        packs=given.values(),
        products=given,
        suppression="eager",
    ) as inspector:
        return {
            product: {record.path: inspector.inspect(image, product=product) for record, image in images}
            for product in given
        }


def golden_scores(inspections: Mapping[str, Inspection]) -> dict[str, float]:
    """Image scores by golden image, without those that were not inspected."""
    return {path: found.score for path, found in inspections.items() if found.score is not None}


def _as_they_are(bundle: Bundle) -> Bundle:
    """The bundle with preprocessing that leaves engine-sized frames as they are."""
    manifest = bundle.manifest
    size = manifest.detector.preprocessing
    detector = msgspec.structs.replace(manifest.detector, preprocessing=Preprocessing(size.width, size.height))
    normality = manifest.normality
    if normality is not None:
        size = normality.detector.preprocessing
        second = msgspec.structs.replace(normality.detector, preprocessing=Preprocessing(size.width, size.height))
        normality = msgspec.structs.replace(normality, detector=second)
    plain_bundle = copy.copy(bundle)
    plain_bundle.manifest = msgspec.structs.replace(manifest, detector=detector, normality=normality)
    return plain_bundle
