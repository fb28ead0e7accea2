"""Fitted detector -> bundle: convert for every target, hold each engine against torch, write all or nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgead.detector_file import FittedDetector, read_detector
from edgead.exporter.builder import Builder, Check, files_in, measured
from edgead.exporter.card import model_card
from edgead.exporter.contract import check_contract
from edgead.exporter.parity import reference_of, rounded
from edgead.exporter.targets import Target, parse_target
from edgead.exporter.with_normality import capacities as normality_capacities
from edgead.exporter.with_normality import combined_pack, normality_record, probe_pack, undecided
from edgead.runtime.bundle import Bundle, golden_files, write_bundle
from edgead.runtime.errors import InputError
from edgead.runtime.files import refuse_existing
from edgead.runtime.progress import Progress
from edgead.runtime.spec import EngineRecord, NormalityGraphs, NormalityRecord, canonical_json

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
    normality: FittedDetector | Path | None = None,
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
        normality: a fitted normality detector, or its file: its graphs go into the bundle too, so that sentences
            can say later what is normal. The initial pack then has the fingerprint of both.
        force: replace what is at `output`.

    Raises:
        InputError: an unknown target or compute capability, a capacity below the initial rows, or the
            output exists and `force` is false.
        DetectorError: the file is none, a graph breaks the contract, or it has operations that cannot be
            exported; names the port or the node. Or the normality detector does not go with the detector.
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
    second = normality if normality is None or isinstance(normality, FittedDetector) else read_detector(Path(normality))
    record: NormalityRecord | None = None
    pack = fitted.pack
    if second is not None:
        check_contract(second.spec, second.trunk, second.head)
        record = normality_record(fitted, second)
        pack = combined_pack(fitted, second.pack, second)
    rows = _capacities(fitted, capacity)
    checks = _checks(fitted, second)
    reference = checks[0].reference
    with tempfile.TemporaryDirectory(prefix="edgead-export-") as place:
        scratch, folder = Path(place), Path(place) / "bundle"
        builder = Builder(fitted, scratch / "base", folder, rows, capabilities)
        pair: Builder | None = None
        if second is not None and record is not None:
            pair = Builder(
                second,
                scratch / "normality",
                folder,
                normality_capacities(second),
                capabilities,
                inner="normality/",
                with_trunk=not record.shared_trunk,
            )
        built = []
        with Progress("building engines", len(wanted)) as progress:
            for target in wanted:
                engine = builder.build(target)
                built.append(engine if pair is None else _with_pair(engine, pair.build(target)))
                progress.advance(note=target.engine)
        engines, report = measured(built, checks, folder, scratch, pack, record)
        files = files_in(folder)
    golden, golden_content = golden_files(
        fitted.golden, reference.scores.tolist(), reference.anomalous.tolist(), reference.maps
    )
    bundle_name = name if name is not None else _name_from(output)
    facts = fitted.card if second is None else {**fitted.card, "normality": second.card}
    card = model_card(bundle_name, fitted.spec, pack, engines, facts)
    return write_bundle(
        output,
        name=bundle_name,
        detector=fitted.spec,
        engines=engines,
        packs={pack.product: pack},
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
        normality=record,
    )


def _checks(base: FittedDetector, normality: FittedDetector | None) -> list[Check]:
    """What every engine is compared in: the detector, and the second one under its own and under a filled table."""
    if normality is None:
        return [Check("detector", base, base.pack, reference_of(base))]
    found = [Check("detector", base, combined_pack(base, normality.pack, normality), reference_of(base))]
    for name, pack in (("normality", normality.pack), ("normality_probe", probe_pack(normality))):
        detector = undecided(normality, pack)
        # The map is a share of 0..1 by contract; under an empty table it has no range of its own.
        reference = reference_of(detector, scale=1.0)
        found.append(Check(name, detector, combined_pack(base, pack, normality), reference, second=True))
    return found


def _with_pair(engine: EngineRecord, pair: EngineRecord) -> EngineRecord:
    """One record of both pairs of graphs of an engine."""
    return msgspec.structs.replace(
        engine,
        capacity={**engine.capacity, **pair.capacity},
        normality=NormalityGraphs(trunk=pair.trunk, head=pair.head),
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


def _flat(capabilities: Sequence[str]) -> tuple[str, ...]:
    """('8.6,8.9', '8.6') -> ('8.6', '8.9')."""
    parts = (part.strip() for text in capabilities for part in text.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def _name_from(output: Path) -> str:
    stem = output.name.removesuffix(".edgead").removesuffix(".bundle")
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)
    return (kept.lstrip("._-") or "bundle")[:128]


__all__ = ["Target", "export_bundle", "parse_target"]
