"""Groups of similar defect types, and the sentences that call each of them normal: what normality addition is measured
on.

    {"schema": 1, "source": "who made the grouping",
     "categories": {"carpet": {"class": "carpet",
                               "groups": {"cut or hole": {"types": ["cut", "hole"], "sentences": ["cut", "hole"]}}}}}

Categories are named like the data set's folders and `class` is what the part is called in sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct, field

from edgead.runtime.errors import InputError, storage_errors

SCHEMA = 1
_FILE_BYTES = 4 * 2**20
_MVTEC = Path(__file__).with_name("mvtec_groups.json")


class Group(Struct, frozen=True, forbid_unknown_fields=True):
    """Defect types that become normal together.

    Attributes:
        types: of the data set, as its folders are named.
        sentences: what is normal from then on; each is a normality of its own.
    """

    types: tuple[str, ...]
    sentences: tuple[str, ...]


class Category(Struct, frozen=True, forbid_unknown_fields=True):
    """The groups of one category by name; `class_name` ('class' in the file) is what the part is called."""

    groups: dict[str, Group]
    class_name: str = field(name="class")


class Grouping(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of groups. `source` says who made it."""

    schema: int
    source: str
    categories: dict[str, Category]


def read_groups(path: Path | None = None) -> Grouping:
    """Read a file of groups; the one for MVTec AD that comes with edgead if None.

    Raises:
        InputError: no such file, not of this form, or a group without types or sentences.
        StorageError: the file cannot be read.
    """
    path = path or _MVTEC
    if not path.is_file():
        raise InputError(wanted=f"a file of groups at {path}", got="no such file")
    with storage_errors(path, "to read groups of defect types"):
        data = path.read_bytes() if path.stat().st_size <= _FILE_BYTES else b""
    try:
        grouping = msgspec.json.decode(data, type=Grouping)
    except msgspec.MsgspecError as error:
        raise _malformed(path, str(error)) from error
    if grouping.schema != SCHEMA:
        raise _malformed(path, f"schema {grouping.schema}")
    for category, content in grouping.categories.items():
        for name, group in content.groups.items():
            if not group.types or not group.sentences or not all(text.strip() for text in group.sentences):
                raise _malformed(path, f"the group '{name}' of '{category}' without types or without sentences")
    return grouping


def groups_of(grouping: Grouping, category: str, types: Sequence[str]) -> tuple[Category, list[str]]:
    """The groups of a category that its data set has, and notes for whoever reads the figures.

    A category that the grouping does not know gets one group for each type, called normal by its own name.

    Args:
        grouping: of `read_groups`.
        category: name of the data set.
        types: its defect types.

    Raises:
        InputError: the data set has none of the category's types.
    """
    found = grouping.categories.get(category)
    if found is None:
        alone = {kind: Group((kind,), (_spoken(kind),)) for kind in types}
        notes = [f"no groups for '{category}': each type is a group of its own, called normal by its own name"]
        return Category(groups=alone, class_name=_spoken(category)), notes
    notes = []
    groups: dict[str, Group] = {}
    for name, group in found.groups.items():
        here = tuple(kind for kind in group.types if kind in types)
        absent = [kind for kind in group.types if kind not in types]
        if absent:
            notes.append(f"{category}: no pictures of {', '.join(absent)} (group '{name}')")
        if here:
            groups[name] = Group(here, group.sentences)
    if not groups:
        raise InputError(
            wanted=f"pictures of at least one of the types in the groups of '{category}'",
            got=", ".join(types) or "no defects",
            next_step="Name a file of groups for this data set with --groups.",
        )
    return Category(groups=groups, class_name=found.class_name), notes


def _spoken(name: str) -> str:
    return name.replace("_", " ").strip()


def _malformed(path: Path, got: str) -> InputError:
    return InputError(
        wanted=f"groups of defect types in {path}: schema {SCHEMA}, source, categories with class and groups",
        got=got,
        next_step="Give each group its types and its sentences; edgead's own mvtec_groups.json is an example.",
    )


__all__ = ("Category", "Group", "Grouping", "groups_of", "read_groups")
