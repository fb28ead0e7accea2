"""`edgead ota` from a shell: the story from an empty folder to a stopped roll-out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgead.runtime.deltas import make_delta
from edgead.runtime.knowledge import write_pack

PHRASE = "correct horse battery staple"


def edgead(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgead", "ota", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )


def invoke(*words: object) -> tuple[int, str]:
    """In this process, which is faster; errors are raised."""
    from click.testing import CliRunner

    from edgead.server_side.ota.cli import ota

    done = CliRunner().invoke(ota, list(map(str, words)), catch_exceptions=False)
    return done.exit_code, done.output


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle_file: Path) -> Path:
    monkeypatch.setenv("EDGEAD_KEYS", PHRASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


KEYS = ("--keys", "keys", "--passphrase-env", "EDGEAD_KEYS")


def test_from_an_empty_folder_to_a_stopped_roll_out(
    shop: Path, bundle_file: Path, first_pack: Any, helpers: dict[str, Any]
) -> None:
    said = []

    def ota(*words: object) -> Any:
        code, output = invoke(*words, *KEYS, "--json")
        assert code == 0, output
        said.append(output)
        return json.loads(output)

    assert ota("init", "up", "--product", "part")["root"] == "keys/root.json"
    files = ota("publish", "up", bundle_file)["files"]
    assert [item["path"].partition("/")[0] for item in files] == ["engines", "knowledge"]
    assert ota("publish", "up", bundle_file)["files"] == []
    assert ota("release", "up", "part")["counter"] == 1
    assert ota("rollout", "up", "part", "--release", 1, "--percent", 100)["previous"] is None
    new = helpers["grown"](first_pack, 2)
    (shop / "new.delta").write_bytes(make_delta(first_pack, new))
    assert len(ota("publish", "up", "new.delta")["files"]) == 2
    made = ota("release", "up", "part", "--notes", "two rows more")
    assert (made["counter"], made["pack"]) == (2, new.digest)
    assert ota("rollout", "up", "part", "--release", 2, "--group", "pilot")["previous"] == 1
    assert ota("rollout", "up", "part", "--percent", 25)["groups"] == ["pilot"]
    assert ota("rollout", "up", "part", "--pause")["paused"]
    assert not ota("rollout", "up", "part", "--resume")["paused"]
    assert ota("rollout", "up", "part", "--stop")["stopped"]
    assert ota("refresh", "up")["roles"] == []
    assert ota("add-product", "up", "tile")["products"] == ["part", "tile"]
    assert len(ota("rotate", "up", "knowledge")["keys"]) == 1
    code, output = invoke("status", "up", "--keys", "keys", "--json")
    assert code == 0
    content = json.loads(output)
    assert all(key["here"] for role in content["roles"].values() for key in role["keys"])
    record = content["products"]["part"]
    assert [release["counter"] for release in record["releases"]] == [1, 2]
    assert record["rollout"]["stopped"]
    revoked = content["roles"]["timestamp"]["keys"][0]["keyid"]
    assert ota("revoke", "up", revoked)["role"] == "timestamp"
    said.append(output)
    said.append(invoke("status", "up")[1])
    assert "STOPPED: release 2 to pilot and 25 % of the others; others have 1" in said[-1]
    assert not [text for text in said if PHRASE in text or "PRIVATE" in text]


def test_a_new_threshold_file_without_its_engine_is_the_users_mistake(
    shop: Path, tiny: Any, helpers: dict[str, Any]
) -> None:
    assert invoke("init", "up", "--product", "part", *KEYS)[0] == 0
    write_pack(shop / "part.safetensors", tiny.pack())
    done = edgead("publish", "up", "part.safetensors", *KEYS, folder=shop)
    assert done.returncode == 2
    assert "no engine is published" in done.stderr
    assert "edgead ota publish" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("status", "nowhere"), "edgead ota init"),
        (("serve", "nowhere"), "edgead ota init"),
        (("refresh", "up", "--keys", "nowhere"), "edgead ota init"),
        (("refresh", "up", "--keys", "keys"), "--passphrase-env"),
        (("refresh", "up", "--keys", "keys", "--passphrase-env", "UNSET_VARIABLE"), "UNSET_VARIABLE"),
        (("rotate", "up", "captain", *KEYS), "timestamp"),
        (("revoke", "up", "abc", *KEYS), "edgead ota status"),
        (("rollout", "up", "part", *KEYS), "--pause"),
        (("rollout", "up", "part", "--pause", *KEYS), "--release"),
        (("rollout", "up", "part", "--release", "1", *KEYS), "edgead ota release"),
        (("release", "up", "tile", *KEYS), "add-product"),
        (("init", "up", "--product", "part", "--keys", "k2", "--passphrase-env", "EDGEAD_KEYS"), "another folder"),
        (("init", "u2", "--product", "a/b", "--keys", "k2", "--passphrase-env", "EDGEAD_KEYS"), "letters"),
        (("init", "u2", "--product", "a", "--signer", "x", "y", "z", "--keys", "k2"), "roles"),
    ],
)
def test_mistakes_name_the_next_step(shop: Path, words: tuple[str, ...], hint: str) -> None:
    from edgead.runtime.errors import UserError

    assert invoke("init", "up", "--product", "part", *KEYS)[0] == 0
    with pytest.raises(UserError) as caught:
        invoke(*words)
    assert hint in str(caught.value)
    assert PHRASE not in str(caught.value)


def test_every_command_has_help_with_an_example() -> None:
    from edgead.server_side.ota.cli import ota

    for name in ota.commands:
        code, output = invoke(name, "--help")
        assert code == 0
        assert f"edgead ota {name}" in output
        assert "Example" in output


def test_serve_serves_until_it_is_interrupted(shop: Path) -> None:
    import http.client
    import signal

    assert invoke("init", "up", "--product", "part", *KEYS)[0] == 0
    command = [sys.executable, "-m", "edgead", "ota", "serve", "up", "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=shop) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.split()[0].removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=10)
        connection.request("GET", "/metadata/timestamp.json")
        assert json.loads(connection.getresponse().read())["signed"]["version"] == 1
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_the_help_needs_no_package_of_the_extra(shop: Path) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tuf', 'securesystemslib', 'cryptography', 'torch'):
            raise ModuleNotFoundError('refused: ' + name, name=name)
sys.meta_path.insert(0, Refuse())
from edgead.cli import main
main(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", code, "ota", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = [sys.executable, "-c", code, "ota", "init", "up", "--product", "part", *KEYS]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'edgead[ota]'" in done.stderr


def test_publishing_needs_no_torch(shop: Path, bundle_file: Path) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'torch':
            raise ModuleNotFoundError('refused: ' + name, name=name)
sys.meta_path.insert(0, Refuse())
from edgead.cli import main
main(sys.argv[1:])
"""
    for words in (("init", "up", "--product", "part"), ("publish", "up", str(bundle_file)), ("release", "up", "part")):
        command = [sys.executable, "-c", code, "ota", *words, *KEYS]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
