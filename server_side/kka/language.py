"""Authors: who writes the captions of anomalies.

`TransformersAuthor` runs a causal model, with the adapter that preferences trained, in the process that asks: this one
or a worker of a cluster. Every answer is drawn with random numbers of its own, from its seed alone, so that neither the
batch nor the answers beside it matter; what remains is the rounding of batched sums, 1e-6 of a probability in float32.
`EndpointAuthor` asks an OpenAI-compatible end point, and keeps answers, so that a run that goes on does not ask twice.
It does not travel to a cluster: its model already runs elsewhere, and its answers and the key are on this machine.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgead.runtime.errors import InputError, LanguageModelError, OutOfMemoryError
from edgead.server_side.kka.causal import (
    Dialogue,
    context_of,
    digest_of_model,
    failed,
    imported,
    is_out_of_memory,
    load_causal,
    one_line,
    source_of,
)
from edgead.server_side.kka.config import Config, Imagine
from edgead.server_side.kka.seams import Author
from edgead.server_side.prompts.llm import EmptyAnswerError, OpenAiLimits, OpenAiModel
from edgead.server_side.prompts.llm_cache import CachedModel, default_cache
from edgead.server_side.prompts.llm_local import local_name
from edgead.server_side.prompts.requests import Message, Request

_THOUGHT = re.compile(r"(?is)<(think|thinking|reasoning)>.*?(?:</\1>|\Z)")
_SENTENCE = re.compile(r"(?<=[^\W\d_]{3})[.!?](?=\s)")
"""The end of a sentence that another follows; not that of 'e.g.', nor the point of 3.5."""
_OPTION = "imagine.model"


def open_author(config: Config, adapter: Path | None) -> Author:
    """The author of a configuration.

    Args:
        config: of the run.
        adapter: folder of the adapter that the rounds before trained, or None.

    Raises:
        InputError: a model that cannot be had here, a folder without an adapter, or one for an author without.
        MissingDependencyError: a package is missing.
    """
    settings = config.imagine
    if settings.author == "local":
        return TransformersAuthor(settings, adapter)
    if adapter is not None:
        raise InputError(
            wanted="an author that preferences tune (imagine.author = 'local')",
            got=f"an adapter for {settings.author!r}",
            next_step="Take a local model, or no rounds.",
        )
    if settings.author == "endpoint":
        return EndpointAuthor(settings)
    from edgead.server_side.kka.procedural import GrammarAuthor

    return GrammarAuthor()


class TransformersAuthor:
    """A causal model of `transformers`.

    It is loaded when the first answer is asked for, once in each process, and does not travel when the author is sent
    to another one: there it is loaded from the same place, and refused if it is another model.

    Where memory does not hold a batch, half of it is tried, down to one answer at a time: a batch decides the speed,
    not what is written.

    Args:
        settings: model, batch and how to draw.
        adapter: folder of a LoRA adapter, or None.
        device: a torch device; None takes the first GPU if there is one.

    Raises:
        InputError: no such model, or no adapter in its folder.
        MissingDependencyError: a package is missing.
    """

    kind = "transformers"
    travels = True
    uses_gpu = True
    """A worker of a cluster gets a GPU of its own, where there are any."""

    def __init__(self, settings: Imagine, adapter: Path | None = None, *, device: str | None = None) -> None:
        self.name = local_name(settings.model).name
        self._settings = settings
        self._adapter = None if adapter is None else adapter.resolve()
        self._asked_device = device
        self._sent = ""
        self._newlines: dict[int, bool] = {}
        source_of(settings.model, _OPTION)
        if self._adapter is not None and not (self._adapter / "adapter_config.json").is_file():
            raise no_adapter(self._adapter, "none")

    def __getstate__(self) -> dict[str, Any]:
        # Gigabytes of weights stay at home; which ones they are goes along.
        heavy = ("_loaded", "digest", "_device")
        return {name: value for name, value in self.__dict__.items() if name not in heavy} | {"_sent": self.digest}

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the files of the model and of its adapter; empty if they are not on this machine."""
        if not Path(source_of(self._settings.model, _OPTION)[0]).is_dir():
            # A model that is still at the hub is fetched by loading it.
            _ = self._loaded
        return digest_of_model(source_of(self._settings.model, _OPTION)[0], self._adapter)

    @functools.cached_property
    def _device(self) -> str:
        (torch,) = imported("torch")
        return self._asked_device or ("cuda" if torch.cuda.is_available() else "cpu")

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Dialogue]:
        network, dialogue = load_causal(self._settings.model, device=self._device, option=_OPTION)
        if self._adapter is not None:
            network = with_adapter(network, self._adapter).eval()
        return network, dialogue

    @property
    def _network(self) -> Any:
        return self._loaded[0]

    @property
    def _dialogue(self) -> Dialogue:
        return self._loaded[1]

    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """One answer for each prompt: its first line, and of that the first sentence. See `Author`.

        Raises:
            InputError: what is no causal model, an adapter that does not fit it, or another model than was sent here.
            LanguageModelError: a prompt that the model's context does not hold, or the model failed.
            OutOfMemoryError: memory does not hold the model, or one answer.
        """
        self._check_sent()
        tokens = [self._dialogue.prompt(prompt) for prompt in prompts]
        limits = [self._limit(prompt) for prompt in tokens]
        answers = [""] * len(tokens)
        # An answer that ends where the context ends has company of its own length only.
        for limit in sorted(set(limits)):
            places = [at for at, found in enumerate(limits) if found == limit]
            for start in range(0, len(places), self._settings.batch):
                part = places[start : start + self._settings.batch]
                found = self._fitting([tokens[at] for at in part], [seeds[at] for at in part], limit)
                for at, answer in zip(part, found, strict=True):
                    answers[at] = first_sentence(self._dialogue.text(answer))
        return answers

    def _check_sent(self) -> None:
        if self._sent and self.digest != self._sent:
            raise InputError(
                wanted=f"the files of the language model {self.name!r} as on the machine that began the run",
                got=f"others at {self._settings.model}" + (f" and {self._adapter}" if self._adapter else ""),
                next_step="Give every machine of the cluster the same folder under the same path.",
            )

    def _limit(self, prompt: list[int]) -> int:
        context = context_of(self._network)
        room = self._settings.max_tokens if context is None else context - len(prompt)
        if room < 1:
            raise LanguageModelError(
                wanted=f"a prompt that fits the context of {self.name!r}, {context} tokens",
                got=f"{len(prompt)} tokens",
                next_step="Shorten imagine.prompt or the captions of normals, or take a model with a longer context.",
            )
        return min(self._settings.max_tokens, room)

    def _fitting(self, prompts: list[list[int]], seeds: list[int], limit: int) -> list[list[int]]:
        """Tokens of answers, in as many pieces as memory needs."""
        try:
            return self._generated(prompts, seeds, limit)
        except Exception as error:  # transformers raises whatever its layers raise
            if not is_out_of_memory(error):
                failed(self.name, error)
            if len(prompts) == 1:
                raise OutOfMemoryError(
                    wanted=f"memory for an answer of {self.name!r}, after {len(prompts[0])} tokens of prompt",
                    got=f"{one_line(error)}, with imagine.batch = {self._settings.batch} and then one at a time",
                    next_step="Lower imagine.max_tokens, shorten the prompt, or take a smaller model.",
                ) from error
        (torch,) = imported("torch")
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()
        half = len(prompts) // 2
        return [
            *self._fitting(prompts[:half], seeds[:half], limit),
            *self._fitting(prompts[half:], seeds[half:], limit),
        ]

    def _generated(self, prompts: list[list[int]], seeds: list[int], limit: int) -> list[list[int]]:
        torch, transformers = imported("torch", "transformers")
        longest, padding = max(map(len, prompts)), self._dialogue.padding
        # Filled on the left, so that all answers begin in one column.
        ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = transformers.GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=padding,
            eos_token_id=sorted(self._dialogue.ends) or None,
        )
        # Whatever the model's files wish (penalties, forbidden words) is not part of the answer's law.
        base = self._network.get_base_model() if hasattr(self._network, "get_base_model") else self._network
        base.generation_config = settings
        draw = Draw(seeds, limit, longest, temperature=self._settings.temperature, top_p=self._settings.top_p)
        with torch.inference_mode():
            output = self._network.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                generation_config=settings,
                logits_processor=transformers.LogitsProcessorList([draw]),
                stopping_criteria=transformers.StoppingCriteriaList([self._line_ends(longest)]),
            )
        return [self._to_its_end(row) for row in output[:, longest:].tolist()]

    def _to_its_end(self, tokens: list[int]) -> list[int]:
        end = next((at for at, token in enumerate(tokens) if token in self._dialogue.ends), len(tokens))
        return tokens[:end]

    def _line_ends(self, start: int) -> Callable[..., Any]:
        """Ends an answer after the newline behind its first words."""
        (torch,) = imported("torch")

        def done(input_ids: Any, scores: Any, **more: Any) -> Any:
            rows = input_ids[:, start:].tolist()
            return torch.tensor([self._has_a_line(row) for row in rows], dtype=torch.bool, device=input_ids.device)

        return done

    def _has_a_line(self, tokens: list[int]) -> bool:
        token = tokens[-1]
        if token not in self._newlines:
            self._newlines[token] = "\n" in self._dialogue.text([token])
        if not self._newlines[token]:
            return False
        text = self._dialogue.text(tokens).lstrip()
        # What begins with a tag may be a thought of many lines, before the answer.
        return bool(text) and not text.startswith("<")


