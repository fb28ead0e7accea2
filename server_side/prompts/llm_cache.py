"""Answers on disk, each under the digest of its whole request: a run repeats itself without the language model.

    DIR/3f/3f9a...c1.json     {"schema": 1, "request": {...}, "answer": "...", "answer_sha256": "...", "time": "..."}

An entry that is damaged, foreign or unreadable is no answer: it is noted, and written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from msgspec import Struct

from edgead.runtime.errors import LanguageModelError, StorageError
from edgead.runtime.files import write_file
from edgead.server_side.prompts.requests import LanguageModel, ModelName, Request

CACHE_SCHEMA = 1
_LARGEST_ENTRY = 8 << 20
"""Bytes of one entry that are read."""


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """One cached answer."""

    request: Request
    answer: str
    answer_sha256: str
    time: str
    """When the model answered, ISO 8601 in UTC."""
    schema: int = CACHE_SCHEMA


class CachedModel:
    """A language model with a cache before it, or the cache alone.

    Args:
        folder: where the answers are.
        inner: asked for what the cache does not have; None works from the cache alone.
        model: the name that requests carry; needed only without `inner`.
        note: told of damaged entries and of answers that could not be kept.
    """

    def __init__(
        self,
        folder: Path,
        inner: LanguageModel | None,
        *,
        model: ModelName | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        if inner is None and model is None:
            raise ValueError("a cache without a model needs the model's name")
        self._folder, self._inner, self._note = folder, inner, note
        self._model = model
        self.times: dict[str, str] = {}
        """Digest -> when that request was answered, for the requests of this object."""

    @property
    def model(self) -> ModelName:
        """Which model answers."""
        if self._inner is not None:
            return self._inner.model
        assert self._model is not None
        return self._model

    def complete(self, request: Request) -> str:
        """The kept answer, or the inner model's, which is kept then.

        Raises:
            LanguageModelError: not in the cache and no model to ask, or the model failed.
        """
        digest = request.digest()
        entry = self._read(digest, request)
        if entry is None:
            if self._inner is None:
                raise LanguageModelError(
                    wanted=f"an answer of {request.model.name!r} in the cache {self._folder}",
                    got=f"none under {digest[:12]}",
                    next_step="Ask the model once without --offline-cache, with the same words and options.",
                )
            entry = _entry(request, self._inner.complete(request))
            self._keep(digest, entry)
        self.times[digest] = entry.time
        return entry.answer

    def forget(self, request: Request) -> None:
        """Drop the kept answer to `request`, if there is one."""
        with contextlib.suppress(OSError):
            self._path(request.digest()).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / f"{digest}.json"

    def _read(self, digest: str, request: Request) -> Entry | None:
        path = self._path(digest)
        try:
            with path.open("rb") as stream:
                data = stream.read(_LARGEST_ENTRY + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note(f"the cached answer {path} cannot be read ({error.strerror or error}); it is left out")
            return None
        try:
            entry = msgspec.json.decode(data, type=Entry)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            self._note(f"the cached answer {path} is damaged; it is left out")
            return None
        sound = entry.answer_sha256 == _sha256(entry.answer) and entry.request == request
        if len(data) > _LARGEST_ENTRY or entry.schema != CACHE_SCHEMA or not sound:
            self._note(f"the cached answer {path} is not the answer to this request; it is left out")
            return None
        return entry

    def _keep(self, digest: str, entry: Entry) -> None:
        try:
            write_file(self._path(digest), msgspec.json.format(msgspec.json.encode(entry)))
        except StorageError as error:
            # The answer is good whether it can be kept or not.
            self._note(f"the answer was not kept: {error.got} at {self._folder}")


def default_cache() -> Path:
    """Where answers are kept unless the caller names a folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "edgead" / "llm"


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _entry(request: Request, answer: str) -> Entry:
    # A lone surrogate could not be written; the parser of answers would drop it anyway.
    text = answer.encode("utf-8", "replace").decode()
    return Entry(request, text, _sha256(text), now())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
