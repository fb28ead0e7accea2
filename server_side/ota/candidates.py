"""What cameras propose, as the publisher keeps it until a person decides.

    DEVICE/DIGEST.candidate     what came, verified; never changed
    DEVICE/DIGEST.json          the decision; not there while the candidate is new

The same candidate is kept once, however often and by whatever way it comes, and one that was decided stays decided.
Nothing here reaches a camera: only `edgead ota candidates accept` makes rows of it, under ids of the publisher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from edgead.runtime.candidates import CANDIDATE_BYTES, SUFFIX, Candidate, decode_candidate
from edgead.runtime.disk import PART, Disk, RealDisk, locked, put_file
from edgead.runtime.errors import CandidateError, EdgeadError, InputError, StorageError, storage_errors
from edgead.runtime.release import Counter
from edgead.runtime.spec import Digest, canonical_json
from edgead.server_side.ota.devices import Devices

SCHEMA = 1
REASON = 1000
_DECISION = ".json"
_DECISION_BYTES = 16 * 2**10
_WAIT_S = 10.0
_RESERVE = 64 * 2**20
"""Bytes that stay free on the publisher's disk."""

Keys = Mapping[str, bytes] | Callable[[str], bytes | None]
"""Public key of a device by its name, 32 bytes."""
State = Literal["new", "accepted", "declined"]


class Decision(Struct, frozen=True, forbid_unknown_fields=True):
    """What a person made of a candidate.

    Attributes:
        id: digest of the candidate.
        state: `accepted` or `declined`.
        who: the person.
        when: seconds since 1970.
        reason: why it was declined.
        release: counter of the release that has its rows.
        schema: version of this record.
    """

    id: Digest
    state: Literal["accepted", "declined"]
    who: Annotated[str, Meta(max_length=128)]
    when: Counter
    reason: Annotated[str, Meta(max_length=REASON)] = ""
    release: Counter | None = None
    schema: int = SCHEMA


@dataclass(frozen=True, eq=False)
class Entry:
    """A candidate with what became of it.

    Attributes:
        id: its digest.
        candidate: what came.
        decision: None while it is new.
    """

    id: str
    candidate: Candidate
    decision: Decision | None

    @property
    def state(self) -> State:
        return "new" if self.decision is None else self.decision.state


@dataclass(frozen=True)
class StoreLimits:
    """What a store holds at most, so that a stolen device cannot fill a disk.

    Attributes:
        new_per_device: candidates of one device that nobody decided on.
        files: candidates in all.
        bytes: of all candidates.
    """

    new_per_device: int = 200
    files: int = 20_000
    bytes: int = 8 * 2**30


class UnknownDeviceError(CandidateError):
    """A candidate is from a device that the publisher does not know."""


class FullError(StorageError):
    """A store has no room for a further candidate."""


def keys_of(devices: Devices) -> Callable[[str], bytes | None]:
    """Keys of a registry, asked for anew each time."""

    def key(device: str) -> bytes | None:
        return next((bytes.fromhex(one.key) for one in devices.all() if one.device == device), None)

    return key


def accept_candidate(data: bytes, keys: Keys) -> Candidate:
    """A candidate that a known device signed. Nobody gets known by sending one.

    Args:
        data: as it came.
        keys: of the devices that the publisher knows.

    Raises:
        UnknownDeviceError: of a device that is not known.
        CandidateError: no candidate, signed with another key, or with a damaged picture.
    """
    candidate = decode_candidate(data)
    check_signer(candidate, keys)
    candidate.frame()
    candidate.region()
    return candidate


def check_signer(candidate: Candidate, keys: Keys) -> None:
    """Check that a device which the publisher knows today signed a candidate.

    Raises:
        UnknownDeviceError: it is not known, or not any more.
        CandidateError: signed with another key than the device's.
    """
    device = candidate.mark.device
    key = keys(device) if callable(keys) else keys.get(device)
    if key is None:
        raise UnknownDeviceError(
            wanted="a candidate of a device that the publisher knows",
            got=f"one of the unknown device {device!r}",
            next_step="Register the device with: edgead ota devices add",
        )
    candidate.verify(key)