class Draw:
    """Chooses the next token of each row with the row's own random numbers; a logits processor of `transformers`.

    Token t of a row is where the t-th number of its seed falls in the cumulated probabilities, in the order of the
    vocabulary: a rounding error moves the limit between two tokens by as much and no more. All in float64.

    Args:
        seeds: one for each row.
        limit: most tokens of an answer.
        start: column at which answers begin.
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens that together reach this probability are drawn.
    """

    def __init__(self, seeds: Sequence[int], limit: int, start: int, *, temperature: float, top_p: float) -> None:
        self._numbers = np.stack([np.random.default_rng(seed).random(limit) for seed in seeds])
        self._start, self._temperature, self._top_p = start, temperature, top_p

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [B, V] in which the token that was drawn has 0 and all others minus infinity."""
        (torch,) = imported("torch")
        if bool((scores.isnan() | scores.isposinf()).any()) or bool(scores.isneginf().all(-1).any()):
            raise LanguageModelError(
                wanted="finite scores of the language model",
                got="numbers that are none",
                next_step="The weights are damaged or overflow in this precision; take another model.",
            )
        column = self._numbers[:, input_ids.shape[1] - self._start]
        drawn = self.tokens(scores, column)
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(1, drawn.to(scores.device)[:, None], 0.0)

    def tokens(self, scores: Any, numbers: Any) -> Any:
        """Tokens [B] for scores [B, V] and random numbers [B] in [0, 1)."""
        (torch,) = imported("torch")
        if self._temperature == 0:
            return scores.argmax(-1)
        odds = torch.softmax(scores.double() / self._temperature, -1)
        if self._top_p < 1:
            ordered, order = odds.sort(dim=-1, descending=True, stable=True)
            # A token is in if those before it do not reach the share yet; the first always is.
            kept = torch.zeros_like(odds, dtype=torch.bool).scatter_(
                1, order, ordered.cumsum(-1) - ordered < self._top_p
            )
            odds = torch.where(kept, odds, 0.0)
        sums = odds.cpu().cumsum(-1)
        places = torch.from_numpy(numbers)[:, None].double() * sums[:, -1:]
        found = torch.searchsorted(sums, places, right=True)[:, 0]
        # The last number below 1 may round to the sum itself.
        last = (sums < sums[:, -1:]).sum(-1)
        return torch.minimum(found, last)


class EndpointAuthor:
    """A model behind an OpenAI-compatible end point; one request with its own seed for each answer.

    Answers are kept under the user's cache folder by all that decides them, so that a run that was ended does not ask
    again. Whether an end point heeds the seed is its own affair.

    Args:
        settings: address, model's name, the key's variable, and how to draw.
        cache: folder of kept answers; that of `edgead prompts` if left out.
        limits: times and sizes.

    Raises:
        InputError: an address that is none, or a key that is not set.
        MissingDependencyError: no `openai` package.
    """

    kind = "endpoint"
    digest = ""

    def __init__(self, settings: Imagine, *, cache: Path | None = None, limits: OpenAiLimits | None = None) -> None:
        self._settings = settings
        self._inner = OpenAiModel(settings.url, settings.model, settings.key_env or None, limits=limits)
        self._model = CachedModel(cache or default_cache(), self._inner)
        self.name = self._inner.model.name

    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """One answer for each prompt; an empty one where the model said nothing or would not. See `Author`.

        Raises:
            LanguageModelError: no connection, out of time, refused, or no answer at all.
        """
        return [first_sentence(self._asked(prompt, seed)) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _asked(self, prompt: str, seed: int) -> str:
        settings = self._settings
        request = Request(
            self._model.model, (Message("user", prompt),), settings.temperature, settings.max_tokens, seed
        )
        try:
            return self._model.complete(request)
        except EmptyAnswerError:
            return ""
        except LanguageModelError as error:
            step = error.next_step.replace("Name the key's variable: --llm-key-env VAR", "Set imagine.key_env.")
            step = step.replace("--llm-max-tokens", "imagine.max_tokens")
            raise LanguageModelError(wanted=error.wanted, got=error.got, next_step=step) from error


def with_adapter(network: Any, adapter: Path, *, trainable: bool = False) -> Any:
    """A model with the LoRA adapter of a folder.

    Raises:
        InputError: no adapter, or one of another model.
        MissingDependencyError: no `peft`.
    """
    (peft,) = imported("peft")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(network, str(adapter), is_trainable=trainable, local_files_only=True)
    except Exception as error:  # peft raises whatever its layers raise
        raise no_adapter(adapter, one_line(error)) from error


def no_adapter(adapter: Path, got: str) -> InputError:
    """The refusal of a folder that is no adapter."""
    return InputError(
        wanted=f"a LoRA adapter of this language model in {adapter}",
        got=got,
        next_step="Restore the folder, or remove it to have it trained again.",
    )


def first_sentence(answer: str) -> str:
    """The first sentence of an answer's first line with words; thoughts that a model shows are left out."""
    text = _THOUGHT.sub(" ", answer)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    end = _SENTENCE.search(line)
    return line[: end.end()] if end else line


__all__ = ["Draw", "EndpointAuthor", "TransformersAuthor", "first_sentence", "open_author", "with_adapter"]
