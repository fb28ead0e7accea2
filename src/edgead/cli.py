"""The `edgead` command: a lazy group, so that `--help` and `run` import no more than they need."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import NoReturn

import click

from edgead import __version__
from edgead.runtime.errors import EdgeadError, StorageError, missing_dependency

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("edgead.demo:demo", "See everything on painted parts; ends in report.html."),
    "fit": ("edgead.server_side.fit_cli:fit", "Photographs of good parts -> a fitted detector."),
    "export": ("edgead.export_command:export", "A fitted detector, or photographs -> a checked bundle."),
    "show": ("edgead.runtime.cli:show", "What is in a bundle, a knowledge pack or a detector."),
    "run": ("edgead.runtime.cli:run", "Inspect a picture, a folder, a video or a camera."),
    "bench": ("edgead.runtime.cli:bench", "Time the engines of a bundle on this machine."),
    "evaluate": ("edgead.server_side.evaluate_cli:evaluate", "Measure a bundle on a labelled data set."),
    "compile": ("edgead.runtime.compile_cli:compile_command", "Build TensorRT plans on the device."),
    "prompts": ("edgead.server_side.prompts.cli:prompts", "Sentences about good and bad parts, by template or LLM."),
    "text-table": ("edgead.server_side.vision_language.cli:text_table", "Sentences -> rows of knowledge."),
    "projections": (
        "edgead.server_side.projections_cli:projections",
        "Train what compares inner layers with sentences.",
    ),
    "kka": ("edgead.server_side.kka.cli:kka", "Written, painted and judged anomalies that get harder each round."),
    "distil": ("edgead.server_side.distil_cli:distil", "A heavy detector's maps -> a small student."),
    "normality": ("edgead.server_side.normality_cli:normality", "Teach a bundle what is normal by a sentence."),
    "ota": ("edgead.server_side.ota.cli:ota", "Publish signed updates for a fleet of cameras."),
    "device": ("edgead.runtime.device_cli:device", "Keep a camera up to date, with a way back."),
    "knowledge": ("edgead.server_side.knowledge_cli:knowledge", "See, change, sign and trace memory banks."),
    "backbone": ("edgead.server_side.backbones.cli:backbone", "Show or distil the embedded backbone."),
}
"""Name -> where the command lives, and its line in the help. Nothing is imported until one is called."""

_EXTRA_OF = {
    "torch": "export",
    "torchvision": "export",
    "onnx": "export",
    "onnxscript": "export",
    "sklearn": "export",
    "scipy": "export",
    "openvino": "openvino",
    "timm": "server",
    "open_clip": "server",
    "openai": "server",
    "transformers": "server",
    "diffusers": "server",
    "trl": "server",
    "peft": "server",
    "accelerate": "server",
    "datasets": "server",
    "ray": "server",
    "paho": "service",
    "starlette": "fleet",
    "uvicorn": "fleet",
    "sqlalchemy": "fleet",
    "psycopg": "fleet",
    "prometheus_client": "fleet",
    "tuf": "ota",
    "securesystemslib": "ota",
    "cryptography": "ota",
}


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=2)
            hint = f" Did you mean: {', '.join(near)}?" if near else ""
            raise click.UsageError(f"No such command '{args[0]}'.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command takes --debug for the whole traceback of an error. Start with: edgead demo",
)
@click.version_option(__version__, prog_name="edgead")
def cli() -> None:
    """Anomaly detection from photographs of good parts, compiled for the camera.

    \b
      edgead export --normal photos/good --target onnx -o part.bundle
      edgead run part.bundle new-photos/ --overlays out/
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 success, 1 failure, 2 the caller's mistake, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or bool(os.environ.get("EDGEAD_DEBUG"))
    words = [word for word in words if word != "--debug"]
    # torch's threads spin between layers by default; on a machine with other work that costs several times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        result = cli.main(words, prog_name="edgead", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing half-written was left", err=True)
        sys.exit(130)
    except EdgeadError as error:
        _report(error, debug)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader went away (`edgead show | head`): not an error of ours, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        # Most places name what they were writing; this is for the rest, such as the temporary folder.
        failure = StorageError(
            wanted=f"the file system to do its part{f' at {error.filename}' if error.filename else ''}",
            got=f"{error.strerror or error}",
            next_step="Check permissions and free space, also of the temporary folder (TMPDIR).",
        )
        _report(failure, debug)
        sys.exit(failure.exit_code)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        missing = missing_dependency(str(error.name), extra, "this command")
        _report(missing, debug)
        sys.exit(missing.exit_code)
    sys.exit(result if isinstance(result, int) else 0)


def _report(error: EdgeadError, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    click.echo(f"error: wanted {error.wanted}", err=True)
    click.echo(f"       got    {error.got}", err=True)
    if error.next_step:
        click.echo(f"       next   {error.next_step}", err=True)
