"""A small language model that writes captions of anomalies, trained from scratch in seconds.

A GPT-2 of few layers over words, taught sentences drawn uniformly from a caption grammar after the very prompt that a
run asks. It is kept as a folder of `transformers` with its tokenizer, and loaded as any other model is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgead.runtime.files import new_folder
from edgead.server_side.kka.causal import Dialogue
from edgead.server_side.kka.grammar import Grammar, describe, sample

_END, _UNKNOWN = "<end>", "<unknown>"
_WORDS = r" ?[\w-]+|\n|[^\w\s]"
"""A word with the space before it, so that tokens in a row are the text again."""
SENTENCES = 6000
WARMUP = 20


def make_author(
    folder: Path,
    grammar: Grammar,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    layers: int = 2,
    width: int = 96,
    steps: int = 350,
    batch: int = 64,
    learning_rate: float = 3e-3,
) -> dict[str, float]:
    """Train an author and keep it.

    Args:
        folder: new folder for the model.
        grammar: whose sentences it learns, each as often as any other.
        prompts: that come before a sentence, one drawn for each.
        seed: of weights, sentences and batches.
        layers: of the GPT-2.
        width: of its layers.
        steps: of AdamW.
        batch: sentences in a step.
        learning_rate: at its highest; it falls to 0 with a cosine.

    Returns:
        seconds, the last loss in nats a token, and the least that a loss could be.
    """
    import transformers

    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    sentences = [describe(sample(rng, grammar)) for _ in range(SENTENCES)]
    tokenizer = word_tokenizer([*prompts, *sentences])
    dialogue = Dialogue(tokenizer)
    rows = []
    for sentence in sentences:
        prompt = prompts[int(rng.integers(len(prompts)))]
        before, after = dialogue.prompt(prompt), dialogue.answer(prompt, sentence)
        # Only the answer is learned; -100 is what transformers leaves out of a loss.
        rows.append((before + after, [-100] * len(before) + after))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), dialogue.padding)
    labels = torch.full((len(rows), longest), -100)
    for place, (tokens, wanted) in enumerate(rows):
        ids[place, : len(tokens)], labels[place, : len(wanted)] = torch.tensor(tokens), torch.tensor(wanted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=longest + 16,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        network = transformers.GPT2LMHeadModel(config).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
        loss = torch.zeros(())
        for _ in range(steps):
            places = torch.randint(len(rows), (batch,))
            loss = network(input_ids=ids[places], labels=labels[places]).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    with new_folder(folder) as made:
        network.eval().save_pretrained(str(made))
        tokenizer.save_pretrained(str(made))
    length = float(np.mean([sum(label != -100 for label in wanted) for _, wanted in rows]))
    return {
        "seconds": time.perf_counter() - start,
        "loss": float(loss.detach()),
        "entropy": float(np.log(grammar.sentences)) / length,
        "parameters": float(sum(parameter.numel() for parameter in network.parameters())),
    }


def word_tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizer of `transformers` over the words of texts."""
    import tokenizers
    import transformers

    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)} | {"\n"})
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate([_END, _UNKNOWN, *words])}, _UNKNOWN)
    )
    inner.pre_tokenizer = splitter
    inner.decoder = tokenizers.decoders.Fuse()
    kind: Any = transformers.PreTrainedTokenizerFast
    return kind(
        tokenizer_object=inner, eos_token=_END, unk_token=_UNKNOWN, pad_token=_END, clean_up_tokenization_spaces=False
    )
