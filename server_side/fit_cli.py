"""`edgead fit`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime.errors import InputError
from edgead.runtime.files import refuse_existing
from edgead.runtime.image import list_images
from edgead.runtime.spec import Preprocessing
from edgead.server_side.fit_options import (
    LANGUAGE_METHODS,
    MEMORY_BANK,
    OPTIONS_OF,
    TRAINED_METHODS,
    TRAINS_PROJECTIONS,
    anomalous_samples,
    check_method,
    fit_options,
    parse_layers,
    parse_preprocessing,
    parse_tower_layers,
)
from edgead.server_side.photographs import LeftOut, leave_out_unreadable, left_out_facts

if TYPE_CHECKING:
    from edgead.detector_file import FittedDetector
    from edgead.server_side.learned import Learned

Samples = Sequence[tuple[Path, Path | None]]
Words = Mapping[str, Any]


@click.command()
@click.option(
    "--normal",
    type=click.Path(path_type=Path),
    help="Folder of good parts. Methods with sentences do without one: nothing is known of false alarms then.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The .detector file.")
@fit_options
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the detector's card as JSON.")
def fit(normal: Path | None, output: Path, force: bool, as_json: bool, **words: Any) -> None:
    """Learn what normal is from photographs of good parts, or from sentences; writes a fitted-detector file.

    \b
    Example:
      edgead fit --normal photos/good -o part.detector
      edgead fit --normal photos/good --roi 100,50,1000,800 --tiles 3x2 -o part.detector
      edgead fit --method winclip --model ViT-B-16-plus-240 --model-weights laion400m_e32 \\
        --class carpet --normal photos/good --shots 4 -o carpet.detector
      edgead fit --method simplenet --normal photos/good --anomalous anomalies/ -o part.detector
      edgead fit --method efficientad --normal photos/good --teacher small.teacher -o part.detector
      edgead fit --method recontrast --normal photos/good --device cuda:1 -o part.detector
    """
    detector = fit_from_options(normal, output, force=force, **words)
    if as_json:
        click.echo(json.dumps({"output": str(output), **detector.card}, sort_keys=True))
        return
    card = detector.card
    click.echo(f"wrote {output}")
    left_out = card["images"].get("left_out_unreadable", 0)
    click.echo(f"  images      {card['images']['all']}{f', {left_out} unreadable left out' * bool(left_out)}")
    anomalies = card.get("data", {}).get("anomalies", 0)
    if anomalies:
        click.echo(f"  anomalies   {anomalies} frames, {card['data']['anomalies_with_masks']} with masks")
    for port in detector.spec.knowledge:
        if port.rows is not None:
            rows, dimensions = detector.pack.arrays[port.name].shape
            click.echo(f"  {port.name:<16} {rows} rows x {dimensions}")
    click.echo(f"  threshold   {detector.pack.calibration.threshold:.4g}")
    click.echo(f"  {card['calibration']}")
    if card.get("warning"):
        click.echo(f"  warning: {card['warning']}")
    if card.get("most_unusual"):
        unusual = ", ".join(f"{item['image']} ({item['score']:.4g})" for item in card["most_unusual"])
        click.echo(f"  most unusual of the held-out photographs: {unusual}")
        click.echo("  look at them: a bad part among the good ones raises the threshold and hides defects")
    if words["method"] == "normality":
        click.echo(f"next: edgead export BASE.detector --with-normality {output} --target onnx -o part.bundle")
    else:
        click.echo(f"next: edgead export {output} --target onnx -o {output.with_suffix('.bundle').name}")


def fit_from_options(normal: Path | None, output: Path, *, force: bool = False, **words: Any) -> Any:
    """Fit as the words of `fit_options` say, and write the detector.

    Raises:
        InputError: an unknown method, or an option that the method needs is missing or foreign to it.
        EdgeadError: see the method's module.
    """
    check_method(words["method"])
    preprocessing = parse_preprocessing(words["size"], words["roi"], words["tiles"], words["overlap"], words["rotate"])
    samples = anomalous_samples(words["anomalous"])
    if words["method"] == MEMORY_BANK:
        detector = _fit_memory_bank(normal, output, preprocessing, samples, force, words)
    elif words["method"] in TRAINED_METHODS:
        detector = _fit_trained(normal, output, preprocessing, samples, force, words)
    else:
        detector = _fit_with_sentences(normal, output, preprocessing, samples, force, words)
    _tell_left_out(detector.card)
    return detector


def _refuse_foreign(method: str, words: Words) -> None:
    """Refuse options that the method would do nothing with.

    Raises:
        InputError: names the option and the methods that it is for.
    """
    for option, methods in OPTIONS_OF.items():
        if words[option] not in (None, 0) and method not in methods:
            spelt = "--class" if option == "class_name" else f"--{option.replace('_', '-')}"
            raise InputError(
                wanted=f"a method that knows {spelt}: {', '.join(methods)}",
                got=f"--method {method}",
                next_step=f"Leave {spelt} out, or name one of these methods.",
            )


def _fit_memory_bank(
    normal: Path | None, output: Path, preprocessing: Preprocessing, samples: Samples, force: bool, words: Words
) -> FittedDetector:
    _refuse_foreign(MEMORY_BANK, words)
    normal = _need_normal(normal)
    # torch comes with this import, so mistakes in the options are told before it
    from edgead.server_side.fitting import FitOptions, fit_memory_bank

    options = FitOptions(
        backbone=words["backbone"],
        backbone_weights=words["backbone_weights"],
        layers=parse_layers(words["layers"]),
        preprocessing=preprocessing,
        rows=words["rows"],
        neighbours=words["neighbours"],
        false_alarm_rate=words["false_alarms"],
        product=words["product"],
        seed=words["seed"],
        skip_unreadable=words["skip_unreadable"],
    )
    return fit_memory_bank(normal, output, options, anomalous=samples, force=force)


def _need_normal(normal: Path | None) -> Path:
    if normal is None:
        raise InputError(
            wanted="photographs of good parts", got="no --normal", next_step="Add: --normal DIR, a folder of pictures."
        )
    return normal


def _fit_trained(
    normal: Path | None, output: Path, preprocessing: Preprocessing, samples: Samples, force: bool, words: Words
) -> FittedDetector:
    method = words["method"]
    _refuse_foreign(method, words)
    paths = list_images(_need_normal(normal))
    refuse_existing(output, force)
    # torch comes with this import, so mistakes in the options are told before it
    from edgead.server_side.detectors.trained import TrainedOptions

    learn = importlib.import_module(f"edgead.server_side.detectors.{TRAINED_METHODS[method]}").learn
    left_out: list[LeftOut] = []
    if words["skip_unreadable"]:
        paths, samples, left_out = leave_out_unreadable(paths, samples)
    options = TrainedOptions(
        backbone=words["backbone"],
        backbone_weights=words["backbone_weights"],
        layers=parse_layers(words["layers"]),
        preprocessing=preprocessing,
        steps=words["steps"],
        false_alarm_rate=words["false_alarms"],
        product=words["product"],
        seed=words["seed"],
        device=words["device"] or "auto",
    )
    more: dict[str, Any] = {}
    if method == "efficientad":
        from edgead.server_side.detectors.efficientad import EfficientAdExtras

        more["extras"] = EfficientAdExtras(
            penalty=None if words["generic"] is None else tuple(list_images(words["generic"])),
            teacher=words["teacher"],
            precision=words["precision"] or "float32",
            start=words["start"] or "closed",
        )
    # An interrupted training goes on from here when the same command is given again.
    checkpoint = output.with_name(output.name + ".training")
    learned: Learned = learn(paths, options, samples, checkpoint=checkpoint, **more)
    _note_left_out(learned, left_out)
    fitted = learned.write(output, force=force)
    checkpoint.unlink(missing_ok=True)
    return fitted


def _note_left_out(learned: Learned, left_out: Sequence[LeftOut]) -> None:
    if left_out:
        learned.card["images"]["left_out_unreadable"] = len(left_out)
        learned.card["left_out"] = left_out_facts(left_out)


def _fit_with_sentences(
    normal: Path | None, output: Path, preprocessing: Preprocessing, samples: Samples, force: bool, words: Words
) -> FittedDetector:
    method = words["method"]
    _refuse_foreign(method, words)
    if words["size"] is not None:
        raise InputError(
            wanted=f"the image size of --model for --method {method}",
            got=f"--size {words['size']}",
            next_step="Leave --size out; use --tiles for large pictures.",
        )
    if words["model"] is None:
        raise InputError(
            wanted=f"a vision-language model for --method {method}",
            got="no --model",
            next_step="Add for example: --model MobileCLIP-S1 --model-weights FILE (or ViT-B-16-plus-240, "
            "ViT-L-14-336, or an open_clip JSON configuration).",
        )
    class_name = (words["class_name"] or "").strip()
    if not class_name:
        raise InputError(
            wanted="what the part is, as a word in sentences",
            got="no --class" if words["class_name"] is None else "an empty --class",
            next_step="Add for example: --class carpet",
        )
    refuse_existing(output, force)
    layers = parse_tower_layers(words["layers"])
    paths = [] if normal is None else list_images(normal)
    from edgead.server_side.vision_language.options import VisionLanguageOptions

    learn = importlib.import_module(f"edgead.server_side.detectors.{LANGUAGE_METHODS[method]}").learn
    left_out: list[LeftOut] = []
    if words["skip_unreadable"]:
        paths, samples, left_out = leave_out_unreadable(paths, samples)
    options = VisionLanguageOptions(
        model=words["model"],
        weights=words["model_weights"],
        class_name=class_name,
        domain=words["domain"],
        prompts=words["prompts"],
        shots=words["shots"],
        layers=layers,
        projections=words["projections"],
        auxiliary=words["auxiliary"],
        preprocessing=preprocessing,
        false_alarm_rate=words["false_alarms"],
        product=words["product"],
        seed=words["seed"],
    )
    more: dict[str, Any] = {}
    checkpoint = output.with_name(output.name + ".training")
    if method == "cmda" or (method in TRAINS_PROJECTIONS and words["projections"] is None):
        more["checkpoint"] = checkpoint
    if method == "cmda":
        more["device"] = words["device"] or "auto"
    if words["score"] is not None:
        more["score"] = words["score"]
    learned: Learned = learn(paths, options, samples, **more)
    _note_left_out(learned, left_out)
    fitted = learned.write(output, force=force)
    if "checkpoint" in more:
        checkpoint.unlink(missing_ok=True)
    return fitted


def _tell_left_out(card: Mapping[str, Any]) -> None:
    """Name on standard error what nothing was learned from, so that it is seen beside --json too."""
    count, named = card["images"].get("left_out_unreadable", 0), card.get("left_out", [])
    for item in named:
        click.echo(f"left out {item['image']}: {item['reason']}", err=True)
    if count > len(named):
        click.echo(f"left out {count - len(named)} more", err=True)
