"""Where the rows of published packs are from. The publisher's own: devices are not given it."""

from __future__ import annotations

import hashlib

from edgead.runtime.errors import storage_errors
from edgead.runtime.provenance import Provenance, encode_provenance
from edgead.runtime.provenance_file import PROVENANCE_SUFFIX, read_provenance, write_provenance
from edgead.server_side.ota.repository import Repository

PROVENANCE = "provenance"
"""Folder of a repository, beside those that are served."""


def keep_provenance(repository: Repository, record: Provenance) -> None:
    """Keep a record, for the next change and for tracing.

    Raises:
        StorageError: the file system refused.
    """
    digest = hashlib.sha256(encode_provenance(record)).hexdigest()
    write_provenance(repository.folder / PROVENANCE / record.product / f"{digest}{PROVENANCE_SUFFIX}", record)


def provenance_of(repository: Repository, product: str) -> list[Provenance]:
    """Records of a product's packs, the newest first.

    Raises:
        KnowledgeError: one is damaged.
        StorageError: one cannot be read.
    """
    folder = repository.folder / PROVENANCE / product
    with storage_errors(folder, "to list provenance records"):
        found = sorted(folder.glob(f"*{PROVENANCE_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [read_provenance(path) for path in found]
