"""`edgead backbone`: show, distil and validate feature networks."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgead.runtime.errors import InputError
from edgead.runtime.files import refuse_existing

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(epilog="Example: edgead backbone show")
def backbone() -> None:
    """Show, distil or validate the networks that turn images into features."""


@backbone.command(epilog="Example: edgead backbone show --json")
@click.option("--json", "as_json", is_flag=True, help="The whole card as JSON.")
def show(as_json: bool) -> None:
    """The card of the embedded backbone, and the other names that --backbone takes."""
    from edgead.server_side.backbones import embedded_card, list_backbones
    from edgead.server_side.backbones.card import card_text

    card = embedded_card()
    if as_json:
        click.echo(json.dumps(card, indent=2, ensure_ascii=False))
        return
    click.echo(card_text(card))
    click.echo("\nBackbones by name:")
    names = list_backbones()
    width = max(map(len, names))
    for name, text in names.items():
        click.echo(f"  {name.ljust(width)}  {text}")


@backbone.command(
    epilog="Example: edgead backbone distil --teacher mobilenet_v2_1.0_224_quant.tflite --images photos/ "
    "--out backbone.safetensors"
)
@click.option("--teacher", type=_FILE, required=True, help="MobileNetV2 1.0, quantised TensorFlow Lite file.")
@click.option("--images", type=_FOLDER, required=True, help="Pictures of anything; no defects needed.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Weights; the card goes beside.")
@click.option("--steps", default=4500, show_default=True, help="Length of the schedule.")
@click.option("--stop-at", type=int, help="Stop early, after this step, with a cool-down.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="A torch device, such as cuda.")
@click.option("--leave-out", multiple=True, metavar="PREFIX", help="File names to keep for validation.")
@click.option("--from-scratch", is_flag=True, help="Start from random weights, not from the teacher's.")
@click.option("--low-precision", is_flag=True, help="Run the teacher in bfloat16.")
@click.option("--resume/--restart", default=True, show_default=True, help="Continue from OUT.checkpoint, or delete it.")
@click.option("--force", is_flag=True, help="Replace OUT.")
def distil(
    teacher: Path,
    images: Path,
    out: Path,
    steps: int,
    stop_at: int | None,
    seed: int,
    device: str,
    leave_out: tuple[str, ...],
    from_scratch: bool,
    low_precision: bool,
    resume: bool,
    force: bool,
) -> None:
    """Distil a teacher into the embedded network. Interrupted, the same command continues."""
    from edgead.server_side.backbones.card import make_card, write_card
    from edgead.server_side.backbones.distillation import DistilConfig
    from edgead.server_side.backbones.distillation import distil as run_distil
    from edgead.server_side.backbones.embedded import TAPS
    from edgead.server_side.backbones.mobilenet_v2 import load_mobilenet_v2

    refuse_existing(out, force)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if not resume:
        checkpoint.unlink(missing_ok=True)
    config = DistilConfig(
        steps=steps,
        stop_at=stop_at,
        seed=seed,
        warm_start=not from_scratch,
        low_precision=low_precision,
    )
    run = run_distil(
        load_mobilenet_v2(teacher, TAPS),
        images,
        config,
        out,
        checkpoint=checkpoint,
        device=device,
        leave_out=leave_out,
    )
    command = [f"edgead backbone distil --teacher {teacher.name} --images {images.name} --out {out.name}"]
    command += [f"--steps {steps}", f"--seed {seed}", *(f"--leave-out {prefix}" for prefix in leave_out)]
    command += [f"--stop-at {stop_at}"] if stop_at is not None else []
    command += ["--from-scratch"] if from_scratch else []
    command += ["--low-precision"] if low_precision else []
    write_card(out.with_suffix(".json"), make_card(run, out, teacher, " ".join(command)))
    checkpoint.unlink(missing_ok=True)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {run.step} steps, card {out.with_suffix('.json')}")


@backbone.command(epilog="Example: edgead backbone validate --normal part-a/train/good --normal part-b/train/good")
@click.option("--backbone", "name", default="embedded", show_default=True, help="See `edgead backbone show`.")
@click.option("--backbone-weights", type=_FILE, help="A local file of weights.")
@click.option("--layers", help="Comma-separated layers of that backbone.")
@click.option("--normal", type=_FOLDER, multiple=True, help="A folder of normal images: one product.")
@click.option("--texture", type=_FILE, multiple=True, help="One picture of a material: its crops, a product.")
@click.option("--bank", default=50, show_default=True, help="Images of a folder that fill its bank.")
@click.option("--probes", default=40, show_default=True, help="Images of a folder that are scored.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--mirrored", is_flag=True, help="Average the features over mirror images.")
@click.option("--json", "as_json", is_flag=True, help="Scores as JSON.")
def validate(
    name: str,
    backbone_weights: Path | None,
    layers: str | None,
    normal: tuple[Path, ...],
    texture: tuple[Path, ...],
    bank: int,
    probes: int,
    seed: int,
    device: str,
    mirrored: bool,
    as_json: bool,
) -> None:
    """Score a backbone on painted defects: for choosing, without touching a test set."""
    from edgead.server_side.backbones import load_backbone
    from edgead.server_side.backbones import validation as v
    from edgead.server_side.backbones.targets import expected_maps

    if not normal and not texture:
        raise InputError(
            wanted="products to validate on",
            got="none",
            next_step="Name folders of normal images with --normal, or pictures of materials with --texture.",
        )
    model = load_backbone(name, backbone_weights, layers.split(",") if layers else None).to(device)
    products = [v.product_from_folder(folder, bank=bank, probes=probes) for folder in normal]
    products += [
        v.product_from_texture(path, bank=max(2, bank * 2 // 5), probes=max(2, probes // 2)) for path in texture
    ]
    features = (lambda image: expected_maps(model, image)) if mirrored else model
    scores = v.score_backbone(features, products, seed=seed, device=device)
    mean = sum(s.image_auroc for s in scores) / len(scores)
    if as_json:
        rows = [{"product": s.product, "image_auroc": s.image_auroc, "patch_auroc": s.patch_auroc} for s in scores]
        click.echo(json.dumps({"backbone": name, "mean_image_auroc": mean, "products": rows}, indent=2))
        return
    click.echo("image  patch  (AUROC on painted defects)")
    for score in scores:
        click.echo(f"{score.image_auroc:.3f}  {score.patch_auroc:.3f}  {score.product}")
    click.echo(f"{mean:.3f}         mean of {len(scores)}")
