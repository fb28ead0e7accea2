"""Language models behind an OpenAI-compatible end point: vLLM, llama.cpp, Ollama, or a service.

The `openai` package sends the request; the answer is read here, byte by byte against a limit and a clock, because
an end point may drip, never end, or send what is no answer. The key comes from an environment variable that the
caller names; it is taken out of everything that is shown or kept.
"""

from __future__ import annotations

import os
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from edgead.runtime.errors import InputError, LanguageModelError, missing_dependency
from edgead.server_side.prompts.answers import excerpt
from edgead.server_side.prompts.patience import Backoff, RateLimit, retry_after_s
from edgead.server_side.prompts.requests import ModelName, Request
from edgead.server_side.prompts.words import LIMITS, check_words


@dataclass(frozen=True)
class OpenAiLimits:
    """How long to wait and how much to read."""

    timeout_s: float = 60.0
    """One attempt, from the request to the last byte of its answer."""
    connect_s: float = 10.0
    attempts: int = 4
    """The first try and its repetitions."""
    first_wait_s: float = 1.0
    """Before the second attempt; doubles each time, with jitter."""
    longest_wait_s: float = 30.0
    longest_retry_after_s: float = 120.0
    """An end point that asks for a longer pause is not waited for."""
    requests_per_minute: float = 60.0
    answer_bytes: int = 1 << 20
    """Of one answer; more is cut off and refused."""
    error_bytes: int = 4096
    """Of an error's explanation."""


