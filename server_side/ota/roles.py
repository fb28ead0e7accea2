"""Who signs what: the roles of an update repository, and which of them a target path belongs to.

    root        offline, threshold     who the others are
    targets     offline                who signs engines, knowledge, releases and roll-outs, product by product
    engines     engines/<digest>.edgead
    knowledge   knowledge/<product>/<digest>.safetensors, <digest>.pin, <digest>.provenance and <base>-<result>.delta
    releases    releases/<product>/<counter>.json; threshold
    rollout     rollout/<product>.json; online
    snapshot, timestamp     online, short-lived

Each product has delegations of its own (`knowledge.<product>`, `releases.<product>`, `rollout.<product>`), so that its
devices fetch nothing that is about others but one line per role in the snapshot. With thousands of products that
line is too much: hash bins then take their place (`knowledge` delegates to `knowledge-000` ...), which also take a new
product without the offline keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from msgspec import Struct
from tuf.api.metadata import DelegatedRole, Delegations, Key, SuccinctRoles

from edgead.runtime.errors import InputError
from edgead.runtime.spec import Name

TOP = ("root", "targets", "snapshot", "timestamp")
KINDS = ("engines", "knowledge", "releases", "rollout")
"""Delegated kinds, which are also the first folder of their target paths."""
ROLES = (*TOP, *KINDS)
ONLINE = frozenset({"rollout", "snapshot", "timestamp"})
"""Roles whose keys may lie on the machine that publishes."""
BY_PRODUCT = ("knowledge", "releases", "rollout")

DAYS = {
    "root": 365,
    "targets": 365,
    "engines": 365,
    "knowledge": 365,
    "releases": 365,
    "rollout": 365,
    "snapshot": 30,
    "timestamp": 7,
}
"""Days until a role's metadata expires, unless `edgead ota init` said otherwise."""


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """How a repository is laid out. Lies beside it as `publisher.json`; devices never read it."""

    schema: int = 1
    products: tuple[Name, ...] = ()
    bins: int = 0
    """Bits of the knowledge role's hash bins: 2**bins of them; 0 for a delegation of each product's own."""
    keep: int = 3
    """How many of a product's releases devices can still be given, and get deltas from."""
    next_ids: dict[Name, int] = msgspec.field(default_factory=dict)
    """By product, the first row id that was never published: rows are numbered here alone, upwards."""
    days: dict[str, int] = msgspec.field(default_factory=lambda: dict(DAYS))


class Layout:
    """Role names and delegations of a repository.

    Args:
        settings: how it is laid out.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def role_of(self, path: str) -> str:
        """The role that signs a target path.

        Raises:
            InputError: no role does.
        """
        kind, _, rest = path.partition("/")
        if kind == "engines":
            return kind
        product = rest.removesuffix(".json") if kind == "rollout" else rest.partition("/")[0]
        self._check(product)
        return self._succinct(kind, [], 1).get_role_for_target(path) if self.settings.bins else f"{kind}.{product}"

    def roles(self, kind: str, product: str | None = None) -> list[str]:
        """All roles of a kind that hold targets; those in which a product's may be.

        Raises:
            InputError: the repository has no such product.
        """
        if kind == "engines":
            return [kind]
        if product is not None:
            self._check(product)
        if self.settings.bins:
            return list(self._succinct(kind, [], 1).get_roles())
        return [f"{kind}.{name}" for name in self.settings.products if product in (None, name)]

    def kind_of(self, role: str) -> str:
        """The kind, or top-level role, whose keys sign `role`."""
        return role if role in ROLES else next(kind for kind in BY_PRODUCT if role.startswith((f"{kind}.", f"{kind}-")))

    def parent(self, role: str) -> str:
        """The role that delegates to `role`."""
        if role in TOP:
            return "root"
        return "targets" if role in KINDS or not self.settings.bins else self.kind_of(role)

    def order(self, roles: Iterable[str]) -> list[str]:
        """Roles so that each comes before the one that delegates to it."""
        return sorted(roles, key=lambda role: (role == "targets", role in KINDS, role))

    def delegations(self, keys: dict[str, Sequence[Key]], thresholds: dict[str, int]) -> Delegations:
        """What the targets role delegates."""
        found: dict[str, DelegatedRole] = {}
        for name, kind, pattern in self._patterns():
            ids = [key.keyid for key in keys[kind]]
            found[name] = DelegatedRole(name, ids, thresholds[kind], terminating=True, paths=[pattern])
        return Delegations({key.keyid: key for kind in KINDS for key in keys[kind]}, found)

    def bins(self, kind: str, keys: Sequence[Key], threshold: int) -> Delegations | None:
        """What the role of a kind delegates to its hash bins; None if it has none."""
        if kind not in BY_PRODUCT or not self.settings.bins:
            return None
        ids = [key.keyid for key in keys]
        return Delegations({key.keyid: key for key in keys}, succinct_roles=self._succinct(kind, ids, threshold))

    def delegated(self) -> list[str]:
        """All delegated roles."""
        kinds = list(KINDS) if self.settings.bins else []
        return list(dict.fromkeys([*kinds, *(role for kind in KINDS for role in self.roles(kind))]))

    def _check(self, product: str) -> None:
        if product not in self.settings.products:
            raise InputError(
                wanted=f"a product of this repository ({', '.join(self.settings.products) or 'none yet'})",
                got=repr(product[:200]),
                next_step="Add it with: edgead ota add-product",
            )

    def _patterns(self) -> Iterator[tuple[str, str, str]]:
        """Role, kind, and pattern of target paths that it signs."""
        yield "engines", "engines", "engines/*"
        if self.settings.bins:
            yield "knowledge", "knowledge", "knowledge/*/*"
            yield "releases", "releases", "releases/*/*"
            yield "rollout", "rollout", "rollout/*"
            return
        for product in self.settings.products:
            yield f"knowledge.{product}", "knowledge", f"knowledge/{product}/*"
            yield f"releases.{product}", "releases", f"releases/{product}/*"
            yield f"rollout.{product}", "rollout", f"rollout/{product}.json"

    def _succinct(self, kind: str, keyids: list[str], threshold: int) -> SuccinctRoles:
        # A product has many packs and deltas, but few releases and one roll-out.
        bits = self.settings.bins if kind == "knowledge" else max(1, self.settings.bins - 4)
        return SuccinctRoles(keyids, threshold, bits, kind)
