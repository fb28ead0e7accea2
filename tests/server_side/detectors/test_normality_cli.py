"""`edgead normality` from the fitted file to the camera: kilobytes that let a look pass, and take it back exactly."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import open_bundle
from edgead.runtime.chain import begins_as_delta, read_chain
from edgead.runtime.cli import run
from edgead.runtime.errors import BackboneError, BundleError, InputError, KnowledgeError, OutputExistsError, PromptError
from edgead.runtime.image import encode_png
from edgead.runtime.knowledge import read_pack
from edgead.server_side.detectors import normality
from edgead.server_side.detectors.projections import new_projections, write_projections
from edgead.server_side.detectors.sentences import normality_row
from edgead.server_side.normalities import check_room, compare, sentences, with_sentence, without_sentence
from edgead.server_side.normality_cli import normality as command
from edgead.server_side.prompts import normality as normality_prompts
from edgead.server_side.prompts import write_prompt_set
from edgead.server_side.vision_language import VisionLanguageModel
from edgead.server_side.vision_language.options import VisionLanguageOptions

Edgead = Callable[..., Result]


@pytest.fixture(scope="module")
def bundle(
    normality_pair: ModuleType,
    tiny_options: VisionLanguageOptions,
    tiny_clip: VisionLanguageModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Colours with the method's own normality detector beside them: ONNX Runtime, and a TensorRT recipe."""
    folder = tmp_path_factory.mktemp("normality")
    projections = new_projections((2, 4), (32, 32), 32, seed=1)
    path = folder / "p.safetensors"
    write_projections(path, projections, model=tiny_clip.name, weights=tiny_clip.weights_sha256)
    learned = normality.learn([], dataclasses.replace(tiny_options, projections=path))
    second = learned.write(folder / "normality.detector")
    export_bundle(normality_pair.base(), folder / "part.bundle", ["onnx", "tensorrt"], normality=second)
    return folder / "part.bundle"


