"""`edgead knowledge sentences`: another text table for a bundle, with the threshold that follows from it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime.errors import KnowledgeError
from edgead.runtime.files import refuse_existing
from edgead.server_side.knowledge_change_cli import common_options, finish, judged

if TYPE_CHECKING:
    from edgead.runtime.knowledge import Pack
    from edgead.server_side.vision_language.table import TextTable

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=_PATH)
@click.argument("table", type=_PATH)
@common_options
def sentences(bundle: Path, table: Path, as_json: bool, **words: Any) -> None:
    """Give a detector with sentences those of TABLE, a file of `edgead text-table`, and set its threshold anew.

    \b
    Example:
      edgead prompts add carpet.json "frayed {}" --state anomalous
      edgead text-table carpet.json --model ViT-B-16-plus-240 --model-weights laion400m_e32 -o carpet.table
      edgead knowledge sentences carpet.bundle carpet.table --held-out good/ --defects bad/ -o sentences.delta
    """
    refuse_existing(words["output"], words["force"])
    from edgead.server_side.knowledge_tools import changed
    from edgead.server_side.vision_language.table import read_table

    read = read_table(table)
    with judged(bundle, words) as (state, judge):
        arrays = with_table(state.pack, read)
        before = len(state.pack.arrays["text.table"])
        notes: Sequence[str] = (f"sentences        {before} -> {len(read.rows)}",)
        change = changed(state, judge, arrays, notes=notes)
    finish(bundle, change, words, as_json)


def with_table(pack: Pack, table: TextTable) -> dict[str, Any]:
    """The arrays of `pack` with the sentences of `table`.

    Raises:
        KnowledgeError: the detector takes no sentences, or the table was made by another model or with other weights
            than those that the pack has.
    """
    from edgead.runtime.notes import read_note
    from edgead.server_side.vision_language.table import STATE, TABLE

    if TABLE not in pack.arrays or STATE not in pack.arrays:
        raise KnowledgeError(
            wanted="a detector that takes sentences",
            got=f"one of {', '.join(pack.arrays)}",
            next_step="Fit one with: edgead fit --method winclip (or april-gan, alfa, anomalous-few-shot).",
        )
    known = read_note(pack, TABLE)
    if known.get("weights_sha256") not in (None, table.weights_sha256):
        raise KnowledgeError(
            wanted=f"a text table by {known.get('model')} with the weights {known.get('weights')} "
            f"({str(known['weights_sha256'])[:12]}), whose image tower the engine is",
            got=f"one by {table.model} with {table.weights} ({table.weights_sha256[:12]})",
            next_step="Encode the prompts with that model: edgead text-table PROMPTS.json --model NAME ...",
        )
    if table.table.shape[1] != pack.arrays[TABLE].shape[1]:
        raise KnowledgeError(
            wanted=f"rows of {pack.arrays[TABLE].shape[1]} numbers",
            got=f"{table.table.shape[1]}",
            next_step="Encode the prompts with the model of the detector.",
        )
    return {**pack.arrays, **table.arrays()}
