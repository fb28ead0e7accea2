"""CMDA, a baseline of KKA, as a trunk and a head ("Cross-modal Data Augmentation for Tasks of Different Modalities";
KKA: Chen et al. 2025, arXiv 2502.14880). Image level: there is no map.

What its authors publish: for each caption the absolute cosine similarities to the pictures of a batch, brought to a
sum of 1, weigh a mixture of these pictures; an encoder learns from the mixtures by contrast, and the Mahalanobis
distance of SSD is the score. How KKA applies it, with anomalies from sentences, is not published. Ours:

- everything happens on embeddings of a frozen vision-language model, so that a handful of normals is enough;
- mixtures of normals by the similarity to sentences about good parts are further normals (`mixture_weights`);
- an anomaly is an embedding between that of a normal and that of a sentence about a defect (`interpolated`). Pictures
  and sentences lie apart in the joint space, whatever they show; by default a sentence therefore first gets its
  counterpart among the pictures (`bridged`), lest the classifier learn to tell pictures from sentences;
- a small classifier tells the normals from these anomalies, and from pictures of anomalies where there are some. It is
  knowledge: a pack carries it, and the trunk is the image tower alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.detectors.text_fitting import open_tower, prompts_for, text_facts
from edgead.server_side.detectors.trained import Samples, TrainedOptions, load_data
from edgead.server_side.detectors.training import Schedule, batch_of, generator, train
from edgead.server_side.devices import CPU, placed, torch_device
from edgead.server_side.learned import Learned, Modules, finished
from edgead.server_side.prompts.ensembles import winclip
from edgead.server_side.vision_language import VisionTower, encode_texts
from edgead.server_side.vision_language.options import VisionLanguageOptions

METHOD = "cmda"
PAPER = (
    "Cross-modal Data Augmentation for Tasks of Different Modalities (CMDA), as a baseline of KKA, arXiv 2502.14880; "
    "on embeddings and with anomalies from sentences, which is ours"
)
EVEN_ODDS = math.log(2.0)
"""The score where the classifier does not decide."""
_BATCH_EMBEDDED = 16


@dataclasses.dataclass(frozen=True)
class CmdaExtras:
    """What CMDA has beyond `VisionLanguageOptions`.

    Attributes:
        steps: of the classifier, at most.
        batch: normals in a step, and as many mixtures and anomalies.
        learning_rate: of Adam.
        hidden: width of the classifier.
        share: least and greatest share of the sentence in an anomaly's embedding, 0 to 1.
        bridge: whether sentences are moved to where pictures lie, see `bridged`.
        held_out: share of the normals that nothing is trained on.
        patience: validations without gain after which training ends.
    """

    steps: int = 600
    batch: int = 32
    learning_rate: float = 1e-3
    hidden: int = 32
    share: tuple[float, float] = (0.2, 0.8)
    bridge: bool = True
    held_out: float = 0.2
    patience: int = 5


class CmdaTrunk(nn.Module):
    """Frame -> embedding of length 1 in the joint space."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: embedding float32 [B, E]."""
        return F.normalize(self.tower(image).pooled, dim=1)


class CmdaHead(nn.Module):
    """Embedding and classifier -> score."""

    def forward(self, embedding: Tensor, hidden: Tensor, bias: Tensor, last: Tensor, last_bias: Tensor) -> Tensor:
        """Classify.

        Args:
            embedding: float32 [B, E].
            hidden: float32 [K, E], with its `bias` [1, K].
            last: float32 [1, K], with its `last_bias` [1].

        Returns:
            score float32 [B]: log(1 + e^x) of the log odds x of an anomaly, never below 0.
        """
        return F.softplus(log_odds(embedding, hidden, bias, last, last_bias))


def log_odds(embedding: Tensor, hidden: Tensor, bias: Tensor, last: Tensor, last_bias: Tensor) -> Tensor:
    """Of an anomaly, [B]; arguments as for `CmdaHead`."""
    inner = F.relu(F.linear(embedding, hidden) + bias)
    return (inner * last).sum(1) + last_bias


def mixture_weights(texts: Tensor, images: Tensor) -> Tensor:
    """CMDA's weights: |cos(t_i, z_j)|, each sentence's brought to a sum of 1.

    Args:
        texts: [T, E], of length 1.
        images: [N, E], of length 1.

    Returns:
        [T, N].
    """
    similarity = (texts @ images.T).abs()
    return similarity / similarity.sum(1, keepdim=True).clamp_min(1e-12)


def mixed(texts: Tensor, images: Tensor) -> Tensor:
    """Mixtures of images by `mixture_weights`, [T, E] of length 1."""
    return F.normalize(mixture_weights(texts, images) @ images, dim=1)


