"""The loop works: an author that prefers what was hard writes what is hard, and what is hard can still be seen.

A small GPT-2 that is taught the grammar here, `trl`, `peft`, the procedural painter and Deep SAD, all of them real, at
a size that two minutes allow. `python -m benchmarks kka` is the same at full size, with what the sets are worth.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.server_side.kka.records import Caption, Image, Judgement, Preference
from edgead.server_side.kka.rounds import facts
from edgead.server_side.kka.seams import UndrawableCaptionError
from edgead.server_side.kka.sets import members
from edgead.server_side.kka.work import trace

pytest.importorskip("trl")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loop() -> Any:
    """The module of the benchmark, which is no package of edgead."""
    sys.path.insert(0, str(Path(__file__).parents[3]))
    try:
        from benchmarks import kka_loop
    finally:
        sys.path.pop(0)
    return kka_loop


@pytest.fixture(scope="module")
def settings(loop: Any) -> Any:
    return loop.LoopSettings(
        normals=60,
        held_out=0,
        reference=0,
        captions=100,
        images=2,
        rounds=2,
        # One evaluator judges all rounds, so that their shares are of one measure.
        evaluator="first",
        # Of the 30 normals in a fold, three may lie farther.
        quantile=0.9,
        author_steps=600,
        evaluator_steps=250,
        prefer_steps=70,
    )


@pytest.fixture(scope="module")
def work(loop: Any, settings: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loop.run_loop(settings, tmp_path_factory.mktemp("loop"), seed=0)


def test_the_author_learns_the_grammar_it_was_taught(work: Any) -> None:
    from edgead.server_side.kka.grammar import describe, parse

    def as_taught(text: str) -> bool:
        try:
            return describe(parse(text)) == text
        except UndrawableCaptionError:
            return False

    captions = work.records(Caption, 0)
    assert sum(as_taught(caption.text) for caption in captions) > 0.7 * len(captions)
    assert len({caption.text for caption in captions}) > 0.9 * len(captions)


def test_the_share_of_what_is_hard_and_can_be_seen_rises_from_the_first_round_to_the_last(work: Any) -> None:
    found = [facts(work, number) for number in range(3)]
    shares = [each["hard"] / each["images"] for each in found]
    assert shares[-1] >= 1.2 * shares[0], shares
    # Of those that can be seen alone, too; and the author does not turn to what nobody sees.
    assert found[-1]["hard_share"] > found[0]["hard_share"]
    assert found[-1]["faint"] <= found[0]["faint"]
    assert work.records(Preference, 0)


def test_what_is_hard_can_be_seen(work: Any, settings: Any) -> None:
    for number in range(3):
        images = {image.id: image for image in work.records(Image, number)}
        hard = [images[judged.parent].visible for judged in work.records(Judgement, number) if judged.hard]
        assert min(hard) >= settings.floor
        assert np.median(hard) >= 1.5 * settings.floor


def test_an_image_of_the_last_set_is_traced_to_the_author_with_the_last_adapter(work: Any) -> None:
    last = [image for image, _ in members(work) if image.round == 2]
    assert last
    chain = trace(work, last[0].id)
    captions = [record for record in chain if isinstance(record, Caption)]
    assert [caption.round for caption in captions] == [2]
    digests = {work.records(Caption, number)[0].made.digest for number in range(3)}
    assert len(digests) == 3
