"""A PostgreSQL and a Mosquitto of the tests' own, in folders that go with them; nothing of the system's is started."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

PLACES = ":".join(
    ["/usr/sbin", "/usr/local/sbin", *(str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
)


def program(name: str) -> str | None:
    """Where a service's program is; Debian has some of them outside of PATH."""
    return shutil.which(name) or shutil.which(name, path=PLACES)


def until(what: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A cluster in a temporary folder, reached by a socket in there.

    PostgreSQL does not run as root: there it runs as another user, to whom the folder belongs.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="edgead-pg-"))
        self._as: dict[str, object] = {"cwd": "/"}
        if os.geteuid() == 0:
            user = next(pwd.getpwnam(name) for name in ("postgres", "nobody") if _exists(name))
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self.process: subprocess.Popen[bytes] | None = None
        self._count = 0
        self._run("initdb", "-D", str(self.folder / "data"), "-U", "edgead", "-A", "trust", "-E", "UTF8", "--no-sync")

    def start(self) -> Postgres:
        options = ["fsync=off", "full_page_writes=off", "listen_addresses=", "shared_buffers=16MB"]
        command = [str(program("postgres")), "-D", str(self.folder / "data"), "-k", str(self.folder)]
        for option in options:
            command += ["-c", option]
        log = (self.folder / "log").open("ab")

        def answers() -> bool:
            # One that was killed may still leave a process or a file behind for a moment.
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, **self._as)  # type: ignore[call-overload]
            return self._run("pg_isready", "-q", "-h", str(self.folder), check=False) == 0

        with log:
            until(answers)
        return self

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._count += 1
        name = f"test{self._count}"
        self._run("createdb", "-h", str(self.folder), "-U", "edgead", name)
        return f"postgresql://edgead@/{name}?host={quote(str(self.folder), safe='')}"

    def kill(self) -> None:
        """As a crash: no connection is taken leave of, nothing is written any more."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(60)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, name: str, *arguments: str, check: bool = True) -> int:
        done = subprocess.run(
            [str(program(name)), *arguments],
            check=check,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._as,  # type: ignore[call-overload]
        )
        return int(done.returncode)


class Mosquitto:
    """A broker on a free port of loopback, which keeps its sessions when it is stopped.

    Args:
        folder: for its configuration and sessions.
        lines: of its configuration, more.
    """

    def __init__(self, folder: Path, *lines: str) -> None:
        self.port = free_port()
        self.config = folder / "mosquitto.conf"
        # As root it would become another user, who may not read a folder of tests.
        lines = (
            f"user {getpass.getuser()}",
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            "persistence true",
            f"persistence_location {folder}/",
            *lines,
            "",
        )
        self.config.write_text("\n".join(lines))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> Mosquitto:
        self.process = subprocess.Popen(
            [str(program("mosquitto")), "-c", str(self.config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(self.answers)
        return self

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)


def _exists(name: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(name))
    return False
