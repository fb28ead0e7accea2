"""Who a device is, and what its updater came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgead.runtime.errors import EdgeadError
from edgead.runtime.self_test import Shadow

Status = Literal["current", "activated", "confirmed", "rolled back", "rejected", "failed"]


@dataclass(frozen=True)
class Device:
    """Who a device is and where its updates come from.

    Attributes:
        device_id: its own name.
        repository: address of the repository (http, https or file).
        product: what it inspects.
        root: trusted root metadata, kept outside of every cache.
        groups: that it belongs to.
        pin_keys: keys by name, each 32 bytes of Ed25519: with any of them, a release is taken only if its pack has a
            pin by one of them.
        statuses: address that its statuses are sent to (http, https, mqtt, mqtts or file); empty for none.
        mqtt: address of a broker that says when to poll; empty for none.
    """

    device_id: str
    repository: str
    product: str
    root: bytes
    groups: tuple[str, ...] = ()
    pin_keys: Mapping[str, bytes] = field(default_factory=dict)
    statuses: str = ""
    mqtt: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a poll, or a look at a release on probation, came to.

    Attributes:
        status: 'current': nothing to do; 'activated': a release is active, on probation; 'confirmed'; 'rolled back';
            'rejected': a release failed here and is quarantined; 'failed': no update, see `error`.
        reason: for people.
        release: counter of the active release; None if there is none.
        way: how the pack came, see `Parts`.
        received: bytes of bodies.
        requests: how many.
        seconds: that it took.
        shadow: which of the last frames are judged differently.
        restart: the release is active in the store, and the program that inspects has to be started anew to take it.
        error: why not.
    """

    status: Status
    reason: str = ""
    release: int | None = None
    way: str = ""
    received: int = 0
    requests: int = 0
    seconds: float = 0.0
    shadow: Shadow | None = None
    restart: bool = False
    error: EdgeadError | None = None


def shadow_text(shadow: Shadow, most: int = 7) -> str:
    """A shadow replay in one line."""
    changed: Sequence[str] = [f"{item.frame} {item.before.value}->{item.after.value}" for item in shadow.changed[:most]]
    more = "" if len(shadow.changed) <= most else ", ..."
    return f"{len(shadow.changed)} of the last {shadow.frames} verdicts change" + (
        f": {', '.join(changed)}{more}" if changed else ""
    )
