"""The store of a device in its ordinary life, the decisions behind it, and random lives with random faults."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace

from edgead.runtime import slots_state
from edgead.runtime.errors import (
    BundleError,
    KnowledgeError,
    ReleaseError,
    StorageError,
    StoreDamagedError,
)
from edgead.runtime.knowledge import encode_pack
from edgead.runtime.release import decode_release, digest_of, encode_release
from edgead.runtime.slots import Store
from edgead.runtime.slots_state import Found, State


def _helper() -> ModuleType:
    """Tests are no package, so the module beside this one is loaded by its path."""
    path = Path(__file__).with_name("store_faults.py")
    spec = importlib.util.spec_from_file_location("edgead_tests_store", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "Parts"):
        spec.loader.exec_module(module)
    return module


faults = _helper()
OLD, NEW, LATER = faults.OLD, faults.NEW, faults.LATER
A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store that runs the old release."""
    store = Store(tmp_path / "store", disk=faults.QuickDisk())
    faults.install(store, OLD)
    return store


def test_a_new_store_has_nothing_to_inspect_with_and_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.state() == State()
    for call in (store.active, store.candidate, store.start):
        with pytest.raises(StoreDamagedError, match="stage and activate") as caught:
            call()
        assert caught.value.fetch == ()
    with pytest.raises(ReleaseError):
        store.activate()
    with pytest.raises(ReleaseError):
        store.confirm(A)
    store.reject("nothing there")
    assert store.state().quarantined == ()


def test_a_release_goes_from_staged_to_active_to_confirmed(store: Store) -> None:
    digest = faults.stage(store, NEW)
    assert digest == NEW.digest
    faults.check_whole(store.active(), [OLD])
    faults.check_whole(store.candidate(), [NEW])
    faults.check_whole(store.activate(), [NEW])
    state = store.state()
    assert (state.active, state.previous, state.candidate, state.confirmed) == (NEW.digest, OLD.digest, None, False)
    store.confirm(NEW.digest)
    store.confirm(NEW.digest)
    assert store.state().confirmed
    faults.check_whole(store.rollback("by hand"), [OLD])
    state = store.state()
    assert (state.active, state.previous, state.quarantined) == (OLD.digest, None, (NEW.digest,))
    assert state.alarm == f"rolled back from {NEW.digest[:12]}: by hand"


def test_the_files_of_a_store_lie_where_they_are_said_to(store: Store) -> None:
    names = {path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file()}
    assert names == {
        "state.a",
        "state.b",
        "state.lock",
        "update.lock",
        f"engines/{OLD.engine_digest}.edgead",
        f"packs/{OLD.pack_digest('bolt')}.safetensors",
        f"packs/{OLD.pack_digest('nut')}.safetensors",
        f"releases/{OLD.digest}.json",
        f"good/{OLD.digest}",
    }
    folders = (store.downloads, store.frames, store.metadata, store.spool)
    assert all(folder.is_dir() for folder in folders)


def test_a_release_with_a_counter_that_is_not_higher_is_refused(store: Store) -> None:
    faults.install(store, LATER)
    for parts in (NEW, OLD, faults.release(9, engine_version=1, pack_version=1)):
        with pytest.raises(ReleaseError, match="counter above 9"):
            faults.stage(store, parts)
    # A new release may name the old pack and the old engine.
    again = faults.release(10, engine_version=1, pack_version=1)
    faults.check_whole(faults.install(store, again), [again])
    assert store.active().engine.name == f"{OLD.engine_digest}.edgead"


def test_an_old_release_under_a_new_name_is_refused(store: Store) -> None:
    faults.install(store, NEW)
    renamed = encode_release(replace(decode_release(OLD.record), name="brand-new"))
    with pytest.raises(ReleaseError, match="counter"):
        store.stage(renamed)


def test_the_counter_does_not_live_in_the_cache_of_metadata(store: Store) -> None:
    faults.install(store, NEW)
    store.see(1_900_000_000)
    shutil.rmtree(store.metadata)
    anew = Store(store.folder, disk=faults.QuickDisk())
    with pytest.raises(ReleaseError, match="counter"):
        faults.stage(anew, faults.release(1, pack_version=3))
    assert anew.state().last_seen == 1_900_000_000
    assert anew.metadata.is_dir()


