"""What `benchmarks.ota` measures with: a bundle with sentences, a publisher, a web server, a line that counts bytes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import bank_detector, embeddings, painted, spread_rows
from benchmarks.update_bytes import crowd
from edgead.cli import cli
from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import Bundle
from edgead.runtime.knowledge import IDS, Pack
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors import normality
from edgead.server_side.detectors.memory_bank import MemoryBankTrunk
from edgead.server_side.detectors.projections import default_layers, new_projections, write_projections
from edgead.server_side.ota.init import create
from edgead.server_side.ota.keys import Keyring, environment
from edgead.server_side.ota.publish import publish_bundle, publish_pack
from edgead.server_side.ota.releases import make_release
from edgead.server_side.ota.repository import Repository, opened
from edgead.server_side.ota.roles import Settings
from edgead.server_side.ota.rollouts import roll_out
from edgead.server_side.vision_language import load_model, tower_of
from edgead.server_side.vision_language.options import VisionLanguageOptions

PRODUCT = "part"
PASSPHRASE = "EDGEAD_BENCHMARK_PASSPHRASE"
WEIGHTS = "random:3"
SMALL = {
    "embed_dim": 512,
    "vision_cfg": {"layers": 4, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0, "image_size": 48},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
"""A text encoder whose sentences are as wide as real ones, and that costs next to nothing."""
GROWN = 16
"""Rows that each update of the stream brings."""
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Made:
    """A bundle with a memory bank and a normality detector.

    Attributes:
        path: of the bundle, one file.
        bundle: opened.
        model: the text encoder, as `--model` takes it.
        pack: what it knows.
    """

    path: Path
    bundle: Bundle
    model: str
    pack: Pack


def make_bundle(home: Path, rows: int, model: str | None) -> Made:
    """A memory bank at 256 pixels with a normality detector beside it; the threshold parts good frames from bad ones.

    Args:
        home: folder to work in.
        rows: of the bank.
        model: text encoder, with random weights; `SMALL` if None.
    """
    network = load_backbone("embedded")
    trunk = MemoryBankTrunk(network).eval()
    known = embeddings(trunk, painted(16))
    bank = spread_rows(known.reshape(-1, known.shape[-1]), rows)
    bad = painted(4, seed=9, defects=True)
    calm, loud = (_scores(embeddings(trunk, frames), bank) for frames in (painted(4, seed=21), bad))
    threshold = (max(calm) + min(loud)) / 2
    if model is None:
        config = home / "encoder.json"
        config.write_text(json.dumps(SMALL))
        model = str(config)
    second = _normality(home, model)
    detector = bank_detector(network, bank, bad[:2], threshold=threshold)
    path = home / "both.edgead"
    bundle = export_bundle(detector, path, ["onnx"], normality=second, force=True)
    return Made(path, bundle, model, bundle.pack(PRODUCT))


def _scores(patches: NDArray[np.float32], bank: NDArray[np.float32]) -> list[float]:
    """Distance of each frame's farthest patch [G, P, D] to its nearest row [N, D]."""
    norms = np.square(bank).sum(1)
    least = [(norms - 2.0 * frame @ bank.T).min(1) + np.square(frame).sum(1) for frame in patches]
    return [float(np.sqrt(max(0.0, far.max()))) for far in least]


def _normality(home: Path, model: str) -> Any:
    loaded = load_model(model, WEIGHTS)
    tower = tower_of(loaded)
    layers = default_layers(tower.depth)
    made = new_projections(layers, [tower.layer_widths[layer - 1] for layer in layers], tower.embed_dim, seed=1)
    projections = home / "projections.safetensors"
    write_projections(projections, made, model=loaded.name, weights=loaded.weights_sha256)
    options = VisionLanguageOptions(model=model, weights=WEIGHTS, class_name="carpet", projections=projections)
    return normality.learn([], options).write(home / "normality.detector", force=True)


