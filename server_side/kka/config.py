"""The configuration of a run: one TOML file, every field checked, nothing unknown let through."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tomllib
from msgspec import Meta, Struct

from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.spec import Name, canonical_json

CONFIG_BYTES = 256 * 1024
"""Largest configuration that is read."""

Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]

PROMPT = (
    "A photograph of a normal {class_name}: {caption}\n"
    "Describe one defect that such a part may have, in one short sentence, as a person would see it on a photograph."
)
"""Asks for the caption of an anomaly; `{caption}` is that of a representative normal."""


class Describe(Struct, frozen=True, forbid_unknown_fields=True):
    """Captions of the normals.

    With `captions`, a file of lines `FILE<TAB>CAPTION`; with `captioner`, a local image-to-text model of transformers;
    else every normal is described by the class name.
    """

    captions: str = ""
    captioner: str = ""
    template: str = "a photograph of a flawless {class_name}"


class Representatives(Struct, frozen=True, forbid_unknown_fields=True):
    """Clusters of normals, one representative for each."""

    clusters: Positive = 8
    shrinkage: Share = 0.1
    """Share of the pooled variance that each cluster's covariance is mixed with, so that a small cluster has one."""


class Imagine(Struct, frozen=True, forbid_unknown_fields=True):
    """Who writes the captions of anomalies."""

    author: Literal["local", "endpoint", "grammar"] = "grammar"
    """`local`: a causal model of transformers, which preferences tune; `endpoint`: an OpenAI-compatible address, for
    the first round; `grammar`: at random from the painter's grammar, without any model."""
    model: str = ""
    """Folder of the local model (or a hub name, which then has to be there), or the endpoint's model name."""
    url: str = ""
    key_env: str = ""
    """Environment variable with the endpoint's key."""
    prompt: Annotated[str, Meta(max_length=4000)] = PROMPT
    temperature: Annotated[float, Meta(ge=0.0, le=5.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] = 64
    batch: Positive = 16
    attempts: Positive = 3
    """How often an unusable answer is asked for anew, with another seed, before it is recorded as refused."""


class Paint(Struct, frozen=True, forbid_unknown_fields=True):
    """Who paints them."""

    painter: Literal["procedural", "text-to-image", "inpainting"] = "procedural"
    model: str = ""
    """Folder of a diffusers pipeline (or a hub name, which then has to be there)."""
    prompt: str = "{caption}"
    negative_prompt: str = ""
    steps: Positive = 30
    guidance: NotNegative = 7.5
    strength: Share = 1.0
    size: Annotated[int, Meta(ge=32, le=4096)] = 512
    """Side of what a pipeline paints, in pixels; the procedural painter keeps the photograph's."""
    images: Positive = 1
    """Images of each caption."""
    within: Literal["part", "frame"] = "part"
    """Where on a photograph defects may be. `part`: on the part that `edgead.server_side.part_finder` finds there, and
    places of a caption are places on it; `frame`: anywhere, also on the background."""


class Judge(Struct, frozen=True, forbid_unknown_fields=True):
    """The confusion evaluator (Deep SAD) and where it divides."""

    hard_quantile: Share = 1.0
    """An anomaly is hard if it is nearer to the centre than this quantile of the held-out normals: 1 means "than some
    normal", the paper's words; less is robust against a single odd normal."""
    visible_floor: Annotated[float, Meta(ge=0.0, le=255.0)] = 4.0
    """Mean change of colour inside the mask below which a painted defect counts as invisible: it is neither hard nor
    easy. Ours: without a floor, preference training learns to paint nothing."""
    eta: Annotated[float, Meta(gt=0.0)] = 1.0
    evaluator: Literal["each", "first"] = "each"
    """Whether each round trains an evaluator on the anomalies so far, as the paper does, or that of round 0 judges all,
    so that the shares of rounds are measured with one measure."""
    folds: Annotated[int, Meta(ge=1, le=10)] = 2
    """Parts of the photographs, each with all that is painted on it: judged by an evaluator that was trained on the
    others, up to a limit that its own normals set. Ours: an evaluator finds easy what it was trained on, and hard what
    is painted on a normal that it was trained on. 1 trains on all that it judges, as the paper does."""
    steps: Positive = 600
    batch: Positive = 32
    learning_rate: Annotated[float, Meta(gt=0.0)] = 1e-4
    held_out: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.2
    """With one fold: share of the normals that the evaluator does not train on and whose distances are the measure.
    With more, the normals of each fold are held out from its evaluator."""
    size: Annotated[int, Meta(ge=32, le=2048)] = 128


class Prefer(Struct, frozen=True, forbid_unknown_fields=True):
    """Direct preference optimisation with LoRA; the authors' published values."""

    beta: Annotated[float, Meta(gt=0.0)] = 0.1
    rank: Positive = 8
    alpha: Annotated[float, Meta(gt=0.0)] = 8.0
    dropout: Share = 0.1
    learning_rate: Annotated[float, Meta(gt=0.0)] = 5e-5
    pairs: Positive = 256
    """Most pairs of a hard and an easy caption."""
    steps: Positive = 150
    batch: Positive = 4
    accumulate: Positive = 4
    """Batches that are summed before a step."""
    likelihood: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0
    """Weight of the chosen captions' own likelihood beside equation 7. Ours: preferences say which of two captions is
    better, not that either is a caption; a small author that is tuned by them alone forgets its language."""
    reject_faint: bool = True
    """Captions of too faint anomalies are rejected like easy ones. Ours: hardest of all is what nobody can see, and an
    author drifts there unless it is told not to."""
    target_modules: tuple[str, ...] = ()
    """Layers with adapters; empty for those that peft knows of the architecture."""


class Evaluate(Struct, frozen=True, forbid_unknown_fields=True):
    """Labelled pictures on which the sets of rounds are compared; nothing of a run depends on them."""

    data: str = ""
    """Folder in the MVTec layout; its `test` pictures are used. Empty for no comparison."""
    steps: Positive = 1500
    size: Annotated[int, Meta(ge=32, le=2048)] = 256


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """A run."""

    normals: str
    """Folder of photographs of normal parts; relative to the configuration's own folder."""
    product: Name = "part"
    class_name: str = "part"
    mode: Literal["add", "rep"] = "add"
    """`add`: the anomalies of each round join those before; `rep`: hard ones replace easy ones, at equal number."""
    rounds: Annotated[int, Meta(ge=0, le=99)] = 0
    """Rounds of preference training after round 0, which is KKA(0); 2 or 3 in the paper."""
    captions: Positive = 200
    """Captions of each round."""
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    backbone: str = "embedded"
    """In whose features clusters are found."""
    describe: Describe = Describe()
    representatives: Representatives = Representatives()
    imagine: Imagine = Imagine()
    paint: Paint = Paint()
    judge: Judge = Judge()
    prefer: Prefer = Prefer()
    evaluate: Evaluate = Evaluate()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical content: two runs with the same one are the same run."""
        return hashlib.sha256(canonical_json(self)).hexdigest()


def parse_config(data: bytes, where: str = "the configuration") -> Config:
    """A checked configuration from the bytes of a TOML file.

    Raises:
        InputError: no TOML, an unknown field, or a value out of range; says which.
    """
    if len(data) > CONFIG_BYTES:
        raise _refusal(where, f"{len(data)} bytes, where {CONFIG_BYTES} are the most")
    try:
        content = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeError, RecursionError) as error:
        raise _refusal(where, str(error)) from error
    try:
        config = msgspec.convert(content, Config)
    except msgspec.MsgspecError as error:
        raise _refusal(where, str(error)) from error
    _check(config, where)
    return config


def read_config(path: Path) -> Config:
    """A checked configuration from its file; `normals` and other local paths in it are made absolute.

    Raises:
        InputError: see `parse_config`.
        StorageError: it cannot be read.
    """
    with storage_errors(path, "to read the configuration"), open(path, "rb") as stream:
        data = stream.read(CONFIG_BYTES + 1)
    config = parse_config(data, str(path))
    folder = path.resolve().parent

    def placed(name: str) -> str:
        return str(folder / name) if name and (folder / name).exists() else name

    return msgspec.structs.replace(
        config,
        normals=str((folder / config.normals).resolve()),
        describe=msgspec.structs.replace(
            config.describe, captions=placed(config.describe.captions), captioner=placed(config.describe.captioner)
        ),
        imagine=msgspec.structs.replace(
            config.imagine, model=config.imagine.model if config.imagine.url else placed(config.imagine.model)
        ),
        paint=msgspec.structs.replace(config.paint, model=placed(config.paint.model)),
        evaluate=msgspec.structs.replace(config.evaluate, data=placed(config.evaluate.data)),
    )


def _check(config: Config, where: str) -> None:
    """What no single field can tell."""
    if config.imagine.author == "local" and not config.imagine.model:
        raise _refusal(where, "imagine.author = 'local' without imagine.model")
    if config.imagine.author == "endpoint" and not (config.imagine.url and config.imagine.model):
        raise _refusal(where, "imagine.author = 'endpoint' without imagine.url and imagine.model")
    if config.rounds and config.imagine.author != "local":
        raise InputError(
            wanted=f"an author that preferences can tune (imagine.author = 'local') in {where}",
            got=f"{config.imagine.author!r} with rounds = {config.rounds}",
            next_step="Name a local model, or set rounds = 0 for KKA(0).",
        )
    if config.paint.painter != "procedural" and not config.paint.model:
        raise _refusal(where, f"paint.painter = {config.paint.painter!r} without paint.model")
    for name, side in (("judge", config.judge.size), ("evaluate", config.evaluate.size)):
        if side % 32:
            raise _refusal(where, f"{name}.size = {side}, which is no multiple of 32")
    if "{caption}" not in config.paint.prompt:
        raise _refusal(where, "paint.prompt without {caption}")


def _refusal(where: str, got: str) -> InputError:
    return InputError(
        wanted=f"a configuration of a run in {where}",
        got=got[:500],
        next_step="Correct it; `edgead kka new` writes one with all fields.",
    )
