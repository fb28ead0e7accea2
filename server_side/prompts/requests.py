"""What a language model is asked: one record that holds the whole request, and its digest."""

from __future__ import annotations

import hashlib
import json
from typing import Protocol

import msgspec
from msgspec import Struct


class Message(Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    """'system' or 'user'."""
    content: str


class ModelName(Struct, frozen=True):
    """Which model, and where: all of it enters the digest of a request."""

    name: str
    base_url: str
    """The end point, or 'transformers' for a model that runs here."""
    revision: str = ""
    """What tells two models of one name apart, such as a digest over a local model's files."""


class Request(Struct, frozen=True):
    """Everything that decides an answer."""

    model: ModelName
    messages: tuple[Message, ...]
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0

    def canonical(self) -> bytes:
        """The request as canonical JSON: sorted keys, no spaces, ASCII."""
        fields = msgspec.to_builtins(self)
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def digest(self) -> str:
        """SHA-256 over `canonical()`, 64 hexadecimal digits: the request's name in the cache and in prompt sets."""
        return hashlib.sha256(self.canonical()).hexdigest()


class LanguageModel(Protocol):
    """Anything that answers a request in text: an end point, a local model, a cache before either."""

    @property
    def model(self) -> ModelName:
        """Which model answers."""
        ...

    def complete(self, request: Request) -> str:
        """The answer to `request`, untrusted.

        Raises:
            LanguageModelError: no answer: no connection, out of time, refused, too long, or not an answer at all.
        """
        ...
