"""Adaptor, discriminator and loss of SimpleNet (see `simplenet`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.server_side.detectors.training import generator

TRUNCATION = 0.5
"""th+ and -th-."""
HIDDEN = 128
_AT_ONCE = 16384


class SimpleNetwork(nn.Module):
    """Adaptor, at first the identity, and discriminator.

    Args:
        dimensions: of a patch.
        hidden: width of the discriminator.
        seed: of the weights.
    """

    def __init__(self, dimensions: int, hidden: int = HIDDEN, seed: int = 0) -> None:
        super().__init__()
        self.spread: Tensor
        self.register_buffer("spread", torch.ones(()))
        self.adaptor = nn.Linear(dimensions, dimensions)
        self.hidden = nn.Linear(dimensions, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.last = nn.Linear(hidden, 1, bias=False)
        drawn = generator(seed, -1)
        with torch.no_grad():
            for layer in (self.hidden, self.last):
                nn.init.xavier_normal_(layer.weight, generator=drawn)
            self.hidden.bias.zero_()
            nn.init.eye_(self.adaptor.weight)
            self.adaptor.bias.zero_()

    def adapted(self, patches: Tensor) -> Tensor:
        """q of patches float32 [n, D], of the same shape."""
        found: Tensor = self.adaptor(patches / self.spread)
        return found

    def judged(self, adapted: Tensor) -> Tensor:
        """D(q) of adapted patches [n, D]: float32 [n], high for normal ones."""
        found: Tensor = self.last(F.leaky_relu(self.norm(self.hidden(adapted)), 0.2))
        return found[:, 0]

    def forward(self, patches: Tensor) -> Tensor:
        """Args: patches: float32 [n, D]. Returns: s = -D(q), float32 [n]."""
        return -self.judged(self.adapted(patches))


class Averaged(nn.Module):
    """A network that is trained, and the mean of its weights over its last steps.

    Args:
        network: to train.
        window: steps of which a mean is taken, with weights that fall off exponentially.
    """

    def __init__(self, network: SimpleNetwork, window: int) -> None:
        super().__init__()
        self.current = network
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.mean = copy.deepcopy(network).requires_grad_(False)
        self._window = max(1, window)

    def update(self) -> None:
        """Count the weights of the step that was made."""
        # The first steps have a plain mean, so that the weights of the beginning are soon forgotten.
        share = max(1.0 / (int(self.steps) + 1), 1.0 / self._window)
        with torch.no_grad():
            for kept, new in zip(self.mean.state_dict().values(), self.current.state_dict().values(), strict=True):
                if kept.is_floating_point():
                    kept.lerp_(new, share)
                else:
                    kept.copy_(new)
            self.steps += 1


def truncated_l1(normal: Tensor, anomalous: Tensor, truncation: float = TRUNCATION) -> Tensor:
    """Equations 7 and 8; see the module.

    Args:
        normal: D(q), any shape.
        anomalous: D(q-), any shape.
        truncation: th+ and -th-.

    Returns:
        the sum of the two means, a scalar.
    """
    return (truncation - normal).clamp_min(0).mean() + (truncation + anomalous).clamp_min(0).mean()


def anomalous_l1(anomalous: Tensor, truncation: float = TRUNCATION) -> Tensor:
    """The second half of `truncated_l1` for given anomalous patches; 0 if there are none."""
    return (truncation + anomalous).clamp_min(0).sum() / max(anomalous.numel(), 1)


def scores_of(network: SimpleNetwork, patches: Tensor) -> Tensor:
    """s of many patches [n, D], in parts: float32 [n]."""
    return torch.cat([network(part) for part in torch.split(patches, _AT_ONCE)])


__all__: Sequence[str] = (
    "HIDDEN",
    "TRUNCATION",
    "Averaged",
    "SimpleNetwork",
    "anomalous_l1",
    "scores_of",
    "truncated_l1",
)
