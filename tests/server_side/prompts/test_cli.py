"""`edgead prompts` as a person or a script meets it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import Result

from edgead.runtime.errors import InputError, LanguageModelError, OutputExistsError, PromptError
from edgead.server_side.prompts import april_gan, normality, read_prompt_set
from edgead.server_side.prompts.generators import descriptor_question
from edgead.server_side.prompts.llm_cache import CachedModel
from edgead.server_side.prompts.llm_local import local_name
from edgead.server_side.prompts.prompt_set import STATES
from edgead.server_side.prompts.requests import Message, Request

Invoke = Callable[..., Result]
KEY = "sk-very-secret-0123456789"


def test_a_set_is_made_shown_extended_and_checked(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "carpet.json"
    made = invoke("new", "carpet", "--method", "april-gan", "-o", path)
    assert read_prompt_set(path) == april_gan("carpet")
    assert "420 prompts, 420 by template" in made.output
    assert "anomalous: 175" in invoke("show", path).output
    assert invoke("show", path, "--json").output == path.read_text()
    assert "added 36" in invoke("add", path, "frayed {}", "a wet carpet.", "--state", "anomalous").output
    assert "added 0" in invoke("add", path, "a wet carpet.", "--state", "anomalous").output
    checked = json.loads(invoke("check", path, "--json").output)
    assert checked["authors"] == {"template": 420, "person": 36}
    assert checked["perhaps_too_long"] == []


def test_an_addition_that_contradicts_the_set_leaves_the_file(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "carpet.json"
    invoke("new", "carpet", "-o", path)
    before = path.read_bytes()
    with pytest.raises(PromptError, match="each prompt under one state"):
        invoke("add", path, "a photo of a carpet.", "--state", "anomalous")
    for text in ("", "\x1b[2J", "x" * 400):
        with pytest.raises(PromptError, match="a prompt"):
            invoke("add", path, text, "--state", "normal")
    assert "would add 1" in invoke("add", path, "a dry carpet.", "--state", "normal", "--dry-run").output
    assert path.read_bytes() == before


def test_a_normality_needs_no_model(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "thread.json"
    result = json.loads(invoke("normality", "thread", "--class", "carpet", "-o", path, "--json").output)
    assert result["normalities"] == {"thread": 420}
    assert read_prompt_set(path) == normality("thread", "carpet")
    own = tmp_path / "own.json"
    invoke("normality", "thread", "--class", "carpet", "--phrase", "carpet with lint", "-o", own)
    assert read_prompt_set(own).authors()["person"] == 35


def test_a_dry_run_prints_and_writes_nothing(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("new", "carpet", "--method", "alfa", "-o", tmp_path / "a.json", "--dry-run")
    assert "An industrial image of a broken carpet" in result.output
    assert not list(tmp_path.iterdir())


def test_what_the_model_said_is_shown_and_used_only_after_a_yes(
    invoke: Invoke, chat: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PART_KEY", KEY)
    path, cache = tmp_path / "a.json", tmp_path / "cache"
    words = ["normality", "thread", "--class", "carpet", "--llm-model", "qwen", "--cache", cache, "-o", path]
    with chat.chat_server(chat.say("1. carpet with a **loose** thread\n2. lint http://evil.example")) as server:
        words += ["--llm", server.url, "--llm-key-env", "PART_KEY"]
        dry = invoke(*words, "--dry-run")
        assert "1. carpet with a loose thread" in dry.output
        with pytest.raises(InputError, match="--yes"):
            invoke(*words)
        assert not path.exists()
        assert len(server.requests) == 1
    done = invoke(*words, "--yes", "--offline-cache")
    assert "2. lint\n" in done.output
    assert KEY not in dry.output + done.output + path.read_text()
    prompts = read_prompt_set(path)
    assert prompts.phrases == ("carpet with a loose thread", "carpet with lint")
    assert prompts.authors()["llm:qwen"] == 70
    assert "asked qwen" in invoke("show", path).output
    shown = invoke(*words, "--yes", "--force", "--json")
    assert json.loads(shown.stdout)["authors"]["llm:qwen"] == 70
    assert "asked qwen" in shown.stderr


@pytest.mark.parametrize(("reply", "code", "written"), [("y", 0, True), ("n", 2, False)])
def test_a_person_at_a_terminal_is_asked(
    chat: ModuleType, tmp_path: Path, reply: str, code: int, written: bool
) -> None:
    path = tmp_path / "a.json"
    command = (
        "import sys, click\nfrom edgead.runtime.errors import EdgeadError\n"
        "from edgead.server_side.prompts.cli import prompts\n"
        "try:\n    prompts.main(sys.argv[1:], standalone_mode=False)\n"
        "except EdgeadError as error:\n    print(error, file=sys.stderr)\n    sys.exit(error.exit_code)"
    )
    ours, theirs = pty.openpty()
    with chat.chat_server(chat.say("- even weave")) as server:
        words = ["new", "carpet", "--method", "descriptors", "--llm", server.url, "--llm-model", "m", "-o", str(path)]
        os.write(ours, f"{reply}\n".encode())
        done = subprocess.run(
            [sys.executable, "-c", command, *words, "--cache", str(tmp_path / "cache")],
            stdin=theirs, capture_output=True, text=True, check=False,
        )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    assert done.returncode == code, done.stderr
    assert "use these 2 phrases?" in done.stdout
    assert path.exists() == written


def test_a_refusal_ends_the_command_and_is_not_kept(invoke: Invoke, chat: ModuleType, tmp_path: Path) -> None:
    words = ["new", "carpet", "--method", "descriptors", "--llm-model", "m", "--cache", tmp_path / "c"]
    words += ["-o", tmp_path / "a.json", "--yes"]
    with chat.chat_server(chat.say("I'm sorry, I can't."), chat.say("- even weave")) as server:
        with pytest.raises(LanguageModelError, match="a refusal"):
            invoke(*words, "--llm", server.url)
        assert not (tmp_path / "a.json").exists()
        invoke(*words, "--llm", server.url)
    assert len(server.requests) == 3


def test_a_local_model_is_asked_by_its_folder(invoke: Invoke, ready: Any, tiny_gpt2: Path, tmp_path: Path) -> None:
    # An untrained model says nothing sensible, so its cached answer is replaced by one that a trained one gives.
    cache, output = tmp_path / "c", tmp_path / "a.json"
    words = ["new", "carpet", "--method", "descriptors", "--llm-local", tiny_gpt2, "--llm-max-tokens", 40]
    words += ["--cache", cache, "-o", output, "--yes"]
    with contextlib.suppress(LanguageModelError):
        invoke(*words)
    name = local_name(str(tiny_gpt2))
    answers = CachedModel(cache, ready("- even weave", "- pulled loop"), model=name)
    for state in STATES:
        question = Message("user", descriptor_question("carpet", state))
        request = Request(name, (question,), max_tokens=40)
        answers.forget(request)
        answers.complete(request)
    assert "asked tiny-gpt2" in invoke(*words, "--force").output
    assert read_prompt_set(output).authors()["llm:tiny-gpt2"] == 2


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["new", ""], "a class name"),
        (["new", "carpet", "--domain", " "], "a domain"),
        (["new", "carpet", "--llm", "http://x/v1"], "--llm-model"),
        (["new", "carpet", "--llm-model", "m"], "--llm"),
        (["new", "carpet", "--offline-cache"], "--offline-cache alone"),
        (["new", "carpet", "--llm", "http://x/v1", "--llm-model", "m", "--llm-local", "x"], "one language model"),
        (["new", "carpet", "--llm", "http://x/v1", "--llm-model", "m"], "alfa or descriptors"),
        (["new", "carpet", "--detail", "scratches"], "--method alfa with --detail"),
        (["new", "carpet", "--method", "alfa", "--detail", " "], "a detail"),
        (["new", "carpet", "--method", "alfa", "--llm", "x", "--llm-model", "m"], "the address"),
        (["normality", "", "--class", "carpet"], "the text of a normality"),
        (["normality", "thread", "--class", " "], "a class name"),
        (["normality", "t", "--class", "c", "--phrase", "p", "--llm-local", "x"], "from a person or"),
    ],
)
def test_mistakes_are_told_and_write_nothing(invoke: Invoke, tmp_path: Path, words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        invoke(*words, "-o", tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_stops_the_command_before_a_model_is_asked(
    invoke: Invoke, chat: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text("mine")
    with chat.chat_server(chat.say("- x")) as server, pytest.raises(OutputExistsError):
        invoke("new", "carpet", "--method", "alfa", "--llm", server.url, "--llm-model", "m", "-o", path)
    assert not server.requests
    assert path.read_text() == "mine"


def test_an_edited_file_is_refused_with_the_place(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    invoke("new", "carpet", "-o", path)
    path.write_text(path.read_text().replace('"state": "anomalous"', '"state": "bad"', 1))
    for command in (["check"], ["show"], ["add"]):
        with pytest.raises(PromptError, match="prompt 155"):
            invoke(*command, path, *(["x y", "--state", "normal"] if command == ["add"] else []))


@pytest.mark.parametrize("command", [[], ["new"], ["normality"], ["show"], ["add"], ["check"]])
def test_every_help_has_an_example_and_imports_no_framework(command: list[str]) -> None:
    code = (
        "import sys\nfrom edgead.server_side.prompts.cli import prompts\n"
        "prompts.main([*sys.argv[1:], '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'openai', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "edgead prompts" in done.stdout
