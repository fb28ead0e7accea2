"""Ways to spoil a file: bytes, lengths, JSON values and spellings of JSON. Deterministic by the generator given."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

Change = Callable[[bytes], bytes]
Rewrite = Callable[[bytes, Change], bytes]
"""Applies a change to a part of a file, and mends the lengths around it."""

NUMBERS = (0, -1, 1, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "-0.0",
    "1e999",
    "-1e999",
    "1e-999",
    "9" * 400,
    "9" * 5000,
    "0.1e",
    "01",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    '"\\ud800"',
    '"\\udfff\\ud800"',
    '"\\u0000"',
    '"\u202egnp.exe"',
    '"e\u0301"',
    '"\ufeff"',
    '"../../etc/passwd"',
    '"' + "a" * 100_000 + '"',
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" * 60_000,
    '"\x01"',
    '"\\x41"',
    *map(str, NUMBERS),
)
"""JSON values as text, some of which are none."""
_MARK = "a mark that is nowhere else"


def mutated(
    data: bytes,
    others: Sequence[bytes],
    rng: random.Random,
    rewrite: Rewrite | None,
    layer: Rewrite | None = None,
) -> bytes:
    """A file that is like `data` and most likely wrong.

    Args:
        data: to begin from.
        others: files to splice with.
        rng: decides.
        rewrite: how to reach JSON inside; None where there is none.
        layer: how to reach what lies under a compression; None where there is none.
    """
    if layer is not None and rng.random() < 0.8:
        return layer(data, lambda inner: mutated(inner, [inner], rng, rewrite))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if rewrite is not None and rng.random() < 0.6:
            data = rewrite(data, lambda text: spoiled_json(text, rng))
        else:
            data = rng.choice(_BYTES)(data, others, rng)
    return data


def spoiled_json(text: bytes, rng: random.Random) -> bytes:
    """JSON text with one thing changed: a value, a key, how it is spelled, or such a thing in JSON within a string."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return _flip(text, (), rng)
    spots = _spots(content)
    if not spots:
        return rng.choice(RAW).encode("utf-8", "surrogatepass")
    holder, key = rng.choice(spots)
    how = rng.randrange(8)
    before = holder[key]
    if isinstance(before, str) and before[:1] in ("{", "[") and rng.random() < 0.7:
        holder[key] = spoiled_json(before.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    elif how == 0 and isinstance(holder, dict):
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(("extra", "", "__proto__", "\u202e", "a" * 5000))] = before
    elif how == 2 and isinstance(holder, list):
        holder.insert(key, before)
    elif how == 3:
        holder[key] = _near(before, rng)
    elif how == 4 and isinstance(holder, dict):
        return _doubled(content, holder, key, rng)
    elif how == 5:
        return _spelled(content, rng)
    else:
        holder[key] = _MARK
        return _dump(content).replace(json.dumps(_MARK), rng.choice(RAW), 1).encode("utf-8", "surrogatepass")
    return _dump(content).encode("utf-8", "surrogatepass")


def after_length(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """`Rewrite` for safetensors: 8 bytes of length, JSON, data."""
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    header += b" " * (-(8 + len(header)) % 64)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def whole(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """`Rewrite` for a file that is JSON."""
    return change(data)


def _spots(content: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) of a JSON value."""
    found, queue = [], [content]
    while queue:
        item = queue.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            found.append((item, key))
            queue.append(item[key])
    return found


def _near(value: Any, rng: random.Random) -> Any:
    """A value of the same kind that is off by a little."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 2**32, -(2**63)))
    if isinstance(value, float):
        return -value if rng.random() < 0.5 else value * (1 + 1e-15)
    if isinstance(value, str):
        place = rng.randrange(len(value) + 1)
        return value[:place] + rng.choice(("", "0", "A", "\u0301", "\n", "/", "\x00")) + value[place + 1 :]
    return [value]


def _doubled(content: Any, holder: dict[str, Any], key: str, rng: random.Random) -> bytes:
    """The key twice, with one value or two."""
    value = holder[key]
    holder[key] = _MARK
    again = json.dumps(_near(value, rng) if rng.random() < 0.5 else value)
    return (
        _dump(content)
        .replace(json.dumps(_MARK), f"{json.dumps(value)},{json.dumps(key)}:{again}", 1)
        .encode("utf-8", "surrogatepass")
    )


def _spelled(content: Any, rng: random.Random) -> bytes:
    """The same content in another spelling."""
    spellings: tuple[Callable[[], str], ...] = (
        lambda: json.dumps(content),
        lambda: json.dumps(content, indent=1),
        lambda: json.dumps(content, sort_keys=True, separators=(",", ":")).replace("e", "\\u0065"),
        lambda: _dump(content) + "\n",
        lambda: "\ufeff" + _dump(content),
        lambda: _dump(content) + _dump(content),
    )
    text: str = rng.choice(spellings)()
    return text.encode("utf-8", "surrogatepass")


def _dump(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _flip(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    if not data:
        return bytes([rng.randrange(256)])
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data) + 1)))]


def _longer(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return data + rng.choice((b"\0", b" ", b"\n", rng.randbytes(64), bytes(100_000), data))


def _spliced(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others) if others else data
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _number(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A length or a count, somewhere, in any width and order of bytes."""
    width = rng.choice((2, 4, 8))
    number: int = rng.choice(NUMBERS) % (1 << 8 * width)
    value = number.to_bytes(width, rng.choice(("little", "big")))
    place = _place(data, rng)
    return data[:place] + value + data[place + width :]


def _block(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A run of bytes taken out, written twice, or overwritten."""
    begin = _place(data, rng)
    end = min(len(data), begin + rng.choice((1, 4, 16, 256)))
    middle = rng.choice((b"", data[begin:end] * 2, bytes(end - begin), b"\xff" * (end - begin), rng.randbytes(9)))
    return data[:begin] + middle + data[end:]


def _noise(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 8, 100, 5000)))


def _place(data: bytes, rng: random.Random) -> int:
    """An offset: as often in the first 64 bytes, where lengths are, as anywhere."""
    return rng.randrange(max(1, min(len(data), 64 if rng.random() < 0.5 else len(data))))


_BYTES = (_flip, _flip, _flip, _cut, _longer, _spliced, _number, _number, _block, _block, _noise)
