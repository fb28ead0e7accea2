"""The programs of the week of `fleet_update.py`: started, started again when they die, waited for."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from edgead.server_side.ota.status_store import StatusStore

SHIFT_OVER = Path("shift-over")


def service(running: ExitStack, command: str) -> str:
    """Start a command of edgead that ends with the week; the address that it prints."""
    words = [sys.executable, "-m", "edgead", *command.split()]
    print(f"$ edgead {command} &", flush=True)
    process = running.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
    running.callback(process.terminate)
    assert process.stdout is not None
    return process.stdout.readline().split()[0]


def camera(running: ExitStack, name: str, program: str) -> None:
    """Start a camera, and start it again whenever it dies, as a service manager does."""
    words = [sys.executable, str(Path(__file__).resolve().with_name(program)), name, "line", str(SHIFT_OVER)]

    def supervise() -> None:
        while (code := subprocess.run(words, check=False).returncode) and not SHIFT_OVER.exists():
            print(f"{name} died with {code} and is started again", flush=True)

    thread = threading.Thread(target=supervise)
    thread.start()
    running.callback(thread.join)
    running.callback(SHIFT_OVER.touch)


def until(reached: Callable[[Path], bool], *names: str) -> None:
    """Wait until all of these cameras have come so far."""
    start = time.monotonic()
    while not all(reached(Path(name)) for name in names):
        if time.monotonic() > start + 120:
            raise TimeoutError(f"one of {', '.join(names)} does not come so far")
        time.sleep(0.1)
    print(f"-> {', '.join(names)}: {time.monotonic() - start:.1f} s\n", flush=True)


def told(device: str) -> dict[int, str]:
    """What became of each release on a camera, as its last status says it in the collector's database."""
    with StatusStore("fleet.db", create=False) as store:
        seen = [one.status for one in store.latest() if one.status.device == device]
    return {attempt.release: attempt.outcome for status in seen for attempt in status.attempts}