_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP states that may pass by themselves."""


class EmptyAnswerError(LanguageModelError):
    """The end point answered, but with nothing, or with a refusal to answer."""


class _RefusedError(Exception):
    """An HTTP error state, raised while the response is open so that its text is read within bounds."""

    def __init__(self, status: int, text: str, retry_after: str | None) -> None:
        super().__init__(status)
        self.status, self.text, self.retry_after = status, text, retry_after


class _PassingError(Exception):
    """One attempt failed in a way that the next may not."""

    def __init__(self, got: str, wait_s: float | None = None) -> None:
        super().__init__(got)
        self.got, self.wait_s = got, wait_s


class OpenAiModel:
    """A model behind an OpenAI-compatible chat-completions end point.

    Args:
        base_url: such as http://127.0.0.1:11434/v1.
        name: the model's name at that end point.
        key_env: the environment variable that holds the key; None for end points without one.
        limits: times and sizes.
        note: told when an attempt failed and will be repeated.
        sleep: how to wait between attempts and for the rate limit.

    Raises:
        InputError: an address that is none or holds a password, a variable that is not set, a key of odd characters.
        MissingDependencyError: no `openai` package.
    """

    def __init__(
        self,
        base_url: str,
        name: str,
        key_env: str | None = None,
        *,
        limits: OpenAiLimits | None = None,
        note: Callable[[str], None] = lambda line: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limits = limits or OpenAiLimits()
        self.model = ModelName(check_words(name, "the name of a model", LIMITS.name_chars), checked_url(base_url))
        self._key, self._key_env = _key(key_env), key_env
        self._note, self._sleep = note, sleep
        self._rate = RateLimit(self._limits.requests_per_minute, sleep=sleep)
        self._tokens_field = "max_tokens"
        try:
            import openai
        except ModuleNotFoundError as error:
            raise missing_dependency("openai", "server", "language models behind an end point") from error
        self._client = openai.OpenAI(
            api_key=self._key or "none",
            base_url=self.model.base_url,
            max_retries=0,
            timeout=openai.Timeout(self._limits.timeout_s, connect=self._limits.connect_s),
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [self._stop_at_error]}),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def complete(self, request: Request) -> str:
        """The answer to `request`; see `LanguageModel.complete`.

        Raises:
            LanguageModelError: no answer after all attempts, a refusal by the end point, an answer that is too long
                or not an answer.
        """
        waits = Backoff(self._limits.first_wait_s, self._limits.longest_wait_s)
        for attempt in range(1, self._limits.attempts + 1):
            self._rate.wait()
            try:
                return self._answer(request)
            except _PassingError as failure:
                last = failure
            if attempt < self._limits.attempts:
                wait = waits.next() if last.wait_s is None else last.wait_s
                self._note(f"{last.got}; attempt {attempt + 1} of {self._limits.attempts} in {wait:.1f} s")
                self._sleep(wait)
        self._fail(
            f"{last.got}, after {self._limits.attempts} attempts", "Check that the end point runs, or try later."
        )

    def _answer(self, request: Request) -> str:
        body = self._body(request)
        try:
            content = msgspec.json.decode(body)
            choice = content["choices"][0]
            message = choice["message"]
            text, refusal, reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        except (msgspec.MsgspecError, UnicodeError, RecursionError, LookupError, TypeError, AttributeError):
            self._fail(
                f"something that is no chat completion: {self._shown(body)!r}",
                "Check that the address is the base of an OpenAI-compatible end point, often ending in /v1.",
            )
        if isinstance(text, list):
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if reason == "content_filter" or (isinstance(refusal, str) and refusal):
            said = f"a refusal: {self._shown(str(refusal or reason).encode())!r}"
            self._fail(said, "Take another model or wording.", EmptyAnswerError)
        if not isinstance(text, str) or not text.strip():
            self._fail("an empty answer", "Take another model, or use the templates.", EmptyAnswerError)
        if reason == "length" and "\n" in text.strip():
            # The last line was cut off in the middle.
            text = text.strip().rsplit("\n", 1)[0]
        return self._redacted(text)

    def _body(self, request: Request) -> bytes:
        """The bytes of a successful response, within the limits of size and time."""
        import openai

        end = time.monotonic() + self._limits.timeout_s
        try:
            # the field's name differs between end points, so it goes in beside the typed arguments
            with self._client.chat.completions.with_streaming_response.create(
                model=request.model.name,
                messages=[{"role": m.role, "content": m.content} for m in request.messages],  # type: ignore[misc]
                temperature=request.temperature,
                seed=request.seed,
                extra_body={self._tokens_field: request.max_tokens},
                extra_headers={"Accept-Encoding": "identity"},
            ) as response:
                # without a size, chunks come as they arrive, and the clock is looked at after each
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > self._limits.answer_bytes:
                        self._fail(
                            f"an answer of more than {self._limits.answer_bytes} bytes",
                            "Ask a model that answers shortly, or lower --llm-max-tokens.",
                        )
                    if time.monotonic() > end:
                        raise _PassingError(f"an answer that was not whole within {self._limits.timeout_s:g} s")
                return bytes(body)
        except (_PassingError, LanguageModelError):
            raise
        except Exception as error:  # a client's errors, of whatever layer, become one kind
            refused = _cause(error, _RefusedError)
            if isinstance(refused, _RefusedError):
                return self._after_refusal(refused, request)
            if _cause(error, openai.APITimeoutError) or "Timeout" in type(error).__name__:
                raise _PassingError(f"no answer within {self._limits.timeout_s:g} s") from None
            # the chain of the foreign error could show headers, so it ends here
            raise _PassingError(f"no connection ({self._redacted(_names(error))})") from None

    def _after_refusal(self, refused: _RefusedError, request: Request) -> bytes:
        said = f"HTTP {refused.status}" + (f", {refused.text!r}" if refused.text else "")
        if refused.status == 400 and "max_completion_tokens" in refused.text and self._tokens_field == "max_tokens":
            self._tokens_field = "max_completion_tokens"
            return self._body(request)
        if refused.status in _AGAIN:
            wait = retry_after_s(refused.retry_after)
            if wait is not None and wait > self._limits.longest_retry_after_s:
                self._fail(f"{said}, and the wish to wait {wait:.0f} s", "Try later, or ask for a higher rate there.")
            raise _PassingError(said, wait)
        advice = {
            401: f"Check the key in {self._key_env}."
            if self._key_env
            else "Name the key's variable: --llm-key-env VAR",
            403: "Ask the keeper of the end point for access.",
            404: "Check the model's name and the address; it often ends in /v1.",
        }
        self._fail(said, advice.get(refused.status, "Check the address, the model's name and its limits."))

    def _stop_at_error(self, response: Any) -> None:
        """Called with every response before its body is read: error texts are bounded as answers are."""
        if response.status_code < 400:
            return
        text, end = bytearray(), time.monotonic() + self._limits.connect_s
        for chunk in response.iter_bytes():
            text += chunk
            if len(text) > self._limits.error_bytes or time.monotonic() > end:
                break
        raise _RefusedError(response.status_code, self._shown(bytes(text)), response.headers.get("retry-after"))

    def _fail(self, got: str, next_step: str, kind: type[LanguageModelError] = LanguageModelError) -> NoReturn:
        where = f"{self.model.name!r} at {self.model.base_url}"
        raise kind(wanted=f"an answer from {where}", got=got, next_step=next_step) from None

    def _shown(self, data: bytes) -> str:
        text = self._redacted(data[: self._limits.error_bytes].decode("utf-8", "replace"))
        return " ".join(excerpt(text, 200).split())

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "(key)") if self._key else text


def checked_url(base_url: str) -> str:
    """An end point's address without the last slash.

    Raises:
        InputError: no http(s) address, or one with a password, a query or a fragment.
    """
    try:
        parts = urllib.parse.urlsplit(base_url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urllib.parse.SplitResult("", "", "", "", ""), None
    if parts.scheme not in ("http", "https") or not host or not base_url.strip().isprintable() or " " in host:
        raise InputError(
            wanted="the address of an OpenAI-compatible end point, such as http://127.0.0.1:11434/v1",
            got=repr(base_url[:80]) if "@" not in base_url else "another text",
            next_step="Pass it with --llm.",
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            wanted=f"the address at {host} alone",
            got="one with a name, a password, a query or a fragment",
            next_step="Put the key into an environment variable and name it: --llm-key-env VAR",
        )
    return base_url.strip().rstrip("/")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            wanted=f"the end point's key in the environment variable {variable}",
            got="no such variable, or an empty one" if not key else "a value with spaces or odd characters",
            next_step=f"Set it in the shell: export {variable}=...",
        )
    return key


def _cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The first error of `kind` in a chain of causes."""
    for _ in range(10):
        if error is None or isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def _names(error: BaseException) -> str:
    """What failed, from the innermost error: the outer ones say only 'Connection error'."""
    inner = error
    for _ in range(10):
        if inner.__cause__ is None:
            break
        inner = inner.__cause__
    return f"{type(inner).__name__}: {' '.join(str(inner).split())[:120]}"
