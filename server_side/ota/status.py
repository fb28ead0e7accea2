"""What is in a repository, for people and programs. Public things only: no private key is opened for it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import msgspec

from edgead.runtime.tables import bytes_text, table
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.publish import engines_of, packs_of, releases_of
from edgead.server_side.ota.repository import MADE, Repository
from edgead.server_side.ota.roles import KINDS, ROLES, TOP
from edgead.server_side.ota.rollouts import rollout_of
from edgead.server_side.ota.rotation import keys_of

_SHOWN = 12


def status(repository: Repository, keyring: Keyring | None = None) -> dict[str, Any]:
    """Roles, engines, and what each product has, as JSON-like content.

    Args:
        repository: which.
        keyring: whose keys are marked as being here.

    Raises:
        InputError: something was tampered with.
    """
    roles = {}
    for kind in ROLES:
        threshold, keys = keys_of(repository, kind)
        expires = min(_expiries(repository, kind))
        roles[kind] = {
            "threshold": threshold,
            "keys": [{"keyid": key.keyid, "here": keyring is not None and keyring.has(key.keyid)} for key in keys],
            "expires": expires.isoformat(),
            "days_left": round((expires - repository.clock()) / timedelta(days=1), 2),
        }
    products = {}
    for product in repository.settings.products:
        record = rollout_of(repository, product)
        releases = [
            {
                "counter": release.counter,
                "engine": release.engine,
                "pack": release.product_packs[product],
                "made_at": release.made_at,
                "notes": release.notes,
            }
            for release in releases_of(repository, product)
        ]
        products[product] = {
            "packs": packs_of(repository, product),
            "releases": releases,
            "rollout": None if record is None else msgspec.to_builtins(record),
        }
    engines = {
        digest: {"name": bundle.manifest.name, "bytes": bundle.path.stat().st_size, "products": list(bundle.products)}
        for digest, bundle in engines_of(repository).items()
    }
    return {
        "folder": str(repository.folder),
        "root": repository.root.signed.version,
        "timestamp": repository.timestamp.signed.version,
        "made": repository.timestamp.signed.unrecognized_fields.get(MADE),
        "bins": repository.settings.bins,
        "roles": roles,
        "engines": engines,
        "products": products,
    }


def status_text(content: dict[str, Any]) -> str:
    """The same as tables."""
    lines = [f"root {content['root']}, timestamp {content['timestamp']} of {content['made']}"]
    rows = [["role", "keys", "here", "expires in"]]
    for kind, role in content["roles"].items():
        here = sum(key["here"] for key in role["keys"])
        left = role["days_left"]
        soon = "EXPIRED" if left <= 0 else f"{left:.0f} d" if left >= 2 else f"{left * 24:.0f} h"
        rows.append([kind, f"{role['threshold']} of {len(role['keys'])}", str(here), soon])
    lines.append(table(rows))
    for digest, engine in content["engines"].items():
        lines.append(f"engine {digest[:_SHOWN]}  {engine['name']}  {bytes_text(engine['bytes'])}")
    for product, found in content["products"].items():
        lines.append(f"{product}: {len(found['packs'])} packs, {len(found['releases'])} releases")
        for release in found["releases"]:
            lines.append(
                f"  {release['counter']}: engine {release['engine'][:_SHOWN]}, pack {release['pack'][:_SHOWN]}"
                + (f"  {release['notes']}" if release["notes"] else "")
            )
        lines.append(f"  {_rollout_text(found['rollout'])}")
    return "\n".join(lines)


def _rollout_text(record: dict[str, Any] | None) -> str:
    if record is None:
        return "nothing rolled out"
    how = "STOPPED" if record["stopped"] else "paused" if record["paused"] else "rolling out"
    groups = ", ".join(record["groups"]) or "no group"
    before = f"; others have {record['previous']}" if record["previous"] else ""
    return f"{how}: release {record['release']} to {groups} and {record['percent']:g} % of the others{before}"


def _expiries(repository: Repository, kind: str) -> list[datetime]:
    if kind in TOP:
        return [getattr(repository, kind).signed.expires]
    names = repository.layout.roles(kind) if kind in KINDS else []
    return [repository.role(name).signed.expires for name in names]
