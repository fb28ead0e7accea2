"""ReContrast as a trunk and a head (Guo et al., "ReContrast: Domain-Specific Anomaly Detection via Contrastive
Reconstruction", NeurIPS 2023, arXiv 2306.02602).

A frozen encoder and one that is trained give two views of a frame. One bottleneck and decoder, shared by both, rebuild
across: the frozen encoder's maps from the trained one's and the other way round, so that the encoder learns the
product and cannot collapse. With the cosine distance of a cell between an encoder's map f_E and the decoder's f_D,

    M(h, w) = 1 - f_E(h, w) . f_D(h, w) / (|f_E(h, w)| |f_D(h, w)|)

the loss compares whole maps, each flattened to one vector per frame, with a stop-gradient on f_E:

    L = sum over maps of  1 - F(sg(f_E)) . F(f_D) / (|F(f_E)| |F(f_D)|)

and mines hard cells: of f_D, those with M below mean(M) + alpha std(M) get no gradient either. alpha rises from -3 to
1 over the first tenth of the steps. The anomaly map is the sum of all M, upsampled and smoothed; the image's score is
its maximum, as in the authors' evaluation (on some data they take the mean of the highest pixels instead).

Both encoders and the decoder are in the trunk. The weight of every map in the sum is knowledge, as are the thresholds.

Ours:
- The embedded backbone's blocks up to stride 8 stay frozen and are shared by both encoders; the trained one begins
  behind them. Other backbones are trained whole, as in the paper. Their normalisation layers keep their statistics.
- The decoder is small: a few hundred photographs train it on a processor in minutes.
- Anomalies, which KKA (Chen et al. 2025, arXiv 2502.14880) gives to a detector as whole images, are used by cell:
  inside a mask M is pushed up to a margin, a tenth of the mean of max(0, margin - M); cells well outside are rebuilt
  like those of normal frames; the seam between is left out. Of an image without a mask only the farthest cell of each
  map is pushed: the score is made of such cells, and nobody knows of any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors.masked_cells import NORMAL, UNKNOWN, cell_labels
from edgead.server_side.detectors.memory_bank import receptive_sigma, smoothing_matrix
from edgead.server_side.detectors.recontrast_losses import MARGIN, alpha_at, cell_distance, global_cosine, push
from edgead.server_side.detectors.recontrast_network import Maps, ReContrastNetwork
from edgead.server_side.detectors.trained import Anomalies, Samples, TrainedOptions, load_data
from edgead.server_side.detectors.training import Schedule, batch_of, generator, train
from edgead.server_side.devices import CPU, computing_on, device_of, torch_device
from edgead.server_side.learned import Learned, Modules, finished

METHOD = "recontrast"
PAPER = "Guo et al., ReContrast: Domain-Specific Anomaly Detection via Contrastive Reconstruction, NeurIPS 2023"

STEPS = 200
BATCH = 8
"""Normals in a step, at most. The authors' 16 cost twice as much and found no more on magnetic tiles."""
LEARNING_RATE = 2e-3
"""At first; it falls to 0 along a cosine, as does the encoder's."""
PUSH = 0.1
"""Weight of the anomalies. On small painted parts and 40 steps, defects were found far worse with anomalies than
without at a weight of 1, and slightly worse at 0.1. After 100 steps at 0.1, better in one pair."""
ENCODER_RATE = 1 / 200
"""The encoder's learning rate as a share of the decoder's: 1e-5 and 2e-3 are the authors'."""
WEIGHT_DECAY = 1e-5
_ANOMALIES = 4
"""Pictures of anomalies in a step."""
_BATCH_EMBEDDED = 16


