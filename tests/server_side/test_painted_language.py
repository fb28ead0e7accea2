"""Sentences decide what is a defect: shown with a tiny CLIP that was trained on painted carpets (`painted_clip.py`).

All pictures that are measured on are held out: other parts than those that the model saw, 400 of each type.

A processor rounds in its own way, and 800 steps of training make another model of that: with the same seed "thread"
lifts APRIL-GAN by more than 0.1 where there is AVX-512, and by 0.085 where there is none. Each has its own bounds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import Bundle
from edgead.runtime.engines import open_engine
from edgead.runtime.image import encode_png
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack, head_feeds
from edgead.runtime.normality import suppress_map, suppress_score, suppression_map
from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors import alfa, anomalous_few_shot, april_gan, normality, winclip
from edgead.server_side.detectors.auxiliary import MaskedPicture, listed_auxiliary
from edgead.server_side.detectors.projection_training import train_projections
from edgead.server_side.detectors.projection_types import type_features
from edgead.server_side.detectors.projections import write_projections
from edgead.server_side.detectors.sentences import class_features, normality_row
from edgead.server_side.detectors.text_heads import STATE, TABLE
from edgead.server_side.fitting import FitOptions, fit_memory_bank
from edgead.server_side.learned import Learned
from edgead.server_side.metrics import auroc
from edgead.server_side.prompts.ensembles import NORMAL_STATES, WINCLIP_TEMPLATES, compose
from edgead.server_side.prompts.ensembles import april_gan as april_gan_prompts
from edgead.server_side.prompts.ensembles import winclip as winclip_prompts
from edgead.server_side.prompts.prompt_set import StateWords, write_prompt_set
from edgead.server_side.vision_language import VisionLanguageModel, load_model, tower_of
from edgead.server_side.vision_language.options import VisionLanguageOptions

pytestmark = pytest.mark.slow

PARTS = 400
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
LIFT = 0.1 if AVX512 else 0.07
"""Least gain of AUROC by a sentence, and by a sample."""
DROPPED = 0.8 if AVX512 else 0.7
"""Least share of pictures for which a prompt that fits them all is dropped."""
OTHERS = ("hole", "scratch", "stain")


class Scores(NamedTuple):
    """Of all held-out pictures: image scores and maxima of the anomaly map, [n] each."""

    score: NDArray[np.float64]
    top: NDArray[np.float64]


class Found(NamedTuple):
    """Without a sentence, and with 'thread'."""

    before: Scores
    after: Scores


class Held(NamedTuple):
    """Held-out pictures uint8 [n, S, S, 3], their masks bool [n, S, S], and their kinds ('good', 'thread', ...) [n]."""

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    kinds: NDArray[np.str_]

    def against_good(self, kind: str, scores: NDArray[np.float64]) -> float:
        """AUROC of one kind of defect against good parts."""
        chosen = (self.kinds == "good") | (self.kinds == kind)
        value = auroc(self.kinds[chosen] == kind, scores[chosen])
        assert value is not None
        return value

    def thread_is_normal(self, scores: NDArray[np.float64]) -> float:
        """AUROC under the changed labels: threads are normal."""
        value = auroc(np.isin(self.kinds, OTHERS), scores)
        assert value is not None
        return value

    def all_defects(self, scores: NDArray[np.float64]) -> float:
        """AUROC of all defects against good parts."""
        value = auroc(self.kinds != "good", scores)
        assert value is not None
        return value


@pytest.fixture(scope="module")
def held(painted: ModuleType) -> Held:
    return Held(*painted.paint(PARTS, seed=777))


@pytest.fixture(scope="module")
def model(carpet_clip: Any) -> VisionLanguageModel:
    return load_model(str(carpet_clip.config), carpet_clip.checkpoint)


@pytest.fixture(scope="module")
def options(carpet_clip: Any) -> VisionLanguageOptions:
    return VisionLanguageOptions(
        model=str(carpet_clip.config),
        weights=carpet_clip.checkpoint,
        projections=carpet_clip.projections,
        class_name="carpet",
        product="carpet",
    )


@pytest.fixture(scope="module")
def normals(painted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """120 photographs of good parts, neither trained on nor measured on."""
    folder = tmp_path_factory.mktemp("normals")
    for number, image in enumerate(painted.paint(120, seed=555, kinds=()).images):
        (folder / f"{number:03d}.png").write_bytes(encode_png(image))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def normality_file(options: VisionLanguageOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("normality") / "normality.detector"
    normality.learn([], options).write(path)
    return path


@pytest.fixture(scope="module", params=["april-gan", "winclip", "memory-bank"])
def bundle(
    request: pytest.FixtureRequest,
    options: VisionLanguageOptions,
    normals: list[Path],
    normality_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """A bundle with a normality detector: zero-shot, but for the memory bank."""
    folder = tmp_path_factory.mktemp("bundle")
    path = folder / "base.detector"
    if request.param == "april-gan":
        april_gan.learn([], options).write(path)
    elif request.param == "winclip":
        winclip.learn([], options).write(path)
    else:
        size = Preprocessing(options_side(options), options_side(options))
        fit_memory_bank(normals[0].parent, path, FitOptions(preprocessing=size, rows=1000, product="carpet"))
    return export_bundle(path, folder / "base.bundle", ["onnx"], normality=normality_file)


@pytest.fixture(scope="module")
def thread(bundle: Bundle, model: VisionLanguageModel) -> Pack:
    """The bundle's knowledge, with a sentence."""
    return calling_normal(bundle.pack("carpet"), model, "thread")


