"""Published protocols: normality addition (NAND), zero-shot and few-shot detection, over one or many categories.

NAND's protocol (Yi et al., "Normality Addition via Normality Detection in Industrial Image Anomaly Detection Models",
https://arxiv.org/abs/2407.19849): each group of similar defect types in turn is called normal. Before, its pictures
still score as defects; after, the group's sentences suppress them. Both AUROCs are under the changed labels: good
parts and the group are normal, every other defect is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.errors import EngineError, InputError
from edgead.runtime.image import read_image
from edgead.runtime.inspection import Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack
from edgead.runtime.progress import Progress
from edgead.server_side.datasets import GOOD, Sample, test_samples
from edgead.server_side.detectors.normality import TABLE, normality_arrays
from edgead.server_side.detectors.sentences import normality_row
from edgead.server_side.evaluation import Evaluation, evaluate_bundle, limited
from edgead.server_side.metrics import auroc
from edgead.server_side.normalities import check_model, normality_of
from edgead.server_side.protocol_groups import Grouping, groups_of
from edgead.server_side.vision_language import VisionLanguageModel

Shots = Literal["zero-shot", "few-shot"]
Encode = Callable[[Sequence[str], str], dict[str, NDArray[Any]]]
"""(sentences, class name) -> the knowledge arrays that call them normal."""
_SUFFIXES = ("", ".bundle", ".edgead")


@dataclass(frozen=True)
class Addition:
    """What calling one group normal did.

    Attributes:
        category: name of the data set.
        group: name of the group.
        types: its defect types.
        sentences: what was called normal.
        pictures: pictures of the group; of good parts; of the other defects.
        before, after: AUROC under the changed labels, the score being the maximum of the anomaly map, as in the paper.
        score_before, score_after: the same by the image score as an inspector gives it.
        moved: for each other defect type the change of its AUROC against good parts, by the map's maximum.
    """

    category: str
    group: str
    types: tuple[str, ...]
    sentences: tuple[str, ...]
    pictures: tuple[int, int, int]
    before: float
    after: float
    score_before: float
    score_after: float
    moved: dict[str, float]


@dataclass(frozen=True)
class NormalityAddition:
    """The protocol's result.

    Attributes:
        method: of the detector.
        source: who made the groups.
        additions: one for each group.
        notes: what a reader of the figures must know.
    """

    method: str
    source: str
    additions: tuple[Addition, ...]
    notes: tuple[str, ...] = field(default=())

    def mean(self, name: str) -> float:
        """Mean over the groups of 'before', 'after', 'score_before' or 'score_after'."""
        return float(np.mean([getattr(addition, name) for addition in self.additions]))


@dataclass(frozen=True)
class Shot:
    """Zero- or few-shot detection over categories.

    Attributes:
        method: of the detector.
        protocol: which of the two.
        evaluations: by category.
    """

    method: str
    protocol: Shots
    evaluations: dict[str, Evaluation]

    def mean(self, name: str) -> float | None:
        """Mean over the categories of one of `KindResult`'s figures; None where a category has none."""
        figures = [getattr(evaluation.kinds[0], name) for evaluation in self.evaluations.values()]
        return None if any(figure is None for figure in figures) else float(np.mean(figures))


def categories_of(data: Path) -> list[tuple[str, Path]]:
    """The data sets at a path, by name: it is one itself, or a folder of them as MVTec AD comes.

    Raises:
        InputError: neither.
    """
    if (data / "test").is_dir():
        return [(data.resolve().name, data)]
    found = sorted(folder.parent for folder in data.glob("*/test") if folder.is_dir())
    if not found:
        raise InputError(
            wanted=f"a data set in the MVTec layout at {data}, or a folder of such data sets",
            got="no folder 'test' there or one level below" if data.is_dir() else "no such folder",
            next_step="Sort the images into test/good and test/<defect type>.",
        )
    return [(folder.name, folder) for folder in found]