class ReContrastTrunk(nn.Module):
    """Frame -> cosine distances of every map of both encoders."""

    def __init__(self, network: ReContrastNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: per map distances float32 [B, 2, h, w], of the frozen encoder
        and of the trained one.
        """
        hidden = self.network.shared(image.permute(0, 3, 1, 2).float() * (1.0 / 255.0))
        frozen, trained = self.network.frozen(hidden), self.network.encoder(hidden)
        of_frozen, of_trained = self.network.decoder(trained), self.network.decoder(frozen)
        return tuple(
            torch.stack([cell_distance(a, b), cell_distance(c, d)], 1)
            for a, b, c, d in zip(frozen, of_frozen, trained, of_trained, strict=True)
        )


class ReContrastHead(nn.Module):
    """Distances and their weights -> image score and anomaly map.

    Args:
        grids: rows and columns of each map.
        size: height and width of the engine's frame, in pixels.
        sigma: standard deviation in pixels of the map's Gaussian blur.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], size: tuple[int, int], sigma: float = 4.0) -> None:
        super().__init__()
        self.maps = len(grids)
        for place, (rows, columns) in enumerate(grids):
            self.register_buffer(f"up_rows_{place}", torch.from_numpy(smoothing_matrix(rows, size[0], sigma)))
            across = torch.from_numpy(smoothing_matrix(columns, size[1], sigma))
            self.register_buffer(f"up_columns_{place}", across.T.contiguous())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Args: inputs: distances float32 [B, 2, h, w] of each map, and last their weights float32 [maps, 2].

        Returns: score float32 [B], anomaly_map float32 [B, H, W].
        """
        *distances, weights = inputs
        found: list[Tensor] = []
        for place, each in enumerate(distances):
            rows, columns = getattr(self, f"up_rows_{place}"), getattr(self, f"up_columns_{place}")
            found.append(rows @ (each * weights[place].reshape(1, 2, 1, 1)).sum(1) @ columns)
        anomaly_map = torch.stack(found).sum(0)
        return anomaly_map.amax((1, 2)), anomaly_map


class Prepared:
    """Frames behind what is frozen, so that a step computes only what changes; 0.6 MB for a frame of 256 pixels.

    They are computed wherever the network is, and kept on the CPU.

    Args:
        network: the shared part and the frozen encoder are used.
        frames: uint8 [N, H, W, 3].

    Attributes:
        hidden: float32 [N, ...], what both encoders share.
        frozen: the frozen encoder's maps of all frames.
    """

    def __init__(self, network: ReContrastNetwork, frames: NDArray[np.uint8]) -> None:
        network.eval()
        hidden: Maps = []
        frozen: list[Maps] = []
        home = device_of(network)
        with torch.no_grad(), computing_on(home):
            # Of no frames one black one, for the shapes.
            some = frames if len(frames) else np.zeros((1, *frames.shape[1:]), np.uint8)
            for at in range(0, len(some), _BATCH_EMBEDDED):
                part = torch.from_numpy(np.ascontiguousarray(some[at : at + _BATCH_EMBEDDED]))
                shared = network.shared(part.to(home).permute(0, 3, 1, 2).float() * (1.0 / 255.0))
                hidden.append(shared.cpu())
                frozen.append([each.cpu() for each in network.frozen(shared)])
        self.hidden = torch.cat(hidden)[: len(frames)]
        self.frozen = [torch.cat(maps)[: len(frames)] for maps in zip(*frozen, strict=True)]

    def __len__(self) -> int:
        return len(self.hidden)

    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each map."""
        return [(each.shape[2], each.shape[3]) for each in self.frozen]

    def some(self, places: Tensor) -> tuple[Tensor, Maps]:
        """`hidden` and `frozen` of frames by index."""
        return self.hidden[places], [each[places] for each in self.frozen]


class ReContrastTask:
    """Trains encoder and decoder; see `training.Task`.

    Args:
        network: to train.
        normals: frames uint8 [N, H, W, 3] to learn from.
        anomalies: to learn from, possibly none.
        stop: held-out normals.
        stop_anomalies: held-out anomalies, possibly none.
        steps: of the whole training, for the mining.
        batch: normals in a step, at most `BATCH`.
        learning_rate: of the decoder.
        margin: see `push`.
        seed: of the batches.
        device: where it is trained; the network is moved there.
        identity: what a checkpoint must agree in.
    """

    def __init__(
        self,
        network: ReContrastNetwork,
        normals: NDArray[np.uint8],
        anomalies: Anomalies,
        stop: NDArray[np.uint8],
        stop_anomalies: Anomalies,
        *,
        steps: int = STEPS,
        batch: int = BATCH,
        learning_rate: float = LEARNING_RATE,
        margin: float = MARGIN,
        seed: int = 0,
        device: torch.device = CPU,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.module, self._device = network.to(device), device
        self._normals, self._stop = Prepared(network, normals), Prepared(network, stop)
        self._anomalies = _Labelled(network, anomalies)
        self._stop_anomalies = _Labelled(network, stop_anomalies)
        self._steps, self._seed, self._margin = steps, seed, margin
        self._rates = (learning_rate, learning_rate * ENCODER_RATE)
        self._batch = min(batch, BATCH, len(normals))
        self.optimizers = [
            torch.optim.AdamW(network.decoder.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY),
            torch.optim.AdamW(network.encoder.parameters(), lr=learning_rate * ENCODER_RATE, weight_decay=WEIGHT_DECAY),
        ]
        self.identity = {
            "method": METHOD,
            "seed": seed,
            "steps": steps,
            "batch": batch,
            "learning_rate": learning_rate,
            "margin": margin,
            **(identity or {}),
        }

    def step(self, number: int) -> dict[str, float]:
        """One step of AdamW on a batch of normals and some anomalies."""
        share = 0.5 * (1.0 + math.cos(math.pi * number / self._steps))
        for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        places = batch_of(len(self._normals), self._batch, self._seed, number)
        hidden, frozen = self._normals.some(places)
        chosen = torch.zeros(0, dtype=torch.int64)
        if len(self._anomalies):
            drawn = generator(self._seed, number)
            chosen = torch.randint(len(self._anomalies), (_ANOMALIES,), generator=drawn)
            more, maps = self._anomalies.prepared.some(chosen)
            hidden = torch.cat([hidden, more])
            frozen = [torch.cat([a, b]) for a, b in zip(frozen, maps, strict=True)]
        losses = self._losses(hidden, frozen, self._anomalies, chosen, alpha_at(number, self._steps))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def validate(self) -> float:
        """The same losses over what is held out, without mining."""
        total = 0.0
        for part in _parts(len(self._stop)):
            losses = self._losses(*self._stop.some(part), self._stop_anomalies, part[:0], None)
            total += float(losses["distance"]) * len(part) / len(self._stop)
        held = self._stop_anomalies
        for part in _parts(len(held)):
            losses = self._losses(*held.prepared.some(part), held, part, None)
            total += float(losses["anomalies"]) * len(part) / len(held)
        return total

    def _losses(
        self, hidden: Tensor, frozen: Maps, anomalies: _Labelled, chosen: Tensor, alpha: float | None
    ) -> dict[str, Tensor]:
        """Losses of a batch whose last `len(chosen)` frames are anomalies."""
        encoded, decoded = self.module.pairs(hidden.to(self._device), [each.to(self._device) for each in frozen])
        labels = [each[chosen].to(self._device) for each in anomalies.labels]
        normals = len(hidden) - len(chosen)
        all_of = functools.partial(torch.ones, dtype=torch.bool, device=self._device)
        counted = [torch.cat([all_of(normals, *each.shape[1:]), each == NORMAL]) for each in labels]
        # A picture without a normal cell says nothing of what is normal.
        told = torch.cat([all_of(normals), (labels[-1] != UNKNOWN).flatten(1).any(1)])
        half = len(frozen)
        views = (slice(None, half), slice(half, None))
        distance = [
            global_cosine(
                [each[told] for each in encoded[view]],
                [each[told] for each in decoded[view]],
                alpha=alpha,
                counted=[each[told] for each in counted] if len(chosen) else None,
            )
            for view in views
            if told.any()
        ]
        losses = {"distance": torch.stack(distance).sum() / 2 if distance else decoded[0].new_zeros(())}
        if len(chosen):
            known = anomalies.known[chosen].to(self._device)
            pushed = [
                push([e[normals:] for e in encoded[v]], [d[normals:] for d in decoded[v]], labels, known, self._margin)
                for v in views
            ]
            losses["anomalies"] = PUSH * torch.stack(pushed).sum() / 2
        return losses


def _parts(count: int) -> list[Tensor]:
    """Indices of `count` frames in batches."""
    return [torch.arange(at, min(at + _BATCH_EMBEDDED, count)) for at in range(0, count, _BATCH_EMBEDDED)]


class _Labelled:
    """Anomalies behind what is frozen, with the labels of their cells, per map int8 [M, h, w]."""

    def __init__(self, network: ReContrastNetwork, anomalies: Anomalies) -> None:
        self.prepared = Prepared(network, anomalies.frames)
        self.labels = [cell_labels(anomalies, grid) for grid in self.prepared.grids()]
        self.known = torch.from_numpy(anomalies.known)

    def __len__(self) -> int:
        return len(self.prepared)


def recontrast_modules(network: ReContrastNetwork, preprocessing: Preprocessing, sigma: float | None = None) -> Modules:
    """Trunk and head with their ports; `sigma` of the map's blur in pixels, by the frame's size if None."""
    size = (preprocessing.height, preprocessing.width)
    trunk = ReContrastTrunk(network).eval()
    with torch.inference_mode():
        shapes = [tuple(each.shape) for each in trunk(torch.zeros(1, *size, 3, dtype=torch.uint8))]
    grids = [(shape[2], shape[3]) for shape in shapes]
    names = [f"distances_{place}" for place in range(len(grids))]
    return Modules(
        trunk,
        ReContrastHead(grids, size, receptive_sigma(min(size)) if sigma is None else sigma),
        method=METHOD,
        preprocessing=preprocessing,
        features=tuple(Port(name, "float32", ("B", 2, *grid)) for name, grid in zip(names, grids, strict=True)),
        knowledge=(KnowledgePort("map.weights", "float32", (len(grids), 2)),),
        outputs=(Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", *size))),
    )


def learn(
    normal: Sequence[Path],
    options: TrainedOptions,
    anomalous: Samples = (),
    *,
    margin: float = MARGIN,
    checkpoint: Path | None = None,
) -> Learned:
    """A ReContrast detector from photographs of good parts and, if there are some, of anomalies.

    Args:
        normal: photographs of good parts.
        options: see `TrainedOptions`; of `batch` at most `BATCH` are used, `learning_rate` is the decoder's.
        anomalous: pictures of anomalies, real or generated, with their masks where there are some; see the module.
        margin: cosine distance that cells of anomalies are pushed to.
        checkpoint: where the training is kept between interruptions.

    Raises:
        InputError: fewer than 2 normals, or no such device.
        ImageError: a file is no picture.
        BackboneError: an unknown backbone.
    """
    device = torch_device(options.device)
    backbone = load_backbone(options.backbone, weights=options.backbone_weights, layers=options.layers).eval()
    data = load_data(normal, options, anomalous)
    steps = options.steps or STEPS
    network = ReContrastNetwork(backbone, seed=options.seed)
    task = ReContrastTask(
        network,
        data.train,
        data.anomalies,
        data.stop,
        data.stop_anomalies,
        steps=steps,
        batch=options.batch,
        learning_rate=options.learning_rate or LEARNING_RATE,
        margin=margin,
        seed=options.seed,
        device=device,
        identity={"backbone": options.backbone, "data": data.digest},
    )
    schedule = Schedule(steps, validate_every=max(1, steps // 15), patience=options.patience)
    history = train(task, schedule, label="ReContrast", checkpoint=checkpoint)
    modules = recontrast_modules(network.requires_grad_(False).eval().to(CPU), options.preprocessing)
    arrays = {"map.weights": np.ones((len(network.strides), 2), np.float32)}
    # A threshold for want of photographs: twice the highest score of the frames that stopped the training.
    pack = modules.pack(options.product, arrays)
    seen = max(float(modules.outputs(modules.embed_prepared(each[None]), pack)["score"][0]) for each in data.stop[:16])
    return finished(
        modules,
        options,
        arrays,
        paper=PAPER,
        normal=normal,
        held_out=data.calibration,
        by_hand=2.0 * seen,
        backbone=options.backbone,
        margin=margin,
        parameters=sum(each.numel() for each in network.parameters()),
        training=history.facts(),
        data=data.facts(),
    )


__all__: Sequence[str] = (
    "METHOD",
    "PAPER",
    "Prepared",
    "ReContrastHead",
    "ReContrastNetwork",
    "ReContrastTask",
    "ReContrastTrunk",
    "learn",
    "recontrast_modules",
)
