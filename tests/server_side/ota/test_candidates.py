"""From a mark at a camera to a release: who may propose, who decides, whose row ids, and what is active before."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edgead.runtime.bundle import golden_files, write_bundle
from edgead.runtime.candidates import CANDIDATE_BYTES, decode_candidate
from edgead.runtime.device_cli import device
from edgead.runtime.device_folder import init_device, read_device
from edgead.runtime.device_status import new_device_key, public_of
from edgead.runtime.errors import CandidateError, InputError
from edgead.runtime.image import encode_png, read_image
from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.marks import Marks, marked
from edgead.runtime.slots import Store
from edgead.runtime.spec import Calibration, EngineRecord, KnowledgePort, Preprocessing, Region
from edgead.runtime.update_outcome import Device
from edgead.runtime.updater import DeviceUpdater
from edgead.server_side.ota.candidates import (
    CandidateStore,
    Decision,
    FullError,
    StoreLimits,
    UnknownDeviceError,
    accept_candidate,
    keys_of,
)
from edgead.server_side.ota.candidates_page import candidates_page
from edgead.server_side.ota.cli import ota
from edgead.server_side.ota.devices import DeviceFile, checked
from edgead.server_side.ota.publish import load_pack, releases_of
from edgead.server_side.ota.repository import opened

JUDGED = ("--held-out", "held-out", "--defects", "defects")
KEYS = ("--keys", "keys", "--passphrase-env", "EDGEAD_KEYS")
SEED = bytes(range(32))
KNOWN = {"cam-1": public_of(SEED)}


def bundle(tiny: Any, path: Path, product: str, *, defects: bool) -> Pack:
    """The tiny detector, if wished with a bank of defects beside the normal one; its pack.

    The head adds nought times all of that bank to the score. Golden scores are true, as devices see them again.
    """
    from onnx import TensorProto, helper, load_from_string

    rows = np.repeat(np.arange(100, 104, dtype=np.float32), 3).reshape(-1, 3)
    arrays, spec, head = {"bank.normal": rows}, tiny.detector(), tiny.head_graph()
    if defects:
        # Another feature space, so that packs of one product do not fit the other's engine.
        spec = tiny.detector(Preprocessing(16, 16, rotate=180))
        port = KnowledgePort("bank.anomalous", "float32", ("M", 3), rows="bank.anomalous.rows", empty_ok=True)
        spec = msgspec.structs.replace(spec, knowledge=(*spec.knowledge, port))
        arrays["bank.anomalous"] = np.zeros((0, 3), np.float32)
        model = load_from_string(head)
        for node in model.graph.node:
            node.output[:] = ["far" if name == "score" else name for name in node.output]
        model.graph.node.extend(
            [
                helper.make_node("Cast", ["bank.anomalous.rows"], ["defects"], to=TensorProto.FLOAT),
                helper.make_node("ReduceSum", ["bank.anomalous"], ["sum"], keepdims=0),
                helper.make_node("Add", ["sum", "defects"], ["both"]),
                helper.make_node("Mul", ["both", "nought"], ["none"]),
                helper.make_node("Add", ["far", "none"], ["score"]),
            ]
        )
        value = helper.make_tensor_value_info
        model.graph.input.append(value("bank.anomalous", TensorProto.FLOAT, ["M", 3]))
        model.graph.input.append(value("bank.anomalous.rows", TensorProto.INT32, [1]))
        head = model.SerializeToString()
    pack = new_pack(
        product=product,
        fingerprint=spec.fingerprint,
        calibration=Calibration(threshold=30.0, map_threshold=30.0, typical=4.0, false_alarm_rate=0.05),
        arrays=arrays,
    )
    frames = np.stack([tiny.frame(), tiny.frame(200)])
    scores = [float(np.linalg.norm(rows - frame[0, 0], axis=1).min()) for frame in frames]
    golden, pictures = golden_files(frames, scores, [False, True])
    graphs = {"e/trunk.onnx": tiny.trunk_graph(), "e/head.onnx": head}
    write_bundle(
        path,
        name=product,
        detector=spec,
        engines=[EngineRecord("onnx-fp32", "onnx", "fp32", *graphs, "a test")],
        packs={product: pack},
        golden=golden,
        files=graphs | pictures,
    )
    return pack


def made(
    level: int = 150, *, seed: bytes = SEED, name: str = "cam-1", note: str = "", anomalous: bool = False
) -> bytes:
    frame = np.full((16, 16, 3), level, np.uint8)
    seen = Inspection(Verdict.NG, 9.0, 0.7, 5.0, None, (), (), "part", "0123456789ab")
    return marked(
        frame,
        seen,
        "anomalous" if anomalous else "normal",
        device=name,
        private_key=seed,
        fingerprint="ab" * 32,
        release=1,
        preprocessing=Preprocessing(16, 16),
        box=Region(4, 4, 6, 5) if anomalous else None,
        note=note,
        now=1_790_000_000 + level,
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


class Plant:
    """A publisher's folder with a repository, and cameras that look for updates in it."""

    def __init__(self, root: Path, tiny: Any, product: str) -> None:
        self.root, self.tiny, self.product = root, tiny, product
        self.collected = root / "collected" / "candidates"
        self.collected.mkdir(parents=True)
        self.pictures("held-out", *range(97, 107), 151, 152, 153)
        self.pictures("defects", 200, 210, 30)
        file = root / f"{product}.edgead"
        bundle(tiny, file, product, defects=product == "dented")
        for words in (
            ("init", "up", "--product", product),
            ("publish", "up", file),
            ("release", "up", product),
            ("rollout", "up", product, "--release", 1, "--percent", 100),
        ):
            run(ota, *words, *KEYS)

    def pictures(self, folder: str, *levels: int) -> Path:
        place = self.root / folder
        place.mkdir(exist_ok=True)
        for level in levels:
            (place / f"{level}.png").write_bytes(encode_png(self.tiny.frame(level)))
        return place

    def camera(self, name: str, *groups: str) -> Path:
        folder = self.root / name
        trusted = (self.root / "keys" / "root.json").read_bytes()
        init_device(folder, Device(name, str(self.root / "up"), self.product, trusted, groups))
        if not (folder / "device.key").exists():
            (folder / "device.key").write_text(new_device_key().hex())
        seed = bytes.fromhex((folder / "device.key").read_text().strip())
        DeviceFile(self.root / "collected").add([checked(name, public_of(seed).hex())])
        assert self.update(folder) == "activated"
        return folder

    def update(self, folder: Path) -> str:
        updater = DeviceUpdater(Store(folder), read_device(folder))
        status: str = updater.poll().status
        if status == "activated":
            updater.confirm()
        return status

    def picture(self, level: int) -> Path:
        return self.pictures("seen", level) / f"{level}.png"

    def take(self, *cameras: Path) -> list[str]:
        """Carry marks to the publisher on a stick."""
        stick = self.root / "stick"
        stick.mkdir(exist_ok=True)
        for camera in cameras:
            assert [item.outcome for item in Marks(camera).send(str(stick))] == ["arrived"]
        done = run(ota, "candidates", "take", self.collected, stick)
        assert {item["outcome"] for item in done["files"]} <= {"taken", "known"}
        listed: list[str] = [item["id"] for item in run(ota, "candidates", "list", self.collected)["candidates"]]
        return listed

    def accept(self, *ids: str) -> Any:
        return run(ota, "candidates", "accept", "up", self.collected, *ids, *JUDGED, *KEYS)

    def accepting(self, *ids: str) -> subprocess.Popen[str]:
        words = ["ota", "candidates", "accept", "up", self.collected, *ids, *JUDGED, *KEYS, "--json"]
        return start(self.root, *words)

    def releases(self) -> list[tuple[int, list[int]]]:
        """Counters, and the ids of all banks' rows."""
        with opened(self.root / "up", (self.root / "keys" / "root.json").read_bytes()) as repository:
            found = []
            for release in releases_of(repository, self.product):
                pack = load_pack(repository, self.product, release.product_packs[self.product])
                found.append((release.counter, [int(one) for bank in pack.banks for one in pack.ids(bank)]))
        return found