def bridged(texts: Tensor, normal_texts: Tensor, images: Tensor) -> Tensor:
    """Where pictures of what sentences say would lie: their difference from sentences about good parts, added to the
    mean picture of a good part.

    Args:
        texts: [T, E] about defects.
        normal_texts: [S, E] about good parts.
        images: [N, E] of good parts.

    Returns:
        [T, E] of length 1.
    """
    return F.normalize(images.mean(0) + texts - normal_texts.mean(0), dim=1)


def interpolated(images: Tensor, texts: Tensor, share: Tensor) -> Tensor:
    """(1 - share) image + share text, of length 1.

    Args:
        images, texts: [N, E].
        share: [N] in 0..1.
    """
    return F.normalize((1.0 - share)[:, None] * images + share[:, None] * texts, dim=1)


class Classifier(nn.Module):
    """One hidden layer; its arrays are knowledge.

    Args:
        dimensions: E of the joint space.
        hidden: width.
        seed: of the weights.
    """

    def __init__(self, dimensions: int, hidden: int, seed: int = 0) -> None:
        super().__init__()
        drawn = generator(seed, -1)
        # An embedding of length 1 has entries of about 1 / sqrt(E).
        self.hidden = nn.Parameter(torch.randn(hidden, dimensions, generator=drawn) * 2**0.5)
        self.bias = nn.Parameter(torch.zeros(1, hidden))
        self.last = nn.Parameter(torch.randn(1, hidden, generator=drawn) * hidden**-0.5)
        self.last_bias = nn.Parameter(torch.zeros(1))

    def forward(self, embedding: Tensor) -> Tensor:
        """Args: embedding: float32 [B, E]. Returns: log odds of an anomaly, float32 [B]."""
        return log_odds(embedding, self.hidden, self.bias, self.last, self.last_bias)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The knowledge, by the names of `cmda_modules`."""
        return {f"classifier.{name}": value.detach().numpy().copy() for name, value in self.named_parameters()}


class CmdaTask:
    """Trains the classifier; see `training.Task`.

    Args:
        images: embeddings [N, E] of normals to learn from.
        stop: [V, E] of held-out normals.
        normal_texts, texts: [S, E] of sentences about good parts, [T, E] about defects; the latter bridged, if wanted.
        anomalies, stop_anomalies: [M, E] of pictures of anomalies, possibly none.
        extras: see `CmdaExtras`.
        seed: of weights, batches and shares.
        device: where the classifier is trained; all embeddings are moved there.
        identity: what a checkpoint must agree in.
    """

    def __init__(
        self,
        images: Tensor,
        stop: Tensor,
        normal_texts: Tensor,
        texts: Tensor,
        anomalies: Tensor,
        stop_anomalies: Tensor,
        *,
        extras: CmdaExtras | None = None,
        seed: int = 0,
        device: torch.device = CPU,
        identity: dict[str, Any] | None = None,
    ) -> None:
        extras = extras or CmdaExtras()
        self._images, self._texts, self._normal_texts, self._anomalies, stop, stop_anomalies = (
            each.to(device) for each in (images, texts, normal_texts, anomalies, stop, stop_anomalies)
        )
        self._extras, self._seed, self._device = extras, seed, device
        self.module = Classifier(images.shape[1], extras.hidden, seed).to(device)
        self._optimizer = torch.optim.Adam(self.module.parameters(), lr=extras.learning_rate)
        self.optimizers = [self._optimizer]
        self.identity = {"method": METHOD, "seed": seed, **dataclasses.asdict(extras), **(identity or {})}
        self.identity["share"] = list(extras.share)
        made = self._made(stop, generator(seed, -2))
        self._held = (stop, torch.cat([made, stop_anomalies]))

    def step(self, number: int) -> dict[str, float]:
        """One step of Adam on normals, mixtures and anomalies."""
        drawn = generator(self._seed, number)
        normals = self._images[batch_of(len(self._images), self._extras.batch, self._seed, number)]
        sentences = torch.randint(len(self._normal_texts), (len(normals),), generator=drawn)
        mixtures = mixed(self._normal_texts[sentences], normals)
        bad = self._made(normals, drawn)
        if len(self._anomalies):
            bad = torch.cat([bad, self._anomalies[batch_of(len(self._anomalies), len(bad), self._seed + 1, number)]])
        loss = balanced_loss(self.module(torch.cat([normals, mixtures])), self.module(bad))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {"loss": float(loss.detach())}

    def _made(self, images: Tensor, drawn: torch.Generator) -> Tensor:
        low, high = self._extras.share
        share = (low + (high - low) * torch.rand(len(images), generator=drawn)).to(self._device)
        return interpolated(
            images, self._texts[torch.randint(len(self._texts), (len(images),), generator=drawn)], share
        )

    def validate(self) -> float:
        """The same loss over held-out normals and anomalies made of them."""
        good, bad = self._held
        return float(balanced_loss(self.module(good), self.module(bad)))


def balanced_loss(good: Tensor, bad: Tensor) -> Tensor:
    """Binary cross entropy, normals and anomalies with half of the weight each.

    Args:
        good: log odds [N] of normals.
        bad: log odds [M] of anomalies.
    """
    return 0.5 * F.softplus(good).mean() + 0.5 * F.softplus(-bad).mean()


def cmda_modules(tower: VisionTower, hidden: int, preprocessing: Preprocessing) -> Modules:
    """Trunk and head with their ports."""
    return Modules(
        CmdaTrunk(tower),
        CmdaHead(),
        method=METHOD,
        preprocessing=preprocessing,
        features=(Port("embedding", "float32", ("B", tower.embed_dim)),),
        knowledge=(
            KnowledgePort("classifier.hidden", "float32", (hidden, tower.embed_dim)),
            KnowledgePort("classifier.bias", "float32", (1, hidden)),
            KnowledgePort("classifier.last", "float32", (1, hidden)),
            KnowledgePort("classifier.last_bias", "float32", (1,)),
        ),
        outputs=(Port("score", "float32", ("B",)),),
    )


def learn(
    normal: Sequence[Path],
    options: VisionLanguageOptions,
    anomalous: Samples = (),
    *,
    extras: CmdaExtras | None = None,
    device: str = "auto",
    checkpoint: Path | None = None,
) -> Learned:
    """A CMDA detector from photographs of good parts, sentences, and pictures of anomalies if there are some.

    Args:
        normal: photographs of good parts.
        options: see `VisionLanguageOptions`; `model`, `weights`, `class_name`, `domain`, `prompts`, `preprocessing`,
            `false_alarm_rate`, `product` and `seed` count.
        anomalous: pictures of anomalies, real or generated; masks are not used, as the method has no map.
        extras: see `CmdaExtras`.
        device: where pictures are embedded and the classifier is trained, see `edgead.server_side.devices`.
        checkpoint: where the training is kept between interruptions.

    Raises:
        InputError: fewer than 2 normals, prompts of one state only, or no such device.
        ImageError: a file is no picture.
        PromptError: a class name or a file that makes no prompts.
        BackboneError: unknown model or weights.
    """
    extras = extras or CmdaExtras()
    there = torch_device(device)
    model, tower, preprocessing = open_tower(options)
    prompts = prompts_for(options, winclip)
    modules = cmda_modules(tower, extras.hidden, preprocessing)
    data = load_data(
        normal,
        TrainedOptions(preprocessing=preprocessing, held_out=extras.held_out, seed=options.seed),
        anomalous,
    )

    def embedded(frames: NDArray[np.uint8]) -> Tensor:
        parts = [np.zeros((0, tower.embed_dim), np.float32)]
        with placed(modules.trunk, there):
            for at in range(0, len(frames), _BATCH_EMBEDDED):
                parts.append(modules.embed_prepared(frames[at : at + _BATCH_EMBEDDED])["embedding"])
        return torch.from_numpy(np.concatenate(parts))

    images = embedded(data.train)
    normal_texts, texts = (torch.from_numpy(encode_texts(model, prompts.texts(s))) for s in ("normal", "anomalous"))
    task = CmdaTask(
        images,
        embedded(data.stop),
        normal_texts,
        bridged(texts, normal_texts, images) if extras.bridge else texts,
        embedded(data.anomalies.frames),
        embedded(data.stop_anomalies.frames),
        extras=extras,
        seed=options.seed,
        device=there,
        identity={"data": data.digest, "model": model.weights_sha256, "texts": len(texts)},
    )
    schedule = Schedule(extras.steps, validate_every=max(1, extras.steps // 30), patience=extras.patience)
    history = train(task, schedule, label="CMDA", checkpoint=checkpoint)
    return finished(
        modules,
        options,
        task.module.to(CPU).arrays(),
        paper=PAPER,
        normal=normal,
        held_out=data.calibration,
        by_hand=EVEN_ODDS,
        **text_facts(model, prompts),
        anomalies_from_sentences={"share": list(extras.share), "bridged": extras.bridge},
        training=history.facts(),
        data=data.facts(),
    )


__all__: Sequence[str] = (
    "METHOD",
    "PAPER",
    "Classifier",
    "CmdaExtras",
    "CmdaHead",
    "CmdaTask",
    "CmdaTrunk",
    "balanced_loss",
    "bridged",
    "cmda_modules",
    "interpolated",
    "learn",
    "log_odds",
    "mixed",
    "mixture_weights",
)
