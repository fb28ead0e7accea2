"""The signed metadata of an update repository: what of it counts, and where a target that is signed lies.

TUF's own client verifies; this adds what it leaves out. Times come from signed metadata, so that neither a wiped cache
nor a wrong clock lets old metadata count; nothing that it fetches or raises escapes the rules of `edgead.runtime.fetch`
and the errors of this package. The cache is only a cache: the root of trust is given each time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgead.runtime.errors import (
    FetchError,
    FetchStatusError,
    StaleError,
    UntrustedError,
    missing_dependency,
    storage_errors,
)
from edgead.runtime.fetch import Fetcher
from edgead.runtime.update_rules import check_clock, check_made

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile
    from tuf.ngclient.fetcher import FetcherInterface

MADE = "made"
"""Field of the signed timestamp: when it was made."""
TIMESTAMP_BYTES = 16 * 2**10
"""Largest timestamp."""
_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_LIST_BYTES = 5_000_000


@dataclass(frozen=True)
class Target:
    """A signed target.

    Attributes:
        path: in the repository.
        url: where its content lies.
        length: bytes.
        sha256: 64 hex digits.
    """

    path: str
    url: str
    length: int
    sha256: str


class TrustedRepository:
    """A repository seen through its signatures, as it is at one moment: make a new one for each poll.

    Args:
        url: of the repository; `metadata/` and `targets/` lie below it.
        root: trusted root metadata to begin from, kept outside of the cache.
        cache: folder for metadata; may be emptied or damaged at any time, but belongs to one process at a time.
        fetcher: gets the files.
        now: seconds since 1970 in UTC, by this device's clock.
        last_seen: latest time that signed metadata ever named here.
        targets_url: where targets lie; `url` is then that of the metadata itself.
        dated: whether its timestamp says when it was made, as those that edgead publishes do.

    Raises:
        MissingDependencyError: TUF is not installed.
        StaleError: the clock is behind what was seen.
        UntrustedError: `root` is none.
        StorageError: the cache cannot be written.
    """

    def __init__(
        self,
        url: str,
        root: bytes,
        cache: Path,
        fetcher: Fetcher,
        *,
        now: float,
        last_seen: int = 0,
        targets_url: str | None = None,
        dated: bool = True,
    ) -> None:
        check_clock(now, last_seen)
        base = url.rstrip("/")
        self._now = now
        self._last_seen = last_seen
        self._targets_url = f"{base}/targets" if targets_url is None else targets_url.rstrip("/")
        self._dated = dated
        self._cache = cache
        self._fetcher = fetcher
        client, config = _tuf()
        with _foreign(cache):
            _tidy(cache)
            self._updater = client(
                str(cache),
                f"{base}/metadata/" if targets_url is None else f"{base}/",
                fetcher=tuf_fetcher(fetcher),
                config=config(timestamp_max_length=TIMESTAMP_BYTES),
                bootstrap=root,
            )
            # The client asks the system's clock; where that may be changed, time still never runs behind what was seen.
            moment = datetime.fromtimestamp(max(now, last_seen), timezone.utc)
            self._updater._trusted_set.reference_time = moment

    def refresh(self) -> int:
        """Fetch and verify the top-level metadata.

        Returns:
            when the timestamp was made, seconds since 1970: to be remembered as the last time seen.

        Raises:
            FetchError: something cannot be had.
            UntrustedError: forged, mixed, or older than what was seen.
            StaleError: expired, or from a time that the clock says is yet to come.
            StorageError: the cache cannot be written.
        """
        with _foreign(self._cache):
            self._updater.refresh()
            if not self._dated:
                return self._last_seen
            made = _made(json.loads((self._cache / "timestamp.json").read_bytes()))
        check_made(made, self._last_seen, self._now)
        return made

    def find(self, path: str) -> Target | None:
        """A signed target; None if nobody who may sign it did. `refresh` first.

        Raises:
            FetchError, UntrustedError, StaleError, StorageError: see `refresh`, for the roles on the way to it.
        """
        entry = self.entry(path)
        if entry is None:
            return None
        found, url = entry
        sha256 = found.hashes.get("sha256", "")
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise UntrustedError(wanted=f"a SHA-256 of {path}", got="none", next_step="Publish it with edgead.")
        return Target(path, url, found.length, sha256)

    def entry(self, path: str) -> tuple[TargetFile, str] | None:
        """What is signed of a target, whichever hashes it has, and where its content lies.

        Raises:
            FetchError, UntrustedError, StaleError, StorageError: see `find`.
        """
        with _foreign(self._cache):
            found: TargetFile | None = self._updater.get_targetinfo(path)
        if found is None:
            return None
        folder, slash, name = path.rpartition("/")
        if self._updater._trusted_set.root.consistent_snapshot:
            # Contents lie under the first hash that is signed.
            name = f"{next(iter(found.hashes.values()))}.{name}"
        return found, f"{self._targets_url}/{folder}{slash}{name}"

    def read(self, path: str, most: int, *, kept: dict[str, bytes] | None = None) -> bytes | None:
        """The content of a small target; None if there is none.

        Args:
            path: in the repository.
            most: bytes that it may have.
            kept: its last content by SHA-256, which is not fetched again and is replaced by another one.

        Raises:
            FetchError, UntrustedError, StaleError, StorageError: see `find`; or it is over `most` bytes.
        """
        target = self.find(path)
        if target is None:
            return None
        if target.length > most:
            raise UntrustedError(wanted=f"{path} of at most {most} bytes", got=f"{target.length}")
        kept = {} if kept is None else kept
        if target.sha256 not in kept:
            data = self._fetcher.read(target.url, target.length, sha256=target.sha256)
            kept.clear()
            kept[target.sha256] = data
        return kept[target.sha256]

    def listed(self, role: str) -> dict[str, int]:
        """Target paths of a delegated role with their lengths, as the cache has them: hints, to be looked up."""
        try:
            text = (self._cache / f"{role}.json").read_bytes()[:_LIST_BYTES]
            targets = json.loads(text)["signed"]["targets"]
            return {path: int(entry["length"]) for path, entry in targets.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}


def tuf_fetcher(fetcher: Fetcher) -> FetcherInterface:
    """`fetcher` as TUF's client wants one.

    Raises:
        MissingDependencyError: TUF is not installed.
    """
    try:
        from tuf.api.exceptions import DownloadError, DownloadHTTPError
        from tuf.ngclient.fetcher import FetcherInterface
    except ModuleNotFoundError as error:
        raise missing_dependency("tuf", "ota", "updates over the air") from error

    class Adapter(FetcherInterface):
        def download_bytes(self, url: str, max_length: int) -> bytes:
            try:
                return fetcher.read(url, max_length, packed=True)  # signatures and digests in hex shrink well
            except FetchStatusError as error:
                raise DownloadHTTPError(str(error), error.status or 0) from error
            except FetchError as error:
                raise DownloadError(str(error)) from error

        def _fetch(self, url: str) -> Iterator[bytes]:
            yield self.download_bytes(url, 2**40)

    return Adapter()


def _tuf() -> tuple[Any, Any]:
    try:
        from tuf.ngclient.config import UpdaterConfig
        from tuf.ngclient.updater import Updater
    except ModuleNotFoundError as error:
        raise missing_dependency(str(error.name), "ota", "updates over the air") from error
    return Updater, UpdaterConfig


def _tidy(cache: Path) -> None:
    """Remove temporary files that a client that was killed left."""
    cache.mkdir(parents=True, exist_ok=True)
    for path in cache.glob("tmp*"):
        path.unlink(missing_ok=True)


def _made(timestamp: dict[str, Any]) -> int:
    text = timestamp["signed"][MADE]
    return int(datetime.strptime(text, _FORMAT).replace(tzinfo=timezone.utc).timestamp())


@contextlib.contextmanager
def _foreign(cache: Path) -> Iterator[None]:
    """Errors of TUF become ours here."""
    from tuf.api import exceptions

    try:
        with storage_errors(cache, "to keep signed metadata"):
            yield
    except exceptions.DownloadError as error:
        if isinstance(error.__cause__, FetchError):
            raise error.__cause__ from None
        raise FetchError(wanted="signed metadata", got=str(error)[:300]) from error
    except exceptions.ExpiredMetadataError as error:
        raise StaleError(
            wanted="signed metadata that is still good",
            got=str(error)[:300],
            next_step="Check this device's clock; else its publisher is silent or held back: sign a new timestamp.",
        ) from error
    except (exceptions.RepositoryError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UntrustedError(
            wanted="signed metadata that belongs together and is no older than what was seen",
            got=f"{type(error).__name__}: {error}"[:300],
            next_step="Check the repository, and what lies between it and this device; nothing of it was taken.",
        ) from error


__all__ = ["MADE", "TIMESTAMP_BYTES", "Target", "TrustedRepository", "tuf_fetcher"]