class CandidateStore:
    """A folder of candidates and decisions. Several processes may use it at once.

    Args:
        folder: where; made when the first one comes.
        limits: what it holds at most.
        disk: takes the steps.
    """

    def __init__(self, folder: Path, *, limits: StoreLimits | None = None, disk: Disk | None = None) -> None:
        self.folder = folder
        self._limits = limits or StoreLimits()
        self._disk = disk or RealDisk()

    def put(self, data: bytes, keys: Keys) -> tuple[Entry, bool]:
        """Keep what came, after all checks of `accept_candidate`.

        Returns:
            the entry, and whether it is new here.

        Raises:
            CandidateError: see `accept_candidate`; nothing was written.
            FullError: there is no room.
            StorageError: the file system refused.
        """
        candidate = accept_candidate(data, keys)
        digest, device = candidate.digest, candidate.mark.device
        with self._changing(device):
            decision = self.decision(device, digest)
            names = self._names(device)
            if f"{digest}{SUFFIX}" in names or decision is not None:
                return Entry(digest, candidate, decision), False
            self._check_room(device, len(data), names)
            put_file(self._disk, self.folder / device / f"{digest}{SUFFIX}", [data])
        return Entry(digest, candidate, None), True

    def __iter__(self) -> Iterator[Entry]:
        """All that are here, the oldest mark first. What is no candidate of its name is passed over."""
        found: list[tuple[int, str, str]] = []
        for device, digest in self._all():
            with contextlib.suppress(EdgeadError):
                found.append((self._entry(device, digest).candidate.mark.time, device, digest))
        for _, device, digest in sorted(found):
            with contextlib.suppress(EdgeadError):
                yield self._entry(device, digest)

    def find(self, beginning: str) -> Entry:
        """The candidate whose digest begins so.

        Raises:
            InputError: none, or several.
            CandidateError: its file is damaged.
            StorageError: it cannot be read.
        """
        found = [(device, digest) for device, digest in self._all() if beginning and digest.startswith(beginning)]
        if len(found) != 1:
            raise InputError(
                wanted=f"one candidate in {self.folder} whose id begins with {beginning!r}",
                got=str(len(found)),
                next_step="See: edgead ota candidates list FOLDER",
            )
        return self._entry(*found[0])

    def decision(self, device: str, digest: str) -> Decision | None:
        """What was made of a candidate; None if nothing yet.

        Raises:
            InputError: the decision's file is damaged.
            StorageError: it cannot be read.
        """
        place = self.folder / device / f"{digest}{_DECISION}"
        with storage_errors(place, "to read a decision"):
            try:
                data = self._disk.read(place, _DECISION_BYTES)
            except FileNotFoundError:
                return None
        try:
            found = msgspec.json.decode(data, type=Decision)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise _damaged(place, str(error)) from error
        if found.id != digest or found.schema != SCHEMA:
            raise _damaged(place, f"one about {found.id[:12]} of schema {found.schema}")
        return found

    def decide(self, entry: Entry, new: Decision) -> Decision:
        """Keep a decision. The first one stays: who comes second is told.

        Returns:
            what holds now: `new`, or the same decision that was there.

        Raises:
            InputError: it was decided otherwise.
            StorageError: the file system refused.
        """
        device = entry.candidate.mark.device
        with self._changing(device):
            old = self.decision(device, entry.id)
            if old is None:
                put_file(self._disk, self.folder / device / f"{entry.id}{_DECISION}", [canonical_json(new)])
                return new
        if old.state != new.state:
            raise decided(old)
        return old

    def _check_room(self, device: str, size: int, names: list[str]) -> None:
        with storage_errors(self.folder, "to look at candidates"):
            there = set(self._disk.names(self.folder / device))
            waiting = sum(f"{name.removesuffix(SUFFIX)}{_DECISION}" not in there for name in names)
            every = [self.folder / one / f"{digest}{SUFFIX}" for one, digest in self._all()]
            held = sum(map(self._disk.size, every))
            free = self._disk.free_space(self.folder)
        most = self._limits
        for wanted, got, fits in (
            (f"at most {most.new_per_device} of {device} to decide on", waiting, waiting < most.new_per_device),
            (f"at most {most.files} candidates", len(every), len(every) < most.files),
            (f"at most {most.bytes} bytes of candidates", held, held + size <= most.bytes),
            (f"{_RESERVE} bytes that stay free", free, free >= size + _RESERVE),
        ):
            if not fits:
                raise FullError(
                    wanted=f"room for a candidate: {wanted}",
                    got=str(got),
                    next_step="Accept or decline what waits; move .candidate files that are decided elsewhere.",
                )

    @contextlib.contextmanager
    def _changing(self, device: str) -> Iterator[None]:
        place = self.folder / device
        with storage_errors(place, "to make a folder"):
            self._disk.make_folder(place)
        with locked(self._disk, self.folder / ".lock", _WAIT_S, "to keep a candidate"):
            with storage_errors(place, "to clean up after an interrupted process"):
                for name in self._disk.names(place):
                    if name.endswith(PART):
                        self._disk.remove(place / name)
            yield

    def _all(self) -> list[tuple[str, str]]:
        with storage_errors(self.folder, "to list candidates"):
            devices = [name for name in self._disk.names(self.folder) if (self.folder / name).is_dir()]
        return [(device, name.removesuffix(SUFFIX)) for device in devices for name in self._names(device)]

    def _names(self, device: str) -> list[str]:
        with storage_errors(self.folder, "to list candidates"):
            return [name for name in self._disk.names(self.folder / device) if name.endswith(SUFFIX)]

    def _entry(self, device: str, digest: str) -> Entry:
        place = self.folder / device / f"{digest}{SUFFIX}"
        with storage_errors(place, "to read a candidate"):
            data = self._disk.read(place, CANDIDATE_BYTES + 1)
        candidate = decode_candidate(data)
        if (candidate.mark.device, candidate.digest) != (device, digest):
            raise CandidateError(
                wanted=f"the candidate {digest[:12]} at {place}", got="another one", next_step="Remove the file."
            )
        return Entry(digest, candidate, self.decision(device, digest))


def decided(decision: Decision) -> InputError:
    """The error for a candidate that somebody decided on before."""
    return InputError(
        wanted=f"a candidate that nobody decided on, {decision.id[:12]}",
        got=f"one that {decision.who or 'somebody'} {decision.state}",
        next_step="Leave it out; mark the picture again at the camera if that was wrong.",
    )


def _damaged(place: Path, got: str) -> InputError:
    return InputError(
        wanted=f"a decision about a candidate at {place}",
        got=got[:300],
        next_step="Restore the file, or remove it to decide anew.",
    )


__all__ = [
    "CandidateStore",
    "Decision",
    "Entry",
    "FullError",
    "Keys",
    "State",
    "StoreLimits",
    "UnknownDeviceError",
    "accept_candidate",
    "check_signer",
    "decided",
    "keys_of",
]