@pytest.fixture(scope="module")
def found(bundle: Bundle, thread: Pack, held: Held) -> Found:
    """By the bundle's engine, as an inspector with eager suppression runs it; but each frame goes through a trunk once,
    for the scores without the sentence and for those with it."""
    second = bundle.manifest.normality
    assert second is not None
    view = second.detector.preprocessing
    before, after = [], []
    with open_engine(bundle) as engine:
        pair = engine.normality()
        assert pair is not None
        trunk, head, explains = engine.trunk(), engine.head(thread), pair.head(thread)
        other = None if second.shared_trunk else pair.trunk()
        for image in held.images:
            features = trunk.infer({"image": image[None]})
            outputs = head.infer(features)
            score, anomaly_map = float(outputs["score"][0]), outputs["anomaly_map"][0].copy()
            explained = explains.infer(features if other is None else other.infer({"image": image[None]}))
            share = suppression_map(explained, anomaly_map.shape, image.shape, view)
            suppressed = suppress_map(anomaly_map, share)
            before.append((score, anomaly_map.max()))
            after.append((suppress_score(score, anomaly_map, suppressed), suppressed.max()))
    return Found(*(Scores(*np.array(each, np.float64).T) for each in (before, after)))


def options_side(options: VisionLanguageOptions) -> int:
    return load_model(options.model, options.weights).size[0]


def calling_normal(pack: Pack, model: VisionLanguageModel, text: str) -> Pack:
    added, normal, row = normality_row(model, text, "carpet")
    arrays = normality.normality_arrays(model, added[None], normal[None], [row])
    return dataclasses.replace(pack, arrays={**pack.arrays, **arrays})


def test_an_inspector_scores_as_its_engine_does(bundle: Bundle, thread: Pack, found: Found, held: Held) -> None:
    with Inspector(bundle, suppression="eager") as inspector:
        for scores, pack in zip(found, (bundle.pack("carpet"), thread), strict=True):
            inspector.swap(pack)
            for place in range(20):
                seen = inspector.inspect(held.images[place])
                assert seen.anomaly_map is not None
                assert (seen.score, seen.anomaly_map.max()) == pytest.approx(
                    (scores.score[place], scores.top[place]), rel=1e-4, abs=1e-6
                )


def test_held_out_defects_are_found_without_a_single_photograph(bundle: Bundle, found: Found, held: Held) -> None:
    if bundle.manifest.detector.method == "memory-bank":
        pytest.skip("a memory bank is made of photographs")
    assert held.all_defects(found.before.score) > 0.9
    assert held.all_defects(found.before.top) > 0.9


def test_the_sentence_thread_lets_threads_pass_and_leaves_other_defects_alone(
    bundle: Bundle, found: Found, held: Held
) -> None:
    for kind in ("good", "thread", *OTHERS):
        assert (held.kinds == kind).sum() >= PARTS
    for name in Scores._fields:
        old, new = getattr(found.before, name), getattr(found.after, name)
        assert held.thread_is_normal(new) - held.thread_is_normal(old) >= LIFT
        for kind in OTHERS:
            # The memory bank finds every scratch; the tiny CLIP takes some of them for threads, and they are lost.
            most = 0.08 if bundle.manifest.detector.method == "memory-bank" and kind == "scratch" else 0.02
            assert abs(held.against_good(kind, new) - held.against_good(kind, old)) < most


