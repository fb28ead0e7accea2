"""A language model that runs here, through `transformers`: a folder of a causal model, or the hub's name of one."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

from edgead.runtime.errors import InputError, LanguageModelError, missing_dependency
from edgead.server_side.hub import find_model
from edgead.server_side.prompts.requests import ModelName, Request
from edgead.server_side.prompts.words import LIMITS, check_words


class TransformersModel:
    """A causal language model in this process. One request and one seed give one answer, on one machine.

    Args:
        place: a folder with config, weights and tokenizer, or the hub's name of a model, 'owner/name'.
        device: a torch device; None takes the first GPU if there is one.
        longest_s: seconds after which an answer ends where it is.

    Raises:
        InputError: neither a folder nor a model of the hub that can be had here, or a folder without a causal model.
        MissingDependencyError: no `transformers` or `torch`.
    """

    def __init__(self, place: str, *, device: str | None = None, longest_s: float = 300.0) -> None:
        self.model = local_name(place)
        try:
            import torch

            transformers: Any = importlib.import_module("transformers")
        except ModuleNotFoundError as error:
            raise missing_dependency(error.name or "transformers", "server", "a local language model") from error
        self._longest_s = longest_s
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        transformers.utils.logging.disable_progress_bar()
        source, here = find_model(place, what="a language model", next_step="--llm-local DIR")
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=here)
            network = transformers.AutoModelForCausalLM.from_pretrained(source, local_files_only=here)
            self._network = network.eval().to(self._device)
        except Exception as error:  # transformers raises whatever its layers raise
            # transformers raises many kinds for one cause: the files are not those of a causal model
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                wanted=f"a causal language model with its tokenizer in {place}",
                got=f"what transformers cannot load ({type(error).__name__}: {reason})",
                next_step="Pass a folder with config.json, the weights and the tokenizer: --llm-local DIR",
            ) from error

    def complete(self, request: Request) -> str:
        """The answer to `request`; greedy at temperature 0, else drawn with the request's seed.

        Raises:
            LanguageModelError: the request does not fit the model's context, or the model failed.
        """
        import torch

        transformers: Any = importlib.import_module("transformers")
        try:
            inputs = self._inputs(request)
            length = int(inputs["input_ids"].shape[1])
            room = self._room(length)
            if room < 1:
                raise LanguageModelError(
                    wanted=f"a request that fits the context of {self.model.name!r}",
                    got=f"{length} tokens",
                    next_step="Take a model with a longer context, or shorter words.",
                )
            cuda = [torch.device(self._device)] if self._device.startswith("cuda") else []
            with torch.random.fork_rng(devices=cuda), torch.inference_mode():
                torch.manual_seed(request.seed)
                sampling: dict[str, Any] = {"do_sample": False}
                if request.temperature > 0:
                    sampling = {"do_sample": True, "temperature": request.temperature}
                settings = transformers.GenerationConfig(
                    max_new_tokens=min(request.max_tokens, room),
                    max_time=self._longest_s,
                    pad_token_id=self._pad(),
                    eos_token_id=self._network.generation_config.eos_token_id or self._tokenizer.eos_token_id,
                    bos_token_id=self._tokenizer.bos_token_id,
                    **sampling,
                )
                output = self._network.generate(**inputs, generation_config=settings)
            return str(self._tokenizer.decode(output[0, length:], skip_special_tokens=True))
        except LanguageModelError:
            raise
        except Exception as error:  # transformers raises whatever its layers raise
            raise LanguageModelError(
                wanted=f"an answer from {self.model.name!r}",
                got=f"a failure of transformers ({type(error).__name__}: {' '.join(str(error).split())[:160]})",
                next_step="Take another model, or use the templates.",
            ) from error

    def _inputs(self, request: Request) -> Any:
        turns = [{"role": message.role, "content": message.content} for message in request.messages]
        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            inputs = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            # A model without a conversation format goes on with a text.
            inputs = self._tokenizer("\n".join(turn["content"] for turn in turns) + "\n", return_tensors="pt")
        wanted = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        return {name: tensor.to(self._device) for name, tensor in wanted.items()}

    def _room(self, length: int) -> int:
        config = self._network.config
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return 1 << 30 if longest is None else int(longest) - length

    def _pad(self) -> int:
        for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0


def local_name(place: str) -> ModelName:
    """The name of a local model in requests: its folder's name, and a digest that tells its files from others'.

    Raises:
        PromptError: a name that is empty or of odd characters.
    """
    folder = Path(place)
    name = folder.resolve().name if folder.is_dir() else place
    name = check_words(name[-LIMITS.name_chars :], "the name of a model", LIMITS.name_chars)
    return ModelName(name, "transformers", _revision(folder) if folder.is_dir() else "")


def _revision(folder: Path) -> str:
    """SHA-256 over the small files' contents and the weights' names, sizes and times: no gigabytes are read."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.name}\0{facts.st_size}\0".encode())
            small = facts.st_size <= 1 << 20 and path.suffix in {".json", ".txt", ".jinja"}
            digest.update(path.read_bytes() if small else str(facts.st_mtime_ns).encode())
    return digest.hexdigest()
