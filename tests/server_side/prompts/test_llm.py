"""An OpenAI-compatible end point that is real, on this machine, and misbehaves in every way we know."""

from __future__ import annotations

import json
import logging
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgead.runtime.errors import InputError, LanguageModelError
from edgead.server_side.prompts import generators
from edgead.server_side.prompts.llm import OpenAiLimits, OpenAiModel, checked_url
from edgead.server_side.prompts.llm_cache import CachedModel
from edgead.server_side.prompts.patience import Backoff, RateLimit, retry_after_s
from edgead.server_side.prompts.requests import Message, ModelName, Request

KEY = "sk-very-secret-0123456789"
FAST = {"first_wait_s": 0.01, "longest_wait_s": 0.05, "requests_per_minute": 0.0}
LIST = "1. loose thread\n2. frayed yarn"


def model_at(url: str, *, key_env: str | None = None, notes: list[str] | None = None, **limits: Any) -> OpenAiModel:
    told = [] if notes is None else notes
    return OpenAiModel(url, "m", key_env, limits=OpenAiLimits(**{**FAST, **limits}), note=told.append)


def ask(model: OpenAiModel, question: str = "What?") -> str:
    return model.complete(Request(model.model, (Message("user", question),), seed=3))


def test_the_request_is_a_chat_completion(chat: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PART_KEY", KEY)
    with chat.chat_server(chat.say(LIST)) as server:
        assert ask(model_at(server.url, key_env="PART_KEY")) == LIST
    assert server.paths == ["/v1/chat/completions"]
    assert server.keys == [f"Bearer {KEY}"]
    body = {"model": "m", "messages": [{"role": "user", "content": "What?"}], "temperature": 0, "seed": 3}
    assert server.requests == [{**body, "max_tokens": 1024}]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_state_that_may_pass_is_tried_again(chat: ModuleType, status: int) -> None:
    notes: list[str] = []
    with chat.chat_server(chat.send(b'{"error": "busy"}', status), chat.say(LIST)) as server:
        assert ask(model_at(server.url, notes=notes)) == LIST
    assert len(server.requests) == 2
    assert f"HTTP {status}" in notes[0]
    assert "attempt 2 of 4" in notes[0]


def test_attempts_end(chat: ModuleType) -> None:
    with (
        chat.chat_server(chat.send(b"no", 500)) as server,
        pytest.raises(LanguageModelError, match=r"HTTP 500, 'no', after 3 attempts"),
    ):
        ask(model_at(server.url, attempts=3))
    assert len(server.requests) == 3


def test_a_connection_that_is_cut_is_tried_again(chat: ModuleType) -> None:
    with chat.chat_server(chat.hang_up, chat.say(LIST)) as server:
        assert ask(model_at(server.url)) == LIST
    assert len(server.requests) == 2


def test_the_pause_that_the_end_point_asks_for_is_kept(chat: ModuleType) -> None:
    pauses: list[float] = []
    with chat.chat_server(chat.send(b"", 429, Retry_After="7"), chat.say(LIST)) as server:
        limits = OpenAiLimits(requests_per_minute=0)
        assert ask(OpenAiModel(server.url, "m", limits=limits, sleep=pauses.append)) == LIST
    assert pauses == [7.0]


def test_a_pause_that_is_too_long_is_told_at_once(chat: ModuleType) -> None:
    with (
        chat.chat_server(chat.send(b"", 429, Retry_After="3600")) as server,
        pytest.raises(LanguageModelError, match="the wish to wait 3600 s"),
    ):
        ask(model_at(server.url))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "advice"), [(400, "limits"), (401, "--llm-key-env"), (403, "access"), (404, "/v1"), (418, "address")]
)
def test_a_state_that_stays_is_told_at_once(chat: ModuleType, status: int, advice: str) -> None:
    with (
        chat.chat_server(chat.send(b'{"error": {"message": "nope"}}', status)) as server,
        pytest.raises(LanguageModelError, match=f"(?s)HTTP {status}.*nope.*{advice}"),
    ):
        ask(model_at(server.url))
    assert len(server.requests) == 1


def test_the_other_name_of_the_token_limit_is_tried(chat: ModuleType) -> None:
    refusal = b'{"error": "max_tokens is not supported, use max_completion_tokens"}'
    with chat.chat_server(chat.send(refusal, 400), chat.say(LIST)) as server:
        model = model_at(server.url)
        assert ask(model) == ask(model) == LIST
    fields = [{"max_tokens", "max_completion_tokens"} & set(body) for body in server.requests]
    assert fields == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]


