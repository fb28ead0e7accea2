"""`edgead evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Data set in the MVTec layout.")
@click.option("--product", help="Whose knowledge to compare with; the bundle's default if left out.")
@click.option("--target", help="Which engine: onnx, openvino:fp16, ...; the best here if left out.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads per inference.")
@click.option("--limit", type=click.IntRange(1), help="At most so many images of each type.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a report as one HTML page.")
@click.option("--force", is_flag=True, help="Replace an existing report.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(
    bundle: Path,
    data: Path,
    product: str | None,
    target: str | None,
    threads: int | None,
    limit: int | None,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure BUNDLE on a labelled data set: test/<type>/, ground_truth/<type>/<name>_mask.png.

    \b
    Example:
      edgead evaluate part.bundle --data photos --html report.html
      edgead evaluate part.bundle --data photos --target openvino:fp16 --json
      edgead evaluate parts.bundle --data flange-photos --product flange
    """
    from edgead.runtime.bundle import open_bundle
    from edgead.runtime.files import refuse_existing, write_file
    from edgead.runtime.inspector import Inspector
    from edgead.server_side.evaluation import evaluate_bundle
    from edgead.server_side.evaluation_report import html_report, text_table

    if html is not None:
        refuse_existing(html, force)
    opened = open_bundle(bundle)
    product = product or opened.manifest.default
    with Inspector(opened, target=target, threads=threads, products=[product]) as inspector:
        result = evaluate_bundle(inspector, data, product=product, limit=limit)
        report = None
        if html is not None:
            # A bundle of several products says which of them it was.
            name = opened.manifest.name if len(opened.products) < 2 else f"{opened.manifest.name}: {product}"
            title = f"{name} on {data.resolve().name}"
            report = html_report(result, inspector, title).encode()
    # The figures first: a page that cannot be written must not cost them.
    click.echo(json.dumps(result.to_dict(), sort_keys=True) if as_json else text_table(result))
    if html is not None and report is not None:
        write_file(html, report)
        click.echo(f"wrote {html}", err=as_json)
