"""`edgead fit`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgead.server_side.fit_options import (
    anomalous_samples,
    check_method,
    fit_options,
    parse_layers,
    parse_preprocessing,
)


@click.command()
@click.option("--normal", required=True, type=click.Path(path_type=Path), help="Folder of good parts.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The .detector file.")
@fit_options
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the detector's card as JSON.")
def fit(normal: Path, output: Path, force: bool, as_json: bool, **words: Any) -> None:
    """Learn what normal is from photographs of good parts; writes a fitted-detector file.

    \b
    Example:
      edgead fit --normal photos/good -o part.detector
      edgead fit --normal photos/good --roi 100,50,1000,800 --tiles 3x2 -o part.detector
    """
    detector = fit_from_options(normal, output, force=force, **words)
    if as_json:
        click.echo(json.dumps({"output": str(output), **detector.card}, sort_keys=True))
        return
    bank = detector.card["bank"]
    click.echo(f"wrote {output}")
    left_out = detector.card["images"].get("left_out_unreadable", 0)
    click.echo(f"  images      {detector.card['images']['all']}{f', {left_out} unreadable left out' * bool(left_out)}")
    click.echo(f"  bank        {bank['normal_rows']} rows x {bank['dimensions']}")
    click.echo(f"  threshold   {detector.pack.calibration.threshold:.4g}")
    click.echo(f"  {detector.card['calibration']}")
    unusual = ", ".join(f"{item['image']} ({item['score']:.4g})" for item in detector.card["most_unusual"])
    click.echo(f"  most unusual of the held-out photographs: {unusual}")
    click.echo("  look at them: a bad part among the good ones raises the threshold and hides defects")
    click.echo(f"next: edgead export {output} --target onnx -o {output.with_suffix('.bundle').name}")


def fit_from_options(normal: Path, output: Path, *, force: bool = False, **words: Any) -> Any:
    """Fit as the words of `fit_options` say; see `edgead.server_side.fitting.fit_memory_bank`."""
    check_method(words["method"])
    preprocessing = parse_preprocessing(words["size"], words["roi"], words["tiles"], words["overlap"], words["rotate"])
    samples = anomalous_samples(words["anomalous"])
    # torch comes with this import, so mistakes in the options are told before it
    from edgead.server_side.fitting import FitOptions, fit_memory_bank

    options = FitOptions(
        backbone=words["backbone"],
        backbone_weights=words["backbone_weights"],
        layers=parse_layers(words["layers"]),
        preprocessing=preprocessing,
        rows=words["rows"],
        neighbours=words["neighbours"],
        false_alarm_rate=words["false_alarms"],
        product=words["product"],
        seed=words["seed"],
        skip_unreadable=words["skip_unreadable"],
    )
    detector = fit_memory_bank(normal, output, options, anomalous=samples, force=force)
    _tell_left_out(detector.card)
    return detector


def _tell_left_out(card: Mapping[str, Any]) -> None:
    """Name on standard error what nothing was learned from, so that it is seen beside --json too."""
    count, named = card["images"].get("left_out_unreadable", 0), card.get("left_out", [])
    for item in named:
        click.echo(f"left out {item['image']}: {item['reason']}", err=True)
    if count > len(named):
        click.echo(f"left out {count - len(named)} more", err=True)