def bundle_of(path: Path, category: str, *, alone: bool, product: str | None = None) -> tuple[Bundle, str]:
    """The bundle for a category, and the product in it.

    Args:
        path: a bundle, or a folder of bundles that are named like the categories.
        category: name of the data set.
        alone: whether it is the only one; a bundle's default product is then good enough.
        product: of the bundle, if there is one category and it is not the default product.

    Raises:
        BundleError: no bundle, or no such product.
        InputError: a product was named for several categories, or the bundle knows nothing of the category.
    """
    if product is not None and not alone:
        raise InputError(
            wanted="no --product for several categories: each is compared with the product of its own name",
            got=repr(product),
            next_step="Name the data set of one category.",
        )
    if path.is_dir() and not (path / "manifest.json").exists():
        found = [path / f"{category}{suffix}" for suffix in _SUFFIXES if (path / f"{category}{suffix}").exists()]
        if found:
            bundle = open_bundle(found[0])
            return bundle, product or (category if category in bundle.products else bundle.manifest.default)
    bundle = open_bundle(path)
    if product is not None or category in bundle.products or alone:
        return bundle, product or (category if category in bundle.products else bundle.manifest.default)
    raise InputError(
        wanted=f"a product '{category}' in {path}, or a folder of bundles named like the categories",
        got=f"the products {', '.join(bundle.products)}",
        next_step=f"Evaluate one category at a time, such as --data .../{category}.",
    )


def normality_addition(
    bundle: Path,
    data: Path,
    grouping: Grouping,
    encode: Callable[[Bundle], Encode],
    *,
    product: str | None = None,
    target: str | None = None,
    threads: int | None = None,
    limit: int | None = None,
) -> NormalityAddition:
    """NAND's protocol over all categories of a data set.

    Args:
        bundle: exported with a normality detector; or a folder of such bundles, see `bundle_of`.
        data: one data set in the MVTec layout, or a folder of them.
        grouping: of `edgead.server_side.protocol_groups.read_groups`.
        encode: a bundle -> what makes rows of sentences for it, see `encoder`.
        product, target, threads: as the inspector's.
        limit: at most so many images of each type.

    Raises:
        InputError: no such data set, or no group in it leaves both a normal and an anomalous picture.
        BundleError: a bundle has no normality detector, or there is none.
        EngineError: an image was not answered.
    """
    additions: list[Addition] = []
    notes: list[str] = []
    method = ""
    sets = categories_of(data)
    for category, root in sets:
        opened, chosen = bundle_of(bundle, category, alone=len(sets) == 1, product=product)
        method = opened.manifest.detector.method
        normality_of(opened)
        samples = limited(test_samples(root), limit)
        with Inspector(opened, target=target, threads=threads, products=[chosen], suppression="eager") as inspector:
            found, said = _category(inspector, chosen, category, samples, grouping, encode(opened))
        additions += found
        notes += said
    if not additions:
        raise InputError(
            wanted="a group of defect types that leaves another defect to find, and good parts",
            got=f"none in {data}",
            next_step="Name a file of groups with --groups.",
        )
    return NormalityAddition(method, grouping.source, tuple(additions), tuple(notes))


def encoder(model: VisionLanguageModel, bundle: Bundle) -> Encode:
    """What makes rows of sentences for a bundle's normality detector.

    Raises:
        BundleError: it has no normality detector.
        KnowledgeError: the model is not the one that the detector was made with.
    """
    check_model(normality_of(bundle), model.name, model.weights_sha256)

    def encode(sentences: Sequence[str], class_name: str) -> dict[str, NDArray[Any]]:
        rows = [normality_row(model, text, class_name) for text in sentences]
        added, normal, notes = zip(*rows, strict=True)
        return normality_arrays(model, np.stack(added), np.stack(normal), notes)

    return encode


def shots(
    bundle: Path,
    data: Path,
    protocol: Shots,
    *,
    product: str | None = None,
    target: str | None = None,
    threads: int | None = None,
    limit: int | None = None,
) -> Shot:
    """Zero- or few-shot detection over all categories of a data set.

    Args:
        bundle, data, product, target, threads, limit: as `normality_addition`, but for the normality detector.
        protocol: whether the banks of reference pictures must be empty or filled.

    Raises:
        InputError: no such data set, or knowledge of the other protocol.
        BundleError: there is no bundle.
        EngineError: an image was not answered.
    """
    evaluations: dict[str, Evaluation] = {}
    method = ""
    sets = categories_of(data)
    for category, root in sets:
        opened, chosen = bundle_of(bundle, category, alone=len(sets) == 1, product=product)
        method = opened.manifest.detector.method
        pack = opened.pack(chosen)
        rows = sum(len(pack.arrays[bank]) for bank in pack.banks)
        if (rows == 0) != (protocol == "zero-shot"):
            raise InputError(
                wanted="knowledge without reference pictures" if rows else "knowledge with reference pictures",
                got=f"{rows} bank rows in the product '{chosen}' of {opened.path}",
                next_step=f"Measure it with --protocol {'few-shot' if rows else 'zero-shot'}.",
            )
        with Inspector(opened, target=target, threads=threads, products=[chosen]) as inspector:
            evaluations[category] = evaluate_bundle(inspector, root, product=chosen, limit=limit)
    return Shot(method, protocol, evaluations)


