"""Preference training with the real `trl` and `peft` on tiny models, against equation (7) of Rafailov et al. 2023."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgead.runtime.errors import InputError, OutOfMemoryError, OutputExistsError
from edgead.server_side.kka.causal import Dialogue
from edgead.server_side.kka.config import Imagine, Prefer
from edgead.server_side.kka.language import TransformersAuthor, open_author
from edgead.server_side.kka.prefer import DpoTuner
from edgead.server_side.kka.preference_task import Facts, Task, digest_of_pairs
from edgead.server_side.kka.preference_training import build_trainer, without_renamed
from edgead.server_side.kka.records import Caption, Preference
from edgead.server_side.kka.rounds import facts, run
from edgead.server_side.kka.stages import prompt_of
from edgead.server_side.kka.work import WorkFolder

PROMPT = "a part"
GOOD, BAD = ("a tiny spot", "a small spot"), ("a large spot", "a huge spot")
LAYERS = ("c_attn", "c_fc", "c_proj")
QUICK = Prefer(steps=24, batch=8, accumulate=1, learning_rate=5e-3, dropout=0.0, target_modules=LAYERS)


def pairs(count: int = 16, prompt: str = PROMPT) -> list[Preference]:
    return [
        Preference(f"p0-{at:05d}", 0, prompt, GOOD[at % 2], BAD[at // 2 % 2], f"c0-{at:05d}", f"c0-1{at:05d}")
        for at in range(count)
    ]


@pytest.fixture(scope="module")
def model(models_of_tests: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says each of four sentences as often as any other."""
    folder = models_of_tests.word_model(tmp_path_factory.mktemp("prefer") / "tiny", [PROMPT, *GOOD, *BAD])
    return models_of_tests.teach(folder, PROMPT, [*GOOD, *BAD])


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a first round."""
    folder = tmp_path_factory.mktemp("rounds") / "first"
    DpoTuner(str(model), QUICK).tune(pairs(), None, folder, seed=1)
    return folder


def log_odds(model: Path, adapter: Path | None, answers: tuple[str, ...]) -> np.ndarray:
    """Summed log-probabilities of answers, in float64, token by token as equation (7) has them."""
    from peft import PeftModel
    from transformers import AutoTokenizer, GPT2LMHeadModel

    network: Any = GPT2LMHeadModel.from_pretrained(model)
    with without_renamed():
        network = (network if adapter is None else PeftModel.from_pretrained(network, str(adapter))).double().eval()
    dialogue = Dialogue(AutoTokenizer.from_pretrained(model))
    start, found = dialogue.prompt(PROMPT), []
    for answer in answers:
        tokens = dialogue.answer(PROMPT, answer)
        with torch.no_grad():
            scores = network(input_ids=torch.tensor([start + tokens])).logits[0].log_softmax(-1)
        found.append(sum(float(scores[len(start) - 1 + at, token]) for at, token in enumerate(tokens)))
    return np.array(found)


def dpo_loss(policy: np.ndarray, reference: np.ndarray, beta: float) -> float:
    """Equation (7) for rows of (chosen, rejected)."""
    ratios = policy - reference
    return float(np.mean(np.log1p(np.exp(-beta * (ratios[:, 0] - ratios[:, 1])))))


def read_facts(adapter: Path) -> Facts:
    return msgspec.json.decode((adapter / "training.json").read_bytes(), type=Facts)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_what_is_preferred_becomes_likelier_and_the_margin_grows(model: Path, first: Path) -> None:
    before, after = (log_odds(model, adapter, GOOD + BAD) for adapter in (None, first))
    assert np.exp(after[:2]).sum() > np.exp(before[:2]).sum() + 0.03
    assert np.exp(after[2:]).sum() < np.exp(before[2:]).sum() - 0.1
    found = read_facts(first)
    assert found.steps == len(found.loss) == len(found.margin) == 24
    assert found.loss[0] == pytest.approx(np.log(2), abs=1e-6)
    assert found.margin[0] == pytest.approx(0, abs=1e-6)
    assert found.loss[-1] < found.loss[0] - 0.02
    assert found.margin[-1] > 0.04
    said = [TransformersAuthor(Imagine("local", str(model)), adapter) for adapter in (None, first)]
    shares = [np.mean([answer in GOOD for answer in author.write([PROMPT] * 60, range(60))]) for author in said]
    assert shares[1] > shares[0]


def test_the_adapter_is_complete_and_nothing_else_is_left(first: Path) -> None:
    assert sorted(digests(first)) == ["adapter_config.json", "adapter_model.safetensors", "training.json"]
    assert [path.name for path in first.parent.iterdir()] == ["first"]


def test_a_later_round_trains_the_adapter_before_against_it(model: Path, first: Path, tmp_path: Path) -> None:
    tuned = DpoTuner(str(model), QUICK).tune(pairs(), first, tmp_path / "second", seed=2)
    assert tuned.loss[0] == pytest.approx(np.log(2), abs=1e-6)
    assert tuned.loss[1] < tuned.loss[0]
    odds = [log_odds(model, adapter, GOOD + BAD) for adapter in (first, tmp_path / "second")]
    assert odds[1][:2].mean() - odds[1][2:].mean() > odds[0][:2].mean() - odds[0][2:].mean() + 0.3


def test_against_the_bare_model_a_later_round_begins_with_the_margin_that_it_has(
    model: Path, first: Path, tmp_path: Path
) -> None:
    settings = msgspec.structs.replace(QUICK, steps=1, batch=16)
    tuned = DpoTuner(str(model), settings, reference="base").tune(pairs(), first, tmp_path / "second", seed=2)
    policy, reference = (log_odds(model, adapter, GOOD + BAD) for adapter in (first, None))
    rows = [(at % 2, 2 + at // 2 % 2) for at in range(16)]
    wanted = dpo_loss(policy[np.array(rows)], reference[np.array(rows)], QUICK.beta)
    assert tuned.loss[0] == pytest.approx(wanted, abs=1e-5)
    assert wanted < np.log(2) - 0.02


def a_task(model: Path, before: Path | None = None, **more: Any) -> Task:
    task = Task(str(model), "", QUICK, "before", str(before or ""), "", digest_of_pairs(pairs()), 1, 1, {})
    return msgspec.structs.replace(task, **more)


@pytest.mark.parametrize("likelihood", [0.0, 0.5])
def test_the_loss_of_a_batch_is_equation_7_and_the_likelihood_of_what_is_chosen(
    likelihood: float, model: Path, first: Path, models_of_tests: ModuleType, tmp_path: Path
) -> None:
    settings = msgspec.structs.replace(QUICK, beta=0.3, likelihood=likelihood)
    trainer = build_trainer(a_task(model, first, settings=settings), pairs(4), tmp_path, ExitStack())
    # The policy goes elsewhere, its reference stays.
    generator = torch.Generator().manual_seed(0)
    for name, value in trainer.model.named_parameters():
        if ".default." in name:
            value.data += 0.1 * torch.randn(value.shape, generator=generator)
    trainer.model.save_pretrained(str(tmp_path / "moved"), selected_adapters=["default"])
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(4)])
    trainer.model.eval()
    with torch.no_grad(), without_renamed():
        found = float(trainer.compute_loss(trainer.model, batch))
    policy, reference = (log_odds(model, adapter, GOOD + BAD) for adapter in (tmp_path / "moved", first))
    rows = np.array([(0, 2), (1, 2), (0, 3), (1, 3)])
    # Mean over the words of all chosen captions, each with its end.
    words = float(batch["completion_mask"][:4].sum())
    chosen = -float(policy[rows[:, 0]].sum()) / words
    assert found == pytest.approx(dpo_loss(policy[rows], reference[rows], 0.3) + likelihood * chosen, abs=1e-5)
    assert abs(found - np.log(2)) > 1e-3


@pytest.mark.parametrize("chat", [False, True])
def test_training_sees_the_tokens_that_writing_sees(chat: bool, models_of_tests: ModuleType, tmp_path: Path) -> None:
    folder = models_of_tests.byte_model(tmp_path / "model", chat=models_of_tests.CHAT if chat else None)
    trainer = build_trainer(a_task(folder), pairs(4, "Name a defect: "), tmp_path / "work", ExitStack())
    collated = trainer.data_collator([trainer.train_dataset[0]])
    tokenizer = trainer.processing_class
    for row, answer in zip(range(2), (GOOD[0], BAD[0]), strict=True):
        shown = collated["attention_mask"][row].bool()
        trained = collated["completion_mask"][row].bool()
        opening = "<|user|>Name a defect:<end>\n<|assistant|>" if chat else "Name a defect:\n"
        assert tokenizer.decode(collated["input_ids"][row][shown & ~trained]) == opening
        assert tokenizer.decode(collated["input_ids"][row][trained]) == answer + "<end>"
    author = TransformersAuthor(Imagine("local", str(folder)), device="cpu")
    assert author._dialogue.prompt("Name a defect: ") == trainer.train_dataset[0]["prompt_ids"]


@pytest.mark.parametrize("later", [False, True])
def test_dropout_acts_in_the_adapter_alone(later: bool, model: Path, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(QUICK, dropout=0.25, steps=1)
    before = tmp_path / "before" if later else None
    if before:
        DpoTuner(str(model), settings).tune(pairs(), None, before, seed=0)
    trainer = build_trainer(a_task(model, before, settings=settings), pairs(), tmp_path / "work", ExitStack())
    dropping = {
        name: module.p for name, module in trainer.model.named_modules() if isinstance(module, torch.nn.Dropout)
    }
    acting = {name: share for name, share in dropping.items() if share}
    assert acting
    assert len(acting) < len(dropping)
    assert all(name.endswith("lora_dropout.default") and share == 0.25 for name, share in acting.items())


@pytest.mark.parametrize("end", [True, False])
def test_a_tokenizer_without_padding_or_end_is_no_hindrance(
    end: bool, models_of_tests: ModuleType, tmp_path: Path
) -> None:
    folder = models_of_tests.byte_model(tmp_path / "model", end=end)
    tuned = DpoTuner(str(folder), msgspec.structs.replace(QUICK, steps=2)).tune(pairs(), None, tmp_path / "a", seed=0)
    assert tuned.steps == 2
    assert tuned.loss[0] == pytest.approx(np.log(2), abs=1e-6)


CHILD = """
import sys
from pathlib import Path
import msgspec
from edgead.server_side.kka.config import Prefer
from edgead.server_side.kka.prefer import DpoTuner
from edgead.server_side.kka.records import Preference, decode_record
model, settings, lines, before, after = sys.argv[1:]
pairs = [decode_record(line, Preference, "") for line in Path(lines).read_bytes().splitlines()]
tuner = DpoTuner(model, msgspec.json.decode(settings, type=Prefer))
tuner.tune(pairs, Path(before), Path(after), seed=3)
"""


def test_a_training_that_was_killed_goes_on_and_ends_in_the_same_bytes(
    model: Path, first: Path, tmp_path: Path
) -> None:
    from edgead.server_side.kka.records import encode_record

    settings = msgspec.structs.replace(QUICK, steps=30, batch=4, dropout=0.1, accumulate=2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (tmp_path / "pairs").write_bytes(b"".join(encode_record(pair) for pair in pairs(18)))
    words = [str(model), msgspec.json.encode(settings).decode(), str(tmp_path / "pairs"), str(first), str(killed)]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *words], stderr=subprocess.PIPE)
    folder = tmp_path / "killed.training"
    end = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*/whole")):
        assert child.poll() is None, child.stderr and child.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not killed.exists()
    kept = {path.parent.name for path in folder.glob("checkpoint-*/whole")}
    # What a kill in the middle of a checkpoint leaves is not gone on from.
    shutil.copytree(next(folder.glob("checkpoint-*/whole")).parent, folder / "checkpoint-29")
    (folder / "checkpoint-29" / "whole").unlink()
    tuner = DpoTuner(str(model), settings)
    resumed, straight = (tuner.tune(pairs(18), first, path, seed=3) for path in (killed, whole))
    assert kept
    assert resumed == straight
    assert digests(killed) == digests(whole)
    assert not folder.exists()


def test_two_processes_that_share_the_batches_of_a_step_train_the_adapter_of_one(model: Path, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(QUICK, steps=6, batch=4, accumulate=2)
    for count in (1, 2):
        DpoTuner(str(model), settings, processes=count).tune(pairs(), None, tmp_path / str(count), seed=3)
    one, two = (read_facts(tmp_path / str(count)) for count in (1, 2))
    assert two.loss == pytest.approx(one.loss, abs=1e-4)
    assert two.margin == pytest.approx(one.margin, abs=1e-3)
    weights = [load_file(tmp_path / str(count) / "adapter_model.safetensors") for count in (1, 2)]
    moved = max(float(tensor.abs().max()) for name, tensor in weights[0].items() if "lora_B" in name)
    assert moved > 1e-3
    for name, tensor in weights[0].items():
        assert float((tensor - weights[1][name]).abs().max()) < 0.02 * moved, name
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["1", "2"]


def test_processes_that_cannot_share_the_batches_of_a_step_are_refused(model: Path) -> None:
    with pytest.raises(InputError, match=r"one of \[1, 2, 4\]"):
        DpoTuner(str(model), msgspec.structs.replace(QUICK, accumulate=4), processes=3)


def test_another_task_in_the_folder_begins_anew(model: Path, tmp_path: Path) -> None:
    quick = msgspec.structs.replace(QUICK, steps=2)
    DpoTuner(str(model), quick).tune(pairs(), None, tmp_path / "a", seed=0)
    stale = tmp_path / "b.training"
    stale.mkdir()
    (stale / "task.json").write_text("{}")
    shutil.copytree(tmp_path / "a", stale / "adapter")
    DpoTuner(str(model), quick).tune(pairs(), None, tmp_path / "b", seed=5)
    assert digests(tmp_path / "a") != digests(tmp_path / "b")


def test_the_seed_decides_and_the_process_keeps_its_own_randomness(model: Path, tmp_path: Path) -> None:
    quick = msgspec.structs.replace(QUICK, steps=2)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        DpoTuner(str(model), quick).tune(pairs(), None, tmp_path / name, seed=seed)
        torch.random.get_rng_state()
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())


def test_without_preferences_or_with_what_is_not_there_it_is_told(model: Path, first: Path, tmp_path: Path) -> None:
    tuner = DpoTuner(str(model), QUICK)
    with pytest.raises(InputError, match="pairs of a chosen and a rejected caption"):
        tuner.tune([], None, tmp_path / "a", seed=0)
    with pytest.raises(InputError, match="the adapter of the round before"):
        tuner.tune(pairs(), tmp_path / "none", tmp_path / "a", seed=0)
    with pytest.raises(OutputExistsError):
        tuner.tune(pairs(), None, first, seed=0)
    with pytest.raises(InputError, match="no such folder"):
        DpoTuner("./none", QUICK).tune(pairs(), None, tmp_path / "a", seed=0)


@pytest.mark.parametrize("names", [("nothing",), ("lm_head",)])
def test_layers_that_cannot_be_tuned_are_told(names: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(QUICK, target_modules=names)
    with pytest.raises(InputError, match=r"prefer\.target_modules"):
        DpoTuner(str(model), settings).tune(pairs(), None, tmp_path / "a", seed=0)


def test_an_architecture_whose_layers_peft_does_not_know_needs_their_names(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, OpenAIGPTConfig, OpenAIGPTLMHeadModel

    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(folder)
    size = OpenAIGPTConfig(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    OpenAIGPTLMHeadModel(size).save_pretrained(folder)
    quick = msgspec.structs.replace(QUICK, steps=1, target_modules=())
    with pytest.raises(InputError, match=r"prefer\.target_modules"):
        DpoTuner(str(folder), quick).tune(pairs(), None, tmp_path / "a", seed=0)
    named = msgspec.structs.replace(quick, target_modules=("c_attn", "c_fc"))
    assert DpoTuner(str(folder), named).tune(pairs(), None, tmp_path / "a", seed=0).steps == 1


def test_a_prompt_that_leaves_no_room_is_told(models_of_tests: ModuleType, tmp_path: Path) -> None:
    folder = models_of_tests.byte_model(tmp_path / "model", context=32)
    with pytest.raises(InputError, match="prompts that fit the model's context of 32 tokens"):
        DpoTuner(str(folder), QUICK).tune(pairs(2, "x" * 40), None, tmp_path / "a", seed=0)


def test_memory_that_does_not_suffice_is_told(model: Path, tmp_path: Path) -> None:
    # Adapters of 10^11 rows are 12 terabytes, which the machine really is asked for.
    settings = msgspec.structs.replace(QUICK, rank=10**11)
    with pytest.raises(OutOfMemoryError, match=r"prefer\.batch"):
        DpoTuner(str(model), settings).tune(pairs(), None, tmp_path / "a", seed=0)
    assert not (tmp_path / "a").exists()


@pytest.fixture
def rounds(
    new_work: Callable[..., WorkFolder], models_of_tests: ModuleType, tmp_path: Path
) -> Callable[[str], WorkFolder]:
    """Begins runs of a model that writes four sizes of spots."""
    texts = [f"a {size} spot" for size in ("tiny", "small", "large", "huge")]
    normal = "a photograph of a flawless plate"

    def begin(name: str) -> WorkFolder:
        folder = tmp_path / "writer"
        settings = (
            f'[imagine]\nauthor = "local"\nmodel = "{folder}"\nmax_tokens = 12\nbatch = 8\n'
            "[prefer]\nsteps = 24\nbatch = 8\naccumulate = 1\nlearning_rate = 5e-3\n"
            f"target_modules = {list(LAYERS)}\n"
        )
        work = new_work(settings, name, captions=96, rounds=1)
        prompt = prompt_of(work.config, normal)
        if not folder.exists():
            models_of_tests.word_model(folder, [*texts, prompt])
            models_of_tests.teach(folder, prompt, texts, steps=150)
        return work

    return begin


def test_a_round_with_a_real_author_and_real_preferences_is_harder_than_the_one_before(
    rounds: Callable[[str], WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = rounds("real")
    makers = replace(
        makers_of_tests.makers(),
        author=lambda adapter: open_author(work.config, adapter),
        tuner=lambda: DpoTuner(work.config.imagine.model, work.config.prefer),
    )
    with work.locked():
        run(work, makers)
    shares = [facts(work, number)["hard_share"] for number in range(2)]
    assert shares[1] > shares[0] + 0.05
    assert len({work.records(Caption, number)[0].made.digest for number in range(2)}) == 2
    assert (work.round_folder(0) / "adapter" / "training.json").is_file()
