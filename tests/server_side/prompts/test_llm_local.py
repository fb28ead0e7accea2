"""A real causal model of `transformers`, tiny and untrained, loaded from a folder as any other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgead.runtime.errors import InputError, LanguageModelError
from edgead.server_side.prompts.llm_local import TransformersModel, local_name
from edgead.server_side.prompts.requests import Message, Request


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> TransformersModel:
    return TransformersModel(str(tiny_gpt2), device="cpu")


def ask(model: TransformersModel, text: str = "What?", **rest: float) -> str:
    return model.complete(Request(model.model, (Message("user", text),), max_tokens=20, **rest))  # type: ignore[arg-type]


def test_one_seed_gives_one_answer(model: TransformersModel) -> None:
    answer = ask(model)
    assert answer
    assert answer == ask(model)
    drawn = ask(model, temperature=1.5, seed=1)
    assert drawn == ask(model, temperature=1.5, seed=1)
    assert drawn != ask(model, temperature=1.5, seed=2)


def test_the_answer_is_bounded_and_without_the_question(model: TransformersModel) -> None:
    assert len(ask(model)) <= 20
    assert "What?" not in ask(model)


def test_the_name_holds_no_path_and_tells_files_apart(
    model: TransformersModel, tiny_gpt2: Path, tmp_path: Path
) -> None:
    assert (model.model.name, model.model.base_url) == ("tiny-gpt2", "transformers")
    copy = tmp_path / "tiny-gpt2"
    shutil.copytree(tiny_gpt2, copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert local_name(str(copy)).revision != model.model.revision
    assert local_name(str(tiny_gpt2)) == model.model


def test_a_question_that_is_too_long_is_told(model: TransformersModel) -> None:
    with pytest.raises(LanguageModelError, match="fits the context"):
        ask(model, "x" * 300)


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="a causal language model"):
        TransformersModel(str(tmp_path))


@pytest.mark.parametrize("place", ["models/none/at/all", "./none", "a b"])
def test_no_folder_and_no_name_is_told(place: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        TransformersModel(place)


def test_a_hub_name_without_a_network_names_the_cache_and_the_way_out(tmp_path: Path) -> None:
    code = (
        "from edgead.runtime.errors import InputError\n"
        "from edgead.server_side.prompts.llm_local import TransformersModel\n"
        "try:\n    TransformersModel('nobody/nothing')\nexcept InputError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "'nobody/nothing'" in done.stdout
    assert str(tmp_path) in done.stdout
    assert "--llm-local DIR" in done.stdout
    assert len(done.stdout.splitlines()) == 1
