"""The one way by which statuses come into the store, over whatever line, and the counters of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from edgead.runtime.errors import StorageError
from edgead.server_side.ota.status_store import Outcome, StatusStore
from edgead.server_side.ota.statuses import RefusedStatusError

Way = Literal["http", "mqtt"]
Result = Outcome | RefusedStatusError
_LOG = logging.getLogger("edgead.collect")
_LOG_SECONDS = 10.0


class Intake:
    """Takes statuses and counts them. Safe to use from several threads.

    Args:
        store: where they are kept.

    Attributes:
        requests: answers over HTTP, by their status.
        dropped: messages over MQTT that were not looked at, by reason.
    """

    def __init__(self, store: StatusStore) -> None:
        self.store = store
        self._registry = CollectorRegistry()
        self._taken = Counter(
            "edgead_statuses", "Statuses that count, new or known.", ["way", "outcome"], registry=self._registry
        )
        self._refused = Counter(
            "edgead_statuses_refused", "Statuses that do not count.", ["way", "reason"], registry=self._registry
        )
        self._away = Counter("edgead_database_errors", "Times the database was away.", registry=self._registry)
        self.requests = Counter("edgead_http_answers", "Answers to statuses.", ["status"], registry=self._registry)
        self.dropped = Counter("edgead_mqtt_dropped", "Messages not looked at.", ["reason"], registry=self._registry)
        self._registry.register(_Devices(store))
        self._lock = threading.Lock()
        self._told, self._untold = float("-inf"), 0

    def take(self, envelopes: Sequence[bytes], way: Way) -> list[Result]:
        """Add statuses in one transaction; what it says of them is on the disk.

        Raises:
            StorageError: the database is away; nothing was taken.
        """
        try:
            results = self.store.add_many(envelopes)
        except StorageError as error:
            self._away.inc()
            self._tell(str(error))
            raise
        for one in results:
            if isinstance(one, RefusedStatusError):
                self.refuse(one, way)
            else:
                self._taken.labels(way, one).inc()
        return results

    def refuse(self, error: RefusedStatusError, way: Way) -> None:
        """Count a refusal."""
        self._refused.labels(way, error.reason).inc()
        self._tell(f"refused: {error.reason}: {error}")

    def metrics(self) -> bytes:
        """All counters in the text format of Prometheus."""
        return generate_latest(self._registry)

    def _tell(self, text: str) -> None:
        """One line in a while; who floods does not fill the log."""
        with self._lock:
            now = time.monotonic()
            if now - self._told < _LOG_SECONDS:
                self._untold += 1
                return
            more = f" (and {self._untold} more before it)" if self._untold else ""
            self._told, self._untold = now, 0
        _LOG.warning("%s%s", text[:400], more)


class _Devices(Collector):
    """Devices by product and release, as the database has them when it is asked."""

    def __init__(self, store: StatusStore) -> None:
        self._store = store

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [self._family()]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = self._family()
        try:
            found = self._store.releases()
        except StorageError:  # counted where statuses come in; the other counters are wanted now most of all
            return []
        for product, release, count in found:
            family.add_metric([product, "" if release is None else str(release)], count)
        return [family]

    @staticmethod
    def _family() -> GaugeMetricFamily:
        text = "Devices by product and active release; product '' was never heard from."
        return GaugeMetricFamily("edgead_devices", text, labels=["product", "release"])


def reason_text(error: RefusedStatusError, most: int = 100) -> str:
    """Why a status does not count, as the device is told."""
    return f"{error.reason}: got {error.got}"[:most]


__all__ = ["Intake", "Result", "Way", "reason_text"]
