"""What a person sees of preference training: edgead's own progress, and nothing of the packages that train."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner

from edgead.server_side.kka.cli import kka
from edgead.server_side.kka.config import PROMPT, Prefer
from edgead.server_side.kka.prefer import DpoTuner, watched
from edgead.server_side.kka.preference_task import Task, digest_of_pairs, remove_older
from edgead.server_side.kka.preference_training import build_trainer, without_renamed
from edgead.server_side.kka.procedural import GrammarAuthor
from edgead.server_side.kka.records import Caption, Preference
from edgead.server_side.kka.work import WorkFolder

QUICK = Prefer(steps=3, batch=2, accumulate=1)
LIVE = r"[a-z][a-z0-9 :]*: \d+/\d+ \(\d+ %\), \d+ s(, \d+ s left)?(, loss \d\.\d{3}, margin -?\d\.\d{3})?"
"""Progress on a terminal."""
SAID = (
    r"KKA\(\d\): \d+ images, \d+ hard, \d+ easy, \d+ too faint \(\d+ % hard\); set of \d+, \d+ of them hard",
    r"round \d: \d+ preferences, 12 steps, loss \d\.\d{3} -> \d\.\d{3}, reward margin -?\d\.\d{3} -> -?\d\.\d{3}",
)


def pairs(count: int = 8) -> list[Preference]:
    return [Preference(f"p0-{at}", 0, "Name it:", "tiny", "huge", f"c0-{at}", f"c0-1{at}") for at in range(count)]


@pytest.fixture
def begin(photographs: Path, models_of_tests: ModuleType, tmp_path: Path) -> Callable[[int, int], Path]:
    """Writes a configuration whose author says eight sentences."""

    def write(rounds: int, steps: int) -> Path:
        sentences = sorted(set(GrammarAuthor().write([""] * 8, range(8))))
        prompt = PROMPT.format(class_name="part", caption="a photograph of a flawless part")
        models_of_tests.word_model(tmp_path / "model", [*sentences, prompt])
        models_of_tests.teach(tmp_path / "model", prompt, sentences)
        # An evaluator of one step knows little, so that it finds some of the images hard.
        (tmp_path / "run.toml").write_text(
            f'normals = "{photographs}"\nrounds = {rounds}\ncaptions = 16\n[representatives]\nclusters = 3\n'
            '[imagine]\nauthor = "local"\nmodel = "model"\nmax_tokens = 48\n'
            "[judge]\nsteps = 1\nfolds = 1\nvisible_floor = 0.0\nsize = 64\n"
            f"[prefer]\nsteps = {steps}\nbatch = 2\naccumulate = 1\n"
        )
        return tmp_path / "run.toml"

    return write


def test_the_command_line_imagines_and_prefers_with_the_procedural_painter(begin: Callable[[int, int], Path]) -> None:
    config = begin(1, 2)
    work = config.with_suffix(".kka")
    for words in (["imagine"], ["prefer"], ["imagine", "--round", "1"]):
        done = CliRunner().invoke(kka, [words[0], str(config), *words[1:]])
        assert done.exit_code == 0, done.output
    digests = [{record.made.digest for record in WorkFolder(work).records(Caption, number)} for number in range(2)]
    assert [len(found) for found in digests] == [1, 1]
    assert WorkFolder(work).records(Preference, 0)
    assert (work / "round-0" / "adapter" / "adapter_model.safetensors").is_file()
    assert digests[0] != digests[1]


def on_a_terminal(command: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, standard output, and what a terminal is sent as standard error."""
    ours, theirs = os.openpty()
    unset = ("EDGEAD_DEBUG", "PYTHONWARNINGS", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    with (folder / "out").open("w+b") as out:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=theirs)
        os.close(theirs)
        sent = b""
        try:
            while data := os.read(ours, 65536):
                sent += data
        except OSError:  # Linux ends a terminal so, and not with an empty read
            pass
        os.close(ours)
        code = child.wait()
        out.seek(0)
        return code, out.read().decode(), sent.decode()


