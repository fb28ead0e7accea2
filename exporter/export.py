"""Fitted detector -> bundle: convert for every target, hold each engine against torch, write all or nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from onnx import ModelProto

from edgead.detector_file import FittedDetector, read_detector
from edgead.exporter.card import model_card
from edgead.exporter.contract import check_contract
from edgead.exporter.onnx_float16 import to_float16
from edgead.exporter.onnx_from_torch import onnx_from_torch, save_onnx
from edgead.exporter.openvino_from_onnx import openvino_from_onnx, openvino_version
from edgead.exporter.parity import TOLERANCE, Comparison, Reference, check_parity, reference_of, rounded
from edgead.exporter.targets import Target, parse_target
from edgead.runtime.bundle import Bundle, golden_files, write_bundle
from edgead.runtime.engines import open_engine
from edgead.runtime.errors import EngineError, EngineMismatchError, InputError, MissingDependencyError
from edgead.runtime.files import refuse_existing
from edgead.runtime.progress import Progress
from edgead.runtime.spec import EngineRecord, Precision, canonical_json

_CAPACITY_STEP = 64
"""Capacities are multiples of it, which suits the GPUs' matrix units."""


def export_bundle(
    detector: FittedDetector | Path,
    output: Path,
    targets: Sequence[str] = ("onnx",),
    *,
    name: str | None = None,
    capacity: int | None = None,
    compute_capabilities: Sequence[str] = (),
    force: bool = False,
) -> Bundle:
    """Compile a fitted detector for `targets` and write a bundle.

    Args:
        detector: a fitted detector, or its file.
        output: a folder to write, or a file that ends with `.edgead`.
        targets: such as 'onnx', 'openvino:fp16', 'tensorrt'; the first is the bundle's own choice.
        name: the bundle's name; that of `output` if None.
        capacity: rows that static (TensorRT) engines have room for in each bank; twice the initial rows and
            at least 1,024 if None.
        compute_capabilities: such as '8.6': TensorRT plans are built ahead of time for these.
        force: replace what is at `output`.

    Raises:
        InputError: an unknown target or compute capability, a capacity below the initial rows, or the
            output exists and `force` is false.
        DetectorError: the file is none, a graph breaks the contract, or it has operations that cannot be
            exported; names the port or the node.
        MissingDependencyError: a target's library is not installed.
        ParityError: an engine disagrees with torch; nothing is written.
        StorageError: the file system refused; nothing is left half-written.
    """
    output = Path(output)
    refuse_existing(output, force)
    wanted = list(dict.fromkeys(parse_target(text) for text in targets))
    if not wanted:
        raise InputError(wanted="at least one target", got="none", next_step="Example: --target onnx")
    fitted = detector if isinstance(detector, FittedDetector) else read_detector(Path(detector))
    check_contract(fitted.spec, fitted.trunk, fitted.head)
    capabilities = _flat(compute_capabilities)
    if capabilities and any(target.name == "tensorrt" for target in wanted):
        from edgead.runtime.engines.tensorrt_build import check_capabilities, load_backend

        check_capabilities(load_backend("tensorrt_rtx"), capabilities)
    capacities = _capacities(fitted, capacity)
    reference = reference_of(fitted)
    with tempfile.TemporaryDirectory(prefix="edgead-export-") as scratch:
        builder = _Builder(fitted, Path(scratch), capacities, capabilities)
        with Progress("building engines", len(wanted)) as progress:
            for target in wanted:
                builder.build(target)
                progress.advance(note=target.engine)
        engines, report = builder.measured(reference)
        files = _files_in(builder.folder)
    golden, golden_content = golden_files(
        fitted.golden, reference.scores.tolist(), reference.anomalous.tolist(), reference.maps
    )
    bundle_name = name if name is not None else _name_from(output)
    card = model_card(bundle_name, fitted.spec, fitted.pack, engines, fitted.card)
    return write_bundle(
        output,
        name=bundle_name,
        detector=fitted.spec,
        engines=engines,
        packs={fitted.pack.product: fitted.pack},
        golden=golden,
        files={
            **files,
            **golden_content,
            "parity.json": canonical_json(
                {
                    "golden": len(reference.scores),
                    "range": rounded(reference.scale),
                    "torch_scores": [float(score) for score in reference.scores],
                    "engines": report,
                }
            ),
            "card.md": card.encode(),
        },
        force=force,
    )


