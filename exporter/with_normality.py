"""A second detector for a bundle: what may stand beside the first, and what their common knowledge is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgead.detector_file import FittedDetector
from edgead.runtime.bundle_manifest import NORMALITY_TABLE, check_pair, view_text
from edgead.runtime.errors import DetectorError
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.notes import NOTE, encode_note
from edgead.runtime.spec import Calibration, NormalityRecord, with_normality

CAPACITY = 64
"""Sentences that static engines have room for."""
PROBE = 3
"""Rows of the table that the parity gate fills: an empty one would prove nothing."""


def normality_record(base: FittedDetector, normality: FittedDetector) -> NormalityRecord:
    """What the manifest says of a normality detector beside `base`.

    Raises:
        DetectorError: it is no normality detector, looks at another part of the frame, or the base makes no maps.
    """

    def refuse(wanted: str, got: str) -> NoReturn:
        raise DetectorError(
            wanted=wanted,
            got=got,
            next_step="Fit the second one with: edgead fit --method normality "
            f"{view_text(base.spec.preprocessing)} -o NORMALITY.detector",
        )

    check_pair(base.spec, normality.spec, refuse)
    model = normality.card.get("model")
    facts: Mapping[str, Any] = model if isinstance(model, Mapping) else {"name": model}
    return NormalityRecord(
        detector=normality.spec,
        model=None if facts.get("name") is None else str(facts["name"]),
        weights=facts.get("weights_sha256"),
        shared_trunk=base.spec.fingerprint == normality.spec.fingerprint,
    )


def combined_pack(base: FittedDetector, second: Pack, normality: FittedDetector) -> Pack:
    """The base's pack in the combined feature space, with the arrays of a normality pack.

    Bank rows keep their bytes and ids: they are copied, never recomputed.

    Args:
        base: the first detector.
        second: knowledge of the second one.
        normality: the second detector.
    """
    arrays = {**base.pack.arrays, **second.arrays}
    note = f"{NORMALITY_TABLE}{NOTE}"
    if note not in arrays:
        rows = len(arrays[NORMALITY_TABLE])
        # Always there, so that whoever adds a sentence and takes it back comes to the same bytes again.
        arrays[note] = encode_note({"rows": [{"text": f"normality {row + 1}"} for row in range(rows)]})
    return Pack(
        product=base.pack.product,
        fingerprint=with_normality(base.spec, normality.spec).fingerprint,
        calibration=base.pack.calibration,
        arrays=arrays,
    )


def probe_pack(normality: FittedDetector, seed: int = 0) -> Pack:
    """The detector's pack with a table of random unit rows in place of its own.

    Every array that shares the table's row symbol is filled; others stay as they are.
    """
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = dict(normality.pack.arrays)
    symbol = next(port.shape[0] for port in normality.spec.knowledge if port.name == NORMALITY_TABLE)
    for port in normality.spec.knowledge:
        if port.shape and port.shape[0] == symbol:
            rows = rng.standard_normal((PROBE, *(int(size) for size in port.shape[1:]))).astype(port.dtype)
            norm = np.sqrt((rows.astype(np.float64) ** 2).reshape(PROBE, -1).sum(1))
            arrays[port.name] = (rows / norm.reshape(-1, *[1] * (rows.ndim - 1))).astype(port.dtype)
            note = f"{port.name}{NOTE}"
            if note in arrays:
                arrays[note] = encode_note({"rows": [{"text": f"probe {row}"} for row in range(PROBE)]})
    return new_pack(
        product=normality.pack.product,
        fingerprint=normality.pack.fingerprint,
        calibration=Calibration(threshold=1.0),  # a share of 0..1 is never above it: there is no decision to compare
        arrays=arrays,
    )


def undecided(normality: FittedDetector, pack: Pack) -> FittedDetector:
    """The detector under `pack`, without a decision of its own to hold an engine to."""
    calm = Pack(pack.product, pack.fingerprint, Calibration(threshold=1.0), pack.arrays)
    return replace(normality, pack=calm)


def capacities(normality: FittedDetector) -> dict[str, int]:
    """Rows that static engines have room for in the second detector's banks."""
    return {
        port.name: max(CAPACITY, len(normality.pack.arrays[port.name]))
        for port in normality.spec.knowledge
        if port.rows is not None
    }
