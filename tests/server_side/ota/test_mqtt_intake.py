"""Statuses over a real broker: good ones, spoofed ones, a flood, and a broker or a database that goes away."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("prometheus_client")
pytest.importorskip("paho.mqtt.client")

from paho.mqtt import client as mqtt

from edgead.runtime.device_status import DeviceStatus, encode_status, new_device_key, public_of
from edgead.runtime.mqtt import MqttLink
from edgead.server_side.ota.devices import checked
from edgead.server_side.ota.intake import Intake
from edgead.server_side.ota.mqtt_intake import MqttIntake
from edgead.server_side.ota.status_store import StatusStore


class Camera:
    """A device that signs."""

    def __init__(self, name: str = "cam-1") -> None:
        self.name, self.seed = name, new_device_key()
        self.key = public_of(self.seed).hex()

    def says(self, sequence: int) -> bytes:
        status = DeviceStatus(device=self.name, product="part", sequence=sequence, time=int(time.time()), version="1.0")
        return encode_status(status, self.seed)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StatusStore]:
    with StatusStore(str(tmp_path / "fleet.db"), keep=10_000) as made:
        yield made


@pytest.fixture
def camera(store: StatusStore) -> Camera:
    made = Camera()
    store.devices.add([checked(made.name, made.key)])
    return made


@pytest.fixture
def stranger(mosquitto: Any) -> Iterator[Any]:
    """Somebody else on the broker."""
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", mosquitto.port)
    client.loop_start()
    yield client
    client.disconnect()
    client.loop_stop()


def numbers(store: StatusStore) -> list[int]:
    return [one.status.sequence for one in store.history("cam-1")]


def test_statuses_of_a_device_come_over_a_broker_and_over_its_restart(
    mosquitto: Any, services: Any, store: StatusStore, camera: Camera
) -> None:
    link = MqttLink(mosquitto.url, device_id="cam-1", product="part", first_wait_s=0.05)
    link.start()
    try:
        with MqttIntake(Intake(store), mosquitto.url, client_id="collect-1") as listener:
            assert listener.connected.wait(60)
            services.until(lambda: link.publish_status(camera.says(1), 5.0))
            services.until(lambda: numbers(store) == [1])
            mosquitto.stop()
            services.until(lambda: not listener.connected.is_set())
            mosquitto.start()
            services.until(lambda: link.publish_status(camera.says(2), 5.0))
            services.until(lambda: numbers(store) == [1, 2])
        # The broker keeps what comes while nobody collects.
        services.until(lambda: link.publish_status(camera.says(3), 5.0))
        with MqttIntake(Intake(store), mosquitto.url, client_id="collect-1"):
            services.until(lambda: numbers(store) == [1, 2, 3])
    finally:
        link.close()


def test_spoofed_oversized_and_flooding_messages_are_counted_and_bounded(
    mosquitto: Any, services: Any, store: StatusStore, camera: Camera, stranger: Any
) -> None:
    intake = Intake(store)
    with MqttIntake(intake, mosquitto.url) as listener:
        assert listener.connected.wait(60)
        stranger.publish("edgead/status/cam-1", Camera("cam-1").says(1), 1)
        stranger.publish("edgead/status/cam-2", camera.says(1), 1)
        stranger.publish("edgead/status/cam-1", b"{" * 17_000, 1)
        stranger.publish("edgead/status/cam-1", b"{" * 1_000_000, 1)
        for _ in range(3000):
            stranger.publish("edgead/status/cam-9", b"flood", 0)
        for n in range(2, 302):
            stranger.publish("edgead/status/cam-1", camera.says(n), 1)
        services.until(lambda: len(numbers(store)) == 300)
        told = intake.metrics().decode()
    assert 'edgead_statuses_refused_total{reason="another key",way="mqtt"} 1.0' in told
    assert 'edgead_statuses_refused_total{reason="another topic",way="mqtt"} 1.0' in told
    assert 'reason="malformed",way="mqtt"' in told
    assert [one.status.device for one in store.latest()] == ["cam-1"]


def test_a_database_that_is_away_loses_no_message_that_was_sent_for_sure(
    mosquitto: Any, services: Any, postgres: Any, stranger: Any
) -> None:
    camera = Camera()
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(StatusStore(postgres.database(), enrol_unknown=True))
        with MqttIntake(Intake(store), mosquitto.url) as listener:
            assert listener.connected.wait(60)
            stranger.publish("edgead/status/cam-1", camera.says(1), 1)
            services.until(lambda: numbers(store) == [1])
            postgres.kill()
            try:
                for n in range(2, 42):
                    stranger.publish("edgead/status/cam-1", camera.says(n), 1).wait_for_publish(60)
            finally:
                postgres.start()
            services.until(lambda: numbers(store) == list(range(1, 42)))