def features(learned: Learned, images: NDArray[np.uint8]) -> list[torch.Tensor]:
    """A trunk's features of frames of its size, in torch."""
    with torch.inference_mode():
        parts = [learned.trunk(torch.from_numpy(images[at : at + 50])) for at in range(0, len(images), 50)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def outputs(learned: Learned, seen: list[torch.Tensor]) -> dict[str, NDArray[Any]]:
    """A head's outputs for features of its trunk, in torch."""
    feeds = [torch.from_numpy(array.copy()) for array in head_feeds(learned.pack, learned.spec).values()]
    found = []
    with torch.inference_mode():
        for at in range(0, len(seen[0]), 50):
            found.append([part.numpy() for part in learned.head(*(part[at : at + 50] for part in seen), *feeds)])
    return {port.name: np.concatenate(parts) for port, *parts in zip(learned.spec.outputs, *found, strict=True)}


AMBIGUOUS = (
    "A photo of a carpet for visual inspection",
    "A good photo of a carpet",
    "A close-up photo of the carpet",
)
"""Planted among the anomalous prompts: they fit every carpet."""


def test_contextual_scoring_drops_planted_prompts_that_fit_every_part(
    held: Held, options: VisionLanguageOptions, tmp_path: Path
) -> None:
    clear = winclip_prompts("carpet")
    shown = Held(*(part[:1000] for part in held))
    defects = shown.kinds != "good"
    seen: list[torch.Tensor] = []
    figures = []
    for name, prompts in (("clear", clear), ("planted", clear.add(AMBIGUOUS, "anomalous"))):
        path = tmp_path / f"{name}.json"
        write_prompt_set(path, prompts)
        learned = alfa.learn([], dataclasses.replace(options, prompts=path))
        seen = seen or features(learned, shown.images)
        figures.append(shown.all_defects(outputs(learned, seen)["score"]))
        table, state = (torch.from_numpy(learned.pack.arrays[name].copy()) for name in (TABLE, STATE))
        count = torch.tensor([len(table)], dtype=torch.int32)
        dropped = (alfa.contextual_scores(seen[0], table, count, state) == 0.0).numpy()
    planted = np.isin([prompt.text for prompt in prompts.class_prompts()], AMBIGUOUS)
    assert planted.sum() == len(AMBIGUOUS)
    # Each of them for nearly every picture, whatever it shows.
    assert dropped[:, planted].mean(0).min() > DROPPED
    # What says that a part is bad is kept where it is.
    assert dropped[defects][:, (state.numpy() == 1.0) & ~planted].mean() < 0.1
    assert min(figures) > 0.9
    assert abs(figures[1] - figures[0]) < 0.01


def test_one_sample_in_the_anomalous_bank_finds_a_defect_that_no_prompt_names(
    painted: ModuleType, held: Held, options: VisionLanguageOptions, tmp_path: Path
) -> None:
    states = StateWords(NORMAL_STATES, ("{} with a hole", "{} with a torn hole"))
    write_prompt_set(tmp_path / "holes.json", compose("carpet", states, WINCLIP_TEMPLATES, method="holes"))
    words = dataclasses.replace(options, prompts=tmp_path / "holes.json")
    shown = Held(*(part[:500] for part in held))
    learned = anomalous_few_shot.learn([], words)
    seen = features(learned, shown.images)
    before = outputs(learned, seen)["score"]
    for kind in ("thread", "stain"):
        sample = painted.paint(1, seed=9, kinds=(kind,))
        image, mask = tmp_path / f"{kind}.png", tmp_path / f"{kind}_mask.png"
        image.write_bytes(encode_png(sample.images[1]))
        mask.write_bytes(encode_png(np.repeat(sample.masks[1][..., None] * np.uint8(255), 3, axis=2)))
        after = outputs(anomalous_few_shot.learn([], words, [(image, mask)]), seen)["score"]
        assert shown.against_good(kind, after) > shown.against_good(kind, before) + LIFT
        assert shown.against_good(kind, after) > 0.8


def test_projections_trained_by_named_types_tell_a_sentence_apart_from_the_others(
    painted: ModuleType, held: Held, options: VisionLanguageOptions, model: VisionLanguageModel, tmp_path: Path
) -> None:
    types = [(0, kind) for kind in painted.KINDS]
    pictures = [
        MaskedPicture(image, mask, 0, -1 if kind == "good" else painted.KINDS.index(kind))
        for image, mask, kind in zip(*painted.paint(60, seed=31), strict=True)
    ]
    auxiliary = listed_auxiliary("carpets", ("carpet",), pictures, types)
    text = class_features(model, april_gan_prompts("carpet"))[None]
    projections, _ = train_projections(
        tower_of(model), auxiliary, text, layers=(1, 2, 3, 4), types=type_features(model, auxiliary), device="cpu"
    )
    path = tmp_path / "own.projections"
    write_projections(path, projections, model=model.name, weights=model.weights_sha256)
    own = dataclasses.replace(options, projections=path)
    shown = Held(*(part[:500] for part in held))
    base = april_gan.learn([], own, score="map")
    seen = features(base, shown.images)
    anomaly = outputs(base, seen)["anomaly_map"]
    before = anomaly.max((1, 2))
    assert shown.all_defects(before) > 0.95

    suppressing = normality.learn([], own)
    for said in ("thread", "stain"):
        learned = dataclasses.replace(suppressing, pack=calling_normal(suppressing.pack, model, said))
        suppressed = outputs(learned, seen)["anomaly_map"]
        after = (anomaly * (1.0 - suppressed)).max((1, 2))
        on = {kind: suppressed[shown.kinds == kind][shown.masks[shown.kinds == kind]].mean() for kind in painted.KINDS}
        assert on[said] > 0.4
        assert on[said] > 2.0 * max(share for kind, share in on.items() if kind != said)
        # What the sentence is about loses most of its score; the others are found as they were. (The rank against
        # good parts would not show it: they are close to 0, and what is left of a thread may still lie above them.)
        assert after[shown.kinds == said].mean() < 0.6 * before[shown.kinds == said].mean()
        for kind in painted.KINDS:
            if kind != said:
                assert abs(shown.against_good(kind, after) - shown.against_good(kind, before)) < 0.02
