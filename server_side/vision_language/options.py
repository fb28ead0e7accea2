"""How to fit a detector that rests on sentences: one record for all of these methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgead.runtime.spec import Preprocessing


@dataclass(frozen=True)
class VisionLanguageOptions:
    """How to fit.

    Attributes:
        model: open_clip model name, or path of an open_clip JSON configuration.
        weights: pretrained tag, path of a local checkpoint, or 'random:SEED' (for time and tests).
        class_name: what the part is, as a word in sentences ("carpet", "metal nut").
        domain: what kind of picture it is, for ensembles that name it ("industrial").
        prompts: a prompt set file; the method's own curated ensemble if None.
        shots: normal photographs that become reference banks; 0 for zero-shot.
        layers: layers of the tower to compare, counted from 1; the method's own choice if None.
        projections: file of trained projections, for the methods that have them; trained anew if None.
        auxiliary: data set with masks in the MVTec layout to train projections on; painted parts if None.
        preprocessing: rotation, region of interest and tiles; its size is replaced by the tower's.
        false_alarm_rate: wanted share of normal frames called NG.
        product: name of the product in the knowledge pack.
        seed: makes everything repeatable.
    """

    model: str
    weights: str | Path | None = None
    class_name: str = "object"
    domain: str = "industrial"
    prompts: Path | None = None
    shots: int = 0
    layers: tuple[int, ...] | None = None
    projections: Path | None = None
    auxiliary: Path | None = None
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing(1, 1))
    false_alarm_rate: float = 0.01
    product: str = "part"
    seed: int = 0
