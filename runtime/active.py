"""Knowledge in use: for each product the pack and the heads that it is bound in, exchanged between frames."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.engines import Engine, Session
from edgead.runtime.errors import InputError
from edgead.runtime.evidence import Texts
from edgead.runtime.knowledge import Pack, check_fits
from edgead.runtime.normality import normalities
from edgead.runtime.spec import DetectorSpec, Port


@dataclass(eq=False)
class Knowing:
    """A pack with the heads that it is bound in. Frames hold it whole, so they never see half of two.

    Attributes:
        pack: the knowledge.
        head: the detector's head.
        normality: the second detector's head; None where the pack says of nothing that it is normal.
        version: of the pack.
        users: frames that work with it now.
        retired: no new frame will take it; the last one that holds it lets its heads go.
    """

    pack: Pack
    head: Session
    normality: Session | None
    version: str
    users: int = 0
    retired: bool = False
    texts: Texts = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Texts(self.pack)

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Its heads."""
        return (self.head,) if self.normality is None else (self.head, self.normality)


class ActiveKnowledge:
    """What each product is compared with. All methods may be called from any thread.

    New knowledge makes new heads only where arrays of that head changed: a threshold makes none, a sentence none
    of the bank's, whose head is the dear one. A head that two versions share is closed with the last of them.

    Args:
        engine: makes the heads.
        tiles: batch of one frame.
    """

    def __init__(self, engine: Engine, tiles: int) -> None:
        self._engine = engine
        self._tiles = tiles
        self._pair: Engine | None = None
        self._trunk: Session | None = None
        self._active: dict[str, Knowing] = {}
        self._holders: dict[Session, int] = {}
        self._swapping = threading.Lock()
        self._books = threading.Lock()
        self._closed = False

    @property
    def normality_trunk(self) -> Session | None:
        """The second trunk; None until knowledge needs one, and where one trunk feeds both heads."""
        return self._trunk

    @property
    def products(self) -> tuple[str, ...]:
        """In name order."""
        with self._books:
            return tuple(sorted(self._active))

    def __getitem__(self, product: str) -> Knowing:
        """What is active for a product; `KeyError` if nothing is."""
        with self._books:
            return self._active[product]

    def take(self, product: str) -> Knowing | None:
        """The one snapshot that a frame takes, and gives back when it is done; None if nothing is active."""
        with self._books:
            knowing = self._active.get(product)
            if knowing is not None:
                knowing.users += 1
            return knowing

    def give_back(self, knowing: Knowing) -> None:
        """A frame is done with it."""
        with self._books:
            knowing.users -= 1
            if knowing.retired and not knowing.users:
                self._let_go(knowing)

    def swap(self, pack: Pack) -> tuple[str | None, str]:
        """See `Inspector.swap`."""
        with self._swapping:
            with self._books:
                old = self._active.get(pack.product)
                if self._closed:
                    raise InputError(wanted="an open inspector", got="a closed one", next_step="Make a new Inspector.")
            if old is not None and old.pack.digest == pack.digest:
                return old.version, old.version
            made: list[Session] = []
            try:
                new = self._bind(pack, old, made)
            except BaseException:
                for session in made:
                    session.close()
                raise
            with self._books:
                for session in new.sessions:
                    self._holders[session] = self._holders.get(session, 0) + 1
                self._active[pack.product] = new
                self._retire(old)
            return (old.version if old else None), new.version

    def close(self) -> None:
        """Retire all; frames in flight keep their heads. A swap that has begun comes to its end first."""
        with self._books:
            self._closed = True
        with self._swapping, self._books:
            for knowing in self._active.values():
                self._retire(knowing)
            self._active = {}

    def close_normality(self) -> None:
        """Free the second trunk, once no frame is on the engine."""
        if self._trunk is not None:
            self._trunk.close()
        if self._pair is not None:
            self._pair.close()

    def _bind(self, pack: Pack, old: Knowing | None, made: list[Session]) -> Knowing:
        """Heads for a pack, those of `old` where its arrays are the same; new ones are noted in `made`."""
        engine = self._engine
        check_fits(pack, engine.bundle.manifest.knowing, engine.record.capacity)
        known = old is not None and _same(old.pack, pack, engine.spec)
        head = old.head if old is not None and known else self._make(engine, pack, made)
        normality: Session | None = None
        # A normality detector may be the bundle's first and only one: its table is then bound above.
        if engine.bundle.manifest.normality is not None and normalities(pack):
            pair = self._opened_pair()
            if old is not None and old.normality is not None and _same(old.pack, pack, pair.spec):
                normality = old.normality
            else:
                normality = self._make(pair, pack, made)
        return Knowing(pack, head, normality, pack.version)

    def _make(self, engine: Engine, pack: Pack, made: list[Session]) -> Session:
        head = engine.head(pack, self._tiles)
        made.append(head)
        warm(head)
        return head

    def _opened_pair(self) -> Engine:
        """The second pair of graphs, opened when the first sentence comes."""
        if self._pair is None:
            pair = self._engine.normality()
            assert pair is not None  # or no pack with a sentence would have fitted
            record = self._engine.bundle.manifest.normality
            if record is not None and not record.shared_trunk:
                trunk = pair.trunk(self._tiles)
                try:
                    warm(trunk)
                except BaseException:
                    trunk.close()
                    pair.close()
                    raise
                self._trunk = trunk
            self._pair = pair
        return self._pair

    def _retire(self, knowing: Knowing | None) -> None:
        """Let its heads go, or leave that to the last frame that holds it. Under the lock of the books."""
        if knowing is not None:
            knowing.retired = True
            if not knowing.users:
                self._let_go(knowing)

    def _let_go(self, knowing: Knowing) -> None:
        for session in knowing.sessions:
            self._holders[session] -= 1
            if not self._holders[session]:
                del self._holders[session]
                session.close()


def warm(session: Session) -> None:
    """A first run, which allocates and chooses kernels: better here than on a frame."""
    session.infer({port.name: _zeros(port) for port in session.inputs})


def _zeros(port: Port) -> NDArray[Any]:
    return np.zeros([int(size) for size in port.shape], port.dtype)


def _same(old: Pack, new: Pack, spec: DetectorSpec) -> bool:
    """Whether a head of `spec` would be bound to the same arrays by both packs."""
    return all(_equal(old.arrays, new.arrays, port.name) for port in spec.knowledge)


def _equal(old: Mapping[str, NDArray[Any]], new: Mapping[str, NDArray[Any]], name: str) -> bool:
    return old[name] is new[name] or bool(old[name].dtype == new[name].dtype and np.array_equal(old[name], new[name]))
