"""What a device refuses of a release that was signed; numbers are the rows of the table of faults."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("tuf")

import msgspec

from edgead.runtime.errors import KnowledgeError, ReleaseError, SelfTestError
from edgead.runtime.knowledge import Pack
from edgead.runtime.live import LiveInspector
from edgead.runtime.release import decode_release, encode_release
from edgead.runtime.spec import Calibration


def test_row_22_a_pack_for_another_engine_is_refused_before_activation(world: Any, camera: Any) -> None:
    world.publish(world.pack())
    counter = world.release(out=False)
    release = decode_release(world.read(f"releases/part/{counter}.json"))
    foreign = Pack("part", "f" * 64, Calibration(threshold=1.0), dict(world.packs[-1].arrays))
    from edgead.runtime.knowledge import encode_pack

    data = encode_pack(foreign)
    with world.opened() as repository:
        repository.add(f"knowledge/part/{foreign.digest}.safetensors", data)
        repository.commit(world.keyring())
    made = msgspec.structs.replace(
        release,
        counter=9,
        product_packs={"part": foreign.digest},
        sizes={release.engine: release.sizes[release.engine], foreign.digest: len(data)},
    )
    world.put_release(9, encode_release(made))
    camera.refused((ReleaseError, KnowledgeError))
    assert camera.store.state().candidate is None
    world.put_release(10, encode_release(msgspec.structs.replace(made, counter=10, fingerprint="f" * 64)))
    camera.refused(ReleaseError, "feature space")


def changed_release(world: Any, change: Callable[[Any], Any]) -> None:
    """Sign release 2 with something in it that its publisher's test would not have let through."""
    world.publish(world.pack())
    world.release(out=False)
    release = decode_release(world.read("releases/part/2.json"))
    world.put_release(2, encode_release(change(release)))


def test_row_23_a_new_threshold_and_its_bank_become_active_together(world: Any, camera: Any, tiny: ModuleType) -> None:
    thresholds = {pack.digest[:12]: pack.calibration.threshold for pack in world.packs}
    with LiveInspector(camera.store.active()) as inspector:
        for _ in range(3):
            world.update()
            thresholds[world.packs[-1].version] = world.packs[-1].calibration.threshold
            assert camera.poll(inspector=inspector).status == "activated"
            result = inspector.inspect(tiny.frame())
            assert result.knowledge == world.packs[-1].version
            assert result.threshold == thresholds[result.knowledge]
            active = camera.store.active().packs["part"]
            assert thresholds[active.version] == active.calibration.threshold
    # A release names a pack; there is no field for a threshold beside it.
    assert "threshold" not in decode_release(world.read("releases/part/4.json")).__struct_fields__


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda r: msgspec.structs.replace(r, scores={"part": {p: s + 50 for p, s in r.scores["part"].items()}}),
            "score",
        ),
        (lambda r: msgspec.structs.replace(r, must_alarm={"part": tuple(r.scores["part"])}), "to alarm"),
        (lambda r: msgspec.structs.replace(r, scores={}), "scores of golden images"),
    ],
    ids=["scores off", "a defect that passes", "no scores"],
)
def test_row_32_a_release_that_fails_its_test_is_quarantined(
    world: Any, camera: Any, change: Callable[[Any], Any], match: str
) -> None:
    changed_release(world, change)
    outcome = camera.refused(SelfTestError, match)
    assert outcome.status == "rejected"
    assert len(camera.store.state().quarantined) == 1
    assert "rejected" in camera.store.state().alarm
    again = camera.poll()
    assert (again.status, again.release) == ("current", 1)
    assert "quarantined" in again.reason


def test_row_32_an_intact_pack_on_a_broken_engine_is_quarantined(
    worlds: ModuleType, world: Any, camera: Any, tiny: ModuleType
) -> None:
    from edgead.server_side.ota.publish import publish_bundle

    # It gives scores, and other ones than when the bundle was made.
    worlds.bundle(world.home / "broken.edgead", tiny, world.packs[0], off=40.0)
    with world.opened() as repository:
        published = publish_bundle(repository, world.home / "broken.edgead")
        repository.commit(world.keyring())
    digest = next(path for path, _ in published.files if "engines/" in path).split("/")[1].removesuffix(".edgead")
    world.publish(world.pack())
    from edgead.server_side.ota.releases import make_release

    with world.opened() as repository:
        made = make_release(repository, "part", pack=world.packs[-1].digest, engine=digest)
        repository.commit(world.keyring())
    world.put_release(made.counter, encode_release(made))
    outcome = camera.refused(SelfTestError, "engine test")
    assert outcome.status == "rejected"
    assert camera.store.state().quarantined
