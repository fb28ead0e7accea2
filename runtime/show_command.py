"""`edgead show`: what is in a bundle, a knowledge pack or a fitted detector."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import click
import msgspec

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.errors import BundleError, InputError
from edgead.runtime.knowledge import Pack, is_bank, read_pack
from edgead.runtime.spec import Calibration, DetectorSpec, EngineRecord


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def show(path: Path, as_json: bool) -> None:
    """Look into a bundle, a knowledge pack (.safetensors) or a fitted detector (.detector).

    Everything is checked on the way: an edited or truncated file is an error.

    \b
    Example:
      edgead show part.bundle
      edgead show part.bundle --json
    """
    if not path.exists():
        raise InputError(
            wanted=f"a bundle, pack or detector at {path}",
            got="nothing there",
            next_step="Make a bundle with: edgead export --normal DIR -o BUNDLE",
        )
    if path.suffix == ".safetensors":
        facts, text = _pack_facts(read_pack(path)), _pack_lines(read_pack(path))
    elif path.suffix == ".detector":
        facts, text = _detector(path)
    else:
        bundle = open_bundle(path)
        facts, text = _bundle_facts(bundle), _bundle_lines(bundle)
    click.echo(json.dumps(facts, sort_keys=True) if as_json else "\n".join(text))


def _bundle_facts(bundle: Bundle) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(bundle.manifest)
    facts["knowledge"] = {product: _pack_facts(bundle.pack(product)) for product in bundle.products}
    return facts


def _bundle_lines(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    size = sum(record.size for record in manifest.files.values())
    lines = [
        f"{manifest.name}: a bundle of {len(manifest.files) + 1} files, {_bytes(size)}, by edgead {manifest.edgead}",
        *_spec_lines(manifest.detector),
        "engines",
    ]
    lines += [f"  {_engine_line(bundle, engine)}" for engine in manifest.engines]
    lines.append("knowledge")
    for product in bundle.products:
        lines += [f"  {line}" for line in _pack_lines(bundle.pack(product))]
    ng = sum(golden.anomalous for golden in manifest.golden)
    lines.append(f"golden frames   {len(manifest.golden)}, {ng} of them NG")
    return lines


def _engine_line(bundle: Bundle, engine: EngineRecord) -> str:
    size = sum(
        record.size
        for name, record in bundle.manifest.files.items()
        if name.startswith(engine.trunk.rsplit("/", 1)[0] + "/")
    )
    if engine.parity is not None and engine.tolerance is not None:
        parity = f"map within {engine.parity.map:.1e} of torch (allowed {engine.tolerance.map:.0e})"
    else:
        parity = "compile it on the device: edgead compile" if engine.recipe else "not executed at export"
    return f"{engine.name:<15} {_bytes(size):>9}  {engine.made_with:<22} {parity}"


def _spec_lines(spec: DetectorSpec) -> list[str]:
    size = spec.preprocessing
    steps = [f"rotate {size.rotate} degrees"] if size.rotate else []
    if size.roi is not None:
        steps.append(f"crop {size.roi.width}x{size.roi.height} at {size.roi.x},{size.roi.y}")
    if size.tiles is not None:
        steps.append(f"{size.tiles.columns}x{size.tiles.rows} tiles that overlap by {size.tiles.overlap:g}")
    steps.append(f"resize to {size.width}x{size.height}")
    features = ", ".join(f"{port.name} {list(port.shape)}" for port in spec.features)
    return [
        f"method          {spec.method}",
        f"frame           {', '.join(steps)}",
        f"features        {features}",
        f"feature space   {spec.fingerprint[:12]}",
    ]


def _pack_facts(pack: Pack) -> dict[str, Any]:
    return {
        "product": pack.product,
        "digest": pack.digest,
        "fingerprint": pack.fingerprint,
        "calibration": msgspec.to_builtins(pack.calibration),
        "arrays": {name: {"dtype": str(a.dtype), "shape": list(a.shape)} for name, a in pack.arrays.items()},
    }


def _pack_lines(pack: Pack) -> list[str]:
    lines = [f"{pack.product}: version {pack.version}, feature space {pack.fingerprint[:12]}"]
    for name, array in pack.arrays.items():
        if is_bank(name):
            size = _bytes(array.nbytes)
            lines.append(f"  {name:<15} {array.shape[0]} rows x {array.shape[1]} {array.dtype}, {size}")
    return [*lines, f"  {'threshold':<15} {_calibration_text(pack.calibration)}"]


def _calibration_text(calibration: Calibration) -> str:
    text = f"{calibration.threshold:.5g} (typical good part {calibration.typical:.5g})"
    if calibration.false_alarm_rate is not None and calibration.false_alarm_bound is not None:
        text += (
            f"; for {100 * calibration.false_alarm_rate:g} % false alarms from {calibration.held_out} held-out "
            f"images, below {100 * calibration.false_alarm_bound:.1f} % with 95 % confidence"
        )
    return text


def _detector(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A fitted detector's JSON parts, read without torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            spec = msgspec.json.decode(archive.read("detector.json"), type=DetectorSpec)
            card = msgspec.json.decode(archive.read("card.json"), type=dict[str, Any])
    except (zipfile.BadZipFile, KeyError, msgspec.MsgspecError) as error:
        raise BundleError(
            wanted=f"a fitted-detector file at {path}", got=str(error), next_step="Fit it again with: edgead fit"
        ) from error
    lines = [f"{path.name}: a fitted detector", *_spec_lines(spec)]
    lines += [f"{key:<15} {value}" for key, value in card.items() if key != "method"]
    return {"spec": msgspec.to_builtins(spec), "card": card}, lines


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