class Publisher:
    """A repository with one product that has a bundle and a release, and entries of others.

    Args:
        home: folder to work in.
        made: what is published.
        products, targets: how many others, and packs of each.
    """

    def __init__(self, home: Path, made: Made, products: int, targets: int) -> None:
        self.folder, self.keys, self._made = home / "updates", home / "keys", made
        os.environ.setdefault(PASSPHRASE, os.urandom(16).hex())
        names = (PRODUCT, *(f"product-{number:04d}" for number in range(products)))
        create(self.folder, self._keyring(), Settings(products=names))
        with self.opened() as repository:
            publish_bundle(repository, made.path)
            crowd(repository, products, targets)
            repository.commit(self._keyring())
            release = make_release(repository, PRODUCT)
            repository.commit(self._keyring())
            roll_out(repository, PRODUCT, release=release.counter, percent=100.0, window=1)
            repository.commit(self._keyring())
        self._packs = [made.pack]

    @property
    def root(self) -> Path:
        """The trusted root, for devices."""
        return self.keys / "root.json"

    @contextlib.contextmanager
    def opened(self) -> Iterator[Repository]:
        with opened(self.folder, self.root.read_bytes()) as repository:
            yield repository

    def words(self, sentence: str) -> list[str]:
        """The command that makes a sentence normal for the pilot group."""
        goldens = [f"--now-normal={record.path}" for record in self._made.bundle.manifest.golden if record.anomalous]
        keys = ["--keys", str(self.keys), "--passphrase-env", PASSPHRASE]
        model = ["--model", self._made.model, "--model-weights", WEIGHTS]
        command = ["ota", "add-normality", str(self.folder), PRODUCT, sentence, "--class", "carpet"]
        return [*command, *model, *goldens, *keys, "--json"]

    def add_normality(self, sentence: str) -> dict[str, Any]:
        """The command, in this process: its modules are there already."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            cli.main(self.words(sentence), "edgead", standalone_mode=False)
        return dict(json.loads(said.getvalue().strip().splitlines()[-1]))

    def signed_at(self) -> float:
        """When the last change came in force, by the clock of this machine."""
        return (self.folder / "metadata" / "timestamp.json").stat().st_mtime

    def grow(self) -> int:
        """A release with some rows more, signed and not rolled out; its counter."""
        base = self._packs[-1]
        rows, ids = base.arrays["bank.normal"], base.ids("bank.normal")
        more = rows[:GROWN] * np.float32(1.0 + 0.01 * len(self._packs))
        later = np.arange(int(ids[-1]) + 1, int(ids[-1]) + 1 + GROWN, dtype=np.uint64)
        arrays = dict(base.arrays) | {
            "bank.normal": np.concatenate([rows, more]),
            "bank.normal" + IDS: np.concatenate([ids, later]),
        }
        pack = Pack(base.product, base.fingerprint, base.calibration, arrays)
        with self.opened() as repository:
            publish_pack(repository, pack, calibrated=True)
            repository.commit(self._keyring())
            release = make_release(repository, PRODUCT, pack=pack.digest)
            repository.commit(self._keyring())
        self._packs.append(pack)
        return release.counter

    def roll_out(self, counter: int) -> None:
        with self.opened() as repository:
            roll_out(repository, PRODUCT, release=counter, percent=100.0)
            repository.commit(self._keyring())

    def _keyring(self) -> Keyring:
        return Keyring([self.keys], environment(PASSPHRASE))


class Program:
    """A Python program whose lines are read as they come.

    Args:
        words: after the interpreter.
    """

    def __init__(self, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def line(self, patience: float = PATIENCE_S) -> str:
        """The next line.

        Raises:
            SystemExit: it ended, or says nothing.
        """
        try:
            line = self.lines.get(timeout=patience)
        except queue.Empty:
            line = ""
        if not line:
            raise SystemExit("a program of this benchmark ended or says nothing; see what it wrote above")
        return line

    def event(self, *names: str, patience: float = PATIENCE_S) -> dict[str, Any]:
        """The next event of these names; others are passed over."""
        end = time.monotonic() + patience
        while True:
            found: dict[str, Any] = json.loads(self.line(max(0.1, end - time.monotonic())))
            if found["event"] in names:
                return found

    def finish(self) -> None:
        """Say that nothing more is to come."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.finish()
        self.process.terminate()
        self.process.wait(30)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Relay]:
    """`edgead ota serve` in a process of its own, behind a line that counts."""
    with Program("-m", "edgead", "ota", "serve", folder, "--port", "0", "--quiet") as server:
        where = urlsplit(server.line().split()[0])
        with Relay((str(where.hostname), int(where.port or 0))) as relay:
            yield relay


class Relay(socketserver.ThreadingTCPServer):
    """Passes bytes on, both ways, and counts them: heads and bodies of HTTP, without what TCP adds.

    Args:
        server: where to.

    Attributes:
        up, down: bytes to the server and from it.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, server: tuple[str, int]) -> None:
        self.upstream = server
        self.up = self.down = 0
        super().__init__(("127.0.0.1", 0), _Passing)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def moved(self) -> tuple[int, int]:
        return self.up, self.down

    def __exit__(self, *words: Any) -> None:
        self.shutdown()
        super().__exit__(*words)


class _Passing(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        with socket.create_connection(self.server.upstream) as other:
            for end in (other, self.request):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self._copy, args=(other, self.request, "down"), daemon=True)
            back.start()
            self._copy(self.request, other, "up")
            back.join(5.0)

    def _copy(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                setattr(self.server, way, getattr(self.server, way) + len(data))
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


__all__ = ["GROWN", "PASSPHRASE", "PRODUCT", "Made", "Program", "Publisher", "Relay", "make_bundle", "served"]
