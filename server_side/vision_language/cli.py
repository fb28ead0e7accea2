"""`edgead text-table`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from edgead.runtime.files import refuse_existing
from edgead.server_side.prompts import read_prompt_set
from edgead.server_side.vision_language.table import make_table_file


@click.command("text-table")
@click.argument("prompts", type=click.Path(path_type=Path), metavar="PROMPTS.json")
@click.option("--model", required=True, help="open_clip model name, such as ViT-B-16-plus-240, or own JSON config.")
@click.option(
    "--model-weights",
    "weights",
    help="Pretrained tag (fetched once), local checkpoint, TAG=FILE for a local copy of a tag, or random:SEED.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The text table.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def text_table(prompts: Path, model: str, weights: str | None, output: Path, force: bool, as_json: bool) -> None:
    """Encode the sentences of a prompt set with a model's text tower; writes a text table.

    Interrupt it at will: the next run with the same words goes on where this one stopped.

    \b
    Example:
      edgead prompts new carpet -o carpet.json
      edgead text-table carpet.json --model ViT-B-16-plus-240 --model-weights laion400m_e32 -o carpet.table
    """
    refuse_existing(output, force)
    sentences = read_prompt_set(prompts)
    # torch comes with this import, so mistakes in the files are told before it
    from edgead.server_side.vision_language.models import load_model

    loaded = load_model(model, weights)
    table = make_table_file(output, loaded, sentences, force=force)
    states = Counter(row.state for row in table.rows)
    authors = dict(sorted(Counter(row.author for row in table.rows).items()))
    if as_json:
        summary = {
            "output": str(output),
            "rows": len(table.rows),
            "dimensions": table.table.shape[1],
            "states": dict(sorted(states.items())),
            "authors": authors,
            "model": table.model,
            "weights": {"name": table.weights, "sha256": table.weights_sha256},
            "prompts_sha256": table.prompts,
        }
        click.echo(json.dumps(summary, sort_keys=True))
        return
    click.echo(f"wrote {output}")
    click.echo(f"  rows        {len(table.rows)} x {table.table.shape[1]}")
    click.echo(f"  states      {states['normal']} normal, {states['anomalous']} anomalous")
    click.echo(f"  authors     {', '.join(f'{name} ({count})' for name, count in authors.items())}")
    click.echo(f"  model       {table.model}, {table.weights} ({table.weights_sha256[:12]})")
    click.echo(f"next: edgead knowledge sentences BUNDLE {output} --held-out GOOD_PARTS -o sentences.delta")
