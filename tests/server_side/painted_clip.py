"""A tiny CLIP that has learned what painted carpets look like: minutes on two cores, no downloaded weights.

Model: open_clip's own `CLIP` (a vision transformer and a text transformer, sizes in `CONFIG`).

Pictures: the painter's woven fabric, called a carpet, good or with one of four defects (`KINDS`).

Captions: sentences about a good carpet, a damaged one, or one with a named defect, in the manner of the prompt
ensembles of zero-shot detection (`caption`). A caption fits a picture if it claims nothing wrong about it: 'a damaged
carpet' fits every defect.

Recipe, in order:

1. The text tower alone learns, by the loss of 3, to tell captions apart: the other side is one learnable anchor for
   each state of a carpet. It takes seconds, and saves the image tower from waiting for it.
2. Both towers, and one linear projection for each of `LAYERS`, learn together. Besides whole pictures (class token)
   three more things are held against the captions: windows of 2 x 2 or of 3 x 3 patches, as WinCLIP looks at them;
   single patches of `LAYERS` through their projections, as APRIL-GAN's; and the last layer's values, which ALFA's
   aligner reads. What a window or a patch shows is known from the painter's mask; a projected patch also counts as a
   defect's if only one of its eight neighbours shows it, since a real tower's patches know their surroundings too, and
   suppression has to reach as far as the maps of detectors smear.
3. The loss is the pairwise sigmoid loss of SigLIP (https://arxiv.org/abs/2303.15343), fitting and unfitting pairs
   weighted alike, plus a ranking term: a picture of a hole is farther from 'carpet with a thread' (two wrong claims: a
   thread that is not there, a hole left out) than from 'flawless carpet' (one).

Everything is decided by the seed. `painted_clip` keeps the result in a folder named after a digest of this file and of
the libraries' versions.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save
from torch import Tensor, nn

from edgead.runtime.files import write_file
from edgead.server_side.detectors.projections import Projections, write_projections
from edgead.server_side.painting import paint_defect, paint_part
from edgead.server_side.vision_language import load_model

KINDS = ("thread", "hole", "scratch", "stain")
"""Defects, by the painter's names."""
GOOD, DAMAGED, UNKNOWN = 0, -1, -2
"""States of a picture, window, patch or caption beside 1 + the place of its kind: good, any defect, hard to say."""
SIDE, PATCH = 96, 12
GRID = SIDE // PATCH
LAYERS = (2, 3, 4)
"""Layers that have projections, counted from 1."""
CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIDE, "patch_size": PATCH, "width": 96, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own, which open_clip takes where a config names none."""
SEEN, UNSEEN = 0.05, 0.004
"""Share of a patch under the mask from which the defect shows in it, and up to which it does not."""


@dataclass(frozen=True)
class Recipe:
    """How it is trained.

    Attributes:
        seed: decides pictures, captions, weights and order.
        bases: painted carpets; each is shown good and with every kind of defect.
        text_steps, steps: of the text tower alone, and of all.
        pictures, captions: per step.
        rate: of AdamW, after warming up; it falls to 0 by a cosine.
        margin: by which the wronger caption is to be farther, in logits.
    """

    seed: int = 0
    bases: int = 500
    text_steps: int = 150
    steps: int = 800
    pictures: int = 32
    captions: int = 64
    rate: float = 3e-3
    margin: float = 3.0


@dataclass(frozen=True)
class PaintedClip:
    """Where the trained model is.

    Attributes:
        config: open_clip JSON config: `load_model(str(config), checkpoint)`.
        checkpoint: the state dict.
        projections: of `LAYERS`, for APRIL-GAN and the normality detector.
        seconds: what training took.
    """

    config: Path
    checkpoint: Path
    projections: Path
    seconds: float


# --- captions -----------------------------------------------------------------------------------------------

_NAMES = ("carpet", "carpet", "carpet", "carpet", "fabric", "textile", "object", "part", "surface", "product")
_GOOD = (
    *("{}", "flawless {}", "perfect {}", "unblemished {}", "{} without flaw", "{} without defect"),
    *("{} without damage", "normal {}", "intact {}", "clean {}", "undamaged {}", "good {}", "{} with no defects"),
    *("{} with no visible defects", "{} with a uniform surface", "{} in good condition", "{} without anomalies"),
    *("whole {}", "smooth {}", "{} with a regular pattern", "{} of even colour", "{} without a {kind}"),
)
_DAMAGED = (
    *("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage", "defective {}", "abnormal {}"),
    *("imperfect {}", "faulty {}", "flawed {}", "blemished {}", "anomalous {}", "{} with a defect"),
    *("{} with visible defects", "{} with an anomaly", "{} with an irregular surface", "damaged {} with a flaw"),
)
_NAMED = (
    *("{} with {kind}", "{} with a {kind}", "{kind} on the {}", "{kind} on a {}", "{} with visible {kind}"),
    *("{} showing {kind}", "{} affected by {kind}", "{} with {kind} on its surface", "{} that has {kind}"),
    *("{kind} on {} surface", "{} with a trace of {kind}", "{kind} defect on {}", "{kind} in the {}", "{kind}"),
    *("damaged {} with a {kind}", "a {kind} on a {}", "{} with a {kind} on it"),
)
_WORDS = {
    "thread": ("thread", "thread", "threads", "loose thread", "stray thread", "loose fibre", "thread end"),
    "hole": ("hole", "hole", "holes", "torn hole", "missing piece", "puncture"),
    "scratch": ("scratch", "scratch", "scratches", "thin scratch", "scratch mark", "scrape"),
    "stain": ("stain", "stain", "stains", "liquid stain", "discoloration", "dirt"),
}
_BEFORE = (
    *("", "", "a photo of a ", "a photo of the ", "a cropped photo of the ", "a close-up photo of a "),
    *("a bright photo of a ", "a dark photo of the ", "a blurry photo of a ", "a jpeg corrupted photo of the "),
    *("a low resolution photo of the ", "a bad photo of a ", "a good photo of the ", "a photo of my "),
    *("a photo of a small ", "a photo of the large ", "a photo of one ", "a photo of a cool "),
    *("a black and white photo of a ", "there is a ", "this is the ", "this is one ", "an image of a "),
    *("an industrial image of a ", "a textural image of a "),
)
_AFTER = ("", "", ".", ".", " for visual inspection.", " for anomaly detection.", " in the scene.")


def caption(rng: np.random.Generator) -> tuple[str, int]:
    """A sentence, and the state that it claims."""

    def one(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    kind = one(KINDS)
    share = rng.random()
    state, forms = (
        (GOOD, _GOOD) if share < 0.3 else (DAMAGED, _DAMAGED) if share < 0.5 else (1 + KINDS.index(kind), _NAMED)
    )
    before = one(_BEFORE)
    if state in (GOOD, DAMAGED) and rng.random() < 0.1:
        before = "a normal image of a " if state == GOOD else "an abnormal image of a "
    body = one(forms).replace("{kind}", one(_WORDS[kind])).replace("{}", one(_NAMES))
    return before + body + one(_AFTER), state


# --- pictures -----------------------------------------------------------------------------------------------


class Pictures(NamedTuple):
    """uint8 [N, S, S, 3]; bool [N, S, S]; [N] of 'good' or the defect."""

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    kinds: NDArray[np.str_]


def paint(bases: int, seed: int, kinds: Sequence[str] = KINDS) -> Pictures:
    """Painted carpets, each good and then with each kind of defect: the kinds are compared on the same parts."""
    rng = np.random.default_rng([seed, bases])
    images, masks, shown = [], [], []
    for _ in range(bases):
        part = paint_part("fabric", rng=rng, size=SIDE)
        images.append(part.image)
        masks.append(np.zeros((SIDE, SIDE), np.bool_))
        shown.append("good")
        for kind in kinds:
            size, contrast = float(rng.uniform(0.45, 0.75)), float(rng.uniform(0.9, 1.0))
            image, mask = paint_defect(part.image, kind, size=size, contrast=contrast, rng=rng, within=part.surface)
            images.append(image)
            masks.append(mask > 0)
            shown.append(kind)
    return Pictures(np.stack(images), np.stack(masks), np.array(shown))


# --- training -----------------------------------------------------------------------------------------------


class Training:
    """One run. Modules and everything that was drawn depend on the recipe alone."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> None:
        self.recipe, self.say = recipe, say
        torch.manual_seed(recipe.seed)
        self.rng = np.random.default_rng([recipe.seed, 1])
        self.model: Any = open_clip.CLIP(CONFIG["embed_dim"], dict(CONFIG["vision_cfg"]), dict(CONFIG["text_cfg"]))
        self.tokenizer = SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
        self.projections = Projections(LAYERS, [CONFIG["vision_cfg"]["width"]] * len(LAYERS), CONFIG["embed_dim"])
        self.bias = nn.Parameter(torch.tensor(-5.0))
        with torch.no_grad():
            self.model.token_embedding.weight.normal_(0.0, 0.25)
            self.model.logit_scale.fill_(math.log(20.0))
        pictures = paint(recipe.bases, recipe.seed + 1)
        self.images = torch.from_numpy(pictures.images)
        covered = pictures.masks.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4))
        self.covered = torch.from_numpy(covered.astype(np.float32)).flatten(1)
        self.states = torch.tensor([("good", *KINDS).index(kind) for kind in pictures.kinds])

    def run(self) -> None:
        """Train to the end."""
        self._learn_text()
        # Words have their meaning by now; a step over 49,408 of them would cost as much as a layer.
        self.model.token_embedding.requires_grad_(False)
        recipe = self.recipe
        towers = [p for part in (self.model, self.projections) for p in part.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in towers if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in towers if p.ndim < 2] + [self.bias], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
        order: list[int] = []
        for step in range(recipe.steps):
            rate = recipe.rate * min(1.0, (step + 1) / 30) * (0.51 + 0.49 * math.cos(math.pi * step / recipe.steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            if len(order) < recipe.pictures:
                order = [int(place) for place in self.rng.permutation(len(self.images))]
            picks, order = order[: recipe.pictures], order[recipe.pictures :]
            losses = self._losses(torch.tensor(picks), 2 + step % 2)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(towers, 1.0)
            optimizer.step()
            if step % 50 == 0:
                self.say(f"step {step}: " + ", ".join(f"{float(loss.detach()):.2f}" for loss in losses))
        self.model.eval().requires_grad_(False)
        self.projections.eval().requires_grad_(False)

    def _learn_text(self) -> None:
        anchors = nn.Parameter(torch.randn(1 + len(KINDS), CONFIG["embed_dim"]))
        states = torch.arange(1 + len(KINDS))
        text = [p for name, p in self.model.named_parameters() if not name.startswith("visual.")]
        optimizer = torch.optim.AdamW([*text, anchors, self.bias], lr=2e-3, weight_decay=0.0)
        for step in range(self.recipe.text_steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 20)
            loss = self._loss(F.normalize(anchors, dim=-1), states, *self._captions(2 * self.recipe.captions))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 50 == 0:
                self.say(f"text {step}: {float(loss.detach()):.2f}")

    def _captions(self, count: int) -> tuple[Tensor, Tensor]:
        """Embeddings [T, E] at length 1 and the states that they claim [T]."""
        drawn = [caption(self.rng) for _ in range(count)]
        tokens = self.tokenizer([text for text, _ in drawn])
        return F.normalize(self.model.encode_text(tokens), dim=-1), torch.tensor([state for _, state in drawn])

    def _losses(self, picks: Tensor, scale: int) -> list[Tensor]:
        """Of whole pictures, of windows of `scale` patches, of single patches, of values."""
        text, claims = self._captions(self.recipe.captions)
        visual, states = self.model.visual, self.states[picks]
        covered = self.covered[picks]
        shown = _shown(covered, states)
        near = _shown(F.max_pool2d(covered.view(-1, 1, GRID, GRID), 3, 1, 1).flatten(1), states)
        start = visual._embeds(_varied(self.images[picks]))
        tokens = [start]
        for block in visual.transformer.resblocks:
            tokens.append(block(tokens[-1]))
        # Every patch at a defect, and some of the others.
        chosen = (near > 0) | ((near == GOOD) & (torch.rand(near.shape) < 0.25))
        patches = [tokens[layer][:, 1:][chosen] for layer in LAYERS]
        places = self._window_places(shown, scale)
        windowed = start[:, 1:].gather(1, places[..., None].expand(-1, -1, start.shape[-1]))
        windows = visual.transformer(torch.cat([start[:, :1], windowed], dim=1))[:, 0]
        return [
            self._loss(self._joint(tokens[-1][:, 0]), states, text, claims),
            self._loss(
                self._joint(windows), _shown(covered.gather(1, places).amax(1, True), states)[:, 0], text, claims
            ),
            torch.stack([self._loss(patch, near[chosen], text, claims) for patch in self.projections(patches)]).mean(),
            0.5 * self._loss(self._joint(self._values(tokens[-2][:, 1:][chosen])), shown[chosen], text, claims),
        ]

    def _joint(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.model.visual.ln_post(tokens) @ self.model.visual.proj, dim=-1)

    def _values(self, tokens: Tensor) -> Tensor:
        block = self.model.visual.transformer.resblocks[-1]
        weight, bias = block.attn.in_proj_weight.chunk(3)[2], block.attn.in_proj_bias.chunk(3)[2]
        values: Tensor = block.attn.out_proj(F.linear(block.ln_1(tokens), weight, bias))
        return values

    def _window_places(self, shown: Tensor, scale: int) -> Tensor:
        """The patches [B, scale * scale] of one window for each picture; two of three touch the defect, if any."""
        corners = []
        for row in shown:
            top, left = (int(place) for place in self.rng.integers(0, GRID - scale + 1, 2))
            touched = torch.nonzero(row > 0).flatten().tolist()
            if touched and self.rng.random() < 0.67:
                y, x = divmod(touched[int(self.rng.integers(len(touched)))], GRID)
                top, left = (max(0, min(at - int(self.rng.integers(scale)), GRID - scale)) for at in (y, x))
            corners.append(top * GRID + left)
        inside = (torch.arange(scale)[:, None] * GRID + torch.arange(scale)).flatten()
        return torch.tensor(corners)[:, None] + inside

    def _loss(self, seen: Tensor, states: Tensor, text: Tensor, claims: Tensor) -> Tensor:
        """`seen` [N, E] with its states [N] against captions [T, E] with what they claim [T]."""
        defect = states[:, None] > 0
        fits = torch.where(claims == DAMAGED, defect, claims == states[:, None]).float()
        known = (states != UNKNOWN)[:, None].float()
        logits = self.model.logit_scale.exp() * seen @ text.T + self.bias
        each = F.binary_cross_entropy_with_logits(logits, fits, reduction="none")
        loss = _mean(each, fits * known) + _mean(each, (1.0 - fits) * known)
        good, named = (claims == GOOD).float(), (claims > 0) & (claims != states[:, None]) & defect
        if bool(good.any()):
            milder = (logits * good).sum(1, keepdim=True) / good.sum()
            loss = loss + 0.5 * _mean(F.softplus(logits - milder + self.recipe.margin), named.float())
        return loss


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1.0)


def _shown(covered: Tensor, states: Tensor) -> Tensor:
    """The states [B, P] of places that the masks cover by these shares [B, P], in pictures of states [B]."""
    return torch.where(covered >= SEEN, states[:, None], torch.where(covered <= UNSEEN, GOOD, UNKNOWN))


def normalised(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> the tower's input, float32 [B, 3, S, S]."""
    pixels = images.permute(0, 3, 1, 2).float() / 255.0
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _varied(images: Tensor) -> Tensor:
    pixels = normalised(images)
    count = len(pixels)
    return pixels * torch.empty(count, 1, 1, 1).uniform_(0.9, 1.1) + torch.empty(count, 3, 1, 1).uniform_(-0.1, 0.1)


# --- keeping it ---------------------------------------------------------------------------------------------


def digest(recipe: Recipe) -> str:
    """Of the recipe, this file and the libraries that decide the result."""
    versions = [sys.version, torch.__version__, open_clip.__version__, np.__version__]
    content = json.dumps([repr(recipe), Path(__file__).read_text(encoding="utf-8"), versions])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def painted_clip(
    folder: Path, recipe: Recipe | None = None, say: Callable[[str], None] = lambda line: None
) -> PaintedClip:
    """The trained model in `folder`, made there if it is not yet.

    Args:
        folder: where trained models are kept.
        recipe: see `Recipe`.
        say: is told how far the training has come.
    """
    recipe = recipe or Recipe()
    home = folder / f"painted-clip-{digest(recipe)}"
    done = home / "done.json"
    try:
        seconds = float(json.loads(done.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError):
        seconds = _train(home, recipe, say)
        write_file(done, json.dumps({"seconds": round(seconds, 1)}).encode())
    return PaintedClip(home / "painted.json", home / "painted.safetensors", home / "projections.safetensors", seconds)


def _train(home: Path, recipe: Recipe, say: Callable[[str], None]) -> float:
    """Returns: seconds."""
    start = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    try:
        with torch.random.fork_rng(devices=[]):
            training = Training(recipe, say)
            training.run()
    finally:
        torch.set_num_threads(threads)
    state = {name: tensor.detach().contiguous() for name, tensor in training.model.state_dict().items()}
    home.mkdir(parents=True, exist_ok=True)
    write_file(home / "painted.json", json.dumps(CONFIG, indent=1).encode())
    write_file(home / "painted.safetensors", save(state))
    model = load_model(str(home / "painted.json"), home / "painted.safetensors")
    write_projections(
        home / "projections.safetensors",
        training.projections,
        model=model.name,
        weights=model.weights_sha256,
        record={"trained": "with the towers", "seed": recipe.seed},
    )
    return time.monotonic() - start
