"""Knowledge from files: packs, and deltas one upon the other. The disk side of `knowledge` and `deltas`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from edgead.runtime.bundle import Bundle
from edgead.runtime.deltas import MAGIC, Delta, apply_delta, is_delta, make_delta, read_delta
from edgead.runtime.errors import KnowledgeError, storage_errors
from edgead.runtime.files import refuse_existing, write_file
from edgead.runtime.knowledge import Pack, check_fits, read_pack, write_pack
from edgead.runtime.spec import DEFAULT_LIMITS, Limits

DELTA_SUFFIX = ".delta"
"""What the name of a delta file ends with."""


def read_chain(bundle: Bundle, paths: Iterable[Path], *, limits: Limits = DEFAULT_LIMITS) -> dict[str, Pack]:
    """Knowledge by product after packs and deltas were read in their order.

    A pack takes the place of its product's knowledge; a delta is applied to what its product has by then, at
    first the pack of the bundle.

    Args:
        bundle: has the initial packs.
        paths: pack and delta files.
        limits: most bytes and rows.

    Returns:
        one pack for each product that a file was read for; all of them fit the bundle.

    Raises:
        KnowledgeError: a file is damaged, does not fit, or a delta is for another base.
        BundleError: a delta for a product that the bundle does not have.
        StorageError: a file cannot be read.
    """
    found: dict[str, Pack] = {}
    for path in paths:
        if not begins_as_delta(path):
            pack = read_pack(path, limits=limits)
        else:
            delta = read_delta_file(path, limits=limits)
            base = found[delta.product] if delta.product in found else bundle.pack(delta.product)
            pack = apply_delta(base, delta, limits=limits)
        check_fits(pack, bundle.manifest.knowing)
        found[pack.product] = pack
    return found


def begins_as_delta(path: str | Path) -> bool:
    """Whether a file says that it is a delta.

    Raises:
        StorageError: it cannot be read.
    """
    with storage_errors(path, "to read knowledge"), open(path, "rb") as stream:
        return is_delta(stream.read(len(MAGIC)) if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else b"")


def write_knowledge(path: Path, base: Pack, result: Pack, *, force: bool = False) -> int:
    """Write a delta if `path` ends with `.delta`, else the whole pack; atomically.

    Returns:
        bytes written.

    Raises:
        KnowledgeError: the change cannot be a delta.
        OutputExistsError: `path` exists and `force` is false.
        StorageError: the file system refused.
    """
    refuse_existing(path, force)
    if path.suffix == DELTA_SUFFIX:
        write_file(path, make_delta(base, result))
    else:
        write_pack(path, result, force=force)
    with storage_errors(path, "to read back knowledge"):
        return path.stat().st_size


def read_delta_file(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> Delta:
    """A delta from its file.

    Raises:
        KnowledgeError: see `read_delta`; or a file of more bytes than any delta has.
        StorageError: it cannot be read.
    """
    # zlib adds at most a thousandth and some bytes to what it cannot make smaller.
    most = limits.delta_bytes + limits.delta_bytes // 1000 + 1024
    with storage_errors(path, "to read a delta"), open(path, "rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise KnowledgeError(
            wanted=f"a delta of at most {most} bytes", got="a larger file", next_step="Fetch the whole pack instead."
        )
    return read_delta(data, limits=limits)
