"""The command as a whole: lazy, helpful, and honest in its exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgead.cli import COMMANDS

HEAVY = ("torch", "cv2", "numpy", "onnxruntime", "openvino", "sklearn", "timm")


def edgead(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgead", *words], capture_output=True, text=True, check=False, timeout=120
    )


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from edgead.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = edgead(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"edgead {command}" in done.stdout
    assert "Example" in done.stdout


def test_a_misspelt_command_gets_the_near_name_and_code_2() -> None:
    done = edgead("exprot")
    assert done.returncode == 2
    assert "export" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_bundle_is_the_users_mistake_without_a_traceback() -> None:
    done = edgead("show", "nowhere.bundle")
    assert done.returncode == 2
    assert "wanted" in done.stderr
    assert "got" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = edgead("show", "nowhere.bundle", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_the_version_is_printed() -> None:
    from edgead import __version__

    assert __version__ in edgead("--version").stdout
