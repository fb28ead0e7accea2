"""Text tables: the same bytes however often the work was interrupted, and refusals that say what is wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgead.runtime.errors import InputError, KnowledgeError, OutputExistsError
from edgead.runtime.tensors import decode_tensors, encode_tensors
from edgead.server_side.prompts import Prompt, PromptSet, winclip, write_prompt_set
from edgead.server_side.vision_language import (
    TextTable,
    VisionLanguageModel,
    check_table,
    encode_texts,
    load_model,
    make_table,
    make_table_file,
    read_table,
    write_table,
)
from edgead.server_side.vision_language.cli import text_table


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    return winclip("metal nut")


@pytest.fixture(scope="module")
def table(tiny_model: VisionLanguageModel, prompts: PromptSet) -> TextTable:
    return make_table(tiny_model, prompts, progress=False)


@dataclasses.dataclass
class FailingTokenizer:
    """A tokenizer that is stopped at its third batch, as by Ctrl-C."""

    inner: Callable[[list[str]], torch.Tensor]
    calls: int = 0

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return self.inner(texts)


def test_rows_are_the_normalised_text_embeddings(tiny_model: VisionLanguageModel) -> None:
    texts = ["a photo of a flawless nut.", "a photo of a damaged nut."] * 3
    module: Any = tiny_model.module
    with torch.inference_mode():
        wanted = module.encode_text(tiny_model.tokenizer(texts), normalize=True).numpy()
    got = encode_texts(tiny_model, texts, batch=4, progress=False)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert encode_texts(tiny_model, [], progress=False).shape == (0, 48)


def test_a_row_depends_on_its_sentence_alone(tiny_model: VisionLanguageModel) -> None:
    texts = [f"a photo of nut number {number}." for number in range(9)]
    np.testing.assert_array_equal(
        encode_texts(tiny_model, texts, progress=False)[:2], encode_texts(tiny_model, texts[:2], progress=False)
    )


def test_an_empty_sentence_is_refused(tiny_model: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match=r"number 1"):
        encode_texts(tiny_model, ["a nut", " "], progress=False)


def test_a_table_reads_back_with_every_sentence_and_its_author(
    table: TextTable, prompts: PromptSet, tmp_path: Path
) -> None:
    write_table(tmp_path / "nut.table", table)
    back = read_table(tmp_path / "nut.table")
    np.testing.assert_array_equal(back.table, table.table)
    assert back.rows == table.rows
    assert [row.text for row in back.rows] == [prompt.text for prompt in prompts.class_prompts()]
    assert back.state.sum() == len(prompts.texts("anomalous"))
    assert {row.author for row in back.rows} == {"template"}
    write_table(tmp_path / "again.table", back)
    assert (tmp_path / "again.table").read_bytes() == (tmp_path / "nut.table").read_bytes()


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    tiny_model: VisionLanguageModel, prompts: PromptSet, table: TextTable, tmp_path: Path
) -> None:
    path, part = tmp_path / "nut.table", tmp_path / "nut.table.part"
    interrupted = dataclasses.replace(tiny_model, tokenizer=FailingTokenizer(tiny_model.tokenizer))
    with pytest.raises(KeyboardInterrupt):
        make_table_file(path, interrupted, prompts, progress=False)
    assert part.is_file()
    assert not path.exists()
    counting = FailingTokenizer(tiny_model.tokenizer, calls=10)
    make_table_file(path, dataclasses.replace(tiny_model, tokenizer=counting), prompts, progress=False)
    assert counting.calls - 10 == -(-len(table.rows) // 64) - 2
    assert not part.exists()
    write_table(tmp_path / "whole.table", table)
    assert path.read_bytes() == (tmp_path / "whole.table").read_bytes()


def test_rows_of_other_sentences_are_not_taken_up(
    tiny_model: VisionLanguageModel, prompts: PromptSet, tmp_path: Path
) -> None:
    part = tmp_path / "nut.table.part"
    interrupted = dataclasses.replace(tiny_model, tokenizer=FailingTokenizer(tiny_model.tokenizer))
    with pytest.raises(KeyboardInterrupt):
        make_table(interrupted, prompts, part=part, progress=False)
    other = winclip("carpet")
    resumed = make_table(tiny_model, other, part=part, progress=False)
    np.testing.assert_array_equal(resumed.table, make_table(tiny_model, other, progress=False).table)


def test_a_stranger_in_the_place_of_the_side_file_is_left_alone(
    tiny_model: VisionLanguageModel, prompts: PromptSet, tmp_path: Path
) -> None:
    part = tmp_path / "nut.table.part"
    part.write_text("my notes")
    with pytest.raises(InputError, match="something else"):
        make_table(tiny_model, prompts, part=part, progress=False)
    assert part.read_text() == "my notes"


def test_prompts_of_one_state_only_are_refused(tiny_model: VisionLanguageModel) -> None:
    only = PromptSet("nut", (Prompt("a photo of a nut.", "normal"),))
    with pytest.raises(InputError, match="state 'anomalous'"):
        make_table(tiny_model, only, progress=False)


def test_a_table_of_another_model_or_weights_is_refused(
    tiny_model: VisionLanguageModel, table: TextTable, tiny_config: Callable[..., Path]
) -> None:
    check_table(table, tiny_model)
    with pytest.raises(KnowledgeError, match=r"tiny with the weights random:9.*tiny with random:1"):
        check_table(table, load_model(str(tiny_config()), "random:9"))
    with pytest.raises(KnowledgeError, match=r"made by ViT-B-32"):
        check_table(table, dataclasses.replace(tiny_model, name="ViT-B-32"))


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda arrays, marks: arrays.update({"text.table": arrays["text.table"] * 2}), "not of length 1"),
        (lambda arrays, marks: arrays.update({"text.state": 1 - arrays["text.state"]}), "states that differ"),
        (lambda arrays, marks: arrays.update({"text.table": arrays["text.table"][1:]}), "sentences"),
        (lambda arrays, marks: arrays.pop("text.state"), "arrays text.table, text.table.text"),
        (lambda arrays, marks: marks.clear(), "without its mark"),
        (lambda arrays, marks: marks.update({"edgead.text-table": "2"}), "version '2'"),
        (lambda arrays, marks: arrays.update({"text.table.text": np.zeros(3, np.uint8)}), "does not read"),
    ],
)
def test_damaged_tables_are_refused(
    table: TextTable, tmp_path: Path, damage: Callable[[dict[str, Any], dict[str, str]], None], got: str
) -> None:
    path = tmp_path / "nut.table"
    write_table(path, table)
    arrays, metadata = decode_tensors(path.read_bytes(), header_limit=2**20)
    changed, marks = dict(arrays), dict(metadata)
    damage(changed, marks)
    path.write_bytes(encode_tensors(changed, marks))
    with pytest.raises(KnowledgeError, match=got):
        read_table(path)


def test_a_truncated_or_absent_table_is_refused(table: TextTable, tmp_path: Path) -> None:
    path = tmp_path / "nut.table"
    write_table(path, table)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(KnowledgeError, match="a text table in"):
        read_table(path)
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "absent.table")


def test_the_command_writes_the_same_bytes_each_time_and_says_what_it_made(
    tiny_config: Callable[..., Path], prompts: PromptSet, tmp_path: Path
) -> None:
    write_prompt_set(tmp_path / "nut.json", prompts)
    words = [str(tmp_path / "nut.json"), "--model", str(tiny_config()), "--model-weights", "random:1"]
    runs = [CliRunner().invoke(text_table, [*words, "-o", str(tmp_path / name), "--json"]) for name in ("a", "b")]
    assert [run.exit_code for run in runs] == [0, 0], runs[0].output
    summary = json.loads(runs[0].stdout)
    assert summary["rows"] == len(prompts.prompts)
    assert summary["weights"]["name"] == "random:1"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "nut.json"]
    again = CliRunner().invoke(text_table, [*words, "-o", str(tmp_path / "a")])
    assert isinstance(again.exception, OutputExistsError)
