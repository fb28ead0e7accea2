"""The rules that every knowledge pack keeps, whoever made it. Pure checks: no bytes, no files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import KnowledgeError
from edgead.runtime.notes import NOTE, check_note, is_note
from edgead.runtime.spec import Calibration

_CHUNK = 2**20
"""Elements looked at in one go: bounds the memory that a check needs."""
_CALIBRATION = msgspec.structs.fields(Calibration)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}\Z")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}\Z")


def check_names(product: str, fingerprint: str) -> None:
    """Check a pack's product name and feature-space fingerprint.

    Raises:
        KnowledgeError: one of them is not spelled as the format wants it.
    """
    if not _NAME.match(product):
        _refuse("a product name of up to 128 letters, digits, '.', '_', '-'", repr(product[:200]))
    if not _FINGERPRINT.match(fingerprint):
        _refuse("a feature-space fingerprint of 64 lower-case hex digits", repr(fingerprint[:200]))


def check_arrays(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check the arrays of a pack: finite numbers, no -0.0, banks with their row ids, notes with their arrays.

    Raises:
        KnowledgeError: an array breaks a rule; the message names it.
    """
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            _check_floats(name, array)
        if name.endswith(".ids"):
            _check_ids(name, array, arrays.get(name[: -len(".ids")]))
        elif is_note(name):
            about = arrays.get(name[: -len(NOTE)])
            if about is None or about.ndim == 0:
                _refuse(f"the rows that {name!r} is about", "none")
            check_note(name, array, about.shape[0])
        elif name.startswith("bank."):
            if array.dtype.kind != "f" or array.ndim != 2 or array.shape[1] == 0:
                _refuse(f"a float bank [rows, dim] in {name!r}", f"{array.dtype} {list(array.shape)}")
            if name + ".ids" not in arrays:
                _refuse(f"the row ids of {name!r} in '{name}.ids'", "none")


def _check_floats(name: str, array: NDArray[Any]) -> None:
    flat = array.reshape(-1)
    bits = flat.view(np.dtype(f"u{array.dtype.itemsize}"))
    negative_zero = bits.dtype.type(1 << (8 * array.dtype.itemsize - 1))
    for start in range(0, flat.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        if not np.isfinite(flat[part]).all():
            _refuse(f"finite numbers in {name!r}", "NaN or infinity")
        if (bits[part] == negative_zero).any():
            _refuse(f"+0.0 for every zero in {name!r}", "-0.0")


def _check_ids(name: str, ids: NDArray[Any], rows: NDArray[Any] | None) -> None:
    if rows is None:
        _refuse(f"the array that {name!r} numbers the rows of", "none")
    if ids.dtype != np.uint64 or ids.ndim != 1:
        _refuse(f"uint64 [rows] in {name!r}", f"{ids.dtype} {list(ids.shape)}")
    if rows.ndim == 0 or ids.shape[0] != rows.shape[0]:
        _refuse(f"one id per row in {name!r}", f"{ids.shape[0]} ids for {list(rows.shape)}")
    for start in range(0, ids.shape[0], _CHUNK):
        part = ids[start : start + _CHUNK + 1]
        if not (part[1:] > part[:-1]).all():
            _refuse(f"strictly increasing ids in {name!r}", "an id that is not greater than the one before")


def calibration_text(calibration: Calibration) -> str:
    """Canonical JSON of a calibration: sorted keys, shortest round-trip floats, defaults left out.

    Raises:
        KnowledgeError: a number is missing, not finite or out of its range.
    """
    content: dict[str, float | int] = {}
    for field in _CALIBRATION:
        value = getattr(calibration, field.name)
        if value == field.default:
            continue
        if not isinstance(value, Real):
            _refuse(f"a number as {field.name} of the calibration", repr(value)[:200])
        try:
            number = float(value) + 0.0
            number = int(number) if field.type is int else number
        except (ValueError, OverflowError):
            _refuse(f"a finite {field.name} of the calibration", str(value)[:200])
        if not math.isfinite(number):
            _refuse(f"a finite {field.name} of the calibration", str(number))
        content[field.name] = number
    if content.get("held_out", 0) < 0:
        _refuse("a count of held-out images of 0 or more", str(content["held_out"]))
    for name in ("false_alarm_rate", "false_alarm_bound"):
        if not 0 <= content.get(name, 0) <= 1:
            _refuse(f"a share of 0 to 1 as {name} of the calibration", str(content[name]))
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def read_calibration(text: str) -> Calibration:
    """A calibration from its JSON.

    Raises:
        KnowledgeError: not JSON, an unknown or missing field, or not a number.
    """
    try:
        return msgspec.json.decode(text, type=Calibration)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise KnowledgeError(
            wanted="the calibration of a pack as JSON",
            got=f"something else ({error})",
            next_step="Fetch the pack again; if a newer edgead made it, update edgead on this machine.",
        ) from error


def _refuse(wanted: str, got: str) -> NoReturn:
    raise KnowledgeError(
        wanted=f"a pack with {wanted}", got=got, next_step="Make the pack with edgead, or fetch it again."
    )
