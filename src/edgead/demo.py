"""`edgead demo`: everything that edgead does, on parts that it paints itself."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.option(
    "-o",
    "--output",
    default=Path("demo-output"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="The folder to write: pictures, detectors, bundle, report.html.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--images",
    type=click.IntRange(6, 2000),
    default=80,
    show_default=True,
    help="Good parts to learn from, for each of the two products.",
)
@click.option(
    "--size", type=click.IntRange(64, 1024), default=256, show_default=True, help="Side of the engine's frame."
)
@click.option("--backbone", default="embedded", show_default=True, help="Feature network; see edgead fit.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON; the log goes to stderr.")
def demo(output: Path, force: bool, seed: int, images: int, size: int, backbone: str, as_json: bool) -> None:
    """See everything in about two minutes: paint, fit, export, inspect, teach a running inspector.

    Paints parts of two materials with four kinds of defects, learns them from good parts alone, compiles
    for every engine library of this machine, measures, and then teaches a running inspector that a newly
    engraved code is normal. Nothing is downloaded. The report is one file, OUTPUT/report.html.

    \b
    Example:
      edgead demo
      edgead demo --output /tmp/demo --images 30 --force
    """
    from edgead.demo_run import DemoOptions, run_demo

    def log(text: str) -> None:
        click.echo(text, err=as_json)

    options = DemoOptions(images=images, size=size, backbone=backbone, seed=seed)
    figures = run_demo(output, options, force=force, log=log)
    if as_json:
        click.echo(json.dumps(figures, sort_keys=True))
