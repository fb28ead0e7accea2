"""`edgead projections`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.option("--model", required=True, help="open_clip model, or a JSON configuration.")
@click.option("--model-weights", required=True, help="Its pretrained tag, a local checkpoint, or random:SEED.")
@click.option(
    "--auxiliary",
    type=click.Path(path_type=Path),
    help="Data set with masks in the MVTec layout to train on; painted parts if left out.",
)
@click.option("--layers", help="Layers of the tower to compare, comma-separated; four evenly spread if left out.")
@click.option("--epochs", type=click.IntRange(1), help="At most so many; training ends when it no longer gets better.")
@click.option("--batch", type=click.IntRange(1), help="Pictures in one step.")
@click.option(
    "--named-types/--no-named-types",
    default=True,
    show_default=True,
    help="Teach types of defects apart by sentences that name them, where the auxiliary set does (folders of test/); "
    "without this, the paper's recipe: sentences say good or damaged only.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file of projections.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print how they were trained as JSON.")
def projections(
    model: str,
    model_weights: str,
    auxiliary: Path | None,
    layers: str | None,
    epochs: int | None,
    batch: int | None,
    named_types: bool,
    seed: int,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Train the projections that compare a model's inner layers with sentences (april-gan, normality).

    One file serves every detector over the same model. The training is kept beside the output after each epoch:
    interrupted, the same command goes on where it was.

    \b
    Example:
      edgead projections --model ViT-L-14-336 --model-weights openai --auxiliary visa/ -o vit-l.projections
      edgead fit --method normality --model ViT-L-14-336 --model-weights openai \\
        --projections vit-l.projections --class carpet -o normality.detector
    """
    from edgead.runtime.files import refuse_existing
    from edgead.server_side.fit_options import parse_tower_layers

    refuse_existing(output, force)
    chosen = parse_tower_layers(layers)
    from edgead.server_side.detectors.april_gan import open_trunk
    from edgead.server_side.detectors.projection_training import TrainingOptions
    from edgead.server_side.detectors.projections import write_projections
    from edgead.server_side.vision_language.options import VisionLanguageOptions

    usual = TrainingOptions()
    training = TrainingOptions(
        epochs=epochs or usual.epochs,
        batch=batch or usual.batch,
        seed=seed,
        named=usual.named if named_types else 0.0,
    )
    options = VisionLanguageOptions(
        model=model, weights=model_weights, auxiliary=auxiliary, layers=chosen, seed=seed, class_name="object"
    )
    checkpoint = output.with_name(output.name + ".training")
    opened = open_trunk(options, training, checkpoint)
    write_projections(
        output,
        opened.trunk.projections,
        model=opened.model.name,
        weights=opened.model.weights_sha256,
        record=opened.facts,
    )
    checkpoint.unlink(missing_ok=True)
    if as_json:
        click.echo(json.dumps({"output": str(output), **opened.facts}, sort_keys=True))
        return
    click.echo(f"wrote {output}: layers {', '.join(map(str, opened.trunk.layers))} of {opened.model.name}")
    click.echo(f"next: edgead fit --method normality --projections {output} --model {model} ... -o normality.detector")