def test_the_last_seen_time_only_goes_forward(store: Store) -> None:
    assert store.see(1_800_000_000) == 1_800_000_000
    assert store.see(5) == 1_800_000_000
    assert Store(store.folder).state().last_seen == 1_800_000_000


def test_a_rejected_candidate_is_never_staged_again(store: Store) -> None:
    faults.stage(store, NEW)
    store.reject("scores off")
    assert store.state().candidate is None
    assert "scores off" in store.state().alarm
    with pytest.raises(ReleaseError, match="quarantined"):
        faults.stage(store, NEW)
    faults.check_whole(store.start(), [OLD])


def test_staging_again_what_is_staged_or_active_changes_nothing(store: Store) -> None:
    faults.stage(store, OLD)
    before = store.state()
    faults.stage(store, OLD)
    assert store.state() == before
    faults.stage(store, NEW)
    before = store.state()
    faults.stage(store, NEW)
    assert store.state() == before


def test_a_release_is_not_staged_before_all_of_it_is_here(store: Store) -> None:
    record = decode_release(NEW.record)
    assert len(store.missing(record)) == 3
    with pytest.raises(StoreDamagedError) as caught:
        store.stage(NEW.record)
    assert caught.value.fetch == store.missing(record)
    store.put_engine([NEW.engine], NEW.engine_digest, len(NEW.engine))
    store.apply_delta(faults.delta("bolt"))
    assert store.missing(record) == (f"packs/{NEW.pack_digest('nut')}.safetensors",)
    with pytest.raises(StoreDamagedError):
        store.stage(NEW.record)
    store.apply_delta(faults.delta("nut"))
    store.stage(NEW.record)
    assert store.missing(record) == ()


def test_a_release_whose_parts_do_not_belong_together_is_refused(store: Store) -> None:
    before = store.state()
    foreign_engine = faults.engine(5, b"\1" * 32)
    store.put_engine([foreign_engine], digest_of(foreign_engine), len(foreign_engine))
    mixed = encode_release(
        replace(
            decode_release(NEW.record),
            engine=digest_of(foreign_engine),
            product_packs={"bolt": OLD.pack_digest("bolt")},
            sizes={digest_of(foreign_engine): len(foreign_engine), OLD.pack_digest("bolt"): len(OLD.packs["bolt"])},
        )
    )
    with pytest.raises(ReleaseError, match="feature space"):
        store.stage(mixed)
    foreign_pack = encode_pack(faults.pack("bolt", 5, faults.detector(b"\1" * 32)))
    digest = store.put_pack(foreign_pack)
    mixed = encode_release(
        replace(
            decode_release(OLD.record),
            counter=5,
            product_packs={"bolt": digest},
            sizes={OLD.engine_digest: len(OLD.engine), digest: len(foreign_pack)},
        )
    )
    with pytest.raises(KnowledgeError, match="feature space"):
        store.stage(mixed)
    assert store.state() == before


def test_an_engine_that_is_no_bundle_is_refused(store: Store) -> None:
    body = b"no bundle"
    store.put_engine([body], digest_of(body), len(body))
    record = replace(
        decode_release(OLD.record),
        counter=5,
        engine=digest_of(body),
        sizes={digest_of(body): len(body), **{digest_of(data): len(data) for data in OLD.packs.values()}},
    )
    with pytest.raises(BundleError):
        store.stage(encode_release(record))
    assert store.state().candidate is None


@pytest.mark.parametrize("body", [b"short", NEW.engine[:-1] + b"!", NEW.engine + b"more"])
def test_an_engine_of_other_bytes_is_not_kept(store: Store, tmp_path: Path, body: bytes) -> None:
    with pytest.raises(BundleError, match="engine"):
        store.put_engine([body], NEW.engine_digest, len(NEW.engine))
    path = store.downloads / "engine"
    path.write_bytes(body)
    with pytest.raises(BundleError):
        store.take_engine(path, NEW.engine_digest)
    assert path.read_bytes() == body
    assert not list(store.folder.glob(f"engines/{NEW.engine_digest}*"))


def test_a_downloaded_engine_is_taken_without_a_copy(store: Store) -> None:
    path = store.downloads / "engine"
    path.write_bytes(NEW.engine)
    store.take_engine(path, NEW.engine_digest)
    assert not path.exists()
    assert (store.folder / f"engines/{NEW.engine_digest}.edgead").read_bytes() == NEW.engine
    store.garbage()  # what came for a release that is not staged yet stays
    assert store.missing(decode_release(NEW.record)) == tuple(
        sorted(f"packs/{NEW.pack_digest(product)}.safetensors" for product in ("bolt", "nut"))
    )


