"""Authors on real causal models, tiny and built by the tests, and on a chat server that behaves and misbehaves."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edgead.runtime.errors import InputError, LanguageModelError
from edgead.server_side.kka.causal import Dialogue
from edgead.server_side.kka.config import Imagine, parse_config
from edgead.server_side.kka.language import Draw, EndpointAuthor, TransformersAuthor, first_sentence, open_author
from edgead.server_side.prompts.llm import OpenAiLimits

PROMPTS = [f"Describe part {'x' * (number * 5 % 13)}." for number in range(16)]
SEEDS = [1000 + number for number in range(16)]
KEY = "sk-secret-of-the-tests"


@pytest.fixture(scope="module")
def model(models_of_tests: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_of_tests.byte_model(tmp_path_factory.mktemp("language") / "tiny")


def local(model: Path, adapter: Path | None = None, **more: Any) -> TransformersAuthor:
    settings = {"max_tokens": 12, "batch": 16, **more}
    return TransformersAuthor(Imagine("local", str(model), **settings), adapter, device="cpu")


def test_an_answer_is_the_same_alone_and_in_any_company(model: Path) -> None:
    together = local(model).write(PROMPTS, SEEDS)
    author = local(model, batch=5)
    assert [author.write([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)] == together
    assert author.write(PROMPTS[::-1], SEEDS[::-1])[::-1] == together
    assert len(set(together)) == 16


def test_the_seed_decides_and_at_temperature_0_nothing_does(model: Path) -> None:
    author = local(model)
    answers = author.write(PROMPTS[:1] * 8, range(8))
    assert answers == author.write(PROMPTS[:1] * 8, range(8))
    assert len(set(answers)) == 8
    assert len(set(local(model, temperature=0.0).write(PROMPTS[:1] * 8, range(8)))) == 1


def test_tokens_are_drawn_after_the_softmax_of_the_scores() -> None:
    scores = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0])
    odds = np.exp(np.float64(scores) / 0.7)
    odds /= odds.sum()
    draw = Draw([0], 1, 0, temperature=0.7, top_p=1.0)
    numbers = (np.arange(20_000) + 0.5) / 20_000
    found = draw.tokens(scores.expand(20_000, 5), numbers).numpy()
    np.testing.assert_allclose(np.bincount(found, minlength=5) / 20_000, odds, atol=1e-4)


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, {0, 1, 2, 3}), (0.9, {0, 2, 3}), (0.5, {2}), (0.01, {2})])
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    scores = torch.log(torch.tensor([0.25, 0.05, 0.5, 0.2]))
    numbers = np.linspace(0, 1, 997, endpoint=False)
    found = Draw([0], 1, 0, temperature=1.0, top_p=top_p).tokens(scores.expand(997, 4), numbers)
    assert set(found.tolist()) == kept


def test_the_last_number_below_1_draws_a_token_that_can_be_drawn() -> None:
    scores = torch.tensor([[0.0, 0.0, float("-inf")]])
    found = Draw([0], 1, 0, temperature=1.0, top_p=1.0).tokens(scores, np.array([np.nextafter(1.0, 0)]))
    assert found.tolist() == [1]


def test_an_adapter_changes_answers_and_the_digest(model: Path, models_of_tests: ModuleType, tmp_path: Path) -> None:
    adapter = models_of_tests.new_adapter(model, tmp_path / "adapter")
    plain, tuned = local(model), local(model, adapter)
    assert plain.write(PROMPTS[:6], SEEDS[:6]) != tuned.write(PROMPTS[:6], SEEDS[:6])
    assert len({plain.digest, tuned.digest}) == 2
    assert local(model).digest == plain.digest
    assert (tuned.kind, tuned.name) == ("transformers", "tiny")
    for damaged in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="a LoRA adapter of this language model"):
            local(model, damaged)


def test_an_author_that_is_sent_elsewhere_takes_no_weights_along_and_refuses_another_model(
    model: Path, models_of_tests: ModuleType, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(model, folder)
    author = local(folder, models_of_tests.new_adapter(folder, tmp_path / "adapter"))
    answers = author.write(PROMPTS[:3], SEEDS[:3])
    data = pickle.dumps(author)
    assert len(data) < 5000
    sent = pickle.loads(data)
    assert sent.write(PROMPTS[:3], SEEDS[:3]) == answers
    assert sent.digest == author.digest
    models_of_tests.always_says(folder, 65)
    with pytest.raises(InputError, match="as on the machine that began the run"):
        pickle.loads(data).write(PROMPTS[:3], SEEDS[:3])


def test_an_endless_answer_ends_and_an_empty_one_is_empty(models_of_tests: ModuleType, tmp_path: Path) -> None:
    folder = models_of_tests.byte_model(tmp_path / "model")
    letter, newline = (Dialogue(_tokenizer(folder)).prompt("x")[at] for at in (0, 1))
    said = {}
    for token in (letter, newline, 256):
        models_of_tests.always_says(folder, token)
        said[token] = local(folder).write(["part", "another"], [0, 1])
    assert said == {letter: ["x" * 12] * 2, newline: ["", ""], 256: ["", ""]}


def test_a_model_that_learned_sentences_says_them_and_stops(models_of_tests: ModuleType, tmp_path: Path) -> None:
    sentences = ["a tiny spot", "a large hole in the middle"]
    folder = models_of_tests.word_model(tmp_path / "model", ["a part", *sentences])
    models_of_tests.teach(folder, "a part", sentences, steps=400)
    answers = local(folder).write(["a part"] * 30, range(30))
    assert set(answers) == set(sentences)


def test_weights_that_are_no_numbers_are_told(model: Path, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    network: Any = GPT2LMHeadModel.from_pretrained(folder)
    network.transformer.ln_f.bias.data.fill_(float("nan"))
    network.save_pretrained(folder)
    with pytest.raises(LanguageModelError, match="finite scores"):
        local(folder).write(["part"], [0])


def test_a_prompt_that_is_too_long_is_told_and_one_that_nearly_is_gets_a_short_answer(model: Path) -> None:
    author = local(model)
    near = "x" * 250
    with pytest.raises(LanguageModelError, match="fits the context of 'tiny', 256 tokens"):
        author.write(["x" * 256], [0])
    assert author.write([near, "part"], [3, 4]) == [author.write([near], [3])[0], author.write(["part"], [4])[0]]


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("A long scratch. It is deep.", "A long scratch."),
        ("\n\n  A dent of 3.5 mm, e.g. from a tool\nMore", "A dent of 3.5 mm, e.g. from a tool"),
        ("<think>Hm.\nA hole?</think>\nA hole! Really.", "A hole!"),
        ("<think>never ends", ""),
        ("", ""),
        (" \n\t\n", ""),
    ],
)
def test_of_an_answer_the_first_sentence_is_kept(answer: str, kept: str) -> None:
    assert first_sentence(answer) == kept


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


OPEN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
THINKS = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ODD = "{% if add_generation_prompt %}ask {{ messages[0]['content'] }}>{% else %}{{ messages | length }}{% endif %}"


@pytest.mark.parametrize(
    ("chat", "before", "after"),
    [
        (None, "a part?\n", "<end>"),
        ("CHAT", "<|user|>a part? <end>\n<|assistant|>", "<end>"),
        (OPEN, "user: a part? \nassistant: ", "\n<end>"),
        (THINKS, "<user>a part? <end>\n<assistant><think></think>", "<end>"),
        (ODD, "ask a part? >", "<end>"),
    ],
)
def test_a_prompt_ends_where_its_answer_begins(
    chat: str | None, before: str, after: str, models_of_tests: ModuleType, tmp_path: Path
) -> None:
    written = models_of_tests.CHAT if chat == "CHAT" else chat
    tokenizer = _tokenizer(models_of_tests.byte_model(tmp_path / "model", chat=written))
    dialogue = Dialogue(tokenizer)
    if chat == "CHAT":
        before = before.replace("? ", "?")
    assert tokenizer.decode(dialogue.prompt("a part? ")) == before
    assert tokenizer.decode(dialogue.answer("a part? ", "a hole")) == "a hole" + after


def test_a_tokenizer_without_an_end_ends_answers_with_a_newline(models_of_tests: ModuleType, tmp_path: Path) -> None:
    folder = models_of_tests.byte_model(tmp_path / "model", end=False)
    assert Dialogue(_tokenizer(folder)).text(Dialogue(_tokenizer(folder)).answer("part", "a hole")) == "a hole\n"
    models_of_tests.teach(folder, "part", ["a hole"], steps=60)
    assert local(folder, max_tokens=60).write(["part"] * 3, range(3)) == ["a hole"] * 3


def test_a_hub_name_without_a_network_gives_one_line(tmp_path: Path) -> None:
    code = (
        "from edgead.runtime.errors import InputError\n"
        "from edgead.server_side.kka.config import Imagine\n"
        "from edgead.server_side.kka.language import TransformersAuthor\n"
        "try:\n    TransformersAuthor(Imagine('local', 'nobody/nothing'))\n"
        "except InputError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "'nobody/nothing'" in done.stdout
    assert "imagine.model = DIR" in done.stdout
    assert len(done.stdout.splitlines()) == 1


MEMORY = """
import gc, resource, sys
from edgead.runtime.errors import OutOfMemoryError
from edgead.server_side.kka.config import Imagine
from edgead.server_side.kka.language import TransformersAuthor
sizes = []
class Author(TransformersAuthor):
    def _generated(self, prompts, seeds, limit):
        found = super()._generated(prompts, seeds, limit)
        sizes.append(len(prompts))
        return found