class _Builder:
    """Builds engines into a scratch folder laid out like a bundle."""

    def __init__(
        self,
        detector: FittedDetector,
        scratch: Path,
        capacities: dict[str, int],
        compute_capabilities: tuple[str, ...],
    ) -> None:
        self.detector = detector
        self.scratch = scratch
        self.folder = scratch / "bundle"
        self.capacities = capacities
        self.compute_capabilities = compute_capabilities
        self.records: list[EngineRecord] = []
        self._models: dict[str, ModelProto] = {}
        self._paths: dict[tuple[str, Precision], Path] = {}

    def build(self, target: Target) -> None:
        folder = self.folder / "engines" / target.engine
        folder.mkdir(parents=True)
        if target.name == "onnx":
            for part in ("trunk", "head"):
                for member in self._onnx(part, target.precision).parent.iterdir():
                    (folder / member.name).write_bytes(member.read_bytes())
            self._add(target, "onnx", f"onnx {_version_of('onnx')}")
        elif target.name == "openvino":
            openvino_from_onnx(self._onnx("trunk", "fp32"), folder, "trunk", precision=target.precision)
            openvino_from_onnx(self._onnx("head", "fp32"), folder, "head", precision="fp32")
            self._add(target, "xml", openvino_version())
        else:
            from edgead.exporter.tensorrt_from_onnx import tensorrt_from_onnx

            made = tensorrt_from_onnx(
                trunk=self._onnx("trunk", target.precision),
                head=self._onnx("head", "fp32"),
                spec=self.detector.spec,
                folder=folder,
                capacity=self.capacities,
                compute_capabilities=self.compute_capabilities,
            )
            self._add(
                target,
                "onnx" if made.recipe else "plan",
                made.made_with,
                capacity=self.capacities,
                match=made.match,
                recipe=made.recipe,
            )

    def measured(self, reference: Reference) -> tuple[list[EngineRecord], dict[str, Any]]:
        """The records with their parity figures, and the report by engine.

        The engines run from a bundle on disk, as they will. One that cannot run on this machine has no
        figures; of a TensorRT engine the ONNX that its plans are built from is run instead, padded banks
        and precision included, so that what can be known is.
        """
        records: list[EngineRecord] = []
        report: dict[str, Any] = {}
        with (
            tempfile.TemporaryDirectory(prefix="parity-", dir=self.scratch) as place,
            Progress("parity gate", len(self.records)) as progress,
        ):
            sources = [_source_of(record) for record in self.records if record.target == "tensorrt"]
            trial = write_bundle(
                Path(place) / "trial",
                name="trial",
                detector=self.detector.spec,
                engines=[*self.records, *sources],
                packs={self.detector.pack.product: self.detector.pack},
                files=_files_in(self.folder),
            )
            for record in self.records:
                tolerance = TOLERANCE[record.precision]
                source = seen = None
                if record.target == "tensorrt":
                    source = self._compare(trial, f"{record.name}.source", reference, record.precision)
                    seen = self._compare_if_runnable(trial, record, reference)
                else:
                    seen = self._compare(trial, record.name, reference, record.precision)
                records.append(
                    msgspec.structs.replace(
                        record, tolerance=tolerance, parity=seen.figures if seen is not None else None
                    )
                )
                report[record.name] = {
                    "tolerance": msgspec.to_builtins(tolerance),
                    "engine": _details(seen),
                    "source": _details(source),
                    "note": "" if seen is not None else "not executed where the bundle was made",
                }
                progress.advance(note=record.name)
        return records, report

    def _compare(self, trial: Bundle, name: str, reference: Reference, precision: Precision) -> Comparison:
        with open_engine(trial, name) as engine:
            return check_parity(engine, self.detector, reference, TOLERANCE[precision])

    def _compare_if_runnable(self, trial: Bundle, record: EngineRecord, reference: Reference) -> Comparison | None:
        try:
            engine = open_engine(trial, record.name)
        except (EngineError, EngineMismatchError, MissingDependencyError):
            return None
        with engine:
            return check_parity(engine, self.detector, reference, TOLERANCE[record.precision])

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

    def _add(self, target: Target, suffix: str, made_with: str, **more: Any) -> None:
        place = f"engines/{target.engine}"
        self.records.append(
            EngineRecord(
                name=target.engine,
                target=target.name,
                precision=target.precision,
                trunk=f"{place}/trunk.{suffix}",
                head=f"{place}/head.{suffix}",
                made_with=made_with,
                **more,
            )
        )


def _source_of(record: EngineRecord) -> EngineRecord:
    """The ONNX of a TensorRT engine as an engine of its own, for the parity gate only."""
    folder = record.trunk.rpartition("/")[0]
    return EngineRecord(
        name=f"{record.name}.source",
        target="onnx",
        precision=record.precision,
        trunk=f"{folder}/trunk.onnx",
        head=f"{folder}/head.onnx",
        made_with="onnx",
        capacity=record.capacity,
    )


def _capacities(detector: FittedDetector, wanted: int | None) -> dict[str, int]:
    """Rows that each bank of a static engine is padded to."""
    found = {}
    for port in detector.spec.knowledge:
        if port.rows is None:
            continue
        rows = len(detector.pack.arrays[port.name])
        if wanted is not None and wanted < rows:
            raise InputError(
                wanted=f"a capacity of at least the {rows} initial rows of {port.name}",
                got=f"{wanted}",
                next_step="Name a larger one, or leave it out for twice the rows.",
            )
        room = wanted if wanted is not None else max(2 * rows, 1024)
        found[port.name] = -(-room // _CAPACITY_STEP) * _CAPACITY_STEP if wanted is None else room
    return found


def _files_in(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _details(seen: Comparison | None) -> dict[str, Any] | None:
    if seen is None:
        return None
    return {
        "parity": msgspec.to_builtins(seen.figures),
        "trunk": seen.trunk,
        "head": {"score": seen.head_score, "map": seen.head_map},
        "agreement": seen.agreement,
    }


def _flat(capabilities: Sequence[str]) -> tuple[str, ...]:
    """('8.6,8.9', '8.6') -> ('8.6', '8.9')."""
    parts = (part.strip() for text in capabilities for part in text.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def _name_from(output: Path) -> str:
    stem = output.name.removesuffix(".edgead").removesuffix(".bundle")
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)
    return (kept.lstrip("._-") or "bundle")[:128]


def _version_of(package: str) -> str:
    from importlib.metadata import version

    return version(package)


__all__ = ["Target", "export_bundle", "parse_target"]
