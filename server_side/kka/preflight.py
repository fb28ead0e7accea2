"""What a run will need and can be found out about in a second, before anything is made."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from edgead.runtime.errors import InputError, missing_dependency
from edgead.runtime.image import list_images
from edgead.server_side.hub import find_model
from edgead.server_side.kka.config import Config

TUNING = ("trl", "peft", "accelerate", "datasets")
"""Packages of preference training."""


def check(
    config: Config, stage: str | None, is_done: Callable[[str, int], bool], *, tuning: Sequence[str] = TUNING
) -> None:
    """Refuse a run that would end hours later for want of a folder, a model or a package.

    Args:
        config: of the run, with absolute paths.
        stage: the last one that is asked for, by its command's name; None for all.
        is_done: whether a stage of a round is complete already; what it needed is not asked for again.
        tuning: packages of preference training.

    Raises:
        InputError: no photographs, no file of captions, no labelled pictures, no key, or no model of that name here.
        MissingDependencyError: a package that preference training needs is absent.
    """
    order = ("describe", "representatives", "imagine", "paint", "judge", "prefer")
    wanted = order[: order.index(stage) + 1] if stage else order
    last = config.rounds

    def ahead(name: str, number: int) -> bool:
        return name in wanted and not is_done(name, number)

    if ahead("describe", 0):
        _describing(config)
    if ahead("imagine", last):
        _writing(config)
    if ahead("paint", last) and config.paint.painter != "procedural":
        find_model(
            config.paint.model, what="a diffusers pipeline", next_step="paint.model = DIR", probe="model_index.json"
        )
    if last and ahead("prefer", last - 1):
        for package in tuning:
            if importlib.util.find_spec(package) is None:
                raise missing_dependency(package, "server", "preference training")
    if stage is None and config.evaluate.data:
        from edgead.server_side.datasets import test_samples

        test_samples(Path(config.evaluate.data))


def _describing(config: Config) -> None:
    list_images(config.normals)
    if config.describe.captions and not Path(config.describe.captions).is_file():
        raise InputError(
            wanted=f"the file of captions {config.describe.captions}",
            got="nothing there",
            next_step="Correct describe.captions: lines FILE<TAB>CAPTION; or leave it empty.",
        )
    if config.describe.captioner and not config.describe.captions:
        find_model(config.describe.captioner, what="a captioner", next_step="describe.captioner = DIR")


def _writing(config: Config) -> None:
    settings = config.imagine
    if settings.author == "local":
        find_model(settings.model, what="a language model", next_step="imagine.model = DIR")
    if settings.author == "endpoint" and settings.key_env and not os.environ.get(settings.key_env):
        raise InputError(
            wanted=f"the endpoint's key in the environment variable {settings.key_env}",
            got="no such variable, or an empty one",
            next_step=f"Set it, as in: export {settings.key_env}=...; or leave imagine.key_env empty.",
        )


__all__ = ["TUNING", "check"]
