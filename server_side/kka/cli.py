"""`edgead kka`: anomalies that nobody photographed, written, painted, judged, and better chosen each round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.files import new_folder, refuse_existing, write_file
from edgead.runtime.tables import table
from edgead.server_side.kka.config import CONFIG_BYTES, read_config
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

TEMPLATE = """\
# A run of key knowledge augmentation. Every field is here with its default; only `normals` has none.
# Paths are relative to this file.

normals = "{normals}"          # photographs of normal parts
product = "part"
class_name = "part"            # what the part is, in words: {{class_name}} in templates and prompts
mode = "add"                   # add: each round's anomalies join those before; rep: hard ones replace easy ones
rounds = 0                     # of preference training (2 or 3 in the paper); needs imagine.author = "local"
captions = 200                 # in each round
seed = 0
backbone = "embedded"          # in whose features clusters of normals are found

[describe]                     # captions of the normals: from a file, a captioner, or the template
captions = ""                  # file of lines FILE<TAB>CAPTION
captioner = ""                 # folder of an image-to-text model of transformers
template = "a photograph of a flawless {{class_name}}"

[representatives]
clusters = 8
shrinkage = 0.1

[imagine]                      # who writes captions of anomalies
author = "grammar"             # grammar: at random, no model; local: a causal model of transformers; endpoint
model = ""                     # folder of the local model, or the endpoint's name of one
url = ""                       # of an OpenAI-compatible endpoint
key_env = ""                   # environment variable with its key
temperature = 1.0
top_p = 1.0
max_tokens = 64
batch = 16
attempts = 3                   # until an answer can be used

[paint]                        # who paints them
painter = "procedural"         # or text-to-image, inpainting: pipelines of diffusers
model = ""                     # folder of the pipeline
prompt = "{{caption}}"
negative_prompt = ""
steps = 30
guidance = 7.5
strength = 1.0
size = 512
images = 1                     # of each caption

[judge]                        # the confusion evaluator
hard_quantile = 1.0            # hard: nearer to the centre than this quantile of held-out normals
visible_floor = 4.0            # mean change of colour, 0 to 255, below which a defect is too faint to count
eta = 1.0
evaluator = "each"             # each: trained anew in each round; first: that of round 0 judges all
folds = 2                      # an image is judged by an evaluator that was not trained on it; 1: by one that was
steps = 600
batch = 32
learning_rate = 1e-4
held_out = 0.2
size = 128

[prefer]                       # direct preference optimisation with LoRA
beta = 0.1
rank = 8
alpha = 8.0
dropout = 0.1
learning_rate = 5e-5
pairs = 256
steps = 150
batch = 4
accumulate = 4
reject_faint = true            # captions of too faint anomalies are rejected like easy ones
target_modules = []

[evaluate]                     # labelled pictures on which the sets of rounds are compared; nothing rests on them
data = ""                      # folder in the MVTec layout
steps = 1500
size = 256
"""


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
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--force", is_flag=True, help="Replace what is there.")
def new(normals: str, output: Path, force: bool) -> None:
    """Write a configuration with all fields and what they mean.

    \b
    Example:
      edgead kka new --normals photos/good -o carpet.toml
    """
    refuse_existing(output, force)
    write_file(output, TEMPLATE.format(normals=json.dumps(normals)[1:-1]).encode())
    click.echo(f"wrote {output}; next: edgead kka run {output}")


def _stage_command(name: str, text: str) -> None:
    @kka.command(name, help=f"{text}\n\n\b\nExample:\n  edgead kka {name} carpet.toml")
    @_CONFIG
    @_OUTPUT
    @_ROUND
    @_RAY
    @_JSON
    def command(config: Path, output: Path | None, number: int | None, ray: str | None, as_json: bool) -> None:
        _run(config, output, None if name == "run" else name, number, ray, as_json)


_stage_command("run", "Run all stages of all rounds, and write the report.")
_stage_command("describe", "Describe the normals.")
_stage_command("representatives", "Find clusters of normals, and the most typical one of each.")
_stage_command("imagine", "Have captions of anomalies written.")
_stage_command("paint", "Paint them.")
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

    found = trace(WorkFolder(work), image)
    if as_json:
        click.echo(json.dumps([{"kind": record.kind, **msgspec.to_builtins(record)} for record in found]))
        return
    for record in found:
        content: dict[str, Any] = msgspec.to_builtins(record)
        made = content.pop("made", {})
        click.echo(f"{record.kind}: {content.pop('id', '')}")
        for name, value in [*content.items(), *((f"made {key}", value) for key, value in made.items())]:
            click.echo(f"  {name:<12} {value}")


@kka.command("export-set")
@_WORK
@click.option("--round", "number", type=click.IntRange(0), help="After which round; the last one that is complete.")
@click.option("--only", type=click.Choice(["hard", "easy"]), help="Only these of the set.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--force", is_flag=True, help="Replace what is there.")
def export_set(work: Path, number: int | None, only: str | None, output: Path, force: bool) -> None:
    """Write the anomalies of a round as pictures with masks beside them, for `edgead fit --anomalous`.

    \b
    Example:
      edgead kka export-set carpet.kka --round 2 -o anomalies/
    """
    from edgead.server_side.kka.sets import export_members

    with new_folder(output, force=force) as folder:
        count, masks, which = export_members(WorkFolder(work), number, folder, only=only)
    click.echo(f"wrote {count} images, {masks} with masks, of KKA({which}) to {output}")


def _run(
    config: Path, output: Path | None, stage: str | None, number: int | None, ray: str | None, as_json: bool
) -> None:
    checked = read_config(config)
    with storage_errors(config, "to read the configuration"), open(config, "rb") as stream:
        toml = stream.read(CONFIG_BYTES)
    # torch comes with these imports, so mistakes in the configuration are told before them
    from edgead.server_side.kka.makers import opened_makers
    from edgead.server_side.kka.rounds import facts, run

    if number is not None and number > checked.rounds:
        raise InputError(
            wanted=f"a round from 0 to {checked.rounds}", got=str(number), next_step="Raise `rounds` in a new run."
        )
    work = WorkFolder.create(output or config.with_suffix(".kka"), checked, toml)
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
        click.echo(json.dumps({"work": str(work.path), "rounds": found}))
        return
    click.echo(f"work folder {work.path}")
    if found:
        rows = [["round", "images", "hard", "easy", "faint", "refused", "hard share", "set", "preferences"]]
        for each in found:
            share = "-" if each["hard_share"] is None else f"{100 * each['hard_share']:.0f} %"
            names = ("round", "images", "hard", "easy", "faint", "refused")
            rows.append([*(str(each[name]) for name in names), share, str(each["set"]), str(each["preferences"])])
        click.echo(table(rows))


__all__ = ["kka"]
