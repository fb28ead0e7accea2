"""Causal language models of `transformers`: loading them, and what stands between a prompt and its answer.

The author, which writes, and the tuner, which trains it, both go through `Dialogue`, so that training sees the very
tokens that writing sees:

    with a conversation format      [what the format puts before an answer][answer][what it puts after, to its end]
    without one                     [prompt, one newline][answer][end token, or a newline where there is none]

Prompt and answer are tokenized apart: no token lies across the place where writing begins.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any, NoReturn

from edgead.runtime.errors import EdgeadError, InputError, LanguageModelError, OutOfMemoryError, missing_dependency
from edgead.server_side.hub import digest_of, find_model

_MARK = "edgeadanswer"
"""Stands for the answer while a conversation format shows what it puts around one."""


class Dialogue:
    """Prompts and answers as tokens.

    Args:
        tokenizer: of `transformers`.
        ends: tokens that end an answer, beside the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int] = frozenset()) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.ends = ends | (frozenset() if own is None else {int(own)})

    def prompt(self, text: str) -> list[int]:
        """Tokens after which an answer begins, at least one.

        Raises:
            LanguageModelError: the tokenizer makes nothing of it.
        """
        return self._around(text)[0]

    def answer(self, prompt: str, text: str) -> list[int]:
        """Tokens of an answer to a prompt, with those that end it."""
        return [*self._tokens(text), *self._around(prompt)[1]]

    def text(self, tokens: list[int]) -> str:
        """The words of tokens that a model wrote."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @property
    def padding(self) -> int:
        """A token to fill with; attention masks hide it, so any will do."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _around(self, prompt: str) -> tuple[list[int], list[int]]:
        if getattr(self.tokenizer, "chat_template", None):
            before, after = self._format(prompt)
            start, end = self._tokens(before), self._tokens(after)
        else:
            start, end = self._tokens(prompt.rstrip() + "\n", special=True), []
            if len(start) > 1 and start[-1] in self.ends:
                # Some tokenizers close every text; here the answer is yet to come.
                del start[-1]
        last = next((at for at, token in enumerate(end) if token in self.ends), None)
        if last is not None:
            end = end[: last + 1]
        elif self.tokenizer.eos_token_id is not None:
            end = [*end, int(self.tokenizer.eos_token_id)]
        else:
            end = end or self._tokens("\n")
        if not start:
            opening = self.tokenizer.bos_token_id
            start = [int(self.padding if opening is None else opening)]
        return start, end

    def _format(self, prompt: str) -> tuple[str, str]:
        """What the conversation format puts before and after an answer."""
        turns = [{"role": "user", "content": prompt}]
        try:
            asked = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            answered = str(
                self.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": _MARK}], tokenize=False)
            )
        except Exception as error:  # a format is a program of its own
            raise LanguageModelError(
                wanted="a conversation format that takes a question and an answer",
                got=one_line(error),
                next_step="Take another model, or remove the format from its tokenizer.",
            ) from error
        before, mark, after = answered.rpartition(_MARK)
        # A format that shows a finished answer otherwise than one that is to come cannot be followed.
        return (before, after) if mark and before.startswith(asked) else (asked, "")

    def _tokens(self, text: str, *, special: bool = False) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=special)["input_ids"]]


def load_causal(place: str, *, device: str, option: str) -> tuple[Any, Dialogue]:
    """A causal model and its dialogue. float32 on a CPU; on a GPU the kind of numbers that its files hold.

    Args:
        place: a folder with config, weights and tokenizer, or the hub's name of a model.
        device: a torch device.
        option: that names it, for messages.

    Raises:
        InputError: neither a folder nor a model of the hub that can be had here, or no causal model.
        OutOfMemoryError: memory does not hold it.
        MissingDependencyError: no `transformers` or `torch`.
    """
    torch, transformers = imported("torch", "transformers")
    transformers.utils.logging.disable_progress_bar()
    source, here = source_of(place, option)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=here)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            source, local_files_only=here, dtype=torch.float32 if device == "cpu" else "auto"
        )
        network = network.eval().to(device)
    except Exception as error:  # transformers raises whatever its layers raise
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                wanted=f"memory for the language model {place!r}",
                got=one_line(error),
                next_step=f"Take a smaller model ({option}), or a machine with more memory.",
            ) from error
        raise InputError(
            wanted=f"a causal language model with its tokenizer in {place}",
            got=f"what transformers cannot load ({one_line(error)})",
            next_step=f"Pass a folder with config.json, the weights and the tokenizer: {option} = DIR",
        ) from error
    ends = getattr(network.generation_config, "eos_token_id", None)
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return network, Dialogue(tokenizer, frozenset(int(token) for token in found))


def source_of(place: str, option: str) -> tuple[str, bool]:
    """Where a model is loaded from, and whether only from this machine; see `find_model`.

    A model of the hub that this machine has is its folder in the cache: nothing is asked of the hub.
    """
    source, here = find_model(place, what="a language model", next_step=f"{option} = DIR")
    if here and not Path(source).is_dir():
        from huggingface_hub import try_to_load_from_cache

        kept = try_to_load_from_cache(place, "config.json")
        if isinstance(kept, str):
            source = str(Path(kept).parent)
    return source, here


def digest_of_model(source: str, adapter: Path | None) -> str:
    """SHA-256 of a model's files and of its adapter's, 64 hex digits; empty if they are not on this machine."""
    base = digest_of(Path(source))
    if not base or adapter is None:
        return base
    return hashlib.sha256(f"{base}\0{digest_of(adapter)}".encode()).hexdigest()


def context_of(network: Any) -> int | None:
    """Most tokens that a model takes, prompt and answer together; None if it does not say."""
    config = network.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if longest is None else int(longest)


def imported(*names: str) -> list[Any]:
    """Heavy packages, when they are needed.

    Raises:
        MissingDependencyError: one is missing; says what installs it.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or names[0], "server", "a local language model") from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is want of memory, of a GPU or of the machine."""
    (torch,) = imported("torch")
    seen = 0
    while error is not None and seen < 10:
        words = str(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, (RuntimeError, OSError))
            and any(said in words.lower() for said in ("allocate memory", "out of memory", "not enough memory"))
        ):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def failed(model: str, error: Exception) -> NoReturn:
    """Raise what a library raised as an error of edgead; those of edgead stay as they are."""
    if isinstance(error, EdgeadError):
        raise error
    raise LanguageModelError(
        wanted=f"work of the language model {model!r}",
        got=f"a failure of its library ({one_line(error)})",
        next_step="Take another model.",
    ) from error


def one_line(error: BaseException) -> str:
    """A foreign error in at most 220 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


__all__ = [
    "Dialogue",
    "context_of",
    "digest_of_model",
    "failed",
    "imported",
    "is_out_of_memory",
    "load_causal",
    "one_line",
    "source_of",
]
