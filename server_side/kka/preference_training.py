"""The training itself, for the folder of a task: in this process, or in each of those that `accelerate` starts.

    python -m edgead.server_side.kka.preference_training FOLDER

Published by KKA's authors and taken over: LoRA rank 8, alpha 8, dropout 0.1, beta 0.1, learning rate 5e-5 with a
cosine, 150 steps of 4 times 4 pairs, weight decay 0.05. Ours: the rate rises over a tenth of the steps, where theirs
rose over 100 of the 150; and their dropout had no effect, since `trl` switches dropout off in all of the model for the
sake of the reference. Here it is on again in the adapter alone, which the reference does not pass through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgead.runtime.errors import EdgeadError, InputError, LanguageModelError, OutOfMemoryError
from edgead.runtime.files import new_folder, write_file
from edgead.runtime.progress import Progress
from edgead.server_side.kka.causal import (
    Dialogue,
    context_of,
    failed,
    imported,
    is_out_of_memory,
    load_causal,
    one_line,
)
from edgead.server_side.kka.language import with_adapter
from edgead.server_side.kka.preference_task import (
    ADAPTER,
    FACTS,
    PROGRESS,
    Facts,
    Task,
    keep_failure,
    mark_whole,
    read,
    remove_older,
    whole_checkpoint,
)
from edgead.server_side.kka.records import Preference

WEIGHT_DECAY = 0.05
WARMUP = 0.1
_CHECKPOINTS = 10
"""Of a training."""
_OPTION = "imagine.model"


def train(folder: Path) -> None:
    """Train the task of a folder to its end; its adapter is there then.

    Raises:
        InputError: see `DpoTuner.tune`; so for the others.
        OutOfMemoryError: memory does not suffice.
        LanguageModelError: the training failed.
        StorageError: the file system refused.
    """
    task, preferences = read(folder)
    with _own_randomness(), contextlib.ExitStack() as shown:
        try:
            trainer = build_trainer(task, preferences, folder, shown)
            checkpoint = whole_checkpoint(folder)
            with without_renamed():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            _keep(trainer, folder)
        except Exception as error:  # trl, peft and transformers raise whatever their layers raise
            if not isinstance(error, EdgeadError) and is_out_of_memory(error):
                raise OutOfMemoryError(
                    wanted=f"memory to train {task.model!r} with {task.settings.batch} pairs at a time",
                    got=one_line(error),
                    next_step="Lower prefer.batch and raise prefer.accumulate, or take a smaller model.",
                ) from error
            failed(task.model, error)


def build_trainer(task: Task, preferences: Sequence[Preference], folder: Path, shown: contextlib.ExitStack) -> Any:
    """The `trl.DPOTrainer` of a task, ready to train.

    Args:
        task: what to train.
        preferences: its pairs.
        folder: where checkpoints go.
        shown: closes the line of progress that training opens.

    Raises:
        InputError: a model, adapter or layers that cannot be had; a prompt that leaves no room for an answer.
        OutOfMemoryError: memory does not hold the model.
    """
    torch, datasets, trl = imported("torch", "datasets", "trl")
    on_gpu = torch.cuda.is_available()
    config = _dpo_config(task, folder, on_gpu=on_gpu)
    device = str(config.device) if on_gpu else "cpu"
    network, dialogue = load_causal(task.model, device=device, option=_OPTION)
    rows = tokenized(dialogue, preferences, context_of(network))
    _agree_on_tokens(network, dialogue.tokenizer)
    adapter = None if task.before else _lora(task, network)
    if task.before:
        network = with_adapter(network, Path(task.before), trainable=True)
    # Made here, since their bases are packages that only training needs.
    trainer_of_tokens = type("TrainerOfTokens", (_OfTokens, trl.DPOTrainer), {})
    watch = type("Watch", (_Watch, imported("transformers")[0].TrainerCallback), {})
    try:
        with without_renamed(), _without_telemetry():
            trainer = trainer_of_tokens(
                model=network,
                args=config,
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=dialogue.tokenizer,
                peft_config=adapter,
                callbacks=[watch(task.settings.steps, shown)],
            )
    except ValueError as error:
        if is_out_of_memory(error) or "target" not in str(error):
            raise
        raise _unfit(task.model, one_line(error)) from error
    if task.before and task.reference == "base":
        # Without its copy of the adapter before, trl measures against the model without any.
        trainer.accelerator.unwrap_model(trainer.model).delete_adapter("ref")
    _drop_out(trainer.model, task.settings.dropout)
    # Without its bar, the trainer would print every log.
    trainer.remove_callback(imported("transformers")[0].PrinterCallback)
    return trainer


def tokenized(dialogue: Dialogue, preferences: Sequence[Preference], context: int | None) -> list[dict[str, list[int]]]:
    """Pairs as the tokens that the author sees and is to write; answers are cut where the context ends.

    Raises:
        InputError: a prompt that leaves no room for an answer.
    """
    rows = []
    for pair in preferences:
        prompt = dialogue.prompt(pair.prompt)
        room = sys.maxsize if context is None else context - len(prompt)
        if room < 1:
            raise InputError(
                wanted=f"prompts that fit the model's context of {context} tokens",
                got=f"{len(prompt)} tokens in {pair.id}",
                next_step="Shorten imagine.prompt or the captions of normals, or take a model with a longer context.",
            )
        chosen, rejected = (dialogue.answer(pair.prompt, text)[:room] for text in (pair.chosen, pair.rejected))
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def _dpo_config(task: Task, folder: Path, *, on_gpu: bool) -> Any:
    torch, trl = imported("torch", "trl")
    settings = task.settings
    brain = on_gpu and torch.cuda.is_bf16_supported()
    # transformers renamed it, and warns of the name that it had.
    names = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
    return trl.DPOConfig(
        output_dir=str(folder),
        beta=settings.beta,
        **_losses(settings.likelihood),
        max_length=None,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(WARMUP * settings.steps),
        weight_decay=WEIGHT_DECAY,
        optim="adamw_torch",
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        # As many pairs in a step however many processes share them.
        gradient_accumulation_steps=settings.accumulate // task.processes,
        use_cpu=not on_gpu,
        bf16=brain,
        fp16=on_gpu and not brain,
        seed=task.seed,
        data_seed=task.seed,
        logging_steps=1,
        # A loss that is not a number ends the training; it is not to be hidden.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=max(1, settings.steps // _CHECKPOINTS),
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        **{checkpointing: on_gpu},
    )


def _losses(likelihood: float) -> dict[str, Any]:
    """Equation 7, and the likelihood of what is chosen beside it, of a weight."""
    if not likelihood:
        return {"loss_type": ["sigmoid"]}
    return {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, likelihood]}


def _lora(task: Task, network: Any) -> Any:
    peft, utils, layers = imported("peft", "peft.utils", "transformers.pytorch_utils")
    settings = task.settings
    known = utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(network.config.model_type, ())
    found = _named(network, settings.target_modules or tuple(known))
    if any(module is network.get_output_embeddings() for module in found):
        # trl refuses it too, after peft has warned of weights that are shared.
        raise _unfit(task.model, f"the model's output among {list(settings.target_modules)}")
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules) or None,
        # GPT-2 and its like keep weights as [in, out]. peft finds that too, and warns.
        fan_in_fan_out=any(isinstance(module, layers.Conv1D) for module in found),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _named(network: Any, names: Sequence[str]) -> list[Any]:
    """Modules whose name is one of these or ends in one, which is how peft finds layers."""
    endings = tuple(f".{name}" for name in names)
    return [module for name, module in network.named_modules() if f".{name}".endswith(endings)]


def _unfit(model: str, got: str) -> InputError:
    return InputError(
        wanted=f"layers of {model!r} for adapters (prefer.target_modules)",
        got=got,
        next_step="Name linear layers of the model, without lm_head, such as ['q_proj', 'v_proj'].",
    )


def _agree_on_tokens(network: Any, tokenizer: Any) -> None:
    """Give trl a padding token, which reaches no loss, and the model the tokenizer's special tokens.

    The trainer would do the latter, with a warning; it matters only to those who generate with the trained model.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    for config in (network.config.get_text_config(), network.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(tokenizer, name)
            if config is not None and token is not None:
                setattr(config, name, token)


def _drop_out(model: Any, share: float) -> None:
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default") and hasattr(module, "p"):
            module.p = share


class _OfTokens:
    """What a `trl.DPOTrainer` of pairs that are tokens already does otherwise.

    trl tokenizes prompt and answer together and cuts where they part, so that the last token of a prompt may be lost
    to one that lies across (trl warns of it then). `tokenized` makes the rows that trl would make, without that.
    """

    def _prepare_dataset(self, dataset: Any, *more: Any, **named: Any) -> Any:
        return dataset


class _Watch:
    """What of a `transformers.TrainerCallback` shows progress, marks whole checkpoints, and ends a useless training.

    Args:
        steps: of the training.
        shown: closes the line of progress.
    """

    def __init__(self, steps: int, shown: contextlib.ExitStack) -> None:
        self._steps, self._shown = steps, shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        # A training that goes on has fewer steps to go, and their time tells the time that is left.
        self._progress = self._shown.enter_context(Progress(PROGRESS, self._steps - state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **more: Any) -> None:
        if "loss" not in logs:
            return
        if not np.isfinite(logs["loss"]):
            raise LanguageModelError(
                wanted="a finite loss of preference training",
                got=f"{logs['loss']} at step {state.global_step}",
                next_step="Lower prefer.learning_rate, in a new run.",
            )
        if state.is_world_process_zero:
            self._progress.advance(note=f"loss {logs['loss']:.3f}, margin {logs['rewards/margins']:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        (distributed,) = imported("torch.distributed")
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_whole(checkpoint)
            remove_older(checkpoint)


def _keep(trainer: Any, folder: Path) -> None:
    """Write the adapter, its configuration in canonical order, and how the training went."""
    if not trainer.accelerator.is_main_process:
        return
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    facts = Facts(
        trainer.state.global_step,
        [float(entry["loss"]) for entry in logged],
        [float(entry["rewards/margins"]) for entry in logged],
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    with new_folder(folder / ADAPTER) as made:
        model.save_pretrained(str(made), selected_adapters=["default"], save_embedding_layers=False)
        (made / "README.md").unlink(missing_ok=True)
        # peft writes sets in any order.
        content = json.loads((made / "adapter_config.json").read_bytes())
        ordered = {
            name: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
            for name, value in content.items()
        }
        write_file(made / "adapter_config.json", json.dumps(ordered, indent=1, sort_keys=True).encode() + b"\n")
        write_file(made / FACTS, msgspec.json.encode(facts) + b"\n")


@contextlib.contextmanager
def without_renamed() -> Iterator[None]:
    """Without warnings that trl and peft call things of transformers by names that they had.

    Nobody here can mend that. They are seen nevertheless with EDGEAD_DEBUG, and every other warning always.
    """
    with warnings.catch_warnings():
        if not os.environ.get("EDGEAD_DEBUG"):
            warnings.filterwarnings(
                "ignore",
                r"`(is_gradient_checkpointing|gradient_checkpointing_(en|dis)able)` is deprecated",
                FutureWarning,
                r"transformers\.modeling_utils",
            )
        yield


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """trl tells its makers of every trainer that is made."""
    (hub,) = imported("huggingface_hub.constants")
    silent, hub.HF_HUB_DISABLE_TELEMETRY = hub.HF_HUB_DISABLE_TELEMETRY, True
    try:
        yield
    finally:
        hub.HF_HUB_DISABLE_TELEMETRY = silent


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """The trainer sets the seeds of the whole process; they are put back."""
    (torch,) = imported("torch")
    states = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(gpus)):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def main(folder: Path) -> int:
    """Train, and leave an error for the process that waits."""
    try:
        train(folder)
    except EdgeadError as error:
        if os.environ.get("RANK", "0") == "0":
            keep_failure(folder, error)
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
