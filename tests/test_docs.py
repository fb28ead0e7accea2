"""What the documentation names exists: tests, commands and their options. So it cannot drift from the code."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest

from edgead.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TEST = re.compile(r"([\w/]+\.py)::(\w+)")
NOT_YET = re.compile(r"\bnot yet\b", re.IGNORECASE)
FAULTS = 43
ALWAYS = {"--help", "-h", "--debug"}


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the tests in a file under `tests/`."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def named_tests(text: str) -> list[tuple[str, str]]:
    return [(file.removeprefix("tests/"), name) for file, name in TEST.findall(text)]


def missing_tests(text: str) -> list[str]:
    return [
        f"{file}::{name}"
        for file, name in named_tests(text)
        if not (ROOT / "tests" / file).is_file() or name not in names_in(file)
    ]


def fault_rows(text: str) -> dict[int, list[str]]:
    """Cells of the table of faults, by the number of the row."""
    lines = re.findall(r"^\| (\d+) \|(.*)\|$", text, re.MULTILINE)
    assert len({number for number, _ in lines}) == len(lines), "a row stands there twice"
    return {int(number): [cell.strip() for cell in cells.split("|")] for number, cells in lines}


def command_lines(text: str) -> list[str]:
    """Every line of a page that calls `edgead`: in blocks of code, and between backticks."""
    text = text.replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [line for block in fenced for line in block.splitlines()]
    blocks += re.findall(r"^(?: {4}|\t)(.*)$", plain, re.MULTILINE)
    found = [line.strip() for line in blocks] + re.findall(r"`([^`]+)`", plain)
    calls = (re.match(r"(?:\$ )?(?:\S*/)?edgead\s+(\S.*)", line, re.DOTALL) for line in found)
    return [call.group(1) for call in calls if call]


def mistakes_in(line: str) -> list[str]:
    """What of a call's commands and options the command line does not have."""
    words = shlex.split(re.sub(r"[\[\]()]", " ", line), comments=True)
    command: click.Command = cli
    context = click.Context(cli, info_name="edgead")
    place = 0
    while isinstance(command, click.Group) and place < len(words) and not words[place].startswith(("-", "...")):
        found = command.get_command(context, words[place])
        if found is None:
            return [f"no command {words[place]!r} in 'edgead {line}'"]
        command, context = found, click.Context(found, info_name=words[place], parent=context)
        place += 1
    known = set(ALWAYS)
    for parameter in command.params:
        known.update(parameter.opts, parameter.secondary_opts)
    if command is cli:
        known.add("--version")
    end = next((index for index, word in enumerate(words) if word in {"|", ">", "&&", ";", "--"}), len(words))
    options = [word.partition("=")[0] for word in words[place:end] if re.match(r"--?[A-Za-z]", word)]
    return [f"no option {option!r} in 'edgead {line}'" for option in options if option not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    assert missing_tests(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_shows_exists_with_its_options(page: Path) -> None:
    assert [mistake for line in command_lines(page.read_text()) for mistake in mistakes_in(line)] == []


def test_the_table_of_faults_is_whole_and_each_row_has_its_tests_or_says_not_yet() -> None:
    rows = fault_rows((ROOT / "docs" / "faults.md").read_text())
    assert sorted(rows) == list(range(1, FAULTS + 1))
    for number, (fault, happens, tests) in rows.items():
        assert fault, number
        assert happens, number
        assert named_tests(tests) or NOT_YET.search(tests), f"row {number} names no test and does not say 'not yet'"


def test_every_claim_of_the_threat_model_has_its_test_or_says_not_yet() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    claims = [line for line in re.findall(r"^\|(.*)\|$", text, re.MULTILINE) if not re.match(r"[\s|:-]+$", line)]
    claims = [line for line in claims if not line.strip().startswith("claim ")]
    assert len(claims) > 20
    for line in claims:
        assert named_tests(line) or NOT_YET.search(line), f"no test for: {line[:100]}"


def test_every_format_has_a_test_that_asserts_its_bytes_or_says_not_yet() -> None:
    sections = (ROOT / "docs" / "formats.md").read_text().split("\n## ")[1:]
    assert len(sections) >= 8
    for section in sections:
        assert named_tests(section) or NOT_YET.search(section), section.partition("\n")[0]


def test_what_does_not_exist_is_found() -> None:
    assert missing_tests("`test_docs.py::test_of_nothing` `nowhere.py::test_x`") == [
        "test_docs.py::test_of_nothing",
        "nowhere.py::test_x",
    ]
    assert missing_tests("`tests/test_docs.py::test_what_does_not_exist_is_found`") == []
    page = "Try `edgead exprot x` or:\n\n    edgead show part.bundle --jsn   # --no\n"
    page += "\n```\nedgead run a b \\\n  --bad=1\n```\n"
    lines = command_lines(page)
    assert [mistake.split(" in ")[0] for line in lines for mistake in mistakes_in(line)] == [
        "no option '--bad'",
        "no option '--jsn'",
        "no command 'exprot'",
    ]