@pytest.mark.parametrize("place", range(0, 1000, 97))
def test_a_flipped_bit_in_a_pack_or_delta_is_refused(store: Store, place: int) -> None:
    for data, put in ((NEW.packs["bolt"], store.put_pack), (faults.delta(), store.apply_delta)):
        wrong = bytearray(data)
        wrong[place % len(wrong)] ^= 4
        with pytest.raises(KnowledgeError):
            put(bytes(wrong), NEW.pack_digest("bolt")) if put == store.put_pack else put(bytes(wrong))
    assert len(list(store.folder.glob("packs/*"))) == 2


def test_a_delta_on_another_base_names_the_pack_to_fetch(store: Store) -> None:
    with pytest.raises(StoreDamagedError) as caught:
        store.apply_delta(faults.delta("bolt", 2, 3))
    assert caught.value.fetch == (f"packs/{NEW.pack_digest('bolt')}.safetensors",)
    # In their order they all apply, and twice is as good as once.
    for _ in range(2):
        store.apply_delta(faults.delta("bolt", 1, 2))
        assert store.apply_delta(faults.delta("bolt", 2, 3)) == faults.release(3).pack_digest("bolt")
    assert len(list(store.folder.glob("packs/*"))) == 4


def test_what_nothing_names_is_removed_and_the_rest_stays(store: Store) -> None:
    faults.install(store, NEW)
    faults.install(store, LATER)
    faults.stage(store, faults.release(12))
    store.see(1_800_000_000)
    store.see(1_800_000_001)
    assert store.garbage() == len(OLD.engine) + len(OLD.record) + sum(map(len, OLD.packs.values()))
    assert store.garbage() == 0
    faults.check_whole(store.candidate(), [faults.release(12)])
    faults.check_whole(store.rollback("a trial"), [NEW])


def test_garbage_keeps_what_either_copy_of_the_state_names(store: Store) -> None:
    faults.install(store, NEW)
    faults.install(store, LATER, confirmed=False)  # the other copy still has the old release as previous one
    store.garbage()
    (store.folder / slots_state_copy(store)).write_bytes(b"")
    faults.check_whole(Store(store.folder).start(), [NEW, LATER])


def slots_state_copy(store: Store) -> str:
    """The copy of the state that holds."""
    return ("state.a", "state.b")[store.state().sequence % 2]


def test_an_unconfirmed_release_is_nothing_to_go_back_to(store: Store) -> None:
    faults.install(store, NEW, confirmed=False)
    faults.install(store, LATER, confirmed=False)
    assert store.state().previous == OLD.digest
    faults.check_whole(store.rollback("a trial"), [OLD])


def test_only_the_release_that_ran_is_confirmed(store: Store) -> None:
    faults.install(store, NEW, confirmed=False)
    with pytest.raises(ReleaseError, match="confirm"):
        store.confirm(OLD.digest)
    assert not store.state().confirmed


def test_the_state_has_these_bytes() -> None:
    state = State(sequence=3, active=A, counter=7, last_seen=9, alarm="x")
    data = slots_state.encode_state(state)
    assert data == (
        b'{"checksum":"375a0380d0920187cc36217cbf6e91da10798c28f2d5170b896ac2abc0105639","state":{'
        b'"active":"' + A.encode() + b'","alarm":"x","candidate":null,"confirmed":false,"counter":7,"last_seen":9,'
        b'"newest":null,"previous":null,"quarantined":[],"schema":1,"sequence":3,"starts":0}}'
    )
    assert digest_of(data[data.index(b'"state":') + 8 : -1]).encode() == data[13:77]
    assert slots_state.decode_state(data) == state


def test_no_edited_copy_of_the_state_is_taken() -> None:
    data = slots_state.encode_state(State(sequence=3, active=A, counter=7))
    for place in range(len(data)):
        for wrong in (data[:place], data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]):
            with pytest.raises(StoreDamagedError):
                slots_state.decode_state(wrong)
    for wrong in (b"", b"\0" * 500, b"[" * 60_000, data + b" ", b"x" * 70_000):
        with pytest.raises(StoreDamagedError):
            slots_state.decode_state(wrong)


