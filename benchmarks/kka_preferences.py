"""Preference training on a file of pairs: loss and reward margin step by step, on a small GPT-2 or on a model of yours.

    python benchmarks/kka_preferences.py --preferences preferences.json
    python benchmarks/kka_preferences.py --preferences preferences.json --model DIR --steps 150

The file is a JSON array of {"prompt", "chosen", "rejected"}, each a text or a list of texts, as KKA's authors published
theirs. Without a model a GPT-2 of 4 layers over bytes is built, and trained on the texts of both kinds before, so that
it writes such sentences and prefers neither.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgead.server_side.kka.causal import Dialogue
from edgead.server_side.kka.config import Prefer
from edgead.server_side.kka.prefer import DpoTuner
from edgead.server_side.kka.preference_task import Facts
from edgead.server_side.kka.records import Preference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preferences", type=Path, required=True)
    parser.add_argument("--model", help="folder of a causal model; a small GPT-2 if left out")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--pretraining", type=int, default=60, help="steps of the small GPT-2 before")
    parser.add_argument("--most", type=int, default=590, help="pairs to take")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pairs = read_pairs(options.preferences)[: options.most]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or str(small_model(folder / "gpt2", pairs, options.pretraining, options.seed))
        settings = Prefer(
            steps=options.steps,
            batch=options.batch,
            accumulate=options.accumulate,
            learning_rate=options.learning_rate,
        )
        start = time.monotonic()
        DpoTuner(model, settings).tune(pairs, None, folder / "adapter", seed=options.seed)
        seconds = time.monotonic() - start
        facts = msgspec.json.decode((folder / "adapter" / "training.json").read_bytes(), type=Facts)
    print(f"{len(pairs)} pairs, {facts.steps} steps in {seconds:.0f} s")
    print("step    loss  margin   (means of ten steps)")
    for at in range(0, facts.steps, 10):
        print(f"{at + 1:4d}  {np.mean(facts.loss[at : at + 10]):6.4f}  {np.mean(facts.margin[at : at + 10]):6.4f}")


def read_pairs(path: Path) -> list[Preference]:
    """Pairs of a JSON array."""

    def text(value: Any) -> str:
        return "".join(value) if isinstance(value, list) else str(value)

    return [
        Preference(
            f"p0-{at:05d}", 0, *(text(row[name]) for name in ("prompt", "chosen", "rejected")), f"c0-{at:05d}", "c0-0"
        )
        for at, row in enumerate(json.loads(path.read_bytes()))
    ]


def small_model(folder: Path, pairs: list[Preference], steps: int, seed: int) -> Path:
    """A GPT-2 over bytes, 1 million weights, that has read all the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    size = GPT2Config(
        vocab_size=257, n_positions=512, n_embd=128, n_layer=4, n_head=4, eos_token_id=256, bos_token_id=256
    )
    network: Any = GPT2LMHeadModel(size)
    dialogue, rng = Dialogue(fast), np.random.default_rng(seed)
    texts = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(steps):
        chosen = [texts[at] for at in rng.integers(len(texts), size=8)]
        rows = [(dialogue.prompt(prompt), dialogue.answer(prompt, answer)) for prompt, answer in chosen]
        longest = max(len(start) + len(end) for start, end in rows)
        ids = torch.tensor([start + end + [0] * (longest - len(start) - len(end)) for start, end in rows])
        labels = torch.tensor(
            [[-100] * len(start) + end + [-100] * (longest - len(start) - len(end)) for start, end in rows]
        )
        optimizer.zero_grad()
        network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    network.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
