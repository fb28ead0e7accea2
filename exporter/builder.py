"""Builds the engines of a bundle in a scratch folder, and holds each of them against torch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from onnx import ModelProto

from edgead.detector_file import FittedDetector
from edgead.exporter.onnx_float16 import to_float16
from edgead.exporter.onnx_from_torch import onnx_from_torch, save_onnx
from edgead.exporter.openvino_from_onnx import openvino_from_onnx, openvino_version
from edgead.exporter.parity import TOLERANCE, Comparison, Reference, check_parity
from edgead.exporter.targets import Target
from edgead.runtime.bundle import Bundle, write_bundle
from edgead.runtime.engines import Engine, open_engine
from edgead.runtime.errors import EngineError, EngineMismatchError, MissingDependencyError
from edgead.runtime.knowledge import Pack
from edgead.runtime.progress import Progress
from edgead.runtime.spec import EngineRecord, NormalityRecord, Precision


@dataclass(frozen=True, eq=False)
class Check:
    """One comparison that every engine has to pass.

    Attributes:
        name: in the report.
        detector: whose golden frames are run, and whose graphs.
        pack: knowledge that the engine is given; fits the bundle.
        reference: what torch says under the same knowledge.
        second: whether the graphs are an engine's second pair.
    """

    name: str
    detector: FittedDetector
    pack: Pack
    reference: Reference
    second: bool = False


class Builder:
    """Builds the graphs of one detector for targets, into a folder laid out like a bundle.

    Args:
        detector: what to build.
        scratch: a folder of its own for what is in between.
        folder: the bundle to be.
        capacities: rows that each bank of a static engine is padded to.
        compute_capabilities: for TensorRT plans ahead of time.
        inner: folder inside each engine's, such as 'normality/'.
        with_trunk: whether the trunk is wanted too. TensorRT engines have it in any case: a recipe builds both.
    """

    def __init__(
        self,
        detector: FittedDetector,
        scratch: Path,
        folder: Path,
        capacities: Mapping[str, int],
        compute_capabilities: tuple[str, ...],
        *,
        inner: str = "",
        with_trunk: bool = True,
    ) -> None:
        scratch.mkdir()
        self.detector = detector
        self.scratch = scratch
        self.folder = folder
        self.capacities = dict(capacities)
        self.compute_capabilities = compute_capabilities
        self.inner = inner
        self.with_trunk = with_trunk
        self._models: dict[str, ModelProto] = {}
        self._paths: dict[tuple[str, Precision], Path] = {}

    def build(self, target: Target) -> EngineRecord:
        """Build one engine; its record has no parity figures yet."""
        folder = self.folder / "engines" / target.engine / self.inner
        folder.mkdir(parents=True)
        parts = ("trunk", "head") if self.with_trunk else ("head",)
        if target.name == "onnx":
            for part in parts:
                for member in self._onnx(part, target.precision).parent.iterdir():
                    (folder / member.name).write_bytes(member.read_bytes())
            return self._record(target, "onnx", f"onnx {version('onnx')}")
        if target.name == "openvino":
            for part in parts:
                precision = target.precision if part == "trunk" else "fp32"
                openvino_from_onnx(self._onnx(part, "fp32"), folder, part, precision=precision)
            return self._record(target, "xml", openvino_version())
        from edgead.exporter.tensorrt_from_onnx import tensorrt_from_onnx

        made = tensorrt_from_onnx(
            trunk=self._onnx("trunk", target.precision),
            head=self._onnx("head", "fp32"),
            spec=self.detector.spec,
            folder=folder,
            capacity=self.capacities,
            compute_capabilities=self.compute_capabilities,
        )
        suffix = "onnx" if made.recipe else "plan"
        return self._record(
            target, suffix, made.made_with, capacity=self.capacities, match=made.match, recipe=made.recipe
        )

    def _onnx(self, part: str, precision: Precision) -> Path:
        """The ONNX file of trunk or head, made once. Heads are float32 at every precision: distances
        are small differences of large numbers."""
        precision = "fp32" if part == "head" else precision
        if (part, precision) not in self._paths:
            model = ModelProto()
            model.CopyFrom(self._model(part))
            folder = self.scratch / f"{part}-{precision}"
            folder.mkdir()
            save_onnx(to_float16(model) if precision == "fp16" else model, folder, f"{part}.onnx")
            self._paths[part, precision] = folder / f"{part}.onnx"
        return self._paths[part, precision]

    def _model(self, part: str) -> ModelProto:
        """Trunk or head as float32 ONNX, converted once: torch's exporter is the slow step."""
        if part not in self._models:
            spec = self.detector.spec
            if part == "trunk":
                made = onnx_from_torch(self.detector.trunk, (spec.image,), spec.features, part=part)
            else:
                made = onnx_from_torch(self.detector.head, spec.head_inputs(), spec.outputs, part=part)
            self._models[part] = made
        return self._models[part]

    def _record(self, target: Target, suffix: str, made_with: str, **more: Any) -> EngineRecord:
        place = f"engines/{target.engine}"
        shared = target.name != "tensorrt" and not self.with_trunk
        return EngineRecord(
            name=target.engine,
            target=target.name,
            precision=target.precision,
            trunk=f"{place}/trunk.{suffix}" if shared else f"{place}/{self.inner}trunk.{suffix}",
            head=f"{place}/{self.inner}head.{suffix}",
            made_with=made_with,
            **more,
        )


