"""A chat server, a model that has its answers ready, and a tiny GPT-2 that a test can load from a folder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from edgead.runtime.errors import EdgeadError
from edgead.server_side.prompts.requests import ModelName, Request


class ReadyModel:
    """A language model whose answers are ready: it keeps what it was asked."""

    def __init__(self, *answers: str, name: str = "ready") -> None:
        self.model = ModelName(name, "ready")
        self.answers = list(answers)
        self.asked: list[Request] = []

    def complete(self, request: Request) -> str:
        """The next answer; the last one again and again."""
        self.asked.append(request)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def ready() -> type[ReadyModel]:
    """The class of models whose answers are ready."""
    return ReadyModel


@pytest.fixture(scope="session")
def chat() -> ModuleType:
    """The module of the chat server."""
    name = "edgead_tests_chat_server"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("chat_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Runs `edgead prompts` in this process; errors of edgead are raised as the command raises them."""
    from edgead.server_side.prompts.cli import prompts

    def call(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(prompts, [str(word) for word in words])
        if isinstance(result.exception, EdgeadError):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained GPT-2 of two layers and a byte tokenizer with a conversation format."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=256, n_embd=32, n_layer=2, n_head=2, eos_token_id=256, bos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
