"""`edgead distil`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from edgead.runtime.errors import InputError
from edgead.runtime.files import refuse_existing
from edgead.server_side.fit_options import anomalous_samples, parse_layers, parse_preprocessing

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("teachers", metavar="TEACHER.detector...", nargs=-1, required=True, type=_PATH)
@click.option("--normal", required=True, type=_PATH, help="Folder of good parts.")
@click.option("-o", "--output", required=True, type=_PATH, help="The student's .detector file.")
@click.option("--anomalous", type=_PATH, help="Pictures of anomalies; painted defects are used in any case.")
@click.option("--data", type=_PATH, help="Labelled data set in the MVTec layout to compare both on.")
@click.option("--limit", type=click.IntRange(1), help="At most so many images of each type of --data.")
@click.option("--size", help="The student's engine frame: SIDE or WIDTHxHEIGHT; the teacher's if left out.")
@click.option("--backbone", default="embedded", show_default=True, help="The student's frozen feature network.")
@click.option("--backbone-weights", type=_PATH, help="Local weights for it.")
@click.option("--layers", help="Layers of it, comma-separated; its own choice if left out.")
@click.option("--steps", type=click.IntRange(1), help="Most steps of training; 800 if left out.")
@click.option(
    "--device", help="Where to train, as auto, cpu, cuda, or one of several GPUs such as cuda:1; auto if left out."
)
@click.option(
    "--false-alarms",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Wanted share of normal frames called NG.",
)
@click.option("--product", help="Name of the product; the teacher's if left out.")
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def distil(
    teachers: tuple[Path, ...],
    normal: Path,
    output: Path,
    anomalous: Path | None,
    data: Path | None,
    limit: int | None,
    size: str | None,
    backbone: str,
    backbone_weights: Path | None,
    layers: str | None,
    steps: int | None,
    device: str | None,
    false_alarms: float,
    product: str | None,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Teach a small student the maps of one detector, or the mean of several.

    The student is a fitted detector like any other. Interrupted, the same command goes on; only the teacher's
    maps are made anew. Photographs that the teacher did not learn from are best: of those in its memory its maps know
    too much.

    \b
    Example:
      edgead distil heavy.detector --normal photos/good -o student.detector
      edgead distil a.detector b.detector --normal photos/good --data photos -o student.detector --json
    """
    from edgead.runtime.image import list_images, read_image

    if limit is not None and data is None:
        raise InputError(wanted="--data with --limit", got="no --data", next_step="Add it, or leave --limit out.")
    paths = list_images(normal)
    samples = anomalous_samples(anomalous)
    wanted = None if size is None else parse_preprocessing(size, None, None, 0.1, "0")
    refuse_existing(output, force)
    if data is not None:
        from edgead.server_side.datasets import test_samples

        test_samples(data)  # a mistake there is better told before minutes of work
    # torch comes with these imports, so mistakes in the options are told before them
    from edgead.detector_file import read_detector
    from edgead.server_side import distil_report as report
    from edgead.server_side.detectors.trained import TrainedOptions
    from edgead.server_side.distil import BATCH
    from edgead.server_side.distil import distil as run
    from edgead.server_side.distil_teacher import Teacher

    teacher = Teacher([read_detector(path) for path in teachers], [path.name for path in teachers])
    first = teacher.detectors[0]
    options = TrainedOptions(
        backbone=backbone,
        backbone_weights=backbone_weights,
        layers=parse_layers(layers),
        preprocessing=wanted or first.spec.preprocessing,
        steps=steps,
        batch=BATCH,
        false_alarm_rate=false_alarms,
        product=product or first.pack.product,
        seed=seed,
        device=device or "auto",
    )
    checkpoint = output.with_name(output.name + ".training")
    found = run(teacher, paths, options, samples, checkpoint=checkpoint)
    student = Teacher([found.learned], [output.name])
    lost = {"painted": report.on_painted(teacher, student, found.held_out, seed)}
    if data is not None:
        lost["data"] = report.on_data(teacher, student, data, limit)
    result = {
        "lost": {name: dataclasses.asdict(loss) for name, loss in lost.items()},
        "gained": report.gained(teacher, student, read_image(paths[0])),
    }
    found.learned.card["distillation"] = {**result["lost"], "painted_seed": seed}
    found.learned.write(output, force=force)
    checkpoint.unlink(missing_ok=True)
    if as_json:
        click.echo(json.dumps({"output": str(output), **result, "card": found.learned.card}, sort_keys=True))
        return
    _tell(output, found.learned.card, result)


def _tell(output: Path, card: dict[str, Any], result: dict[str, Any]) -> None:
    click.echo(f"wrote {output}")
    click.echo(f"  {card['calibration']}")
    for name, loss in result["lost"].items():
        where = "held-out photographs, half with painted defects" if name == "painted" else "labelled data"
        click.echo(f"lost, on {loss['images']} {where}:")
        click.echo(
            f"  correlation of scores {_figure(loss['correlation'])}, of ranks {_figure(loss['rank_correlation'])}, "
            f"of maps {_figure(loss['map_correlation'])}; same verdict {100 * loss['agreement']:.0f} %"
        )
        for side in ("teacher", "student"):
            each = loss[side]
            click.echo(
                f"  {side:<8} image AUROC {_figure(each['image_auroc'])}  pixel AUROC {_figure(each['pixel_auroc'])}"
                + (f"  false alarms {_figure(each['false_alarms'])}" if each["false_alarms"] is not None else "")
            )
    click.echo("gained, in torch on this machine:")
    for side, each in result["gained"].items():
        click.echo(
            f"  {side:<8} {each['milliseconds_in_torch']:.1f} ms per frame, {each['parameters'] / 1e6:.2f} M "
            f"parameters, {each['bytes'] / 2**20:.1f} MiB with knowledge"
        )
    click.echo(f"next: edgead export {output} --target onnx -o {output.with_suffix('.bundle').name}")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
