"""Causal models that a test builds: real ones of `transformers`, tiny, loaded from a folder as any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from edgead.server_side.kka.causal import Dialogue

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A conversation format with an opening of the answer and an end token behind it."""


def byte_model(
    folder: Path, *, chat: str | None = None, end: bool = True, context: int = 256, vocabulary: int = 257
) -> Path:
    """An untrained GPT-2 of two layers over bytes; token 256 is the end, without a padding token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _saved(folder, tokenizer, vocabulary, chat=chat, end="<end>" if end else None, context=context)


def word_model(folder: Path, texts: Sequence[str]) -> Path:
    """An untrained GPT-2 over the words of some texts; it has an end token and no padding token."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<end>", "<unknown>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _saved(folder, tokenizer, len(vocabulary), end="<end>")


def always_says(folder: Path, token: int) -> Path:
    """Make a model say one token whatever it is asked."""
    network: Any = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        network.transformer.ln_f.weight.zero_()
        network.transformer.ln_f.bias.fill_(1.0)
        network.transformer.wte.weight.zero_()
        network.transformer.wte.weight[token] = 100.0
    network.save_pretrained(folder)
    return folder


def teach(folder: Path, prompt: str, answers: Sequence[str], *, steps: int = 150) -> Path:
    """Train a model until it gives these answers to a prompt, each as often as any other."""
    network: Any = GPT2LMHeadModel.from_pretrained(folder)
    dialogue = Dialogue(PreTrainedTokenizerFast.from_pretrained(folder))
    start = dialogue.prompt(prompt)
    rows = [start + dialogue.answer(prompt, answer) for answer in answers]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([[-100] * len(start) + row[len(start) :] + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    network.save_pretrained(folder)
    return folder


def new_adapter(model: Path, folder: Path, *, seed: int = 0) -> Path:
    """A LoRA adapter of random weights, so that it changes what the model says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    network: Any = GPT2LMHeadModel.from_pretrained(model)
    tuned = get_peft_model(network, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False))
    tuned.save_pretrained(str(folder))
    return folder


def _saved(
    folder: Path,
    tokenizer: Tokenizer,
    vocabulary: int,
    *,
    chat: str | None = None,
    end: str | None = None,
    context: int = 256,
) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    fast.chat_template = chat
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    number = None if end is None else fast.convert_tokens_to_ids(end)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=context,
        n_embd=32 if vocabulary < 10_000 else 4,
        n_layer=2,
        n_head=2,
        eos_token_id=number,
        bos_token_id=number,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
