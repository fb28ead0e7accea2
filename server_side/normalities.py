"""The sentences of a bundle's knowledge that say what is normal: add one, take one back, look what changes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle
from edgead.runtime.bundle_manifest import NORMALITY_TABLE
from edgead.runtime.chain import read_chain
from edgead.runtime.errors import BundleError, InputError, KnowledgeError
from edgead.runtime.inspection import Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack, check_fits
from edgead.runtime.notes import NOTE, encode_note, read_note
from edgead.runtime.spec import NormalityRecord

NORMAL = "normality.normal"
"""The feature of normal parts that each sentence is compared with, row by row beside `normality.table`."""


def normality_of(bundle: Bundle) -> NormalityRecord:
    """What the bundle says of its normality detector.

    Raises:
        BundleError: it has none.
    """
    record = bundle.manifest.normality
    if record is None:
        raise BundleError(
            wanted="a bundle that can be told by sentences what is normal",
            got=f"{bundle.path} without a normality detector",
            next_step="Export it again --with-normality NORMALITY.detector; fit that with: "
            "edgead fit --method normality",
        )
    return record


def current(bundle: Bundle, knowledge: Sequence[Path], product: str | None = None) -> Pack:
    """The knowledge of a product: the bundle's pack, with packs and deltas upon it in their order.

    Raises:
        BundleError: no such product.
        KnowledgeError: a file that is damaged or does not fit, or that is of another product.
    """
    found = read_chain(bundle, knowledge)
    if product is None and len(found) == 1:
        product = next(iter(found))
    product = product or bundle.manifest.default
    others = sorted(found.keys() - {product})
    if others:
        raise KnowledgeError(
            wanted=f"knowledge of {product!r}", got=f"knowledge of {', '.join(others)} too", next_step="Leave it out."
        )
    return found[product] if product in found else bundle.pack(product)


def sentences(pack: Pack) -> list[dict[str, Any]]:
    """The note of each sentence in the order of the rows: at least `text`."""
    rows: list[dict[str, Any]] = read_note(pack, NORMALITY_TABLE)["rows"]
    count = len(pack.arrays[NORMALITY_TABLE])
    return [dict(row) for row in rows] or [{"text": f"row {row} of {NORMALITY_TABLE}"} for row in range(count)]


def place_of(pack: Pack, text: str) -> int | None:
    """The row of a sentence; case, white space and underscores do not matter. None if it is not there."""
    return next((row for row, note in enumerate(sentences(pack)) if _key(note["text"]) == _key(text)), None)


def refuse_known(pack: Pack, text: str) -> None:
    """Check that a sentence can be added.

    Raises:
        InputError: the same is there already.
    """
    if place_of(pack, text) is not None:
        raise InputError(
            wanted="a sentence that the knowledge does not have yet",
            got=repr(text),
            next_step="Remove it first to add it with other phrases.",
        )


def check_model(record: NormalityRecord, name: str, weights_sha256: str) -> None:
    """Check that a text encoder is that of the bundle's normality detector.

    Raises:
        KnowledgeError: another model, or other weights of it: its rows would mean nothing to this bundle.
    """
    if record.weights is not None and weights_sha256 != record.weights:
        raise KnowledgeError(
            wanted=f"the model {record.model or ''} with the weights {record.weights[:12]}, which the bundle has",
            got=f"{name} with the weights {weights_sha256[:12]}",
            next_step="Name the weights that the normality detector was fitted with: --model-weights.",
        )


def check_room(bundle: Bundle, pack: Pack) -> None:
    """Check that every engine of the bundle has room for the sentences of a pack.

    Raises:
        KnowledgeError: an engine of static shapes is full.
    """
    rows = len(pack.arrays[NORMALITY_TABLE])
    for engine in bundle.manifest.engines:
        room = engine.capacity.get(NORMALITY_TABLE)
        if room is not None and rows > room:
            raise KnowledgeError(
                wanted=f"at most {room} sentences, the capacity of '{engine.name}'",
                got=f"{rows}",
                next_step="Remove one that is no longer needed, or export the bundle again: its engines' shapes "
                "are fixed.",
            )


def with_sentence(
    bundle: Bundle,
    pack: Pack,
    added: NDArray[np.float32],
    normal: NDArray[np.float32],
    note: Mapping[str, Any],
) -> Pack:
    """The pack with one sentence more, as the last row.

    Args:
        bundle: that the pack is for.
        pack: the knowledge so far.
        added: float32 [E], the sentence's feature.
        normal: float32 [E], the feature that it is compared with.
        note: what its row means: at least `text`.

    Raises:
        InputError: the same sentence is there already.
        KnowledgeError: a feature of another dimension, or no room in an engine.
    """
    refuse_known(pack, str(note["text"]))
    wanted = pack.arrays[NORMALITY_TABLE].shape[1]
    if len(added) != wanted:
        raise KnowledgeError(
            wanted=f"sentences of {wanted} dimensions, as the bundle's model gives them",
            got=f"{len(added)}",
            next_step="Use the model that the normality detector was fitted with.",
        )
    # IEEE 754: -0.0 + 0.0 is +0.0, which packs want.
    rows = {NORMALITY_TABLE: added + np.float32(0), NORMAL: normal + np.float32(0)}
    arrays = {name: np.concatenate([pack.arrays[name], row[None]]) for name, row in rows.items()}
    made = _replaced(pack, arrays, [*sentences(pack), dict(note)])
    check_fits(made, bundle.manifest.knowing)
    check_room(bundle, made)
    return made


def without_sentence(pack: Pack, text: str) -> Pack:
    """The pack without a sentence: to the byte as if it had never been added.

    Raises:
        InputError: no such sentence; near ones are suggested.
    """
    before = sentences(pack)
    place = place_of(pack, text)
    if place is None:
        _unknown(text, [str(note["text"]) for note in before])
    arrays = {name: np.delete(pack.arrays[name], place, axis=0) for name in (NORMALITY_TABLE, NORMAL)}
    return _replaced(pack, arrays, before[:place] + before[place + 1 :])


@dataclass(frozen=True)
class KindChange:
    """Alarms on the images of one type before and after a change of the knowledge."""

    kind: str
    images: int
    anomalous: bool
    before: int
    after: int


@dataclass(frozen=True)
class Change:
    """What a change of the knowledge does on labelled images.

    Attributes:
        kinds: by type; those that are normal from now on count as normal.
    """

    kinds: tuple[KindChange, ...]

    def misses(self, when: str) -> int:
        """Anomalous images without an alarm, 'before' or 'after'."""
        return sum(kind.images - getattr(kind, when) for kind in self.kinds if kind.anomalous)

    def false_alarms(self, when: str) -> int:
        """Normal images with an alarm, 'before' or 'after'."""
        return sum(getattr(kind, when) for kind in self.kinds if not kind.anomalous)


def compare(
    bundle: Bundle,
    before: Pack,
    after: Pack,
    data: Path,
    *,
    now_normal: Sequence[str] = (),
    target: str | None = None,
) -> Change:
    """Inspect labelled images under both packs and count.

    Args:
        bundle: that the packs are for.
        before, after: of one product.
        data: a data set in the MVTec layout.
        now_normal: types that are normal from now on.
        target: which engine.

    Raises:
        InputError: no such layout, or a type that it does not have.
        EngineError: an image was not answered.
    """
    from edgead.server_side.evaluation import evaluate_bundle

    counts: list[dict[str, tuple[int, int]]] = []
    with Inspector(bundle, target=target, packs=[before], products=[before.product]) as inspector:
        for pack in (before, after):
            inspector.swap(pack)
            found: dict[str, tuple[int, int]] = {}
            for outcome in evaluate_bundle(inspector, data, product=pack.product).outcomes:
                images, alarms = found.get(outcome.sample.kind, (0, 0))
                found[outcome.sample.kind] = images + 1, alarms + (outcome.inspection.verdict is Verdict.NG)
            counts.append(found)
    for kind in now_normal:
        if kind not in counts[0]:
            near = difflib.get_close_matches(kind, counts[0], n=3, cutoff=0.4)
            raise InputError(
                wanted=f"a type of {data}: {', '.join(sorted(counts[0]))}",
                got=repr(kind),
                next_step=f"Did you mean {' or '.join(near)}?" if near else "Name one of these.",
            )
    return Change(
        tuple(
            KindChange(kind, images, kind != "good" and kind not in now_normal, alarms, counts[1][kind][1])
            for kind, (images, alarms) in sorted(counts[0].items())
        )
    )


def _replaced(pack: Pack, arrays: Mapping[str, NDArray[Any]], notes: Sequence[Mapping[str, Any]]) -> Pack:
    """The pack with other sentences; thresholds stay, since sentences only ever lower a score."""
    note = {**read_note(pack, NORMALITY_TABLE), "rows": list(notes)}
    changed = {**pack.arrays, **arrays, f"{NORMALITY_TABLE}{NOTE}": encode_note(note)}
    return Pack(pack.product, pack.fingerprint, pack.calibration, changed)


def _key(text: str) -> str:
    """Sentences that differ in case, white space and underscores only are one."""
    return " ".join(str(text).replace("_", " ").casefold().split())


def _unknown(text: str, known: Sequence[str]) -> NoReturn:
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.4)
    raise InputError(
        wanted=f"one of the sentences {', '.join(map(repr, known)) or '(none has been added)'}",
        got=repr(text),
        next_step=f"Did you mean {' or '.join(map(repr, near))}?" if near else "See: edgead normality list BUNDLE",
    )


__all__ = [
    "NORMAL",
    "NORMALITY_TABLE",
    "Change",
    "KindChange",
    "check_model",
    "check_room",
    "compare",
    "current",
    "normality_of",
    "place_of",
    "refuse_known",
    "sentences",
    "with_sentence",
    "without_sentence",
]
