"""Whole files or none: the file system really refuses here, by limits and mounts, not by patched functions."""

from __future__ import annotations

import os
import re
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from edgead.runtime.errors import OutputExistsError, StorageError
from edgead.runtime.files import new_file, new_folder, refuse_existing, write_file


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def with_file_limit(code: str, *words: object, limit: int = 4096) -> str:
    """Run `code` in a process whose files cannot grow over `limit` bytes: a full disk, for real."""

    def confine() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code), *map(str, words)],
        preexec_fn=confine,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_is_written_whole_with_its_folders(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b.bin", b"content")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "a" / "b.bin").stat().st_mode) == 0o644
    assert entries(tmp_path) == ["a", "a/b.bin"]


def test_a_file_is_replaced_and_a_reader_of_the_old_one_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")
    with path.open("rb") as reader:
        write_file(path, b"newer")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"newer"


def test_a_failing_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")

    def failing() -> None:
        with new_file(path) as stream:
            stream.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert path.read_bytes() == b"old"
    assert entries(tmp_path) == ["f"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")
    said = with_file_limit(
        """
        import sys
        from pathlib import Path
        from edgead.runtime.errors import StorageError
        from edgead.runtime.files import write_file
        try:
            write_file(Path(sys.argv[1]), b"x" * 10_000)
        except StorageError as error:
            print(error)
        """,
        path,
    )
    assert str(path) in said
    assert "free space" in said
    assert path.read_bytes() == b"old"
    assert entries(tmp_path) == ["f"]


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with new_folder(path) as folder:
        (folder / "one").write_bytes(b"old")
    said = with_file_limit(
        """
        import sys
        from pathlib import Path
        from edgead.runtime.errors import StorageError
        from edgead.runtime.files import new_folder
        try:
            with new_folder(Path(sys.argv[1]), force=True) as folder:
                (folder / "small").write_bytes(b"fits")
                (folder / "large").write_bytes(b"x" * 10_000)
        except StorageError as error:
            print(error)
        """,
        path,
    )
    assert str(path) in said
    assert entries(tmp_path) == ["d", "d/one"]
    assert (path / "one").read_bytes() == b"old"


def unwritable_places(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").write_bytes(b"")
    return {
        "under a file": tmp_path / "file" / "x",
        "on a file system of the kernel": Path("/proc/edgead-test"),
        "a name too long": tmp_path / ("x" * 300),
    }


@pytest.mark.parametrize("place", ["under a file", "on a file system of the kernel", "a name too long"])
def test_a_place_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path: Path, place: str) -> None:
    path = unwritable_places(tmp_path)[place]
    with pytest.raises(StorageError, match=path.name[-20:]) as caught:
        write_file(path, b"x")
    assert caught.value.exit_code == 1
    with pytest.raises(StorageError), new_folder(path) as folder:
        (folder / "f").write_bytes(b"x")
    assert entries(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not hold root back")
def test_no_permission_is_a_storage_error(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(StorageError, match="ermission"):
        write_file(closed / "x", b"x")
    with pytest.raises(StorageError, match="ermission"), new_folder(closed / "x"):
        pass


def test_a_file_cannot_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "d" / "kept").mkdir(parents=True)
    with pytest.raises(StorageError):
        write_file(tmp_path / "d", b"x")
    assert entries(tmp_path) == ["d", "d/kept"]


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "d"
    with new_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "f").write_bytes(b"x")
        assert not path.exists()
    assert entries(path) == ["sub", "sub/f"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert entries(tmp_path / "deep") == ["d", "d/sub", "d/sub/f"]


def test_a_failing_block_leaves_no_folder(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "d") as folder:
            (folder / "f").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert entries(tmp_path) == []


def existing(kind: str) -> Callable[[Path], object]:
    return {
        "file": lambda path: path.write_bytes(b"old"),
        "folder": lambda path: (path / "old").mkdir(parents=True),
        "link to a folder": lambda path: path.symlink_to(path.parent),
        "dangling link": lambda path: path.symlink_to("nowhere"),
    }[kind]


@pytest.mark.parametrize("kind", ["file", "folder", "link to a folder", "dangling link"])
def test_what_is_there_is_kept_without_force_and_replaced_with_it(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = home / "d"
    existing(kind)(path)
    before = entries(home)
    with pytest.raises(OutputExistsError, match="--force"), new_folder(path):
        pytest.fail("the block must not run")
    with pytest.raises(OutputExistsError):
        refuse_existing(path, force=False)
    assert entries(home) == before
    with new_folder(path, force=True) as folder:
        (folder / "new").write_bytes(b"x")
    assert not path.is_symlink()
    assert entries(home) == ["d", "d/new"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")
    code = """
    import os, signal, sys
    from pathlib import Path
    from edgead.runtime.files import new_file
    with new_file(Path(sys.argv[1])) as stream:
        stream.write(b"half")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_file(path, b"newer")
    assert path.read_bytes() == b"newer"


@pytest.mark.parametrize(
    ("fault", "left"),
    [("shutil.rmtree(source)", "d/old"), ("os.makedirs(os.path.join(target, 'squatter'))", r"\.d\..*\.old/old/old")],
    ids=["the new folder vanishes", "somebody takes the place"],
)
def test_the_old_folder_survives_a_fault_between_the_two_renames(tmp_path: Path, fault: str, left: str) -> None:
    (tmp_path / "d" / "old").mkdir(parents=True)
    code = f"""
    import os, shutil, sys
    from pathlib import Path
    from edgead.runtime.errors import StorageError
    from edgead.runtime.files import new_folder
    path, renames = sys.argv[1], []
    def second_rename(event, arguments):
        if event == "os.rename":
            source, target = map(str, arguments[:2])
            renames.append(target)
            if len(renames) == 2:
                {fault}
    sys.addaudithook(second_rename)
    try:
        with new_folder(Path(path), force=True) as folder:
            (folder / "new").write_bytes(b"x")
    except StorageError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "d")], capture_output=True, text=True, timeout=60
    )
    assert "wanted to write a folder" in done.stdout, done.stderr
    # The folder that the old one steps into has a random part in its name.
    assert any(re.fullmatch(left, name) for name in entries(tmp_path))
    assert not any(name.endswith(".part") for name in entries(tmp_path))
