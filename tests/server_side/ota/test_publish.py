"""What may be published, released and rolled out, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.runtime.deltas import apply_delta, make_delta
from edgead.runtime.errors import BundleError, InputError, KnowledgeError, ReleaseError
from edgead.runtime.knowledge import Pack, write_pack
from edgead.runtime.release import decode_release
from edgead.runtime.spec import Calibration, Preprocessing
from edgead.server_side.ota.init import add_product
from edgead.server_side.ota.publish import (
    engines_of,
    packs_of,
    publish_bundle,
    publish_pack,
    read_knowledge,
    releases_of,
)
from edgead.server_side.ota.releases import make_release
from edgead.server_side.ota.rollouts import pause, roll_out, rollout_of, stop


def deltas_of(repository: Any) -> list[tuple[str, str]]:
    names = [path.rpartition("/")[2] for path in repository.entries("knowledge", "part") if path.endswith(".delta")]
    return sorted(tuple(name.removesuffix(".delta").split("-")) for name in names)  # type: ignore[misc]


def test_the_same_bundle_as_folder_and_as_file_is_one_engine(place: Any, tmp_path: Path, bundle_file: Path) -> None:
    folder = tmp_path / "tiny.bundle"
    with zipfile.ZipFile(bundle_file) as archive:
        archive.extractall(folder)
    (folder / "compiled").mkdir()
    (folder / "compiled" / "plan.engine").write_bytes(b"of this device alone")
    with place.opened() as repository:
        assert publish_bundle(repository, folder).files == []
        assert len(engines_of(repository)) == 1


def test_a_bundle_of_other_products_is_refused(place: Any, tmp_path: Path) -> None:
    other = place.tiny.bundle(tmp_path / "other.edgead", [place.tiny.pack(product="tile")]).path
    with place.opened() as repository, pytest.raises(BundleError, match="add-product"):
        publish_bundle(repository, other)


def test_a_pack_that_fits_no_published_engine_is_refused(place: Any) -> None:
    stranger = place.tiny.pack(spec=place.tiny.detector(Preprocessing(16, 16, rotate=90)))
    with place.opened() as repository, pytest.raises(KnowledgeError, match="published engine"):
        publish_pack(repository, stranger)


def test_a_pack_of_a_product_that_the_repository_does_not_have_is_refused(place: Any) -> None:
    with place.opened() as repository, pytest.raises(InputError, match="add-product"):
        publish_pack(repository, place.tiny.pack(product="tile"))


def test_a_changed_bank_with_the_old_calibration_is_refused_unless_it_came_out_the_same(place: Any) -> None:
    new = place.next_pack()
    lazy = Pack(new.product, new.fingerprint, place.packs[0].calibration, new.arrays)
    with place.opened() as repository, pytest.raises(KnowledgeError, match="Recalibrate"):
        publish_pack(repository, lazy)
    with place.opened() as repository:
        assert publish_pack(repository, lazy, calibrated=True).files


def test_a_new_threshold_alone_is_a_pack_that_may_be_published(place: Any) -> None:
    old = place.packs[0]
    with place.opened() as repository:
        done = publish_pack(repository, Pack("part", old.fingerprint, Calibration(threshold=29.0), old.arrays))
    assert len(done.files) == 2


def test_a_delta_file_is_published_as_the_pack_that_it_makes(place: Any, tmp_path: Path) -> None:
    new = place.next_pack()
    (tmp_path / "new.delta").write_bytes(make_delta(place.packs[0], new))
    (tmp_path / "far.delta").write_bytes(make_delta(new, place.tiny.pack([(1, 2, 3)], first_id=5000)))
    write_pack(tmp_path / "new.safetensors", new)
    with place.opened() as repository:
        assert read_knowledge(repository, tmp_path / "new.delta").digest == new.digest
        assert read_knowledge(repository, tmp_path / "new.safetensors").digest == new.digest
        with pytest.raises(KnowledgeError, match="published pack"):
            read_knowledge(repository, tmp_path / "far.delta")


def test_deltas_lead_from_the_last_releases_to_the_new_pack_and_old_ones_go(place: Any, device: Any) -> None:
    for _ in range(5):
        place.publish(place.next_pack())
        place.release()
    place.publish(place.next_pack())
    digests = [pack.digest for pack in place.packs]
    with place.opened() as repository:
        assert [release.counter for release in releases_of(repository, "part")] == [4, 5, 6]
        assert set(packs_of(repository, "part")) == set(digests[-4:])
        leads = deltas_of(repository)
    into_new = {base for base, result in leads if result == digests[-1]}
    # From the last three releases, and from what a new camera has in its bundle.
    assert into_new == {digests[0], *digests[-4:-1]}
    assert {result for _, result in leads} == set(digests[-2:])
    path = f"knowledge/part/{digests[0]}-{digests[-1]}.delta"
    assert apply_delta(place.packs[0], device.fetch(path)).digest == digests[-1]


def test_a_bank_that_was_fitted_anew_is_published_whole(place: Any) -> None:
    rows = np.random.default_rng(9).uniform(90, 110, (300, 3)).astype(np.float32)
    with place.opened() as repository:
        done = publish_pack(repository, place.tiny.pack(rows, threshold=33.0))
    assert len(done.files) == 1
    assert "stands for another row" in done.skipped[0]


def test_a_release_carries_the_scores_that_the_golden_images_have_under_its_pack(place: Any) -> None:
    with place.opened() as repository:
        release = releases_of(repository, "part")[0]
    assert release.scores["part"]["golden/000.png"] == 0.0
    assert release.scores["part"]["golden/001.png"] == pytest.approx(
        np.linalg.norm(200.0 - place.packs[0].arrays["bank.normal"], axis=1).min(), abs=1e-3
    )
    assert release.must_alarm == {"part": ("golden/001.png",)}
    assert 0 < release.tolerance < 10
    assert release.made_at > 1_700_000_000


def test_knowledge_under_which_a_golden_defect_passes_is_not_released_unless_it_is_meant(place: Any) -> None:
    old = place.packs[0]
    blind = Pack("part", old.fingerprint, Calibration(threshold=500.0, map_threshold=500.0), old.arrays)
    place.publish(blind)
    with place.opened() as repository:
        with pytest.raises(ReleaseError, match="to alarm as before"):
            make_release(repository, "part")
        with pytest.raises(InputError, match="golden images"):
            make_release(repository, "part", now_normal=["golden/9.png"])
        made = make_release(repository, "part", now_normal=["golden/001.png"])
        assert made.must_alarm == {"part": ()}


def test_knowledge_under_which_a_golden_good_part_alarms_is_not_released(place: Any) -> None:
    old = place.packs[0]
    place.publish(Pack("part", old.fingerprint, Calibration(threshold=-1.0, map_threshold=1.0), old.arrays))
    with place.opened() as repository, pytest.raises(ReleaseError, match="to pass as before"):
        make_release(repository, "part")


def test_a_release_of_a_detector_with_a_region_of_interest_is_tested_on_its_golden_images(
    place: Any, tmp_path: Path
) -> None:
    from edgead.runtime.bundle import open_bundle
    from edgead.runtime.golden import golden_inspections
    from edgead.runtime.spec import Region, Tiling

    tiny = place.tiny
    spec = tiny.detector(Preprocessing(16, 16, roi=Region(100, 100, 640, 640), tiles=Tiling(2, 2, 0.0)))
    pack = tiny.pack(spec=spec)
    bundle = tiny.bundle(tmp_path / "roi.edgead", [pack], spec=spec)
    found = golden_inspections(open_bundle(bundle.path), [pack])["part"]
    assert [item.verdict.name for item in found.values()] == ["OK", "NG"]


def test_a_counter_never_goes_back_but_a_new_release_may_name_an_old_pack(place: Any) -> None:
    place.publish(place.next_pack())
    place.release()
    with place.opened() as repository:
        with pytest.raises(ReleaseError, match="greater than 2"):
            make_release(repository, "part", pack=place.packs[0].digest, counter=2)
        made = make_release(repository, "part", pack=place.packs[0].digest[:10])
    assert (made.counter, made.product_packs["part"]) == (3, place.packs[0].digest)


def test_which_pack_is_meant_must_be_clear(place: Any) -> None:
    with place.opened() as repository:
        with pytest.raises(InputError, match="0 packs"):
            make_release(repository, "part")
        with pytest.raises(InputError, match="one published pack"):
            make_release(repository, "part", pack="zz")


def test_only_signed_releases_are_rolled_out_and_never_an_older_one(place: Any) -> None:
    place.publish(place.next_pack())
    place.release()
    with place.opened() as repository:
        with pytest.raises(InputError, match="signed release"):
            roll_out(repository, "part", release=9, percent=1.0)
        with pytest.raises(InputError, match="or a later one"):
            roll_out(repository, "part", release=1, percent=100.0)


def test_a_roll_out_begins_with_a_group_and_only_widens(place: Any) -> None:
    place.publish(place.next_pack())
    place.release(groups=["pilot"], percent=0.0)
    with place.opened() as repository:
        begun = rollout_of(repository, "part")
        assert begun is not None
        assert (begun.release, begun.previous, begun.groups, begun.percent) == (2, 1, ("pilot",), 0.0)
        wider = roll_out(repository, "part", groups=["hall-2"], percent=20.0, error_threshold=0.05, window=60)
        assert (wider.groups, wider.sequence) == (("hall-2", "pilot"), begun.sequence + 1)
        assert (wider.error_threshold, wider.window) == (0.05, 60)
        repository.commit(place.keyring("rollout", "snapshot", "timestamp"))
    with place.opened() as repository, pytest.raises(InputError, match="at least the 20 %"):
        roll_out(repository, "part", percent=5.0)


def test_a_pause_ends_and_a_stop_does_not(place: Any) -> None:
    with place.opened() as repository:
        assert pause(repository, "part").paused
        repository.commit(place.keyring())
        assert not pause(repository, "part", False).paused
        repository.commit(place.keyring())
        assert stop(repository, "part").stopped
        repository.commit(place.keyring("rollout", "snapshot", "timestamp"))
        for go_on in (lambda: pause(repository, "part", False), lambda: roll_out(repository, "part", percent=100.0)):
            with pytest.raises(InputError, match="stopped"):
                go_on()


def test_after_a_stop_new_cameras_are_given_the_release_before_and_the_next_release_starts_anew(place: Any) -> None:
    for _ in range(2):
        place.publish(place.next_pack())
        place.release(groups=["pilot"], percent=0.0)
    with place.opened() as repository:
        record = rollout_of(repository, "part")
        # Release 2 never reached everybody, so the one to fall back to is still the first.
        assert record is not None
        assert (record.release, record.previous) == (3, 1)


def test_a_release_that_the_roll_out_names_is_kept(place: Any) -> None:
    for _ in range(5):
        place.publish(place.next_pack())
        place.release(groups=["pilot"], percent=0.0)
    with place.opened() as repository:
        counters = [release.counter for release in releases_of(repository, "part")]
        packs = packs_of(repository, "part")
    assert 1 in counters
    assert place.packs[0].digest in packs


def test_each_command_needs_the_keys_of_its_role_alone(place: Any) -> None:
    online = ("snapshot", "timestamp")
    with place.opened() as repository:
        publish_pack(repository, place.next_pack())
        with pytest.raises(InputError, match="knowledge"):
            repository.commit(place.keyring("engines", "releases", "rollout", *online))
    with place.opened() as repository:
        publish_pack(repository, place.next_pack())
        repository.commit(place.keyring("knowledge", *online))
    with place.opened() as repository:
        make_release(repository, "part")
        ring = place.keyring("releases", *online)
        del ring.records[next(key for key, record in ring.records.items() if record.role == "releases")]
        with pytest.raises(InputError, match="2 private keys of the role releases"):
            repository.commit(ring)
    with place.opened() as repository:
        make_release(repository, "part")
        repository.commit(place.keyring("releases", *online))


def test_another_product_is_added_and_devices_of_the_first_fetch_nothing_of_it(
    place: Any, device: Any, server: Any, tmp_path: Path
) -> None:
    device.fetch("releases/part/1.json")
    with place.opened() as repository:
        add_product(repository, "tile", place.keyring())
        with pytest.raises(InputError, match="new product"):
            add_product(repository, "tile", place.keyring())
    bundle = place.tiny.bundle(tmp_path / "both.edgead", [place.tiny.pack(product="tile", threshold=31.0)]).path
    with place.opened() as repository:
        publish_bundle(repository, bundle)
        repository.commit(place.keyring())
        made = make_release(repository, "tile")
        repository.commit(place.keyring())
    del server.requests[:]
    assert decode_release(device.fetch(f"releases/tile/{made.counter}.json")).product_packs.keys() == {"tile"}
    del server.requests[:]
    device.fetch("releases/part/1.json")
    assert not [path for path, *_ in server.requests if "tile" in path]


def test_a_damaged_bundle_is_not_published(place: Any, tmp_path: Path, bundle_file: Path) -> None:
    data = bytearray(bundle_file.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.edgead").write_bytes(data)
    with place.opened() as repository, pytest.raises(BundleError):
        publish_bundle(repository, tmp_path / "bad.edgead")