def _category(
    inspector: Inspector,
    product: str,
    category: str,
    samples: Sequence[Sample],
    grouping: Grouping,
    encode: Encode,
) -> tuple[list[Addition], list[str]]:
    """Every group of one category in turn."""
    kinds = np.array([sample.kind for sample in samples])
    types = sorted({str(kind) for kind in kinds} - {GOOD})
    content, notes = groups_of(grouping, category, types)
    pack = inspector.knowledge(product)
    known = len(pack.arrays[TABLE])
    if known:
        notes.append(f"{category}: {known} normalities of the bundle are left out; each group starts without any")
    frames = len(samples) * (1 + len(content.groups))
    additions = []
    with Progress(f"inspecting {category}", frames) as progress:
        before = _scores(inspector, product, _with(pack, encode, (), content.class_name), samples, progress)
        for name, group in content.groups.items():
            others = [kind for kind in types if kind not in group.types]
            if not others or GOOD not in kinds:
                reason = "no other defect" if not others else "no good part"
                notes.append(f"{category}: the group '{name}' is left out, {reason} is there to compare with")
                progress.advance(len(samples))
                continue
            now = _with(pack, encode, group.sentences, content.class_name)
            after = _scores(inspector, product, now, samples, progress)
            anomalous = np.isin(kinds, others)
            additions.append(
                Addition(
                    category=category,
                    group=name,
                    types=group.types,
                    sentences=group.sentences,
                    pictures=(
                        int(np.isin(kinds, group.types).sum()),
                        int((kinds == GOOD).sum()),
                        int(anomalous.sum()),
                    ),
                    before=_auroc(anomalous, before.top),
                    after=_auroc(anomalous, after.top),
                    score_before=_auroc(anomalous, before.score),
                    score_after=_auroc(anomalous, after.score),
                    moved={
                        kind: _against_good(kinds, kind, after.top) - _against_good(kinds, kind, before.top)
                        for kind in others
                    },
                )
            )
    return additions, notes


@dataclass(frozen=True, eq=False)
class _Scores:
    """Of all samples: image scores [n], and maxima of the anomaly maps [n]."""

    score: NDArray[np.float64]
    top: NDArray[np.float64]


def _with(pack: Pack, encode: Encode, sentences: Sequence[str], class_name: str) -> Pack:
    """A pack in which exactly these sentences are normal."""
    if sentences:
        return replace(pack, arrays={**pack.arrays, **encode(sentences, class_name)})
    empty = {name: array[:0] for name, array in pack.arrays.items() if name in (TABLE, "normality.normal")}
    rest = {name: array for name, array in pack.arrays.items() if name != f"{TABLE}.text"}
    return replace(pack, arrays={**rest, **empty})


def _scores(inspector: Inspector, product: str, pack: Pack, samples: Sequence[Sample], progress: Progress) -> _Scores:
    inspector.swap(pack)
    scores, tops = [], []
    for sample in progress.track(samples):
        inspection = inspector.inspect(read_image(sample.path), product=product)
        if inspection.verdict is Verdict.NOT_INSPECTED or inspection.anomaly_map is None:
            raise EngineError(
                wanted=f"a score and a map for {sample.path}",
                got=f"none: {inspection.reason or 'the detector makes no maps'}",
                next_step="Check the engine with: edgead bench BUNDLE",
            )
        scores.append(float(inspection.score or 0.0))
        tops.append(float(inspection.anomaly_map.max()))
    return _Scores(np.array(scores), np.array(tops))


def _auroc(anomalous: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    value = auroc(anomalous, scores)
    assert value is not None  # both classes are there
    return value


def _against_good(kinds: NDArray[np.str_], kind: str, scores: NDArray[np.float64]) -> float:
    chosen = (kinds == GOOD) | (kinds == kind)
    return _auroc(kinds[chosen] == kind, scores[chosen])


def rows_of(result: NormalityAddition) -> Iterator[tuple[Addition, float]]:
    """Each addition with the largest move of another defect's AUROC."""
    for addition in result.additions:
        yield addition, max(addition.moved.values(), key=abs, default=0.0)


__all__ = (
    "Addition",
    "Encode",
    "NormalityAddition",
    "Shot",
    "Shots",
    "bundle_of",
    "categories_of",
    "encoder",
    "normality_addition",
    "rows_of",
    "shots",
)
