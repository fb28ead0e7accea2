"""`edgead export`: composes fitting (server side) and compiling (exporter), which do not know each other."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from edgead.runtime.errors import InputError
from edgead.runtime.files import refuse_existing
from edgead.runtime.spec import NormalityGraphs
from edgead.server_side.fit_options import fit_options


@click.command()
@click.argument("detector", required=False, type=click.Path(path_type=Path))
@click.option("--normal", type=click.Path(path_type=Path), help="Fit on this folder of good parts first.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="onnx, openvino or tensorrt, each also with :fp16; may be repeated. Default: onnx.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The bundle: a folder, or one file that ends with .edgead.",
)
@click.option("--name", help="The bundle's name; that of the output if left out.")
@click.option("--capacity", type=click.IntRange(1), help="Rows that TensorRT engines have room for.")
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    metavar="X.Y",
    help="Build TensorRT plans ahead of time for this GPU generation; may be repeated.",
)
@click.option(
    "--with-normality",
    "normality",
    type=click.Path(path_type=Path),
    metavar="NORMALITY.detector",
    help="Put this normality detector into the bundle too (edgead fit --method normality), so that sentences can "
    "say later what is normal: edgead normality add.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print the bundle's engines and parity as JSON.")
@fit_options
def export(
    detector: Path | None,
    normal: Path | None,
    targets: tuple[str, ...],
    output: Path,
    name: str | None,
    capacity: int | None,
    capabilities: tuple[str, ...],
    normality: Path | None,
    force: bool,
    as_json: bool,
    **words: Any,
) -> None:
    """Compile a fitted DETECTOR, or photographs of good parts, into a bundle of checked engines.

    The export fails if an engine disagrees with torch on golden images; nothing is written then.

    \b
    Example:
      edgead export --normal photos/good --target onnx --target openvino:fp16 -o part.bundle
      edgead export part.detector --target tensorrt:fp16 --compute-capability 8.6 -o part.edgead
    """
    if (detector is None) == (normal is None):
        raise InputError(
            wanted="either a fitted-detector file or --normal DIR",
            got="both" if detector is not None else "neither",
            next_step="Example: edgead export --normal photos/good -o part.bundle",
        )
    refuse_existing(output, force)
    from edgead.detector_file import read_detector
    from edgead.exporter.export import export_bundle, parse_target
    from edgead.runtime.provenance_file import pin_path, provenance_beside, provenance_path, write_provenance

    wanted = targets or ("onnx",)
    for text in wanted:  # a misspelt target must not cost the time of a fit
        parse_target(text)
    second = None if normality is None else read_detector(normality)  # nor a path that leads nowhere
    with tempfile.TemporaryDirectory(prefix="edgead-fit-") as scratch:
        if normal is not None:
            from edgead.server_side.fit_cli import fit_from_options

            source: Any = fit_from_options(normal, Path(scratch) / "fitted.detector", **words)
        else:
            source = detector
        bundle = export_bundle(
            source,
            output,
            wanted,
            name=name,
            capacity=capacity,
            compute_capabilities=capabilities,
            normality=second,
            force=force,
        )
        fitted = Path(scratch) / "fitted.detector" if detector is None else detector
        provenance = provenance_beside(fitted)
        for stale in (provenance_path(output), pin_path(output)):  # of what was replaced
            stale.unlink(missing_ok=True)
        if provenance is not None:  # it speaks of rows by their ids, which the export does not change
            write_provenance(provenance_path(output), provenance)
    if as_json:
        engines = {
            record.name: None
            if record.parity is None
            else {
                "score": record.parity.score,
                "map": record.parity.map,
                "images": record.parity.images,
                "normality": _normality_figures(record.normality),
            }
            for record in bundle.manifest.engines
        }
        click.echo(json.dumps({"output": str(output), "engines": engines}, sort_keys=True))
        return
    size = sum(record.size for record in bundle.manifest.files.values())
    click.echo(f"wrote {output} ({size / 1e6:.1f} MB)")
    for record in bundle.manifest.engines:
        if record.parity is not None:
            text = f"score off by {record.parity.score:.1e}, map by {record.parity.map:.1e} of its range from torch"
        else:
            text = "not executed here; compile it on the device" if record.recipe else "not executed here"
        click.echo(f"  {record.name:<15} {text}")
        if record.normality is not None and record.normality.parity is not None:
            click.echo(f"  {'':<15} normality map off by {record.normality.parity.map:.1e}")
    click.echo(f"next: edgead run {output} PICTURES")
    if second is not None:
        click.echo(f'      edgead normality add {output} --class CLASS "WHAT IS NORMAL" -o normal.delta')


def _normality_figures(pair: NormalityGraphs | None) -> dict[str, float] | None:
    """Parity of the second pair of graphs; null if there is none or it was not executed."""
    if pair is None or pair.parity is None:
        return None
    return {"score": pair.parity.score, "map": pair.parity.map}