@pytest.fixture(scope="module")
def chat() -> ModuleType:
    """The module of the chat server that the tests of prompts have."""
    path = Path(__file__).parents[1] / "prompts" / "chat_server.py"
    spec = importlib.util.spec_from_file_location("edgead_tests_chat", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def edgead(tiny_options: VisionLanguageOptions) -> Edgead:
    """Runs `edgead normality` with words; `add` gets the tiny encoder's config. Errors of edgead are raised."""

    def invoke(*words: object) -> Result:
        extra = ["--model", tiny_options.model] if words[0] == "add" else []
        return CliRunner().invoke(command, [*map(str, words), *extra], catch_exceptions=False)

    return invoke


def test_a_sentence_is_added_listed_chained_and_taken_back_exactly(
    bundle: Path, edgead: Edgead, tmp_path: Path
) -> None:
    thread, stain, back, whole = (tmp_path / name for name in ("t.delta", "s.delta", "b.delta", "p.safetensors"))
    start = open_bundle(bundle).pack()
    done = edgead("add", bundle, "--class", "carpet", "thread", "-o", thread)
    assert f"added 'thread': {start.version} -> " in done.output
    assert thread.stat().st_size < 2 * 32 * 4 + 2000
    edgead("add", bundle, "--class", "carpet", "a dark stain", "--knowledge", thread, "-o", stain)
    listed = json.loads(edgead("list", bundle, "--knowledge", thread, "--knowledge", stain, "--json").output)
    assert [row["text"] for row in listed["sentences"]] == ["thread", "a dark stain"]
    assert [row["class"] for row in listed["sentences"]] == ["carpet", "carpet"]
    assert "a dark stain" in edgead("list", bundle, "--knowledge", thread, "--knowledge", stain).output
    assert "nothing added yet" in edgead("list", bundle).output
    # Back to one, and back to none: the same bytes as before.
    edgead("remove", bundle, "a dark stain", "--knowledge", thread, "--knowledge", stain, "-o", whole)
    assert read_pack(whole).digest == read_chain(open_bundle(bundle), [thread])["carpet"].digest
    edgead("remove", bundle, "Thread", "--knowledge", thread, "-o", back)
    assert begins_as_delta(back)
    assert read_chain(open_bundle(bundle), [thread, back])["carpet"].digest == start.digest


def test_the_row_is_the_methods_own(
    bundle: Path, edgead: Edgead, tiny_clip: VisionLanguageModel, tmp_path: Path
) -> None:
    edgead("add", bundle, "--class", "carpet", "thread", "-o", tmp_path / "t.safetensors")
    pack = read_pack(tmp_path / "t.safetensors")
    added, normal, row = normality_row(tiny_clip, "thread", "carpet")
    np.testing.assert_array_equal(pack.arrays["normality.table"], added[None])
    np.testing.assert_array_equal(pack.arrays["normality.normal"], normal[None])
    assert sentences(pack) == [row]
    assert pack.ids("bank.normal").tolist() == [1]


def test_own_phrases_come_as_lines_or_as_a_prompt_set(
    bundle: Path, edgead: Edgead, tiny_clip: VisionLanguageModel, tmp_path: Path
) -> None:
    lines, prompts = tmp_path / "phrases.txt", tmp_path / "phrases.json"
    lines.write_text("loose fibre on the carpet\n\n  yarn that sticks out \n")
    phrases = ["loose fibre on the carpet", "yarn that sticks out"]
    write_prompt_set(prompts, normality_prompts("thread", "carpet", phrases=phrases))
    wanted, _, _ = normality_row(tiny_clip, "thread", "carpet", phrases=phrases)
    for name, source in (("a", lines), ("b", prompts)):
        output = tmp_path / f"{name}.safetensors"
        edgead("add", bundle, "--class", "carpet", "thread", "--phrases", source, "-o", output)
        np.testing.assert_array_equal(read_pack(output).arrays["normality.table"], wanted[None])
    with pytest.raises(InputError, match="'stain' in the prompt set"):
        edgead("add", bundle, "--class", "carpet", "stain", "--phrases", prompts, "-o", tmp_path / "c.delta")


def test_a_language_models_phrases_are_used_only_after_a_yes(
    bundle: Path, edgead: Edgead, chat: ModuleType, tiny_clip: VisionLanguageModel, tmp_path: Path
) -> None:
    output = tmp_path / "t.safetensors"
    words: list[object] = ["add", bundle, "--class", "carpet", "thread", "--cache", tmp_path / "cache", "-o", output]
    with chat.chat_server(chat.say("1. carpet with a loose thread\n2. lint")) as server:
        words += ["--llm", server.url, "--llm-model", "qwen"]
        with pytest.raises(InputError, match="agreement"):
            edgead(*words)
        assert not output.exists()
        edgead(*words, "--yes")
        assert len(server.requests) == 1
    phrases = ["carpet with a loose thread", "carpet with lint"]
    wanted, _, _ = normality_row(tiny_clip, "thread", "carpet", phrases=phrases)
    pack = read_pack(output)
    np.testing.assert_array_equal(pack.arrays["normality.table"], wanted[None])
    assert sentences(pack)[0]["phrases"] == phrases


def test_run_takes_packs_and_deltas_and_says_what_passed(
    normality_pair: ModuleType, bundle: Path, edgead: Edgead, tmp_path: Path
) -> None:
    thread = tmp_path / "t.delta"
    edgead("add", bundle, "--class", "carpet", "thread", "-o", thread)
    (tmp_path / "red.png").write_bytes(encode_png(normality_pair.frame("red")))
    words = [str(bundle), str(tmp_path / "red.png"), "--target", "onnx", "--json", "--knowledge", str(thread)]
    line = json.loads(CliRunner().invoke(run, words, catch_exceptions=False).stdout.splitlines()[0])
    assert line["knowledge"] == read_chain(open_bundle(bundle), [thread])["carpet"].version
    # A random encoder explains something everywhere, so the score is lower; whether it passes is chance.
    assert line["base_score"] > line["score"]
    assert isinstance(line["suppressed"], list)


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        (["--class", "", "thread"], PromptError, "class"),
        (["--class", "carpet", " "], PromptError, "normality"),
        (["--class", "carpet", "thread", "--model-weights", "random:4"], KnowledgeError, "weights"),
        (["--class", "carpet", "thread", "--model-weights", "laion"], BackboneError, "laion"),
        (["--class", "carpet", "thread", "--phrases", "nowhere.txt"], Exception, "nowhere"),
        (["--class", "carpet", "thread", "--now-normal", "x"], InputError, "--check"),
        (["--class", "carpet", "thread", "--product", "nut"], BundleError, "nut"),
        (["--class", "carpet", "thread", "--llm", "http://127.0.0.1:9/v1"], InputError, "name of a model"),
    ],
)
def test_words_that_cannot_be_are_refused_and_nothing_is_written(
    bundle: Path, edgead: Edgead, tmp_path: Path, words: list[str], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        edgead("add", bundle, *words, "-o", tmp_path / "t.delta")
    assert not (tmp_path / "t.delta").exists()


def test_a_bundle_without_the_second_detector_says_how_to_export_it(
    normality_pair: ModuleType, edgead: Edgead, tmp_path: Path
) -> None:
    export_bundle(normality_pair.base(), tmp_path / "b", ["onnx"])
    for words in (["add", tmp_path / "b", "--class", "carpet", "thread"], ["remove", tmp_path / "b", "thread"]):
        with pytest.raises(BundleError) as caught:
            edgead(*words, "-o", tmp_path / "t.delta")
        assert "--with-normality" in caught.value.next_step
    with pytest.raises(BundleError):
        edgead("list", tmp_path / "b")


def test_a_sentence_twice_or_one_that_is_not_there_is_refused_with_near_names(
    bundle: Path, edgead: Edgead, tmp_path: Path
) -> None:
    thread = tmp_path / "t.delta"
    edgead("add", bundle, "--class", "carpet", "thread", "-o", thread)
    with pytest.raises(InputError, match="does not have yet"):
        edgead("add", bundle, "--class", "carpet", "THREAD", "--knowledge", thread, "-o", tmp_path / "u.delta")
    with pytest.raises(OutputExistsError):
        edgead("add", bundle, "--class", "carpet", "thread", "-o", thread)
    with pytest.raises(InputError) as caught:
        edgead("remove", bundle, "tread", "--knowledge", thread, "-o", tmp_path / "u.delta")
    assert "Did you mean 'thread'?" in caught.value.next_step
    with pytest.raises(InputError, match="none has been added"):
        edgead("remove", bundle, "thread", "-o", tmp_path / "u.delta")
    edgead("add", bundle, "--class", "carpet", "stain", "-o", tmp_path / "s.delta")
    with pytest.raises(KnowledgeError, match="a delta against version"):
        edgead("list", bundle, "--knowledge", thread, "--knowledge", tmp_path / "s.delta")


def test_a_full_table_says_that_the_bundle_must_be_exported_again(bundle: Path) -> None:
    opened = open_bundle(bundle)
    pack = opened.pack()
    rng = np.random.default_rng(0)
    for number in range(64):
        added, normal = (row.astype(np.float32) for row in rng.standard_normal((2, 32)))
        pack = with_sentence(opened, pack, added, normal, {"text": f"look {number}"})
    check_room(opened, pack)
    with pytest.raises(KnowledgeError) as caught:
        with_sentence(opened, pack, added, normal, {"text": "one too many"})
    assert "64 sentences, the capacity of 'tensorrt-fp32'" in caught.value.wanted or "64 rows" in caught.value.wanted
    assert "export" in caught.value.next_step
    for number in range(63, -1, -1):
        pack = without_sentence(pack, f"look {number}")
    assert pack.digest == opened.pack().digest


def test_check_counts_misses_and_false_alarms_before_and_after(
    normality_pair: ModuleType, tmp_path: Path, edgead: Edgead, bundle: Path
) -> None:
    pair = normality_pair
    made = pair.bundle(tmp_path / "b", ["onnx"])
    data = labelled(pair, tmp_path / "data")
    before, after = made.pack(), pair.with_sentences(made.pack(), "red")
    change = compare(made, before, after, data, now_normal=["red"])
    assert (change.false_alarms("before"), change.false_alarms("after")) == (3, 0)
    assert (change.misses("before"), change.misses("after")) == (0, 0)
    strict = compare(made, before, after, data)
    assert (strict.misses("before"), strict.misses("after")) == (0, 3)
    with pytest.raises(InputError) as caught:
        compare(made, before, after, data, now_normal=["rde"])
    assert "red" in caught.value.next_step
    words = ["add", bundle, "--class", "carpet", "thread", "--check", data, "--target", "onnx"]
    text = edgead(*words, "--now-normal", "red", "-o", tmp_path / "t.delta").output
    assert "false alarms 3 -> " in text
    found: dict[str, Any] = json.loads(edgead(*words, "--json", "-o", tmp_path / "u.delta").output)
    assert found["check"]["before"] == {"misses": 0, "false_alarms": 0}


def labelled(pair: ModuleType, folder: Path) -> Path:
    """A data set: good parts, and three of each of two defects."""
    for kind, colours in (("good", ()), ("red", ("red",)), ("blue", ("blue",))):
        place = folder / "test" / kind
        place.mkdir(parents=True)
        for number in range(3):
            frame = pair.frame(*colours)
            frame[12 + number, 15] += 1
            (place / f"{number}.png").write_bytes(encode_png(frame))
    shutil.copytree(folder / "test" / "good", folder / "train" / "good")
    return folder