def measured(
    records: Sequence[EngineRecord],
    checks: Sequence[Check],
    folder: Path,
    scratch: Path,
    pack: Pack,
    normality: NormalityRecord | None,
) -> tuple[list[EngineRecord], dict[str, Any]]:
    """The records with their parity figures, and the report by engine.

    The engines run from a bundle on disk, as they will. One that cannot run on this machine has no figures; of
    a TensorRT engine the ONNX that its plans are built from is run instead, padded banks and precision
    included, so that what can be known is.

    Args:
        records: of the engines that were built.
        checks: that of the detector first.
        folder: holds the engines' files.
        scratch: for the trial bundle.
        pack: the initial knowledge.
        normality: the bundle's second detector.

    Raises:
        ParityError: an engine disagrees with torch.
    """
    done: list[EngineRecord] = []
    report: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="parity-", dir=scratch) as place,
        Progress("parity gate", len(records)) as progress,
    ):
        sources = [_source_of(record) for record in records if record.target == "tensorrt"]
        trial = write_bundle(
            Path(place) / "trial",
            name="trial",
            detector=checks[0].detector.spec,
            engines=[*records, *sources],
            packs={pack.product: pack},
            files=files_in(folder),
            normality=normality,
        )
        for record in records:
            tolerance = TOLERANCE[record.precision]
            seen, source, runnable = _compared(trial, record, checks)
            parts = {}
            for number, check in enumerate(checks):
                parts[check.name] = {"engine": _details(seen, number), "source": _details(source, number)}
            first = parts.pop(checks[0].name)
            report[record.name] = {
                "tolerance": msgspec.to_builtins(tolerance),
                **first,
                "note": "" if runnable else "not executed where the bundle was made",
                **parts,
            }
            changes: dict[str, Any] = {"tolerance": tolerance, "parity": seen[0].figures if runnable else None}
            if record.normality is not None:
                # The worst of both tables: filled and empty.
                worst = max((item.figures for item in seen[1:]), key=lambda item: item.map) if runnable else None
                changes["normality"] = msgspec.structs.replace(record.normality, tolerance=tolerance, parity=worst)
            done.append(msgspec.structs.replace(record, **changes))
            progress.advance(note=record.name)
    return done, report


def _compared(
    trial: Bundle, record: EngineRecord, checks: Sequence[Check]
) -> tuple[list[Comparison], list[Comparison], bool]:
    """What each check says of the engine, and of its source; and whether the engine could run here."""
    if record.target != "tensorrt":
        with open_engine(trial, record.name) as engine:
            return _run(engine, checks, record.precision), [], True
    with open_engine(trial, f"{record.name}.source") as engine:
        source = _run(engine, checks, record.precision)
    try:
        engine = open_engine(trial, record.name)
    except (EngineError, EngineMismatchError, MissingDependencyError):
        return [], source, False
    with engine:
        return _run(engine, checks, record.precision), source, True


def _run(engine: Engine, checks: Sequence[Check], precision: Precision) -> list[Comparison]:
    found = []
    for check in checks:
        pair = engine.normality() if check.second else engine
        assert pair is not None  # every engine of a bundle with a normality detector has one
        found.append(check_parity(pair, check.detector, check.reference, TOLERANCE[precision], check.pack))
        if check.second:
            pair.close()
    return found


def _source_of(record: EngineRecord) -> EngineRecord:
    """The ONNX of a TensorRT engine as an engine of its own, for the parity gate only."""
    pair = record.normality
    return EngineRecord(
        name=f"{record.name}.source",
        target="onnx",
        precision=record.precision,
        trunk=_as_onnx(record.trunk),
        head=_as_onnx(record.head),
        made_with="onnx",
        capacity=record.capacity,
        normality=None
        if pair is None
        else msgspec.structs.replace(pair, trunk=_as_onnx(pair.trunk), head=_as_onnx(pair.head)),
    )


def _as_onnx(path: str) -> str:
    return f"{path.rpartition('.')[0]}.onnx"


def _details(seen: Sequence[Comparison], number: int) -> dict[str, Any] | None:
    if number >= len(seen):
        return None
    one = seen[number]
    return {
        "parity": msgspec.to_builtins(one.figures),
        "trunk": one.trunk,
        "head": {"score": one.head_score, "map": one.head_map},
        "agreement": one.agreement,
    }


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
