"""`edgead evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime.errors import InputError

if TYPE_CHECKING:
    from edgead.runtime.bundle import Bundle
    from edgead.server_side.protocols import Encode

PROTOCOLS = ("normality-addition", "zero-shot", "few-shot")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Data set in the MVTec layout.")
@click.option("--product", help="Whose knowledge to compare with; the bundle's default if left out.")
@click.option("--target", help="Which engine: onnx, openvino:fp16, ...; the best here if left out.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads per inference.")
@click.option("--limit", type=click.IntRange(1), help="At most so many images of each type.")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    help="A published protocol, beside its published figures. --data may then be a folder of data sets, one for each "
    "category, and BUNDLE a folder of bundles of the same names.",
)
@click.option(
    "--groups",
    type=click.Path(path_type=Path),
    help="normality-addition: JSON file of groups of similar defect types; edgead's own for MVTec AD if left out.",
)
@click.option("--model", help="normality-addition: name or open_clip config of the text encoder, as fitted with.")
@click.option("--model-weights", help="Its pretrained tag or checkpoint; what the bundle says if left out.")
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
    protocol: str | None,
    groups: Path | None,
    model: str | None,
    model_weights: str | None,
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
      edgead evaluate part.bundle --data carpet --protocol normality-addition --groups groups.json
      edgead evaluate bundles/ --data mvtec --protocol zero-shot --html report.html
    """
    from edgead.runtime.bundle import open_bundle
    from edgead.runtime.files import refuse_existing, write_file
    from edgead.runtime.inspector import Inspector
    from edgead.server_side.evaluation import evaluate_bundle
    from edgead.server_side.evaluation_report import html_report, text_table

    if html is not None:
        refuse_existing(html, force)
    if protocol is None and (groups or model or model_weights):
        raise InputError(
            wanted="--protocol normality-addition with --groups, --model or --model-weights",
            got="no --protocol",
            next_step="Add it, or leave these options out.",
        )
    if protocol is not None:
        words = {"product": product, "target": target, "threads": threads, "limit": limit}
        text, content, drawn = _protocol(bundle, data, protocol, groups, model, model_weights, words)
        click.echo(json.dumps(content, sort_keys=True) if as_json else text)
        if html is not None:
            write_file(html, drawn.encode())
            click.echo(f"wrote {html}", err=as_json)
        return
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


def _protocol(
    bundle: Path,
    data: Path,
    protocol: str,
    groups: Path | None,
    model: str | None,
    weights: str | None,
    words: dict[str, Any],
) -> tuple[str, dict[str, Any], str]:
    """Run a protocol: its result as text, as JSON-like values, as a page."""
    from edgead.server_side import protocol_report as report
    from edgead.server_side import protocols
    from edgead.server_side.protocol_groups import read_groups

    title = f"{protocol} of {bundle.resolve().name} on {data.resolve().name}"
    if protocol == "normality-addition":
        grouping = read_groups(groups)
        addition = protocols.normality_addition(bundle, data, grouping, _encoders(model, weights), **words)
        return (
            report.addition_text(addition),
            report.addition_dict(addition),
            report.addition_html(addition, title),
        )
    if groups or model or weights:
        raise InputError(
            wanted="--groups, --model and --model-weights with --protocol normality-addition",
            got=f"--protocol {protocol}",
            next_step="Leave them out.",
        )
    shot = protocols.shots(bundle, data, "zero-shot" if protocol == "zero-shot" else "few-shot", **words)
    return report.shot_text(shot), report.shot_dict(shot), report.shot_html(shot, title)


def _encoders(model: str | None, weights: str | None) -> Callable[[Bundle], Encode]:
    """A bundle -> what encodes sentences for it; the text encoder is loaded once for bundles that name the same."""
    from edgead.runtime.notes import read_note
    from edgead.server_side import normalities, protocols
    from edgead.server_side.vision_language import VisionLanguageModel, load_model

    loaded: dict[tuple[str, str | None], VisionLanguageModel] = {}

    def encode(bundle: Bundle) -> Encode:
        record = normalities.normality_of(bundle)
        name = model or record.model
        if name is None:
            raise InputError(
                wanted="the name of the text encoder",
                got="a bundle that does not say it",
                next_step="Add: --model NAME --model-weights TAG_OR_FILE",
            )
        note = read_note(bundle.pack(), normalities.NORMALITY_TABLE)
        key = (name, weights or note.get("weights"))
        if key not in loaded:
            loaded[key] = load_model(*key)
        return protocols.encoder(loaded[key], bundle)

    return encode
