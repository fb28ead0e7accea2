"""Pins and provenance of packs in the repository: beside each pack, under the knowledge role of its product.

knowledge/<product>/<digest>.pin            who vouches for the pack (`edgead.runtime.pins`); cameras may ask for it
knowledge/<product>/<digest>.provenance     where its rows are from; for people, and only if it is wished: it names
                                            photographs, and no camera fetches it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from edgead.runtime.bundle import open_bundle
from edgead.runtime.device_pins import pin_target
from edgead.runtime.errors import KnowledgeError, PinError
from edgead.runtime.knowledge import Pack
from edgead.runtime.pins import Pin, encode_pin, make_pin
from edgead.runtime.provenance import Provenance, check_provenance, encode_provenance
from edgead.runtime.provenance_file import pin_path, provenance_beside, read_pin
from edgead.server_side.ota.provenance import provenance_of as records_of
from edgead.server_side.ota.publish import engines_of, load_pack
from edgead.server_side.ota.repository import Repository
from edgead.server_side.sources import provenance_of


@dataclass(frozen=True)
class PinSigner:
    """Who pins, and with what.

    Attributes:
        sign: bytes -> 64 bytes of an Ed25519 signature.
        kid: name of the key.
        signer: for people.
        days: how long the pin counts.
    """

    sign: Callable[[bytes], bytes]
    kid: str
    signer: str
    days: int = 365


def provenance_target(product: str, digest: str) -> str:
    """Target path of the provenance of a pack."""
    return f"knowledge/{product}/{digest}.provenance"


def put_pin(repository: Repository, pin: Pin) -> list[tuple[str, int]]:
    """Put a pin beside its pack, in place of an older one. `Repository.commit` then signs.

    Returns:
        (target path, bytes) of what is new.

    Raises:
        InputError: no such product.
        PinError: its pack is not published.
    """
    place, data = pin_target(pin.product, pin.pack), encode_pin(pin)
    if repository.find(place.replace(".pin", ".safetensors")) is None:
        raise PinError(
            wanted=f"a pin of a published pack of {pin.product!r}",
            got=f"one of {pin.pack[:12]}",
            next_step="Publish that pack first.",
        )
    return _put(repository, place, data)


def put_provenance(repository: Repository, pack: Pack, record: Provenance) -> list[tuple[str, int]]:
    """Put the provenance of a published pack, for whoever traces a row. `Repository.commit` then signs.

    Returns:
        (target path, bytes) of what is new.

    Raises:
        KnowledgeError: it is not that of the pack.
    """
    check_provenance(pack, record)
    return _put(repository, provenance_target(pack.product, pack.digest), encode_provenance(record))


def publish_beside(
    repository: Repository, path: Path, pack: Pack | None = None, *, sources: bool = False
) -> list[tuple[str, int]]:
    """Put what stands beside a file that was published: its pin, and if wished its provenance.

    Args:
        repository: where to.
        path: of a pack, delta or bundle.
        pack: that it is or makes; None for a bundle's initial one.
        sources: whether everybody may see where the rows are from.

    Raises:
        PinError: the pin is of another pack.
        KnowledgeError: the provenance is of another pack, or damaged.
        StorageError: a file cannot be read.
    """
    done: list[tuple[str, int]] = []
    if pin_path(path).is_file():
        pin = read_pin(pin_path(path))
        whole = pack or _initial(repository, path, pin.product)
        if whole is not None and (pin.product, pin.pack) != (whole.product, whole.digest):
            raise PinError(
                wanted=f"a pin of the knowledge {whole.version} of {whole.product!r} beside {path}",
                got=f"one of {pin.pack[:12]} of {pin.product!r}",
                next_step="Sign it with: edgead knowledge sign",
            )
        done += [] if whole is None else put_pin(repository, pin)
    record = provenance_beside(path) if sources else None
    whole = None if record is None else pack or _initial(repository, path, record.product)
    if record is not None and whole is not None:
        done += put_provenance(repository, whole, record)
    return done


def sign_pack(
    repository: Repository, product: str, digest: str, signer: PinSigner, *, more: Sequence[Provenance] = ()
) -> Pin:
    """Pin a published pack with the provenance that the publisher kept, and put the pin.

    Args:
        repository: where pack and records lie.
        product, digest: which pack.
        signer: who pins.
        more: further records of its rows, the most trusted first.

    Raises:
        InputError: no such pack.
        KnowledgeError: no published engine has the pack's feature space.
    """
    pack, record = kept_record(repository, product, digest, more)
    now = repository.clock()
    pin = make_pin(
        pack,
        record,
        signer.sign,
        kid=signer.kid,
        signer=signer.signer,
        ts=now,
        not_before=now,
        not_after=now + timedelta(days=signer.days),
    )
    put_pin(repository, pin)
    return pin


def kept_record(
    repository: Repository, product: str, digest: str, more: Sequence[Provenance] = ()
) -> tuple[Pack, Provenance]:
    """A published pack, and what the publisher's records know of its rows; the rest is "not known".

    Raises:
        InputError: no such pack.
        KnowledgeError: no published engine has the pack's feature space, or a record is damaged.
    """
    pack = load_pack(repository, product, digest)
    before = [*more, *records_of(repository, product)]
    return pack, provenance_of(pack, fingerprint=_rows_fingerprint(repository, pack), before=before)


def _rows_fingerprint(repository: Repository, pack: Pack) -> str:
    """Feature space of a pack's rows: of a bundle of two detectors it is not the pack's own."""
    for bundle in engines_of(repository).values():
        if bundle.manifest.knowing.fingerprint == pack.fingerprint:
            return bundle.manifest.detector.fingerprint
    raise KnowledgeError(
        wanted=f"a published engine with the feature space of {pack.version}",
        got="none",
        next_step="Publish its bundle first: edgead ota publish FOLDER BUNDLE",
    )


def _initial(repository: Repository, path: Path, product: str) -> Pack | None:
    """The pack that a bundle brings along; None for a product that is not published."""
    if product not in repository.settings.products:
        return None
    bundle = open_bundle(path, verify=False)
    return bundle.pack(product) if product in bundle.products else None


def _put(repository: Repository, place: str, data: bytes) -> list[tuple[str, int]]:
    if repository.find(place) is not None and repository.read(place) == data:
        return []
    repository.add(place, data)
    return [(place, len(data))]


__all__ = [
    "PinSigner",
    "kept_record",
    "provenance_target",
    "publish_beside",
    "put_pin",
    "put_provenance",
    "sign_pack",
]