author = Author(Imagine("local", sys.argv[1], batch=16, max_tokens=2), device="cpu")
asked = ["part"] * 16, list(range(16))
def leave(megabytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
author.write(["part"], [0])
plenty = author.write(*asked)
leave(150)
print(author.write(*asked) == plenty, sizes)
# What is collected later would make room for an answer.
gc.collect()
leave(1)
try:
    author.write(*asked)
except OutOfMemoryError as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(error)
"""


def test_without_memory_for_a_batch_less_is_asked_at_a_time_and_without_any_it_is_told(
    models_of_tests: ModuleType, tmp_path: Path
) -> None:
    # Scores of half a million words are 64 MB for a batch in float64, and 4 MB for one answer.
    folder = models_of_tests.byte_model(tmp_path / "model", vocabulary=500_000)
    # With one arena: a thread's own has 64 MB in reserve, which malloc falls back on when the limit is reached.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, env=environment, check=False
    )
    same, *said = done.stdout.splitlines()
    assert same == "True [1, 16, 8, 8]", done.stderr
    assert said, done.stderr
    assert "memory for an answer of 'model'" in said[0]
    assert "imagine.batch = 16" in said[0]


def endpoint(url: str, cache: Path, **more: Any) -> EndpointAuthor:
    limits = OpenAiLimits(attempts=2, first_wait_s=0.01, timeout_s=2.0, requests_per_minute=0)
    return EndpointAuthor(Imagine("endpoint", "m", url, **more), cache=cache, limits=limits)


def test_an_endpoint_is_asked_once_for_each_answer_with_its_seed(chat: ModuleType, tmp_path: Path) -> None:
    with chat.chat_server(chat.say("A hole. And more."), chat.say("- A dent\n- A tear")) as server:
        author = endpoint(server.url, tmp_path)
        assert author.write(["a part", "a part"], [7, 8]) == ["A hole.", "- A dent"]
        assert endpoint(server.url, tmp_path).write(["a part", "a part"], [7, 8]) == ["A hole.", "- A dent"]
    assert [body["seed"] for body in server.requests] == [7, 8]
    assert [body["messages"][0]["content"] for body in server.requests] == ["a part"] * 2
    assert {body["max_tokens"] for body in server.requests} == {64}
    assert (author.kind, author.name, author.digest) == ("endpoint", "m", "")


def test_an_endpoint_that_says_nothing_or_will_not_gives_empty_answers(chat: ModuleType, tmp_path: Path) -> None:
    acts = chat.say(""), chat.say(None, refusal="No."), chat.say("{}"), chat.say("a hole")
    with chat.chat_server(*acts) as server:
        author = endpoint(server.url, tmp_path)
        assert author.write(["a part"] * 4, range(4)) == ["", "", "{}", "a hole"]
        assert author.write(["a part"], [0]) == ["a hole"]


def test_an_endpoint_that_fails_is_told_and_what_it_said_is_kept(chat: ModuleType, tmp_path: Path) -> None:
    with chat.chat_server(chat.say("a hole"), chat.send(b"busy", 503)) as server:
        author = endpoint(server.url, tmp_path)
        with pytest.raises(LanguageModelError, match=r"HTTP 503, 'busy', after 2 attempts"):
            author.write(["a part"] * 3, range(3))
        server.acts[:] = [chat.say("a dent")]
        assert author.write(["a part"] * 3, range(3)) == ["a hole", "a dent", "a dent"]
    assert [body["seed"] for body in server.requests] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("act", ["silence", "hang_up", "endless", "nonsense"])
def test_an_endpoint_that_misbehaves_ends_in_one_error(act: str, chat: ModuleType, tmp_path: Path) -> None:
    acts = {
        "silence": chat.silence(1),
        "hang_up": chat.hang_up,
        "endless": chat.endless(4 << 20),
        "nonsense": chat.send(b"<html>"),
    }
    limits = OpenAiLimits(attempts=1, timeout_s=0.3, requests_per_minute=0)
    with chat.chat_server(acts[act]) as server, pytest.raises(LanguageModelError) as refused:
        EndpointAuthor(Imagine("endpoint", "m", server.url), cache=tmp_path, limits=limits).write(["a"], [0])
    assert "--llm" not in str(refused.value)


def test_the_key_comes_from_the_environment_and_its_want_is_told_in_words_of_the_configuration(
    chat: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with chat.chat_server(chat.send(b"who?", 401), chat.say("a hole")) as server:
        with pytest.raises(LanguageModelError, match=r"imagine\.key_env"):
            endpoint(server.url, tmp_path).write(["a part"], [0])
        monkeypatch.setenv("PART_KEY", KEY)
        endpoint(server.url, tmp_path, key_env="PART_KEY").write(["a part"], [0])
    assert server.keys[1] == f"Bearer {KEY}"
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_the_configuration_names_the_author(
    chat: ModuleType, model: Path, models_of_tests: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = parse_config(b'normals = "x"')
    grammar = open_author(config, None)
    assert grammar.write(["a", "b"], [1, 2]) == [grammar.write(["a"], [1])[0], grammar.write(["b"], [2])[0]]
    adapter = models_of_tests.new_adapter(model, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"imagine\.author = 'local'"):
        open_author(config, adapter)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with chat.chat_server(chat.say("a hole")) as server:
        asked = msgspec.structs.replace(config, imagine=Imagine("endpoint", "m", server.url))
        assert open_author(asked, None).write(["a part"], [0]) == ["a hole"]
        with pytest.raises(InputError, match="an adapter for 'endpoint'"):
            open_author(asked, adapter)
    tuned = open_author(msgspec.structs.replace(config, imagine=Imagine("local", str(model))), adapter)
    assert tuned.kind == "transformers"
