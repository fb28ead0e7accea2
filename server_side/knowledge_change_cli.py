"""`edgead knowledge add`, `remove` and `merge`: changes of memory banks, with the thresholds that follow from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgead.runtime.errors import InputError
from edgead.runtime.files import refuse_existing

if TYPE_CHECKING:
    from edgead.runtime.spec import Calibration
    from edgead.server_side.knowledge_rows import Judge
    from edgead.server_side.knowledge_tools import BankChange, State

_PATH = click.Path(path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def common_options(command: _Command) -> _Command:
    """The options of every change."""
    options = [
        click.option(
            "--knowledge",
            type=_PATH,
            multiple=True,
            help="Pack or delta that the cameras have on top of the bundle's own; may be repeated, in their order.",
        ),
        click.option("--product", help="Whose knowledge; the bundle's default if left out."),
        click.option(
            "--held-out",
            type=_PATH,
            metavar="DIR",
            help="Good parts that the bank was never taught: the threshold is set anew on them. Needed: a bank is "
            "never changed without its threshold.",
        ),
        click.option("--defects", type=_PATH, metavar="DIR", help="Known defects, to count what would be missed."),
        click.option("--bank", help="Only this bank; all of its kind if left out."),
        click.option("--next-id", type=click.IntRange(1, 2**63), help="First row id to give out, if it is larger."),
        click.option("--target", help="Engine to embed and judge with; the best of this machine if left out."),
        click.option(
            "-o",
            "--output",
            required=True,
            type=_PATH,
            help="What to write: NAME.delta, or the whole NAME.safetensors.",
        ),
        click.option("--force", is_flag=True, help="Replace an existing output."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("bundle", type=_PATH)
@click.option("--normal", type=_PATH, metavar="DIR", help="Pictures that are normal from now on.")
@click.option("--anomalous", type=_PATH, metavar="DIR", help="Pictures of defects; masks beside them as NAME_mask.png.")
@click.option("--rows", type=_PATH, metavar="FILE.npy", help="Rows of your own, float [n, D], for --bank.")
@click.option("--novelty", type=click.FloatRange(0), help="Distance from the bank up to which a patch is known.")
@click.option("--most", type=click.IntRange(1), default=512, show_default=True, help="Most rows to add to each bank.")
@common_options
def add(
    bundle: Path,
    normal: Path | None,
    anomalous: Path | None,
    rows: Path | None,
    novelty: float | None,
    most: int,
    bank: str | None,
    as_json: bool,
    **words: Any,
) -> None:
    """Teach BUNDLE pictures that are normal from now on, or defects that it has to find.

    The bundle's own engine embeds them; only the rows that the bank lacks are added. The threshold is set anew on the
    held-out pictures: put some of the new kind among them.

    \b
    Example:
      edgead knowledge add part.bundle --normal new-pattern/ --held-out good/ --defects bad/ -o pattern.delta
      edgead knowledge add part.bundle --anomalous missed/ --held-out good/ --knowledge pattern.delta -o dent.delta
    """
    given = [name for name, value in (("normal", normal), ("anomalous", anomalous), ("rows", rows)) if value]
    if len(given) != 1:
        raise InputError(
            wanted="one of --normal, --anomalous and --rows", got=" and ".join(given) or "none", next_step="Give one."
        )
    if rows is not None and novelty is not None:
        raise InputError(wanted="--novelty with pictures", got="--rows", next_step="Leave it out.")
    refuse_existing(words["output"], words["force"])
    from edgead.runtime.image import list_images
    from edgead.server_side import knowledge_rows as made
    from edgead.server_side import knowledge_tools as room
    from edgead.server_side.fit_options import anomalous_samples

    paths = list_images(normal) if normal is not None else []
    samples = anomalous_samples(anomalous)
    with judged(bundle, words, [*paths, *(path for path, _ in samples)]) as (state, judge):
        spec = state.bundle.manifest.detector
        levels: dict[str, float] | None = None
        if rows is not None:
            banks = _one_bank(state, bank)
            dimensions = state.pack.arrays[banks[0]].shape[1]
            offered = {banks[0]: made.file_rows(rows, banks[0], dimensions)}
        elif normal is not None:
            banks = made.banks_of(spec, anomalous=False, wanted=bank)
            levels = room.novelties(state, judge, banks, novelty)
            offered = made.normal_rows(judge.inspector, paths, banks)
        else:
            banks = made.banks_of(spec, anomalous=True, wanted=bank)
            unmasked = any(mask is None for _, mask in samples)
            known = room.farthest_known(state, judge, banks) if unmasked and novelty is None else {}
            known = known or dict.fromkeys(banks, novelty or 0.0)
            offered = made.anomalous_rows(judge.inspector, samples, banks, known, state.pack)
            levels = {}
        change = room.add_rows(state, judge, offered, levels=levels, most=most)
    finish(bundle, change, words, as_json)


@click.command()
@click.argument("bundle", type=_PATH)
@click.option("--row", "ids", type=click.IntRange(0, 2**64 - 1), multiple=True, help="Row id; may be repeated.")
@click.option("--source", help="Rows that came from this picture: a file, or a name or SHA-256 of the provenance.")
@click.option("--like", type=_PATH, metavar="IMAGE", help="Rows nearest to this picture: forget what it shows.")
@click.option("--count", type=click.IntRange(1), help="With --like: so many rows; 16 if neither is given.")
@click.option("--radius", type=click.FloatRange(0), help="With --like: all rows within this distance.")
@click.option("--mask", type=_PATH, metavar="IMAGE", help="With --like: only what it marks.")
@common_options
def remove(
    bundle: Path,
    ids: tuple[int, ...],
    source: str | None,
    like: Path | None,
    count: int | None,
    radius: float | None,
    mask: Path | None,
    bank: str | None,
    as_json: bool,
    **words: Any,
) -> None:
    """Make BUNDLE forget rows: by id, by the picture that they came from, or by likeness to a picture.

    \b
    Example:
      edgead knowledge remove part.bundle --source bad-photo.png --held-out good/ -o forget.delta
      edgead knowledge remove part.bundle --like missed.png --mask dent.png --count 8 --held-out good/ -o forget.delta
      edgead knowledge remove part.bundle --row 1742 --row 1743 --held-out good/ -o forget.delta
    """
    given = [name for name, value in (("--row", ids), ("--source", source), ("--like", like)) if value]
    if len(given) != 1:
        raise InputError(
            wanted="one of --row, --source and --like", got=" and ".join(given) or "none", next_step="Give one."
        )
    if like is None and any(value is not None for value in (count, radius, mask)):
        raise InputError(wanted="--like with --count, --radius and --mask", got=given[0], next_step="Leave them out.")
    if count is not None and radius is not None:
        raise InputError(wanted="--count or --radius", got="both", next_step="Leave one out.")
    refuse_existing(words["output"], words["force"])
    from edgead.server_side import knowledge_tools as room

    with judged(bundle, words) as (state, judge):
        forgotten: set[str] = set()
        if ids:
            rows = room.rows_named(state.pack, ids, bank)
        elif source is not None:
            rows, forgotten = room.rows_from(state, source)
            rows = {name: numbers for name, numbers in rows.items() if bank in (None, name)}
        else:
            assert like is not None
            banks = [bank] if bank is not None else list(_banks(state, anomalous=False))
            rows = room.rows_like(state, judge, like, banks, count=count, radius=radius, mask=mask)
        change = room.remove_rows(state, judge, rows, forgotten=forgotten)
    finish(bundle, change, words, as_json)


@click.command()
@click.argument("bundle", type=_PATH)
@click.argument("other", type=_PATH)
@click.option("--most-rows", type=click.IntRange(1), help="Most rows of each bank.")
@click.option("--most-bytes", type=click.IntRange(1), help="Most bytes of the pack.")
@click.option("--most-ms", type=click.FloatRange(0, min_open=True), help="Most milliseconds a frame on this machine.")
@common_options
def merge(
    bundle: Path,
    other: Path,
    most_rows: int | None,
    most_bytes: int | None,
    most_ms: float | None,
    bank: str | None,
    as_json: bool,
    **words: Any,
) -> None:
    """Add the rows of the pack OTHER to the knowledge of BUNDLE; over a cap, a coreset stands for the rows.

    Both must be of the same feature space. Sentences and other knowledge stay as BUNDLE has them.

    \b
    Example:
      edgead knowledge merge part.bundle line-2.safetensors --most-rows 8000 --held-out good/ -o both.safetensors
    """
    if bank is not None:
        raise InputError(wanted="no --bank: whole packs are merged", got=bank, next_step="Leave it out.")
    refuse_existing(words["output"], words["force"])
    from edgead.server_side import knowledge_view
    from edgead.server_side.knowledge_merge import Caps, merge_packs

    theirs = knowledge_view.load(other)
    with judged(bundle, words) as (state, judge):
        records = [] if theirs.provenance is None else [theirs.provenance]
        change = merge_packs(state, judge, theirs.pack, records, Caps(most_rows, most_bytes, most_ms))
    finish(bundle, change, words, as_json)


@contextmanager
def judged(bundle: Path, words: dict[str, Any], taught: Sequence[Path] = ()) -> Iterator[tuple[State, Judge]]:
    """What is there, and who judges the change; mistakes in the folders are told before anything is computed."""
    from edgead.runtime.image import list_images
    from edgead.runtime.inspector import Inspector
    from edgead.server_side import knowledge_tools as room
    from edgead.server_side.knowledge_rows import Judge

    if words["held_out"] is None:
        raise InputError(
            wanted="held-out pictures: a bank is never changed without its threshold",
            got="no --held-out",
            next_step="Add --held-out DIR with good parts that the bank was never taught, 20 or more.",
        )
    held_out = list_images(words["held_out"])
    if len(held_out) < 2:
        raise InputError(
            wanted="at least 2 held-out pictures of good parts (20 work, 200 are comfortable)",
            got=str(len(held_out)),
            next_step="Hold out more: one picture cannot show how normal parts differ.",
        )
    defects = [] if words["defects"] is None else list_images(words["defects"])
    state = room.open_state(bundle, words["knowledge"], words["product"], words["next_id"])
    room.refuse_seen(held_out, state, taught)
    with Inspector(
        state.bundle,
        target=words["target"],
        packs=[state.pack],
        products=[state.pack.product],
        suppression="eager",  # a threshold is set on what sentences leave of a score
    ) as inspector:
        yield state, Judge(inspector, held_out, [path for path in defects if not path.stem.endswith("_mask")])


def _banks(state: State, *, anomalous: bool) -> tuple[str, ...]:
    from edgead.server_side.knowledge_rows import banks_of

    return banks_of(state.bundle.manifest.detector, anomalous=anomalous)


def _one_bank(state: State, wanted: str | None) -> tuple[str, ...]:
    banks = state.pack.banks if wanted is None else tuple(name for name in state.pack.banks if name == wanted)
    if wanted is None:
        banks = tuple(name for name in banks if name == "bank.normal") or banks
    if len(banks) != 1:
        raise InputError(
            wanted=f"one of the banks {', '.join(state.pack.banks) or '(none)'} for --rows",
            got=wanted or "no --bank",
            next_step="Name it with --bank.",
        )
    return (banks[0],)


def finish(bundle: Path, change: BankChange, words: dict[str, Any], as_json: bool) -> None:
    from edgead.runtime.provenance_file import provenance_path, write_with_provenance
    from edgead.runtime.tables import bytes_text
    from edgead.server_side.calibration import statement

    output: Path = words["output"]
    size = write_with_provenance(output, change.before, change.after, change.provenance, force=words["force"])
    before, after = change.before.calibration, change.after.calibration
    verdicts = change.judged
    if as_json:
        content: dict[str, Any] = {
            "output": str(output),
            "provenance": str(provenance_path(output)),
            "bytes": size,
            "base": change.before.digest,
            "result": change.after.digest,
            "added": dict(change.added),
            "removed": dict(change.removed),
            "rows": {bank: len(change.after.ids(bank)) for bank in change.after.banks},
            "next_id": change.provenance.next_id,
            "threshold": [before.threshold, after.threshold],
            "false_alarms": _counts(verdicts.false_alarms),
            "misses": None if verdicts.misses is None else _counts(verdicts.misses),
            "notes": list(change.notes),
        }
        click.echo(json.dumps(content, sort_keys=True))
        return
    kind = "delta" if output.suffix == ".delta" else "pack"
    click.echo(f"{change.before.version} -> {change.after.version}; wrote {output} ({kind}, {bytes_text(size)})")
    for bank in change.after.banks:
        counts = f"{change.added.get(bank, 0)} added, {change.removed.get(bank, 0)} removed"
        click.echo(f"  {bank:<16} {counts}, {len(change.after.ids(bank))} rows now")
    for note in change.notes:
        click.echo(f"  {note}")
    click.echo(f"  threshold        {before.threshold:.4g} -> {after.threshold:.4g}{_of(before, after)}")
    click.echo(f"  {verdicts.summary()}")
    click.echo(f"  {statement(after)}")
    chain = [*words["knowledge"], output] if kind == "delta" else [output]
    click.echo(f"next: edgead run {bundle} PICTURES {' '.join(f'--knowledge {path}' for path in chain)}")


def _counts(change: Any) -> dict[str, int]:
    return {"pictures": change.pictures, "before": change.before, "after": change.after}


def _of(before: Calibration, after: Calibration) -> str:
    return f", from {before.held_out} and {after.held_out} held-out normals"
