"""The prompt set: what a person may edit, and what is refused with the place named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.runtime.errors import InputError, OutputExistsError, PromptError
from edgead.server_side.prompts import Exchange, Prompt, PromptSet, read_prompt_set, winclip, write_prompt_set
from edgead.server_side.prompts.checks import parse_prompt_set
from edgead.server_side.prompts.ensembles import descriptors, normality
from edgead.server_side.prompts.prompt_set import format_prompt_set
from edgead.server_side.prompts.words import LIMITS, spoken_name, with_article

EXCHANGE = Exchange("ab" * 32, "qwen", "What?", "a frayed carpet", "2026-01-31T12:00:00+00:00")
SMALL = PromptSet(
    "carpet",
    (
        Prompt("a good carpet", "normal"),
        Prompt("a bad carpet", "anomalous", "person"),
        Prompt("a frayed carpet", "anomalous", "llm:qwen", None, "ab" * 6),
    ),
    exchanges=(EXCHANGE,),
)


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    fields = json.loads(format_prompt_set(SMALL))
    change(fields)
    return json.dumps(fields).encode()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for number, prompts in enumerate((SMALL, winclip("metal_nut"), normality("thread", "carpet"))):
        path = tmp_path / f"{number}.json"
        write_prompt_set(path, prompts)
        assert read_prompt_set(path) == prompts


def test_the_file_has_one_prompt_to_a_line() -> None:
    lines = format_prompt_set(SMALL).decode().splitlines()
    assert '    {"text": "a bad carpet", "state": "anomalous", "author": "person"},' in lines
    assert lines[1] == '  "schema": 1,'
    assert len(lines) < 25


def test_an_existing_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_prompt_set(path, SMALL)
    with pytest.raises(OutputExistsError):
        write_prompt_set(path, descriptors("carpet"))
    assert read_prompt_set(path) == SMALL
    write_prompt_set(path, descriptors("carpet"), force=True)
    assert read_prompt_set(path).method == "descriptors"


def test_a_set_that_does_not_hold_together_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PromptError):
        write_prompt_set(tmp_path / "a.json", PromptSet("carpet", (Prompt("a carpet", "normal"),)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["absent", "folder"])
def test_a_path_without_a_file_is_told(tmp_path: Path, what: str) -> None:
    path = tmp_path if what == "folder" else tmp_path / "none.json"
    with pytest.raises(InputError, match="a folder" if what == "folder" else "no such file"):
        read_prompt_set(path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda f: f["prompts"][1].update(state="broken"), "'anomalous' in prompt 2.*'broken'"),
        (lambda f: f["prompts"][1].update(text="  "), "words in prompt 2.*empty"),
        (lambda f: f["prompts"][1].update(text="..."), "words in prompt 2"),
        (lambda f: f["prompts"][1].update(text="x" * 301), "300 characters in prompt 2.*301"),
        (lambda f: f["prompts"][1].update(text="a \u202e carpet"), r"prompt 2.*U\+202E"),
        (lambda f: f["prompts"][1].update(text="a\ncarpet"), r"prompt 2.*U\+000A"),
        (lambda f: f["prompts"][1].update(text=7), "text of prompt 2"),
        (lambda f: f["prompts"][1].update(text="A  good carpet".replace("  ", " ")), "one state.*prompt 2"),
        (lambda f: f["prompts"][1].update(txet="x"), "unknown field `txet`.*prompt 2"),
        (lambda f: f["prompts"][1].update(author="nobody"), "author.*prompt 2.*'nobody'"),
        (lambda f: f["prompts"][1].update(author="llm:"), "model's name in prompt 2"),
        (lambda f: f["prompts"][1].update(author="llm:x"), "exchanges for prompt 2.*none"),
        (lambda f: f["prompts"][1].update(exchange="ab" * 6), "no exchange in prompt 2"),
        (lambda f: f["prompts"][1].update(normality=""), "normality of prompt 2"),
        (lambda f: f["prompts"].append(f["prompts"][0]), "every prompt once.*as prompt 4"),
        (lambda f: f["prompts"].pop(0), "at least one normal prompt"),
        (lambda f: [p.update(normality="thread") for p in f["prompts"][1:]], "at least one anomalous prompt"),
        (lambda f: f.update(prompts=[]), "at least one normal prompt"),
        (lambda f: f.update(prompts="all"), "prompts"),
        (lambda f: f.update(class_name=""), "words in class_name"),
        (lambda f: f.update(domain="\x00"), r"domain.*U\+0000"),
        (lambda f: f.update(schema=2), "schema 1 or older.*schema 2, from a newer"),
        (lambda f: f.update(schema=0), "schema 0"),
        (lambda f: f.pop("schema"), "schema"),
        (lambda f: f.update(templates=["a photo"]), "one '{}'.*template 1"),
        (lambda f: f.update(states={"normal": ["{} {}"], "anomalous": []}), "normal state 1"),
        (lambda f: f.update(states={"odd": []}), "unknown field `odd`"),
        (lambda f: f.update(phrases=["\u200b"]), r"phrase 1.*U\+200B"),
        (lambda f: f["exchanges"][0].update(digest="12"), "64 hexadecimal digits in exchange 1"),
        (lambda f: f["exchanges"][0].update(time="yesterday"), "time.*exchange 1"),
        (lambda f: f["exchanges"][0].update(answer="x" * 5000), "answer in exchange 1"),
        (lambda f: f["exchanges"].append(f["exchanges"][0]), "every exchange once"),
        (lambda f: f.update(extra=1), "unknown field `extra`"),
    ],
)
def test_nonsense_is_refused_with_its_place(change: Callable[[dict[str, Any]], object], place: str) -> None:
    with pytest.raises(PromptError, match=f"(?s){place}") as refused:
        parse_prompt_set(edited(change), "part.json")
    assert "part.json" in str(refused.value)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (b"", "line 1"),
        (b"hello", "line 1"),
        (b'{"schema": 1,\n "class_name": "x"\n "domain": "y"}', "line 3"),
        (b"\xff\xfe", "wanted JSON"),
        (b"[" * 100_000, "array"),
        (b'{"schema":1,"a":' + b"[" * 100_000, "JSON"),
        (b"[]", "array"),
        (b"null", "null"),
    ],
)
def test_what_is_no_json_is_refused_with_its_line(data: bytes, got: str) -> None:
    with pytest.raises(PromptError, match=got):
        parse_prompt_set(data, "part.json")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_edit_is_a_whole_set_or_the_one_error(data: st.DataObject) -> None:
    text = format_prompt_set(SMALL)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    middle = data.draw(
        st.one_of(st.binary(max_size=12), st.text(max_size=8).map(lambda t: t.encode("utf-8", "replace")))
    )
    try:
        found = parse_prompt_set(text[:start] + middle + text[end:], "part.json")
    except PromptError:
        return
    assert parse_prompt_set(format_prompt_set(found), "part.json") == found


def test_a_file_that_is_far_too_long_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    with path.open("wb") as stream:
        stream.truncate(LIMITS.file_bytes + 1)
    with pytest.raises(PromptError, match="16 MiB"):
        read_prompt_set(path)


def test_too_many_prompts_are_refused() -> None:
    many = PromptSet("carpet", tuple(Prompt(f"carpet {n}", "normal") for n in range(LIMITS.prompts + 1)))
    with pytest.raises(PromptError, match="at most 20000 prompts"):
        parse_prompt_set(format_prompt_set(many), "part.json")


def test_a_state_goes_through_the_templates_and_a_sentence_stays_one() -> None:
    before = winclip("carpet")
    after = before.add(["frayed {}", "a wet carpet."], "anomalous")
    new = after.prompts[len(before.prompts) :]
    assert len(new) == len(before.templates) + 1
    assert new[0] == Prompt("a cropped photo of the frayed carpet.", "anomalous", "person")
    assert after.states.anomalous[-1] == "frayed {}"
    assert after.add(["FRAYED {}".lower(), "A WET CARPET."], "anomalous").prompts == after.prompts


def test_prompts_of_added_normalities_belong_to_no_class_embedding() -> None:
    prompts = normality("thread", "carpet")
    added = prompts.normality_texts("thread")
    assert prompts.normalities() == ("thread",)
    assert not set(added) & {*prompts.texts("normal"), *prompts.texts("anomalous")}
    assert len(added) + len(prompts.class_prompts()) == len(prompts.prompts)


@pytest.mark.parametrize("name", ["", "  ", "_", "x" * 61, "a\x1b[31mb", "\u202eabc", "..."])
def test_class_names_that_are_no_names_are_refused(name: str) -> None:
    with pytest.raises(PromptError, match="a class name"):
        spoken_name(name)


def test_words_are_said_as_people_say_them() -> None:
    assert spoken_name(" metal_nut ") == "metal nut"
    assert spoken_name("Cafe\u0301") == "Caf\u00e9"
    said = {word: with_article(word) for word in ("industrial", "uniform", "unblemished", "flawed", "intact", "used")}
    assert [text.split()[0] for text in said.values()] == ["an", "a", "an", "a", "an", "a"]
    assert with_article("imperfect nut", capital=True) == "An imperfect nut"
