"""The error tree of edgead.

Every error says what was wanted, what came instead, and what to do next. The class tells whose move it is:

    EdgeadError
    ├── UserError                 the caller can mend it; exit code 2
    │   ├── InputError            a path, folder, option or argument
    │   │   ├── OutputExistsError     the output is already there and --force was not given
    │   │   ├── MissingDependencyError  an optional package is not installed
    │   │   ├── PromptError           a prompt set, or words for one, that are not well formed
    │   │   ├── StatusError           a device's status that is malformed, edited, or of another key
    │   │   └── CandidateError        a marked picture that is malformed, edited, or of another key
    │   ├── ImageError            a file that is no picture, or one outside the limits
    │   ├── BundleError           a bundle that is truncated, edited, too new or foreign
    │   │   └── EngineMismatchError   an engine built for another GPU, library or version
    │   ├── KnowledgeError        a pack that is damaged, foreign, over capacity or not finite
    │   │   └── PinError              a signature on a pack that is forged, moved, expired or of an unknown key
    │   ├── ReleaseError          a release that is malformed, old, quarantined, or not of one piece
    │   ├── DetectorError         a module or detector file that breaks the graph contract
    │   └── BackboneError         an unknown backbone, or weights that do not fit it
    └── FailureError              the work itself failed; exit code 1
        ├── EngineError           an inference library refused or failed
        ├── ParityError           a compiled engine disagrees with its torch reference
        ├── LanguageModelError    a language model timed out, refused, or answered nothing usable
        ├── OutOfMemoryError      a change that this machine's memory does not hold
        ├── UpdateError           an update over the air did not happen; the active release stays
        │   ├── FetchError            a file that cannot be fetched: refused, cut, no name, bad TLS
        │   │   ├── FetchStatusError      a server's answer that is no file (403, 404, 429, 503, ...)
        │   │   ├── FetchTimeoutError     stalled, too slow, or over the deadline
        │   │   └── FetchContentError     another file than the signed one: too long, too short, damaged
        │   ├── UntrustedError        metadata that is forged, mixed or older than what was seen before
        │   ├── StaleError            metadata that expired, or a clock that cannot be right
        │   └── SelfTestError         a release or engine that fails its tests on this device
        └── StorageError          no permission, no space, an I/O fault
            ├── StoreBusyError        another process changes the store
            ├── StoreDamagedError     a file of the store is missing or damaged; says which to fetch
            └── RollbackError         there is no release to go back to
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike


class EdgeadError(Exception):
    """Base of all errors that edgead raises on purpose.

    Args:
        wanted: what the operation needed, as a phrase ("a folder with at least 2 images").
        got: what it found instead.
        next_step: what the reader can do about it, as an imperative sentence.
    """

    exit_code = 1

    def __init__(self, *, wanted: str, got: str, next_step: str = "") -> None:
        self.wanted = wanted
        self.got = got
        self.next_step = next_step
        super().__init__(wanted, got, next_step)

    def __str__(self) -> str:
        text = f"wanted {self.wanted}; got {self.got}"
        return f"{text}. {self.next_step}" if self.next_step else text


class UserError(EdgeadError):
    """Something the caller can mend; the command line exits with 2."""

    exit_code = 2


class InputError(UserError):
    """A path, folder, option or argument is not usable."""


class OutputExistsError(InputError):
    """The output is already there and overwriting was not asked for."""


class MissingDependencyError(InputError):
    """An optional package is not installed."""


class PromptError(InputError):
    """A prompt set, or a word that goes into one, is not well formed."""


class StatusError(InputError):
    """A device's status is malformed, edited, or not signed by the key that it should be."""


class CandidateError(InputError):
    """A picture that somebody marked is malformed, edited, or not signed by the key that it should be."""


class ImageError(UserError):
    """A file or frame is not a picture that edgead accepts."""


class BundleError(UserError):
    """A bundle is truncated, edited, of a newer schema, or not a bundle."""


