"""Fitted detector -> bundle: convert for every target, hold each engine against torch, write all or nothing."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgead.detector_file import FittedDetector, read_detector
from edgead.exporter.onnx_from_torch import onnx_from_torch, save_onnx
from edgead.exporter.openvino_from_onnx import openvino_from_onnx, openvino_version
from edgead.exporter.parity import TOLERANCE, Reference, check_parity, reference_of
from edgead.runtime.bundle import Bundle, golden_files, write_bundle
from edgead.runtime.engines import open_engine
from edgead.runtime.errors import InputError
from edgead.runtime.files import refuse_existing
from edgead.runtime.progress import Progress
from edgead.runtime.spec import EngineRecord, Precision, TargetName, canonical_json

_PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "onnx": ("fp32", "fp16"),
    "openvino": ("fp32", "fp16"),
    "tensorrt": ("fp32", "fp16"),
}


@dataclass(frozen=True)
class Target:
    """One engine to build."""

    name: TargetName
    precision: Precision

    @property
    def engine(self) -> str:
        """The engine's name in the bundle, such as 'openvino-fp16'."""
        return f"{self.name}-{self.precision}"


def parse_target(text: str) -> Target:
    """'onnx', 'openvino:fp16', ... -> a target; the precision is fp32 if none is named.

    Raises:
        InputError: unknown target or precision; near names are suggested.
    """
    name, _, precision = text.partition(":")
    known = [f"{target}:{choice}" for target, choices in _PRECISIONS.items() for choice in choices]
    precision = precision or "fp32"
    if f"{name}:{precision}" in known:
        return Target(name, precision)  # type: ignore[arg-type]
    near = difflib.get_close_matches(text, [*_PRECISIONS, *known], n=3, cutoff=0.4)
    raise InputError(
        wanted=f"a target such as {', '.join(known)}",
        got=f"'{text}'",
        next_step=f"Did you mean {' or '.join(near)}?" if near else "Name one of these.",
    )


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
        InputError: an unknown target, or the output exists and `force` is false.
        DetectorError: the file is none, or its graph has operators that cannot be exported.
        MissingDependencyError: a target's library is not installed.
        ParityError: an engine disagrees with torch; nothing is written.
        StorageError: the file system refused; nothing is left half-written.
    """
    refuse_existing(output, force)
    wanted = list(dict.fromkeys(parse_target(text) for text in targets))
    fitted = detector if isinstance(detector, FittedDetector) else read_detector(detector)
    reference = reference_of(fitted)
    with tempfile.TemporaryDirectory(prefix="edgead-export-") as scratch:
        builder = _Builder(fitted, Path(scratch), capacity, tuple(compute_capabilities))
        with Progress("building engines", len(wanted)) as progress:
            for target in wanted:
                builder.build(target)
                progress.advance(note=target.engine)
        engines = builder.measured(reference)
        files = {
            path.relative_to(builder.folder).as_posix(): path.read_bytes()
            for path in sorted(builder.folder.rglob("*"))
            if path.is_file()
        }
    golden, golden_content = golden_files(
        fitted.golden, reference.scores.tolist(), reference.anomalous.tolist(), reference.maps
    )
    bundle_name = name if name is not None else _name_from(output)
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
            "parity.json": _parity_report(engines, reference),
            "card.md": model_card(bundle_name, fitted.card).encode(),
        },
        force=force,
    )


class _Builder:
    """Builds engines into a scratch folder laid out like a bundle."""

    def __init__(
        self,
        detector: FittedDetector,
        scratch: Path,
        capacity: int | None,
        compute_capabilities: tuple[str, ...],
    ) -> None:
        self.detector = detector
        self.scratch = scratch
        self.folder = scratch / "bundle"
        self.compute_capabilities = compute_capabilities
        self.records: list[EngineRecord] = []
        self._capacity = capacity
        self._models: dict[tuple[str, Precision], Path] = {}

    def build(self, target: Target) -> None:
        folder = self.folder / "engines" / target.engine
        folder.mkdir(parents=True)
        if target.name == "onnx":
            for part in ("trunk", "head"):
                source = self._onnx(part, target.precision)
                for member in source.parent.iterdir():
                    (folder / member.name).write_bytes(member.read_bytes())
            self._add(target, "onnx", _version_of("onnx"))
        elif target.name == "openvino":
            for part in ("trunk", "head"):
                openvino_from_onnx(self._onnx(part, "fp32"), folder, part, precision=target.precision)
            self._add(target, "xml", openvino_version())
        else:
            from edgead.exporter.tensorrt_from_onnx import tensorrt_from_onnx

            made = tensorrt_from_onnx(
                trunk=self._onnx("trunk", target.precision),
                head=self._onnx("head", "fp32"),
                spec=self.detector.spec,
                folder=folder,
                capacity=self._capacities(),
                compute_capabilities=self.compute_capabilities,
            )
            self._add(
                target,
                "onnx" if made.recipe else "plan",
                made.made_with,
                capacity=self._capacities(),
                match=made.match,
                recipe=made.recipe,
            )

    def measured(self, reference: Reference) -> list[EngineRecord]:
        """The records with their parity figures; engines that cannot run on this machine have none."""
        with tempfile.TemporaryDirectory(prefix="edgead-parity-", dir=self.scratch) as place:
            files = {
                path.relative_to(self.folder).as_posix(): path.read_bytes()
                for path in self.folder.rglob("*")
                if path.is_file()
            }
            trial = write_bundle(
                Path(place) / "trial",
                name="trial",
                detector=self.detector.spec,
                engines=self.records,
                packs={self.detector.pack.product: self.detector.pack},
                files=files,
            )
            measured = []
            with Progress("parity gate", len(self.records)) as progress:
                for record in self.records:
                    tolerance = TOLERANCE[record.precision]
                    figures = None
                    if record.target != "tensorrt":
                        with open_engine(trial, record.name) as engine:
                            figures = check_parity(engine, self.detector, reference, tolerance)
                    measured.append(msgspec.structs.replace(record, tolerance=tolerance, parity=figures))
                    progress.advance(note=record.name)
        return measured

    def _onnx(self, part: str, precision: Precision) -> Path:
        """The ONNX file of trunk or head, made once; heads are always float32 (see the design of distances)."""
        precision = "fp32" if part == "head" else precision
        if (part, precision) not in self._models:
            spec = self.detector.spec
            if part == "trunk":
                model = onnx_from_torch(
                    self.detector.trunk, (spec.image,), spec.features, precision=precision
                )
            else:
                model = onnx_from_torch(self.detector.head, spec.head_inputs(), spec.outputs)
            folder = self.scratch / f"{part}-{precision}"
            folder.mkdir()
            save_onnx(model, folder, f"{part}.onnx")
            self._models[part, precision] = folder / f"{part}.onnx"
        return self._models[part, precision]

    def _capacities(self) -> dict[str, int]:
        found = {}
        for port in self.detector.spec.knowledge:
            if port.rows is not None:
                rows = len(self.detector.pack.arrays[port.name])
                found[port.name] = max(self._capacity or max(2 * rows, 1024), rows)
        return found

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


def model_card(name: str, card: Mapping[str, Any]) -> str:
    """The detector's facts as Markdown: one heading, one list; nested facts are indented."""
    lines = [f"# {name}", ""]

    def add(facts: Mapping[str, Any], indent: str) -> None:
        for key, value in facts.items():
            if isinstance(value, Mapping):
                lines.append(f"{indent}- {key}:")
                add(value, indent + "  ")
            else:
                lines.append(f"{indent}- {key}: {value}")

    add(card, "")
    return "\n".join(lines) + "\n"


def _parity_report(engines: Sequence[EngineRecord], reference: Reference) -> bytes:
    return canonical_json(
        {
            "golden": len(reference.scores),
            "map_range": float(np.float32(reference.scale)),
            "torch_scores": reference.scores.tolist(),
            "engines": {
                record.name: {
                    "tolerance": msgspec.to_builtins(record.tolerance),
                    "parity": None if record.parity is None else msgspec.to_builtins(record.parity),
                    "note": "" if record.parity else "not executed where the bundle was made",
                }
                for record in engines
            },
        }
    )


def _name_from(output: Path) -> str:
    stem = output.name.removesuffix(".edgead").removesuffix(".bundle")
    kept = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem
    )
    return (kept.lstrip("._-") or "bundle")[:128]


def _version_of(package: str) -> str:
    from importlib.metadata import version

    return f"{package} {version(package)}"


__all__ = ["Target", "export_bundle", "model_card", "parse_target"]