def test_on_a_terminal_there_is_progress_and_nothing_else(begin: Callable[[int, int], Path], tmp_path: Path) -> None:
    begin(2, 12)
    command = [sys.executable, "-m", "edgead", "kka", "prefer", "run.toml", "--round", "1"]
    code, out, sent = on_a_terminal(command, tmp_path)
    assert code == 0, sent
    shown = [line.rstrip() for line in re.split(r"[\r\n]+", sent) if line.strip()]
    for line in shown:
        assert any(re.fullmatch(pattern, line) for pattern in (LIVE, *SAID)), line
    assert [sum(bool(re.fullmatch(pattern, line)) for line in shown) for pattern in SAID] == [2, 2]
    assert "preferences: 12/12 (100 %)" in sent
    first, head, *rows, last = out.splitlines()
    assert first.startswith("work folder run.kka")
    assert head.split()[:4] == ["round", "images", "hard", "easy"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert last == "next: edgead kka run run.toml"


@pytest.mark.parametrize("kind", ["words", "chat", "no end", "llama"])
def test_no_warning_and_no_message_comes_from_a_training(
    kind: str,
    models_of_tests: ModuleType,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    if kind == "words":
        models_of_tests.word_model(folder, ["Name it: tiny huge"])
    else:
        models_of_tests.byte_model(
            folder, chat=models_of_tests.CHAT if kind == "chat" else None, end=kind in ("chat", "llama")
        )
    if kind == "llama":
        llama(folder)
    recwarn.clear()
    capfd.readouterr()
    tuner = DpoTuner(str(folder), QUICK)
    tuner.tune(pairs(), None, tmp_path / "a", seed=0)
    tuner.tune(pairs(), tmp_path / "a", tmp_path / "b", seed=1)
    assert [str(each.message) for each in recwarn] == []
    assert capfd.readouterr() == ("", "")
    # GPT-2's layers keep their weights the other way round.
    for name in ("a", "b"):
        found = json.loads((tmp_path / name / "adapter_config.json").read_bytes())["fan_in_fan_out"]
        assert found is (kind != "llama")


def llama(folder: Path) -> None:
    """Replace the model of a folder by one with linear layers and several end tokens, as those of today have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for path in [folder / "config.json", folder / "generation_config.json", *folder.glob("*.safetensors")]:
        path.unlink()
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=2, max_position_embeddings=256, bos_token_id=1, **size)
    network = LlamaForCausalLM(config).to(torch.bfloat16)
    network.generation_config.eos_token_id = [2, 256]
    network.save_pretrained(folder)


def test_trl_is_given_tokens_and_tokenizes_nothing_itself(models_of_tests: ModuleType, tmp_path: Path) -> None:
    """A newline and the word behind it are one token here, over which trl's own way loses the end of the prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = models_of_tests.byte_model(tmp_path / "model", vocabulary=258)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "Ċt"]
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(letters)}, merges=[("Ċ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    merging.save_pretrained(folder)
    assert 257 in merging("Name it:\ntiny")["input_ids"]
    task = Task(str(folder), "", QUICK, "before", "", "", digest_of_pairs(pairs()), 1, 1, {})
    trainer = build_trainer(task, pairs(), tmp_path / "work", contextlib.ExitStack())
    row = trainer.train_dataset[0]
    assert set(row) == {"prompt_ids", "chosen_ids", "rejected_ids"}
    assert merging.convert_ids_to_tokens(row["prompt_ids"])[-1] == "Ċ"
    assert merging.decode(row["chosen_ids"]) == "tiny<end>"
    assert 257 not in row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"]


def test_only_names_that_transformers_gave_up_are_not_told_of(
    models_of_tests: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2LMHeadModel

    network: Any = GPT2LMHeadModel.from_pretrained(models_of_tests.word_model(tmp_path / "model", ["a"]))

    def told() -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with without_renamed():
                assert network.is_gradient_checkpointing is False
                warnings.warn("another name is deprecated", FutureWarning, stacklevel=1)
        return [str(each.message) for each in seen]

    monkeypatch.delenv("EDGEAD_DEBUG", raising=False)
    assert told() == ["another name is deprecated"]
    monkeypatch.setenv("EDGEAD_DEBUG", "1")
    assert [words.split()[0] for words in told()] == ["`is_gradient_checkpointing`", "another"]


def test_of_processes_that_train_together_progress_alone_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["noise of a package", "preferences: 3/9 (33 %), 15 s", "the end"]
    command = [sys.executable, "-c", f"import sys; print(*{lines}, sep='\\n', file=sys.stderr); sys.exit(3)"]
    monkeypatch.delenv("EDGEAD_DEBUG", raising=False)
    assert watched(command, os.environ) == (3, "noise of a package the end")
    assert capsys.readouterr() == ("", "preferences: 3/9 (33 %), 15 s\n")
    monkeypatch.setenv("EDGEAD_DEBUG", "1")
    assert watched(command, os.environ) == (3, "noise of a package the end")
    assert capsys.readouterr().err.splitlines() == lines


def test_an_interruption_lets_what_was_started_end_its_own_processes(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    open(sys.argv[1], 'w').write('ended')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('preferences: 1/9', file=sys.stderr, flush=True)\n"
        "time.sleep(60)\n"
    )

    class Interrupting(io.StringIO):
        """Where progress is written: somebody presses Ctrl-C when there is some."""

        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stderr(Interrupting()):
        watched([sys.executable, "-c", script, str(tmp_path / "ended")], os.environ)
    assert (tmp_path / "ended").read_text() == "ended"


def test_of_checkpoints_the_newest_whole_one_is_kept(models_of_tests: ModuleType, tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_older(tmp_path / "checkpoint-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    folder = models_of_tests.word_model(tmp_path / "model", ["Name it: tiny huge"])
    settings = msgspec.structs.replace(QUICK, steps=30)
    task = Task(str(folder), "", settings, "before", "", "", digest_of_pairs(pairs()), 1, 1, {})
    with contextlib.ExitStack() as shown, without_renamed():
        build_trainer(task, pairs(), tmp_path / "work", shown).train()
    assert [path.name for path in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-30"]
    assert (tmp_path / "work" / "checkpoint-30" / "whole").is_file()