def test_an_end_point_that_says_nothing_times_out(chat: ModuleType) -> None:
    start = time.monotonic()
    with (
        chat.chat_server(chat.silence(5)) as server,
        pytest.raises(LanguageModelError, match=r"no answer within 0\.2 s, after 2 attempts"),
    ):
        ask(model_at(server.url, timeout_s=0.2, attempts=2))
    assert len(server.requests) == 2
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("status", [200, 500])
def test_a_drip_ends_at_the_time_limit(chat: ModuleType, status: int) -> None:
    start = time.monotonic()
    with chat.chat_server(chat.drip(0.02, status)) as server, pytest.raises(LanguageModelError):
        ask(model_at(server.url, timeout_s=0.3, connect_s=0.3, attempts=1))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("status", [200, 500])
def test_ten_megabytes_are_cut_off(chat: ModuleType, status: int) -> None:
    wanted = "more than 1048576 bytes" if status == 200 else "HTTP 500"
    with chat.chat_server(chat.endless(10 << 20, status)) as server, pytest.raises(LanguageModelError, match=wanted):
        ask(model_at(server.url, attempts=1))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        *(b"<html>hello</html>", b"", b"{}", b"[]", b"null", b"42", b"\xff\xfe", b'{"choices": []}', b'{"choices": 1}'),
        *(b'{"choices": [{"message": null}]}', b'{"choices": [{"message": "x"}]}', b"[" * 100_000),
    ],
)
def test_what_is_no_completion_is_told(chat: ModuleType, body: bytes) -> None:
    with (
        chat.chat_server(chat.send(body)) as server,
        pytest.raises(LanguageModelError, match=r"no chat completion.*/v1"),
    ):
        ask(model_at(server.url))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("act", "got"),
    [
        (("", {}), "an empty answer"),
        ((None, {}), "an empty answer"),
        ((7, {}), "an empty answer"),
        ((None, {"refusal": "I will not"}), "a refusal.*I will not"),
        (("x", {"finish": "content_filter"}), "a refusal"),
    ],
)
def test_no_answer_in_a_completion_is_told(chat: ModuleType, act: tuple[Any, dict[str, Any]], got: str) -> None:
    with chat.chat_server(chat.say(act[0], **act[1])) as server, pytest.raises(LanguageModelError, match=got):
        ask(model_at(server.url))


def test_answers_in_parts_are_joined_and_a_cut_line_is_dropped(chat: ModuleType) -> None:
    parts = [{"type": "text", "text": "loose "}, {"type": "text", "text": "thread"}]
    with chat.chat_server(chat.say(parts), chat.say("- one thing\n- anoth", finish="length")) as server:
        model = model_at(server.url)
        assert ask(model) == "loose thread"
        assert ask(model) == "- one thing"


def test_no_one_at_the_address_is_told() -> None:
    with pytest.raises(LanguageModelError, match=r"no connection.*after 2 attempts"):
        ask(model_at("http://127.0.0.1:9/v1", attempts=2))


def test_the_key_is_in_no_message(
    chat: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PART_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    notes: list[str] = []
    echo = json.dumps({"error": f"wrong key {KEY}"}).encode()
    acts = [chat.send(echo, 500), chat.send(echo, 401), chat.send(echo), chat.say(f"- a thread like {KEY}")]
    with chat.chat_server(*acts) as server:
        model = model_at(server.url, key_env="PART_KEY", notes=notes)
        for _ in range(2):
            with pytest.raises(LanguageModelError) as refused:
                ask(model)
            notes += [str(refused.value), repr(refused.value)]
        cached = CachedModel(tmp_path, model)
        notes.append(cached.complete(Request(model.model, (Message("user", "x"),))))
    files = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "(key)" in files
    assert KEY not in "".join(notes) + files + caplog.text


@pytest.mark.parametrize("value", ["", "  ", "two words", "with\nline", "schl\u00fcssel"])
def test_a_key_that_cannot_be_one_is_refused_unshown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PART_KEY", value)
    with pytest.raises(InputError, match="PART_KEY") as refused:
        model_at("http://127.0.0.1:9/v1", key_env="PART_KEY")
    assert not value.strip() or value not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["", "localhost:80", "ftp://x/y", "http://", "http://u:secret@x/v1", "http://x/v1?key=secret", "http://x:y/"]
)
def test_addresses_that_are_none_or_hold_secrets_are_refused(url: str) -> None:
    with pytest.raises(InputError) as refused:
        checked_url(url)
    assert "secret" not in str(refused.value)