def run(group: Any, *words: object) -> Any:
    done = CliRunner().invoke(group, [*map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgead", *map(str, words)]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=180)
    return process.returncode, out, error


Make = Callable[[str], Plant]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any, helpers: dict[str, Any]) -> Make:
    monkeypatch.setenv("EDGEAD_KEYS", helpers["PHRASE"])
    monkeypatch.chdir(tmp_path)
    return lambda product: Plant(tmp_path, tiny, product)


@pytest.fixture
def plant(make: Make) -> Plant:
    return make("part")


def test_row_43_two_cameras_mark_at_once_and_two_publishers_accept_at_once(plant: Plant) -> None:
    cameras = [plant.camera("cam-1", "pilot"), plant.camera("cam-2", "pilot")]
    active = [Store(camera).active().digest for camera in cameras]
    marking = [
        start(plant.root, "device", "mark", camera, plant.picture(level), "--normal", "--json")
        for camera, level in zip(cameras, (150, 154), strict=True)
    ]
    for code, out, error in map(ended, marking):
        assert code == 0, error
        assert json.loads(out)["verdict"] == "NG"
    # A camera that marked goes on as it was, and no update brings it what nobody accepted.
    ids = plant.take(*cameras)
    assert len(ids) == 2
    assert [plant.update(camera) for camera in cameras] == ["current", "current"]
    assert [Store(camera).active().digest for camera in cameras] == active
    assert plant.releases() == [(1, [1, 2, 3, 4])]

    accepting = {one: plant.accepting(one) for one in ids}
    for one, (code, _, error) in {one: ended(process) for one, process in accepting.items()}.items():
        if code == 1 and "another process" in error:  # it waited for as long as it does, on a slow machine
            code, _, error = ended(plant.accepting(one))
        assert code == 0, error
    assert plant.releases() == [(1, [1, 2, 3, 4]), (2, [1, 2, 3, 4, 5]), (3, [1, 2, 3, 4, 5, 6])]
    assert [plant.update(camera) for camera in cameras] == ["activated", "activated"]
    for camera in cameras:
        pack = Store(camera).active().packs["part"]
        assert pack.ids("bank.normal").tolist() == [1, 2, 3, 4, 5, 6]
        assert {150.0, 154.0} <= set(pack.arrays["bank.normal"][:, 0].tolist())

    code, _, error = ended(plant.accepting(ids[0]))
    assert (code, "accepted" in error) == (2, True)
    # A publisher that was killed between the release and its decision finds the release.
    next(plant.collected.rglob(f"{ids[0]}.json")).unlink()
    assert plant.accept(ids[0])["accepted"] == [ids[0]]
    assert len(plant.releases()) == 3
    assert CandidateStore(plant.collected).find(ids[0]).state == "accepted"


def test_a_missed_dent_becomes_rows_of_the_anomalous_bank_on_two_cameras_and_then_on_all(make: Make) -> None:
    plant = make("dented")
    pilots = [plant.camera(f"cam-{number}", "pilot") for number in (1, 2)]
    other = plant.camera("cam-3")
    (plant.root / "mask.png").write_bytes(
        encode_png(np.pad(np.full((4, 4, 3), 255, np.uint8), ((4, 8), (4, 8), (0, 0))))
    )
    run(device, "mark", pilots[0], plant.picture(31), "--anomalous", "--mask", "mask.png", "--note", "dent")
    run(device, "mark", other, plant.picture(33), "--anomalous", "--box", "4,4,4,4")
    ids = plant.take(pilots[0], other)
    done = plant.accept(*ids)
    assert (done["release"], done["added"], done["groups"]) == (2, {"bank.anomalous": 2}, ["pilot"])
    assert set(done["accepted"]) == set(ids)
    assert [plant.update(camera) for camera in (*pilots, other)] == ["activated", "activated", "current"]
    taught = Store(pilots[0]).active().packs["dented"]
    assert sorted(taught.arrays["bank.anomalous"][:, 0].tolist()) == [31.0, 33.0]
    assert taught.ids("bank.anomalous").tolist() == [5, 6]
    run(ota, "rollout", "up", "dented", "--percent", 100, *KEYS)
    assert plant.update(other) == "activated"
    assert Store(other).active().digest == Store(pilots[0]).active().digest
    with opened(plant.root / "up", (plant.root / "keys" / "root.json").read_bytes()) as repository:
        notes = releases_of(repository, "dented")[-1].notes
    assert notes.startswith("defect, marked at cam-1, cam-3: ")
    assert all(one[:16] in notes for one in ids)


def test_what_nobody_may_accept_is_refused_and_changes_nothing(plant: Plant) -> None:
    store, registry = CandidateStore(plant.collected), DeviceFile(plant.root / "collected")
    registry.add([checked("cam-1", KNOWN["cam-1"].hex())])
    good, bad, late = (
        store.put(data, keys_of(registry))[0].id for data in (made(), made(31, anomalous=True), made(155))
    )
    run(ota, "candidates", "decline", plant.collected, late, "--reason", "a reflection", "--by", "Ada")
    before = files(plant.root / "up")
    for ids, said in (((good, bad), "one kind"), ((late,), "Ada declined"), (("0" * 64,), "one candidate")):
        with pytest.raises(InputError, match=said):
            plant.accept(*ids)
    with pytest.raises(InputError, match="anomalous rows"):
        plant.accept(bad)  # this detector has no bank of defects
    # A device that was removed since, as a stolen one is, has no say any more; nor has one under a new key.
    registry.add([checked("cam-1", public_of(new_device_key()).hex())], replace=True)
    with pytest.raises(CandidateError, match="the key"):
        plant.accept(good)
    registry.remove("cam-1")
    with pytest.raises(CandidateError, match="unknown device"):
        plant.accept(good)
    assert files(plant.root / "up") == before
    assert [entry.state for entry in store] == ["new", "new", "declined"]


def test_marks_are_listed_taken_back_and_need_a_release_and_a_key(plant: Plant) -> None:
    camera = plant.camera("cam-1")
    first = run(device, "mark", camera, plant.picture(150), "--normal", "--note", "thread")
    assert first["new"]
    assert not run(device, "mark", camera, plant.picture(150), "--normal")["new"]
    (waiting,) = run(device, "marks", camera)["marks"]
    assert (waiting["id"], waiting["note"], waiting["verdict"], waiting["release"]) == (first["id"], "thread", "NG", 1)
    assert waiting["knowledge"] == Store(camera).active().packs["part"].version
    assert run(device, "marks", camera, "--remove", first["id"][:8])["marks"] == []
    for name in ("device.key", "device.copy.key"):
        (camera / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="key of a device"):
        run(device, "mark", camera, plant.picture(150), "--normal")
    for wrong in (
        ["--normal", "--anomalous"],
        [],
        ["--normal", "--box", "1,1,1,1"],
        ["--anomalous", "--box", "1,1,0,1"],
    ):
        words = ["mark", str(camera), str(plant.picture(150)), *wrong]
        if wrong[-1:] == ["1,1,0,1"]:
            with pytest.raises(InputError, match="X,Y,W,H"):
                CliRunner().invoke(device, words, catch_exceptions=False)
        else:
            assert CliRunner().invoke(device, words, catch_exceptions=False).exit_code == 2


def test_the_same_candidate_is_one_and_stays_decided_however_often_it_comes(tmp_path: Path) -> None:
    store = CandidateStore(tmp_path)
    entry, new = store.put(made(), KNOWN)
    assert new
    assert store.put(made(), KNOWN)[1] is False
    no = Decision(entry.id, "declined", "Ada", 5, "a reflection")
    assert store.decide(entry, no) == no
    assert store.decide(entry, Decision(entry.id, "declined", "Bob", 6)) == no
    with pytest.raises(InputError, match="Ada declined"):
        store.decide(entry, Decision(entry.id, "accepted", "Bob", 6, release=2))
    again, new = store.put(made(), KNOWN)
    assert (again.state, new) == ("declined", False)
    # Moved away to save space, it is still known.
    next(tmp_path.rglob("*.candidate")).unlink()
    assert store.put(made(), KNOWN)[1] is False
    assert list(store) == []


def test_nobody_but_a_known_device_gets_in_and_nothing_is_written(tmp_path: Path) -> None:
    store = CandidateStore(tmp_path)
    with pytest.raises(UnknownDeviceError):
        store.put(made(name="cam-2"), KNOWN)
    with pytest.raises(CandidateError, match="the key"):
        store.put(made(seed=new_device_key()), KNOWN)
    broken = bytearray(made())
    broken[-30] ^= 1
    for data in (bytes(broken), b"", b"x" * 100, bytes(CANDIDATE_BYTES + 1)):
        with pytest.raises(CandidateError):
            store.put(data, KNOWN)
    assert files(tmp_path) == set()


def test_a_stolen_device_cannot_fill_the_store_and_others_still_get_in(tmp_path: Path) -> None:
    other = new_device_key()
    keys = KNOWN | {"cam-2": public_of(other)}
    store = CandidateStore(tmp_path, limits=StoreLimits(new_per_device=2, files=4))
    entries = [store.put(made(level), keys)[0] for level in (150, 151)]
    with pytest.raises(FullError, match="at most 2 of cam-1"):
        store.put(made(152), keys)
    store.put(made(seed=other, name="cam-2"), keys)
    store.decide(entries[0], Decision(entries[0].id, "declined", "Ada", 5))
    store.put(made(152), keys)
    with pytest.raises(FullError, match="at most 4 candidates"):
        store.put(made(153, seed=other, name="cam-2"), keys)
    with pytest.raises(FullError, match="at most 10 bytes"):
        CandidateStore(tmp_path, limits=StoreLimits(bytes=10)).put(made(154), keys)


def test_a_file_that_was_exchanged_in_the_store_is_seen(tmp_path: Path) -> None:
    store = CandidateStore(tmp_path)
    entry, _ = store.put(made(), KNOWN)
    place = next(tmp_path.rglob("*.candidate"))
    place.write_bytes(made(151))
    with pytest.raises(CandidateError, match="another one"):
        store.find(entry.id)
    assert list(store) == []
    place.write_bytes(made())
    (tmp_path / "cam-1" / f"{entry.id}.json").write_bytes(b"{}")
    with pytest.raises(InputError, match="decision"):
        store.find(entry.id)


def test_the_page_shows_picture_mark_and_verdict_and_runs_nothing(tmp_path: Path) -> None:
    store = CandidateStore(tmp_path)
    store.put(made(31, anomalous=True, note="<script>alert(1)</script> dent"), KNOWN)
    store.put(made(), KNOWN)
    page = tmp_path / "marked.html"
    done = run(ota, "candidates", "show", tmp_path, "-o", page)
    assert done["candidates"] == 2
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert text.count("data:image/jpeg;base64,") == 3
    assert "NG (score 9, threshold 5)" in text
    assert "Nothing was marked" in candidates_page([])


def test_a_candidate_is_accepted_with_its_picture_as_it_was_seen(plant: Plant) -> None:
    camera = plant.camera("cam-1")
    picture = plant.picture(150)
    run(device, "mark", camera, picture, "--normal")
    (data, _), *_ = Marks(camera)
    keys = keys_of(DeviceFile(plant.root / "collected"))
    assert (accept_candidate(data, keys).frame() == read_image(picture)).all()


@contextlib.contextmanager
def collecting(store: CandidateStore, keys: Any, limits: Any = None) -> Iterator[int]:
    """A real server with the route; its port."""
    uvicorn = pytest.importorskip("uvicorn")
    from starlette.applications import Starlette

    from edgead.server_side.ota.candidates_http import candidate_routes

    app = Starlette(routes=candidate_routes(store, keys, limits))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        end = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def post(port: int, body: Any, **headers: str) -> tuple[int, dict[str, Any], Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/candidates", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers


def test_cameras_send_marks_to_a_real_server_which_checks_before_it_writes(tmp_path: Path) -> None:
    store, marks = CandidateStore(tmp_path / "store", limits=StoreLimits(new_per_device=2)), Marks(tmp_path / "camera")
    first, _ = marks.add(made())
    with collecting(store, KNOWN) as port:
        assert [(item.digest, item.outcome) for item in marks.send(f"http://127.0.0.1:{port}/")] == [(first, "arrived")]
        assert list(marks) == []
        assert post(port, made())[:2] == (200, {"id": first, "state": "new"})
        before = files(tmp_path / "store")
        assert post(port, made(name="cam-2"))[0] == 403
        assert post(port, made(seed=new_device_key()))[0] == 400
        assert post(port, b"\x00" * 300)[0] == 400
        status, answer, _ = post(port, b"", **{"Content-Length": str(CANDIDATE_BYTES + 1)})
        assert (status, answer["reason"]) == (413, f"more than {CANDIDATE_BYTES} bytes")
        # In pieces, without saying how much it will be.
        with contextlib.suppress(ConnectionError):
            assert post(port, iter([b"x" * 2**20] * 9))[0] == 413
        assert files(tmp_path / "store") == before
        assert post(port, made(151))[0] == 201
        status, answer, headers = post(port, made(152))
        assert (status, headers["Retry-After"]) == (429, "60")
        assert "at most 2 of cam-1" in answer["reason"]
        marks.add(made(152))
        assert [item.outcome for item in marks.send(f"http://127.0.0.1:{port}")] == ["kept"]
    assert decode_candidate(next((tmp_path / "store").rglob(f"{first}.candidate")).read_bytes()).digest == first


def test_the_collector_of_statuses_takes_candidates_with_its_token_from_the_devices_it_knows(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("sqlalchemy")
    from edgead.server_side.ota import collector_server
    from edgead.server_side.ota.candidates_http import candidate_routes
    from edgead.server_side.ota.collector import Tokens
    from edgead.server_side.ota.intake import Intake
    from edgead.server_side.ota.status_store import StatusStore

    store, marks = CandidateStore(tmp_path / "candidates"), Marks(tmp_path / "camera")
    first, _ = marks.add(made())
    with StatusStore(str(tmp_path / "fleet.db")) as statuses:
        routes = candidate_routes(store, keys_of(statuses.devices))
        server = collector_server.CollectorServer(Intake(statuses), tokens=Tokens("a secret"), routes=routes)
        with collector_server.collecting(server) as running:
            address = running.url.replace("http://", "http://camera:a%20secret@")
            # Without the token nobody is listened to, and with it only who is registered.
            assert [item.outcome for item in marks.send(running.url)] == ["kept"]
            assert [(item.outcome, item.reason) for item in marks.send(address)] == [
                ("refused", "one of the unknown device 'cam-1'")
            ]
            assert files(tmp_path / "candidates") == set()
            statuses.devices.add([checked("cam-1", KNOWN["cam-1"].hex())])
            assert [item.outcome for item in marks.send(address)] == ["arrived"]
    assert [entry.id for entry in store] == [first]
    # The registry of that database is the one that the publisher accepts by.
    known = run(
        ota,
        "candidates",
        "take",
        store.folder,
        next(store.folder.rglob("*.candidate")),
        "--devices",
        tmp_path / "fleet.db",
    )
    assert [item["outcome"] for item in known["files"]] == ["known"]


def test_a_slow_body_a_crowd_and_a_registry_that_is_away_cost_no_more_than_their_request(tmp_path: Path) -> None:
    from edgead.runtime.errors import StorageError
    from edgead.server_side.ota.candidates_http import IntakeLimits

    def away(name: str) -> bytes | None:
        raise StorageError(wanted="the registry", got="a secret place")

    store = CandidateStore(tmp_path)
    with collecting(store, away, IntakeLimits(seconds=1.0, at_once=1)) as port:
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"POST /candidates HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
            end = time.monotonic() + 30
            while post(port, made())[0] != 429:
                assert time.monotonic() < end
            slow.settimeout(60)
            assert b" 408 " in slow.recv(200)
        status, answer, headers = post(port, made())
        assert (status, answer, headers["Retry-After"]) == (503, {"reason": "not now"}, "60")
    assert files(tmp_path) == set()
