"""`edgead kka`: anomalies that nobody photographed, written, painted, judged, and better chosen each round."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.files import new_folder, refuse_existing, write_file
from edgead.runtime.image import list_images
from edgead.runtime.tables import table
from edgead.server_side.kka.config import CONFIG_BYTES, read_config
from edgead.server_side.kka.records import Caption, Image, Normal, Representative
from edgead.server_side.kka.work import WorkFolder, trace

_CONFIG = click.argument("config", type=click.Path(path_type=Path))
_WORK = click.argument("work", type=click.Path(path_type=Path, file_okay=False))
_OUTPUT = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Work folder; by default beside CONFIG, with its name.",
)
_RAY = click.option(
    "--ray",
    metavar="ADDRESS",
    help="Write, paint, embed and judge on a Ray cluster, with the same results: auto, local, HOST:PORT or "
    "ray://HOST:PORT. Its machines see photographs, WORK and models under the same paths.",
)
_ROUND = click.option("--round", "number", type=click.IntRange(0), help="Stop after this round.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(
    epilog="A run can be ended at any time and goes on where it was: nothing is made twice. WORK is its folder, plain "
    "files that say of everything what made it."
)
def kka() -> None:
    """Key knowledge augmentation: captions of anomalies, painted, judged hard or easy, and preferred.

    \b
    Example:
      edgead kka new --normals photos/good -o carpet.toml
      edgead kka run carpet.toml
      edgead kka export-set carpet.kka --round 2 -o anomalies/
      edgead fit --method simplenet --normal photos/good --anomalous anomalies/ -o carpet.detector
    """


@kka.command()
@click.option("--normals", required=True, help="Folder of photographs of normal parts.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The configuration, TOML."
)
@click.option("--force", is_flag=True, help="Replace what is there.")
def new(normals: str, output: Path, force: bool) -> None:
    """Write a configuration with all fields and what they mean.

    \b
    Example:
      edgead kka new --normals photos/good -o carpet.toml
    """
    from edgead.server_side.kka.template import template

    refuse_existing(output, force)
    count = len(list_images(normals))
    # Paths in the file are relative to it, those of the command line to where one is.
    place = normals if os.path.isabs(normals) else os.path.relpath(normals, output.parent)
    write_file(output, template(place).encode())
    click.echo(f"wrote {output} for {count} photographs; look it through, then: edgead kka run {output}")


def _stage_command(name: str, text: str) -> None:
    if name != "run":
        text += " With all that comes before it and is not done yet."

    @kka.command(name, help=f"{text}\n\n\b\nExample:\n  edgead kka {name} carpet.toml")
    @_CONFIG
    @_OUTPUT
    @_ROUND
    @_RAY
    @_JSON
    def command(config: Path, output: Path | None, number: int | None, ray: str | None, as_json: bool) -> None:
        _run(config, output, None if name == "run" else name, number, ray, as_json)


_stage_command("run", "Run all stages of all rounds, and write the report.")
_stage_command("describe", "Describe the normals: a caption for each photograph.")
_stage_command("representatives", "Find clusters of normals, and the most typical one of each.")
_stage_command("imagine", "Have captions of anomalies written after those of the representatives.")
_stage_command("paint", "Paint the captions of a round, on photographs of normals where the painter can.")
_stage_command("judge", "Train the confusion evaluator and divide images into hard and easy ones.")
_stage_command("prefer", "Teach the author to prefer captions of hard anomalies.")


@kka.command()
@_WORK
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="By default WORK/report.html.")
def report(work: Path, output: Path | None) -> None:
    """Write the report of a run as one HTML page: rounds side by side, distances, costs.

    \b
    Example:
      edgead kka report carpet.kka
    """
    from edgead.server_side.kka.report import write_report

    click.echo(f"wrote {write_report(WorkFolder(work), output)}")


@kka.command("trace")
@_WORK
@click.argument("image")
@_JSON
def trace_command(work: Path, image: str, as_json: bool) -> None:
    """Show where an image comes from: caption, prompt, models, seeds, the normal that it was written after.

    \b
    Example:
      edgead kka trace carpet.kka i1-00042
    """
    import msgspec

    run = WorkFolder(work)
    found = trace(run, image)
    if as_json:
        click.echo(json.dumps([{"kind": record.kind, **msgspec.to_builtins(record)} for record in found]))
        return
    for record in found:
        content: dict[str, Any] = msgspec.to_builtins(record)
        made = content.pop("made", {})
        click.echo(f"{record.kind}: {content.pop('id', '')}")
        if isinstance(record, Image) and record.normal:
            photographs = {normal.id: normal.file for normal in run.records(Normal)}
            content["normal"] = f"{record.normal} ({photographs.get(record.normal, 'not in normals.jsonl')})"
        for name, value in [*content.items(), *((f"made {key}", value) for key, value in made.items())]:
            click.echo(f"  {name:<12} {value}")


@kka.command("export-set")
@_WORK
@click.option("--round", "number", type=click.IntRange(0), help="After which round; the last one that is complete.")
@click.option("--only", type=click.Choice(["hard", "easy"]), help="Only these of the set.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the pictures."
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@_JSON
def export_set(work: Path, number: int | None, only: str | None, output: Path, force: bool, as_json: bool) -> None:
    """Write the anomalies of a round as pictures with masks beside them, for `edgead fit --anomalous`.

    \b
    Example:
      edgead kka export-set carpet.kka --round 2 -o anomalies/
    """
    from edgead.server_side.kka.sets import export_members

    run = WorkFolder(work)
    with new_folder(output, force=force) as folder:
        count, masks, which = export_members(run, number, folder, only=only)
    if as_json:
        click.echo(json.dumps({"set": str(output), "images": count, "masks": masks, "round": which}))
        return
    click.echo(f"wrote {count} images, {masks} with masks, of KKA({which}) to {output}")


_STAGES = ("describe", "representatives", "imagine", "paint", "judge", "prefer")


def _made(work: WorkFolder) -> dict[str, int]:
    """How many of each there are, of all rounds together."""
    rounds = range(work.config.rounds + 1)
    return {
        "normals": len(work.records(Normal)),
        "representatives": len(work.records(Representative)),
        "captions": sum(len(work.records(Caption, at)) for at in rounds),
        "images": sum(len(work.records(Image, at)) for at in rounds),
    }


def _run(
    config: Path, output: Path | None, stage: str | None, number: int | None, ray: str | None, as_json: bool
) -> None:
    if not config.is_file():
        raise InputError(
            wanted=f"the configuration of a run at {config}",
            got="a folder" if config.is_dir() else "nothing there",
            next_step=f"Name the configuration that this run was begun with, such as {config.with_suffix('.toml')}."
            if (config / "run.json").exists()
            else "Write one with: edgead kka new --normals DIR -o FILE",
        )
    checked = read_config(config)
    with storage_errors(config, "to read the configuration"), open(config, "rb") as stream:
        toml = stream.read(CONFIG_BYTES)
    # torch comes with these imports, so mistakes in the configuration are told before them
    from edgead.server_side.kka.makers import opened_makers
    from edgead.server_side.kka.preflight import check
    from edgead.server_side.kka.rounds import facts, run

    if number is not None and number > checked.rounds:
        raise InputError(
            wanted=f"a round from 0 to {checked.rounds}",
            got=str(number),
            next_step="Raise `rounds` in the configuration; the run goes on with more.",
        )
    place = output or config.with_suffix(".kka")
    check(checked, stage, lambda name, at: (place / f"round-{at}" / f"{name}.done").exists())
    work = WorkFolder.create(place, checked, toml)
    with (
        work.locked(),
        opened_makers(checked, ray=ray, say=lambda line: click.echo(line, err=True)) as makers,
    ):
        run(work, makers, stage=stage, last_round=number)
        done = [at for at in range(checked.rounds + 1) if work.is_done("judge", at)]
        found = [facts(work, at) for at in done]
        if stage is None:
            from edgead.server_side.kka.report import write_report

            write_report(work)
    if as_json:
        for each in found:
            del each["distances_over_limit"]
        click.echo(json.dumps({"work": str(work.path), **_made(work), "rounds": found}))
        return
    made = _made(work)
    click.echo(f"work folder {work.path}: " + ", ".join(f"{count} {name}" for name, count in made.items()))
    if found:
        rows = [["round", "images", "hard", "easy", "faint", "refused", "hard share", "set", "preferences"]]
        for each in found:
            share = "-" if each["hard_share"] is None else f"{100 * each['hard_share']:.0f} %"
            names = ("round", "images", "hard", "easy", "faint", "refused")
            rows.append([*(str(each[name]) for name in names), share, str(each["set"]), str(each["preferences"])])
        click.echo(table(rows))
    if stage is None:
        click.echo(f"report {work.path / 'report.html'}")
        click.echo(f"next: edgead kka export-set {work.path} -o FOLDER")
    else:
        # Without rounds there is nothing to prefer; with them, the next round comes after it.
        following = _STAGES[_STAGES.index(stage) + 1 :]
        last = not following or (stage == "judge" and not checked.rounds)
        click.echo(f"next: edgead kka {'run' if last else following[0]} {config}")


__all__ = ["kka"]
