"""What a run needs of others: somebody who writes, somebody who paints, something that measures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.server_side.kka.records import Preference

Frame = NDArray[np.uint8]
"""uint8 RGB [H, W, 3]."""


class UndrawableCaptionError(InputError):
    """A caption that the painter cannot draw; the caption is kept with the reason, and the run goes on."""


@dataclass(frozen=True, eq=False)
class Painted:
    """A painted anomaly.

    Attributes:
        image: uint8 RGB [H, W, 3].
        mask: uint8 [H, W] of 0 and 255: where the anomaly is; None where the painter does not know.
    """

    image: Frame
    mask: NDArray[np.uint8] | None


class Author(Protocol):
    """Writes captions of anomalies. `kind`, `name` and `digest` go into the records.

    One that can be sent to the workers of a cluster and is worth it says so with `travels = True`, and with
    `uses_gpu = True` that each of them needs a GPU where there are any.
    """

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...

    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """One answer for each prompt, in order; answer n depends on prompt n and seed n alone.

        An answer may be empty or nonsense: whoever asked cleans it.

        Raises:
            LanguageModelError: the model cannot be reached, or failed.
            OutOfMemoryError: its memory does not suffice.
        """
        ...


class Painter(Protocol):
    """Paints an anomaly after a caption. `kind`, `name` and `digest` go into the records.

    It may be sent to the workers of a cluster; with `uses_gpu = True` each of them gets a GPU where there are any.
    """

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...

    @property
    def needs_normal(self) -> bool:
        """Whether it paints on a photograph of a normal part."""
        ...

    def check(self, caption: str) -> None:
        """Refuse a caption that it cannot draw, without drawing.

        Raises:
            UndrawableCaptionError: it cannot.
        """
        ...

    def paint(self, caption: str, normal: Frame | None, *, seed: int) -> Painted:
        """Paint one anomaly; depends on the arguments alone.

        Args:
            caption: in words.
            normal: uint8 RGB [H, W, 3] to paint on, where `needs_normal`.
            seed: decides everything that the caption leaves open.

        Raises:
            UndrawableCaptionError: it cannot draw that.
            OutOfMemoryError: its memory does not suffice.
        """
        ...


class Embedder(Protocol):
    """Turns frames into vectors in which clusters of normals are found; it may be sent to workers of a cluster."""

    @property
    def name(self) -> str: ...

    def embed(self, frames: Sequence[Frame]) -> NDArray[np.float32]:
        """float32 [N, D] of N frames."""
        ...


class Evaluator(Protocol):
    """The confusion evaluator: how far an image lies from the normals, and how far is still hard.

    It may be sent to the workers of a cluster, when it is trained.
    """

    @property
    def normal_distances(self) -> NDArray[np.float32]:
        """Distances of held-out normals, [V]."""
        ...

    def measure(self, names: Sequence[str], frames: Sequence[Frame]) -> list[tuple[float, float]]:
        """(squared distance to the centre, distance up to which it would be hard) of each frame.

        Args:
            names: ids of the images; which evaluator measures one may depend on it.
            frames: their pixels.
        """
        ...


@dataclass(frozen=True)
class Tuned:
    """What preference training came to.

    Attributes:
        steps: of the optimiser.
        loss: of the first and of the last logged step.
        margin: mean reward margin (chosen minus rejected) of the first and of the last logged step.
    """

    steps: int
    loss: tuple[float, float]
    margin: tuple[float, float]


class Tuner(Protocol):
    """Teaches the author to prefer what is hard."""

    def tune(self, preferences: Sequence[Preference], before: Path | None, after: Path, *, seed: int) -> Tuned:
        """Train an adapter.

        Args:
            preferences: chosen and rejected captions.
            before: folder of the adapter of the round before, or None.
            after: folder for the new one; it is there only when it is complete.
            seed: of the training.

        Raises:
            InputError: no preferences.
            OutOfMemoryError: memory does not suffice.
        """
        ...


def seed_of(*parts: object) -> int:
    """A seed for one artefact from all that names it, 0 to 2**31 - 1: the same whatever was made before.

    The first four bytes of SHA-256 over the parts' texts with NULs between them.
    """
    text = "\0".join(("edgead/kka/seed/v1", *(str(part) for part in parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