def test_a_state_made_anew_prefers_whole_then_confirmed_then_newest_releases() -> None:
    found = [
        Found(A, 9, whole=False, good=True),
        Found(B, 8, whole=True, good=False),
        Found(C, 3, whole=True, good=True),
        Found(D, 2, whole=True, good=True),
    ]
    state = slots_state.recovered(found)
    assert state is not None
    assert (state.active, state.previous, state.confirmed, state.counter) == (C, D, True, 9)
    state = slots_state.recovered(found[:2])
    assert state is not None
    assert (state.active, state.previous, state.confirmed) == (B, None, False)
    assert slots_state.recovered([]) is None


def test_old_quarantines_are_forgotten_first() -> None:
    state = State()
    for number in range(slots_state.MOST_QUARANTINED + 5):
        state = slots_state.rejected(replace(state, candidate=f"{number:064x}"), "x" * 5000)
    assert len(state.quarantined) == slots_state.MOST_QUARANTINED
    assert state.quarantined[-1] == f"{slots_state.MOST_QUARANTINED + 4:064x}"
    assert len(state.alarm) == 1000
    assert len(slots_state.encode_state(state)) < slots_state.STATE_BYTES


class Lives(RuleBasedStateMachine):
    """A device that updates, starts, rolls back and is refused by its disk in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="edgead-lives-"))
        self.folder = self.home / "store"
        self.disk = faults.FailingDisk(0, errno.EIO)
        self.store = Store(self.folder, disk=self.disk, lock_timeout_s=5)
        self.next = 2
        self.counter = -1
        self.seen = 0
        self.known = {OLD.digest: OLD}

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    @initialize()
    def install(self) -> None:
        faults.install(self.store, OLD)

    @rule(steps=st.integers(1, 40), code=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS]), lasting=st.booleans())
    def break_disk(self, steps: int, code: int, lasting: bool) -> None:
        self.disk.at, self.disk.code, self.disk.lasting = self.disk.steps + steps, code, lasting

    @rule()
    def mend_disk(self) -> None:
        self.disk.at, self.disk.lasting = 0, False

    @rule(confirmed=st.booleans())
    def update(self, confirmed: bool) -> None:
        parts = faults.release(self.next)
        self.next += 1
        self.known[parts.digest] = parts
        self._try(lambda: faults.install(self.store, parts, confirmed=confirmed))

    @rule()
    def stage_only(self) -> None:
        parts = faults.release(self.next)
        self.next += 1
        self.known[parts.digest] = parts
        self._try(lambda: faults.stage(self.store, parts))

    @rule()
    def activate(self) -> None:
        self._try(self.store.activate)

    @rule()
    def start(self) -> None:
        self.store = Store(self.folder, disk=self.disk, lock_timeout_s=5)
        self.store.start()

    @rule()
    def confirm(self) -> None:
        self._try(lambda: self.store.confirm(str(self.store.state().active)))

    @rule()
    def rollback(self) -> None:
        self._try(lambda: self.store.rollback("a trial"))

    @rule()
    def reject(self) -> None:
        self._try(lambda: self.store.reject("a trial"))

    @rule()
    def garbage(self) -> None:
        self._try(self.store.garbage)

    @rule(when=st.integers(0, 100))
    def see(self, when: int) -> None:
        self._try(lambda: self.store.see(when))

    @rule(which=st.sampled_from(["state.a", "state.b"]))
    def lose_a_copy(self, which: str) -> None:
        # One copy at a time: a device starts, and so mends, between two faults of this kind.
        self.mend_disk()
        self.store.start()
        (self.folder / which).write_bytes(b"\0" * 100)
        self.counter, self.seen = -1, 0
        self.store.start()

    def _try(self, action: Callable[[], object]) -> None:
        with contextlib.suppress(StorageError, ReleaseError):
            action()

    @invariant()
    def one_whole_release_is_active(self) -> None:
        if not self.folder.exists():
            return
        state = self.store.state()
        faults.check_whole(self.store.active(), self.known.values())
        assert state.active not in state.quarantined
        assert state.previous != state.active
        assert state.counter >= self.counter
        assert state.last_seen >= self.seen
        self.counter, self.seen = state.counter, state.last_seen


Lives.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRandomLives = Lives.TestCase
