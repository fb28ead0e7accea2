"""What a round chooses: which easy anomalies give way, and which captions are pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from edgead.server_side.kka.choices import set_of
from edgead.server_side.kka.records import Judgement, Member
from edgead.server_side.kka.rounds import run
from edgead.server_side.kka.seams import Frame
from edgead.server_side.kka.work import WorkFolder


def test_rep_replaces_the_farthest_in_multiples_of_the_limit_that_each_was_judged_by(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    class TwoMeasures(makers_of_tests.DarkEvaluator):  # type: ignore[misc,name-defined]
        """Every other image is measured by a fold whose distances, and limit, are a thousand times as large."""

        def measure(self, names: Sequence[str], frames: Sequence[Frame]) -> list[tuple[float, float]]:
            found: list[tuple[float, float]] = super().measure(names, frames)
            scales = [1000.0 if int(name[-1]) % 2 else 1.0 for name in names]
            return [(scale * each[0], scale * each[1]) for scale, each in zip(scales, found, strict=True)]

    work = new_work('mode = "rep"', rounds=1)
    makers: Any = makers_of_tests.makers(author=makers_of_tests.SizeAuthor((1, 1, 3, 3)))
    run(work, type(makers)(**{**vars(makers), "evaluator": lambda work, number: TwoMeasures()}))
    far = {record.parent: record.distance / record.limit for record in work.records(Judgement, 0)}
    before, after = work.records(Member, 0), work.records(Member, 1)
    kept = [far[member.parent] for member in after if not member.hard]
    gone = {member.parent for member in before} - {member.parent for member in after}
    assert kept
    assert gone
    assert max(kept) <= min(far[name] for name in gone)
    assert not any(member.hard for member in before if member.parent in gone)
    assert set_of(work, 1, "rep") == [(member.parent, member.hard) for member in after]
    judged = [record for at in range(2) for record in work.records(Judgement, at) if not record.faint]
    assert sorted(set_of(work, 1, "add")) == sorted((record.parent, record.hard) for record in judged)
