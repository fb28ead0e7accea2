"""The updater of a device: looks for a release that it should have, and makes it active once it has proved itself.

One poll: refresh the signed metadata; ask the roll-out record what this device should have; fetch what is missing, the
cheapest way; stage it; test engine and release on this machine; replay the last frames; activate; hand it to the
running inspector between two frames. Then it is watched, and confirmed or rolled back. Whatever fails on the way, the
active release stays as it is and inspection goes on. Decisions are in `edgead.runtime.update_rules`.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from edgead.runtime import slots_state
from edgead.runtime.bundle import open_bundle
from edgead.runtime.device_pins import check_pinned, keep_pin
from edgead.runtime.disk import Disk, RealDisk
from edgead.runtime.errors import (
    BundleError,
    EdgeadError,
    EngineError,
    EngineMismatchError,
    FetchContentError,
    FetchError,
    FetchStatusError,
    InputError,
    KnowledgeError,
    ReleaseError,
    SelfTestError,
    StaleError,
    StoreDamagedError,
    UpdateError,
)
from edgead.runtime.fetch import Fetcher
from edgead.runtime.fetch_rules import FetchLimits
from edgead.runtime.frames import FrameRing
from edgead.runtime.live import Health, LiveInspector
from edgead.runtime.release import RELEASE_BYTES, Release, decode_release, digest_of
from edgead.runtime.rollout import RECORD_BYTES, Rollout, decode_rollout
from edgead.runtime.self_test import Shadow, engine_test, release_test, shadow_replay
from edgead.runtime.slots import Active, Store
from edgead.runtime.slots_files import RELEASES
from edgead.runtime.slots_state import State
from edgead.runtime.status_report import StatusReporter
from edgead.runtime.trust import TrustedRepository
from edgead.runtime.update_loop import UpdateLoop
from edgead.runtime.update_outcome import Device, Outcome
from edgead.runtime.update_parts import Parts
from edgead.runtime.update_rules import decide, judge_watch

DEEP_CHECK_S = 86_400.0
"""Seconds between two checks of every byte of the active release."""
SHADOW_FRAMES = 16
"""Frames that are replayed at most."""
_WINDOW_S, _FAILURES = 600.0, 0.1
"""Probation, while no roll-out record says otherwise."""


class DeviceUpdater(UpdateLoop):
    """Keeps a device's store at the release that it should have.

    `poll` and `watch` may be called from one thread at a time; `run` calls them until it is told to stop.

    Args:
        store: of the device.
        device: who it is.
        inspector: the running inspector that takes new releases between two frames; None where another process
            inspects, which then takes them when it starts.
        limits: how patient downloads are.
        target, threads: engine and processor threads for the tests, see `Inspector`.
        clock: seconds since 1970 in UTC.
        disk: that of the store.
        stop: ends waits of downloads.
        rng: for jitter.
        lock_timeout_s: how long to wait for another updater.
        reporter: writes a status after each poll, and whenever something changed, while `run` is at it.
    """

    def __init__(
        self,
        store: Store,
        device: Device,
        inspector: LiveInspector | None = None,
        *,
        limits: FetchLimits | None = None,
        target: str | None = None,
        threads: int | None = None,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
        stop: threading.Event | None = None,
        rng: random.Random | None = None,
        lock_timeout_s: float = 30.0,
        reporter: StatusReporter | None = None,
    ) -> None:
        super().__init__(stop, rng, reporter)
        self._store = store
        self._device = device
        self._inspector = inspector
        self._target = target
        self._threads = threads
        self._clock = clock
        self._disk = disk or RealDisk()
        self._lock_timeout = lock_timeout_s
        self._limits = limits
        self._fetcher = Fetcher(limits, stop=self._stop, rng=self._rng)
        self._record: Rollout | None = None
        self._rollouts: dict[str, bytes] = {}
        self._checked = float("-inf")
        self._refused: str | None = None
        self._good: float | None = None

    def poll(self) -> Outcome:
        """Look once for a release, and make it active if there is one that passes.

        Returns:
            what came of it; errors are in it, and never raised.
        """
        begin = time.monotonic()
        before = self._fetcher.received, self._fetcher.requests
        try:
            with self._store.updating(self._lock_timeout):
                outcome = self._poll()
            self._remember(None)
        except EdgeadError as error:
            outcome = Outcome("failed", error.got[:300], error=error)
            self._remember(error)
        except Exception as error:  # whatever a foreign library comes up with must not end the updates of a device
            surprise = UpdateError(
                wanted="a poll without surprises",
                got=f"{type(error).__name__}: {error}"[:300],
                next_step="Report it, with this message; the active release is as it was.",
            )
            surprise.__cause__ = error
            outcome = Outcome("failed", surprise.got, error=surprise)
            self._remember(surprise)
        finally:
            self._fetcher.close()
            self._refused = None
        self.failures = self.failures + 1 if outcome.status == "failed" else 0
        active = self._active_release()
        return replace(
            outcome,
            release=None if active is None else active.counter,
            received=self._fetcher.received - before[0],
            requests=self._fetcher.requests - before[1],
            seconds=time.monotonic() - begin,
        )

    def watch(self) -> Outcome | None:
        """Look at the release that is on probation in the running inspector, and whether it still is the active one.

        Returns:
            whether it was confirmed or rolled back, or another one taken that another process made active; None while
            neither.
        """
        if self._inspector is None:
            return None
        try:
            outcome = self._watch(self._inspector, self._inspector.health)
        except EdgeadError as error:
            outcome = Outcome("failed", error.got[:300], error=error)
        if outcome is None:
            return None
        active = self._active_release()
        return replace(outcome, release=None if active is None else active.counter)

    def confirm(self, health: Health | None = None) -> None:
        """Say that the active release has proved itself, and remove what is then of no use.

        Args:
            health: of the release that ran; None for the active one.

        Raises:
            ReleaseError: another release is active by now, or none.
            StorageError: the file system refused.
        """
        digest = health.digest if health is not None else self._store.state().active
        if digest is None:
            raise ReleaseError(wanted="an active release", got="none", next_step="Take one with: edgead device update")
        self._store.confirm(digest)
        self._store.garbage()

    def self_test(self, candidate: Active) -> None:
        """Test engine and knowledge of a candidate on this machine. Whoever knows the result already may override it.

        Args:
            candidate: as the store loaded it, every byte checked.

        Raises:
            SelfTestError, EngineError, BundleError, KnowledgeError, ReleaseError: it must not become active here.
            MissingDependencyError, EngineMismatchError: it cannot be tested here.
        """
        bundle = open_bundle(candidate.engine, verify=False)
        engine_test(bundle, target=self._target, threads=self._threads)
        release_test(bundle, candidate.release, candidate.packs, target=self._target, threads=self._threads)

    def _remember(self, error: EdgeadError | None) -> None:
        """An alarm in the store from stale metadata, a wrong clock or a day of failed polls to the next good one."""
        now = self._clock()
        if error is None:
            self._good = now
        since, got = now if self._good is None else self._good, "" if error is None else error.got
        answered = not isinstance(error, FetchError) or isinstance(error, (FetchStatusError, FetchContentError))

        def change(state: State) -> State:
            if error is None:
                return slots_state.thawed(state)
            if isinstance(error, StaleError):
                return slots_state.frozen(state, now, got)
            return slots_state.failed(state, since, now, got, answered=answered)

        with contextlib.suppress(EdgeadError):  # the outcome of the poll counts; the next one says it again
            self._store.remember(change)

    def _poll(self) -> Outcome:
        state = self._store.state()
        repository = TrustedRepository(
            self._device.repository,
            self._device.root,
            self._store.metadata,
            self._fetcher,
            now=self._clock(),
            last_seen=state.last_seen,
        )
        made = repository.refresh()
        if made > state.last_seen:
            self._store.see(made)
        record = self._rollout(repository)
        self._record = record
        active = self._active_release()
        healed: tuple[str, ...] = ()
        trouble: EdgeadError | None = None
        try:
            healed = self._heal(repository, record, active)
        except EdgeadError as error:
            trouble = error  # what cannot be had any more is left to the next release
        active = self._active_release()
        decision = decide(
            record,
            device_id=self._device.device_id,
            groups=self._device.groups,
            active=None if active is None else active.counter,
            highest=state.counter,
        )
        if decision.action == "go back":
            self._go_back(decision.reason)
            return Outcome("rolled back", decision.reason)
        if decision.counter is None:
            if trouble is not None:
                raise trouble
            return Outcome("current", f"mended: {', '.join(healed)}" if healed else decision.reason)
        data, release = self._release(repository, decision.counter)
        if digest_of(data) in state.quarantined:
            return Outcome("current", f"release {release.counter} is quarantined here")
        pin = check_pinned(repository, self._device, release, max(made, state.last_seen))
        parts = Parts(self._store, repository, self._fetcher, self._disk, self._device.product)
        parts.bring(release)
        if pin is not None:
            keep_pin(self._disk, self._store.folder, pin)
        self._store.stage(data)
        return replace(self._install(), way=parts.way)

    def _watch(self, inspector: LiveInspector, health: Health) -> Outcome | None:
        state = self._store.state()
        if state.active != health.digest:
            if state.active is None or state.active == self._refused:
                return None
            self._refused = state.active  # once between two polls is enough to try
            inspector.take(self._store.active())
            return Outcome("activated", "another process made it active")
        if state.confirmed:
            return None
        window = _WINDOW_S if self._record is None else float(self._record.window)
        threshold = _FAILURES if self._record is None else self._record.error_threshold
        elapsed = time.monotonic() - health.since
        verdict = judge_watch(health.frames, health.failures, elapsed, window, threshold)
        reason = f"{health.failures} of {health.frames} frames without an answer"
        if verdict == "confirm":
            self.confirm(health)
            return Outcome("confirmed", reason)
        if verdict == "go back":
            self._go_back(reason)
            return Outcome("rolled back", reason)
        return None

    def _install(self) -> Outcome:
        """Test the candidate and make it active."""
        candidate = self._store.candidate()
        try:
            self.self_test(candidate)
            shadow = self._shadow(candidate)
        except EngineMismatchError:
            raise  # this machine lacks a plan, which `edgead compile` makes
        except (SelfTestError, EngineError, BundleError, KnowledgeError, ReleaseError) as error:
            # An engine that refuses, or a bundle or pack that breaks on use, failed here as much as a wrong score.
            self._store.reject(f"wanted {error.wanted}, got {error.got}")
            return Outcome("rejected", error.got[:300], error=error)
        active = self._store.activate()
        if self._inspector is None:
            return Outcome("activated", f"release {active.release.counter}", shadow=shadow, restart=True)
        try:
            self._inspector.take(active)
        except EdgeadError as error:
            self._go_back(f"the inspector refused it: {error.got}")
            return Outcome("rejected", error.got[:300], error=error)
        return Outcome("activated", f"release {active.release.counter}", shadow=shadow)

    def _shadow(self, candidate: Active) -> Shadow | None:
        frames = FrameRing(self._store.frames, disk=self._disk).read(SHADOW_FRAMES)
        product = self._device.product
        try:
            old = self._store.active()
        except StoreDamagedError:
            return None
        if not frames or product not in old.packs:
            return None
        return shadow_replay(
            frames,
            (old.engine, old.packs[product]),
            (candidate.engine, candidate.packs[product]),
            target=self._target,
            threads=self._threads,
        )

    def _go_back(self, reason: str) -> None:
        active = self._store.rollback(reason)
        if self._inspector is not None:
            self._inspector.take(active)

    def _rollout(self, repository: TrustedRepository) -> Rollout | None:
        data = repository.read(f"rollout/{self._device.product}.json", RECORD_BYTES, kept=self._rollouts)
        record = None if data is None else decode_rollout(data)
        if record is not None and record.product != self._device.product:
            raise InputError(
                wanted=f"the roll-out of {self._device.product!r}",
                got=f"that of {record.product!r} in its place",
                next_step="Publish it with: edgead ota rollout",
            )
        return record

    def _release(self, repository: TrustedRepository, counter: int) -> tuple[bytes, Release]:
        path = f"releases/{self._device.product}/{counter}.json"
        data = repository.read(path, RELEASE_BYTES)
        if data is None:
            raise ReleaseError(
                wanted=path, got="no release that its signers signed", next_step="Sign it with: edgead ota release"
            )
        release = decode_release(data)
        if release.counter != counter or set(release.product_packs) != {self._device.product}:
            raise ReleaseError(
                wanted=f"release {counter} of {self._device.product!r} under that name",
                got=f"release {release.counter} of {', '.join(release.product_packs)}",
                next_step="An old release under a new name is refused; release it under a new counter.",
            )
        return data, release

    def _active_release(self) -> Release | None:
        digest = self._store.state().active
        if digest is None:
            return None
        try:
            data = self._disk.read(self._store.folder / RELEASES / f"{digest}.json", RELEASE_BYTES + 1)
            return decode_release(data) if digest_of(data) == digest else None
        except (OSError, EdgeadError):
            return None

    def _heal(self, repository: TrustedRepository, record: Rollout | None, active: Release | None) -> tuple[str, ...]:
        """Fetch what rotted of the active release, and name it."""
        digest, now = self._store.state().active, time.monotonic()
        if digest is None or (active is not None and now - self._checked < DEEP_CHECK_S):
            return ()
        damaged: tuple[str, ...] = ()
        data = b""
        if active is None:
            damaged = (f"{RELEASES}/{digest}.json",)
            for counter in () if record is None else (record.release, record.previous):
                found = None if counter is None else repository.read(self._path(counter), RELEASE_BYTES)
                if found is not None and digest_of(found) == digest:
                    data, active = found, decode_release(found)
        if active is None:
            return ()
        damaged += self._store.missing(active)
        if damaged:
            Parts(self._store, repository, self._fetcher, self._disk, self._device.product).bring(active)
            if data:
                self._store.stage(data)
        self._checked = now
        return damaged

    def _path(self, counter: int) -> str:
        return f"releases/{self._device.product}/{counter}.json"


__all__ = ["DeviceUpdater"]
