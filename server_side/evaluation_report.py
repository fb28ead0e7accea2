"""An evaluation as a table for the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.image import map_to_frame, read_image
from edgead.runtime.inspection import Verdict
from edgead.runtime.inspector import Inspector
from edgead.server_side.datasets import GOOD, read_mask
from edgead.server_side.evaluation import Evaluation, KindResult, Outcome
from edgead.server_side.html import cards, figure, page, svg_histogram, svg_roc, table
from edgead.server_side.metrics import roc_points

HEAD = ("type", "images", "AUROC", "AUPR", "F1-max", "px AUROC", "px F1-max", "PRO", "wrong")
WORST = 6
"""Pictures of the worst misses and of the worst false alarms in the report."""
OUTLINE = (64, 224, 255)
LEGEND = (
    "Each type is measured against the good images. AUPR is average precision; px are pixel metrics; PRO is the "
    "per-region overlap up to a false-positive rate of 0.3; wrong counts misses, and false alarms of good parts."
)


def rows(evaluation: Evaluation) -> list[list[str]]:
    """The cells of the table under `HEAD`, as text."""
    return [_row(kind) for kind in evaluation.kinds]


def text_table(evaluation: Evaluation) -> str:
    """The result for a terminal."""
    lines = [list(HEAD), *rows(evaluation)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    good = evaluation.kinds[-1]
    everything = evaluation.kinds[0]
    text += [
        "",
        f"at the threshold {evaluation.threshold:.4g}: {good.wrong} false alarms in {good.images} good parts, "
        f"{everything.wrong} misses in {everything.images} defects",
        f"product {evaluation.product}, knowledge {evaluation.knowledge}, engine {evaluation.engine}, median "
        f"{evaluation.milliseconds.get('total', 0.0):.1f} ms per frame",
        *evaluation.notes,
    ]
    return "\n".join(text)


def html_report(evaluation: Evaluation, inspector: Inspector, title: str) -> str:
    """The result as one page: figures, ROC, score histograms, the worst misses and false alarms."""
    everything, good = evaluation.kinds[0], evaluation.kinds[-1]
    facts = [
        (_figure(everything.auroc), "image AUROC"),
        (_figure(everything.pixel_auroc), "pixel AUROC"),
        (_figure(everything.pro), "PRO to 0.3 FPR"),
        (f"{everything.wrong} of {everything.images}", "defects missed at the threshold"),
        (f"{good.wrong} of {good.images}", "false alarms at the threshold"),
        (f"{evaluation.milliseconds.get('total', 0.0):.1f} ms", f"median per frame, {evaluation.engine}"),
    ]
    labels = np.array([outcome.sample.anomalous for outcome in evaluation.outcomes], np.bool_)
    scores = np.array([outcome.score for outcome in evaluation.outcomes])
    groups = {
        kind.kind: [o.score for o in evaluation.outcomes if o.sample.kind == kind.kind]
        for kind in (good, *evaluation.kinds[1:-1])
    }
    body = [cards(facts), "<h2>By type of defect</h2>", table(HEAD, rows(evaluation))]
    body += [f'<p class="note">{escape(note)}</p>' for note in (LEGEND, *evaluation.notes)]
    plots = [svg_histogram({k: v for k, v in groups.items() if v}, evaluation.threshold, "Image scores")]
    if labels.any() and not labels.all():
        plots.append(svg_roc({"all": roc_points(labels, scores)}, "ROC, all defects"))
    body.append("<h2>Scores</h2>")
    body.append('<div class="row">' + "".join(f'<div class="panel">{plot}</div>' for plot in plots) + "</div>")
    misses = [o for o in evaluation.outcomes if o.sample.anomalous and o.inspection.verdict is Verdict.OK]
    alarms = [o for o in evaluation.outcomes if o.sample.kind == GOOD and o.inspection.verdict is Verdict.NG]
    body += _gallery(
        evaluation.product,
        "Worst misses",
        "Lowest scores first. The outline is the mask; the map turns yellow where it reaches the threshold.",
        sorted(misses, key=lambda o: o.score),
        inspector,
        "no defect was missed",
    )
    body += _gallery(
        evaluation.product,
        "Worst false alarms",
        "Highest scores first. The map turns yellow where it reaches the threshold.",
        sorted(alarms, key=lambda o: -o.score),
        inspector,
        "no good part was called NG",
    )
    lead = (
        f"Product {evaluation.product}, engine {evaluation.engine}, knowledge {evaluation.knowledge}, "
        f"threshold {evaluation.threshold:.4g}"
    )
    return page(title, "".join(body), lead)


def _gallery(
    product: str, title: str, note: str, outcomes: Sequence[Outcome], inspector: Inspector, none: str
) -> list[str]:
    parts = [f"<h2>{title}</h2>"]
    if not outcomes:
        return [*parts, f"<p>None: {none} at the calibrated threshold.</p>"]
    cases = []
    for outcome in outcomes[:WORST]:
        frame = read_image(outcome.sample.path)
        inspection = inspector.inspect(frame, product=product)
        name = f"{outcome.sample.kind}/{outcome.sample.path.name}, score {outcome.score:.4g}"
        truth = figure(outlined(frame, read_mask(outcome.sample, frame.shape)), name)
        if inspection.anomaly_map is None:
            seen = ""
        else:
            full = map_to_frame(inspection.anomaly_map, frame.shape, inspector.spec.preprocessing)
            seen = figure(heat(frame, full, inspector.knowledge(product).calibration.map_threshold), "anomaly map")
        cases.append(f'<div class="case">{truth}{seen}</div>')
    return [*parts, f"<p>{note}</p>", f'<div class="pairs">{"".join(cases)}</div>']


def outlined(frame: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A frame, uint8 RGB [H, W, 3], with the outline of its mask, bool [H, W]."""
    thickness = max(1, round(max(mask.shape) / 250))
    edges, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(frame.copy(), edges, -1, OUTLINE, thickness), np.uint8)


def heat(frame: NDArray[np.uint8], full: NDArray[np.float32], threshold: float | None) -> NDArray[np.uint8]:
    """A frame under its map, float32 [H, W]: dark at the map's minimum, yellow at the threshold or above.

    The scale begins at the frame's own minimum, so a miss shows what the detector had seen of the defect.
    """
    low = float(full.min())
    high = max(float(full.max()) if threshold is None else threshold, low + 1e-12)
    level = ((full - low) / (high - low)).clip(0.0, 1.0) * 255.0
    colours = cv2.cvtColor(cv2.applyColorMap(level.astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return np.asarray(cv2.addWeighted(frame, 0.35, colours, 0.65, 0.0), np.uint8)


def _row(kind: KindResult) -> list[str]:
    figures = (kind.auroc, kind.aupr, kind.f1_max, kind.pixel_auroc, kind.pixel_f1_max, kind.pro)
    return [kind.kind, str(kind.images), *(_figure(value) for value in figures), str(kind.wrong)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