def test_the_cache_repeats_a_run_with_the_server_gone(chat: ModuleType, tmp_path: Path) -> None:
    with chat.chat_server(chat.say("- An abnormal image of carpet with a pulled loop\n- lint")) as server:
        model = CachedModel(tmp_path, model_at(server.url))
        first = generators.alfa(model, "carpet")
        assert len(server.requests) == 2
        assert generators.alfa(model, "carpet") == first
        assert len(server.requests) == 2
    assert generators.alfa(CachedModel(tmp_path, None, model=model.model), "carpet") == first
    gone = CachedModel(tmp_path, model_at(server.url, attempts=1))
    assert generators.alfa(gone, "carpet") == first
    with pytest.raises(LanguageModelError):
        generators.alfa(gone, "leather")


def test_a_cache_without_the_answer_says_so(tmp_path: Path) -> None:
    name = ModelName("m", "http://127.0.0.1:9/v1")
    with pytest.raises(LanguageModelError, match="--offline-cache"):
        CachedModel(tmp_path, None, model=name).complete(Request(name, (Message("user", "x"),)))


def test_damaged_answers_are_noted_and_asked_for_again(ready: Any, tmp_path: Path) -> None:
    inner = ready("- loose thread")
    request = Request(inner.model, (Message("user", "x"),))
    path = tmp_path / request.digest()[:2] / f"{request.digest()}.json"
    assert CachedModel(tmp_path, inner).complete(request) == "- loose thread"
    good = path.read_bytes()
    other = json.loads(good) | {"request": json.loads(good)["request"] | {"seed": 9}}
    damaged = [b"", good[:40], b"[]", good.replace(b"loose", b"lost "), json.dumps(other).encode(), b"\xff"]
    for count, data in enumerate(damaged, 2):
        path.write_bytes(data)
        notes: list[str] = []
        assert CachedModel(tmp_path, inner, note=notes.append).complete(request) == "- loose thread"
        assert len(inner.asked) == count
        assert "left out" in notes[0]
    assert json.loads(path.read_bytes())["answer"] == "- loose thread"


def test_a_cache_that_cannot_be_written_loses_no_answer(ready: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    notes: list[str] = []
    inner = ready("- loose thread")
    model = CachedModel(tmp_path / "file", inner, note=notes.append)
    assert model.complete(Request(inner.model, (Message("user", "x"),))) == "- loose thread"
    assert "not kept" in notes[-1]


def test_every_part_of_a_request_is_in_its_digest() -> None:
    name = ModelName("m", "http://x/v1")
    request = Request(name, (Message("user", "x"),))
    others = [
        Request(ModelName("n", "http://x/v1"), request.messages),
        Request(ModelName("m", "http://y/v1"), request.messages),
        Request(ModelName("m", "http://x/v1", "r"), request.messages),
        Request(name, (Message("system", "x"),)),
        Request(name, (Message("user", "y"),)),
        Request(name, request.messages, temperature=0.5),
        Request(name, request.messages, max_tokens=5),
        Request(name, request.messages, seed=1),
    ]
    assert len({item.digest() for item in (request, *others)}) == len(others) + 1
    assert request.canonical() == (
        b'{"max_tokens":1024,"messages":[{"content":"x","role":"user"}],'
        b'"model":{"base_url":"http://x/v1","name":"m","revision":""},"seed":0,"temperature":0.0}'
    )


def test_the_back_off_doubles_with_jitter_up_to_its_longest() -> None:
    waits = Backoff(1, 10, seed=0)
    for longest in (1, 2, 4, 8, 10, 10):
        assert longest / 2 <= waits.next() <= longest


def test_requests_are_spaced_by_the_rate() -> None:
    time_now = [0.0]
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        time_now[0] += seconds

    limit = RateLimit(30, clock=lambda: time_now[0], sleep=sleep)
    for _ in range(3):
        limit.wait()
    time_now[0] += 60
    limit.wait()
    assert pauses == [2.0, 2.0]


def test_retry_after_is_seconds_or_a_date() -> None:
    now = datetime(2026, 1, 31, tzinfo=timezone.utc)
    date = format_datetime(now + timedelta(seconds=90), usegmt=True)
    found = [retry_after_s(text, now) for text in ("3", "1.5", "-4", date, "soon", "nan", "inf", None)]
    assert found == [3, 1.5, 0, 90, None, None, None, None]