class EngineMismatchError(BundleError):
    """An engine was built for another GPU, compute capability or library version."""


class KnowledgeError(UserError):
    """A knowledge pack is damaged, foreign to the engine, over capacity or not finite."""


class PinError(KnowledgeError):
    """A signature on a pack is forged, moved from another one, expired, or of a key that is not trusted."""


class ReleaseError(UserError):
    """A release is malformed, older than one seen before, quarantined, or its parts do not belong together."""


class DetectorError(UserError):
    """A module or a fitted-detector file does not obey the graph contract."""


class BackboneError(UserError):
    """A backbone is unknown, or its weights are missing or do not fit."""


class FailureError(EdgeadError):
    """The work itself failed; the command line exits with 1."""


class EngineError(FailureError):
    """An inference library refused a model or failed on a frame."""


class ParityError(FailureError):
    """A compiled engine disagrees with its torch reference beyond the tolerance."""


class LanguageModelError(FailureError):
    """A language model could not be reached, ran out of time, refused, or answered nothing usable."""


class OutOfMemoryError(FailureError):
    """A change needs more memory than there is; nothing of it was done."""


class UpdateError(FailureError):
    """An update over the air did not happen; the active release stays."""


class FetchError(UpdateError):
    """A file could not be fetched.

    Args:
        transient: whether trying again soon may help.
        status: the server's answer, if there was one.
        retry_after: seconds that the server asked to wait.
    """

    def __init__(
        self,
        *,
        wanted: str,
        got: str,
        next_step: str = "",
        transient: bool = False,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.transient = transient
        self.status = status
        self.retry_after = retry_after
        super().__init__(wanted=wanted, got=got, next_step=next_step)


class FetchStatusError(FetchError):
    """A server answered with something else than the file."""


class FetchTimeoutError(FetchError):
    """A transfer stalled, was too slow, or did not end by its deadline."""


class FetchContentError(FetchError):
    """What came is not what was signed: too long, too short, or of another digest."""


class UntrustedError(UpdateError):
    """Metadata is forged, does not belong together, or is older than what this device has seen."""


class StaleError(UpdateError):
    """Metadata has expired, or this device's clock cannot be right."""


class SelfTestError(UpdateError):
    """A release, or the engine that it names, fails its tests on this device."""


class StorageError(FailureError):
    """The file system refused: permission, space or I/O."""


class StoreBusyError(StorageError):
    """Another process or thread changes the store and did not finish in time."""


class StoreDamagedError(StorageError):
    """Files of the store are missing or damaged.

    Args:
        fetch: the files that would mend it, by their paths in the store: 'packs/<digest>.safetensors',
            'engines/<digest>.edgead', 'releases/<digest>.json'. Empty if any release would do.
    """

    def __init__(self, *, wanted: str, got: str, next_step: str = "", fetch: tuple[str, ...] = ()) -> None:
        self.fetch = fetch
        super().__init__(wanted=wanted, got=got, next_step=next_step)


class RollbackError(StorageError):
    """There is no whole release to go back to; the active one stays."""


@contextlib.contextmanager
def storage_errors(path: str | PathLike[str], wanted: str) -> Iterator[None]:
    """Turn `OSError` from the block into `StorageError` that names `path`.

    Raises:
        StorageError: the block raised `OSError` (no permission, disk full, I/O fault).
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            wanted=f"{wanted} at {path}",
            got=f"the system's refusal: {reason}",
            next_step="Check the permissions and the free space there, or name another place.",
        ) from error


def missing_dependency(package: str, extra: str, purpose: str) -> MissingDependencyError:
    """The error for an absent optional package, with the exact line that installs it.

    Args:
        package: the import name that was not found.
        extra: the extra of the `edgead` distribution that brings it.
        purpose: what it was needed for, as a phrase.
    """
    return MissingDependencyError(
        wanted=f"the package '{package}' for {purpose}",
        got="an environment without it",
        next_step=f"Run: pip install 'edgead[{extra}]'",
    )
