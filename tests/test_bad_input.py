"""Bad input through the command line: a typed error that helps, the right exit code, nothing lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgead.cli import main
from edgead.runtime.image import encode_png
from edgead.runtime.knowledge import Pack, read_pack, write_pack

Run = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must end with the given code; returns what it said on standard error."""

    def run(*words: object, code: int = 2) -> str:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        said = capsys.readouterr().err
        assert end.value.code == code, said
        assert "wanted" in said, said
        assert "got" in said
        assert "Traceback" not in said
        return said

    return run


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_an_empty_folder(fails: Run, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    said = fails("fit", "--normal", tmp_path / "good", "-o", tmp_path / "x.detector")
    assert "images" in said
    assert not (tmp_path / "x.detector").exists()


def test_a_folder_that_is_not_there(fails: Run, tmp_path: Path) -> None:
    assert "nothing there" in fails("fit", "--normal", tmp_path / "no", "-o", tmp_path / "x.detector")


def test_one_image(fails: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8)))
    said = fails("fit", "--normal", tmp_path, "--backbone", "random", "-o", tmp_path / "x.detector")
    assert "at least 2" in said


def test_an_unreadable_image_is_named(fails: Run, tmp_path: Path, painted_normals: Path) -> None:
    shutil.copytree(painted_normals, tmp_path / "good")
    (tmp_path / "good" / "broken.png").write_bytes((tmp_path / "good" / "000.png").read_bytes()[:500])
    words = ("--backbone", "random", "--size", 64)
    said = fails("fit", "--normal", tmp_path / "good", *words, "-o", tmp_path / "x.detector")
    assert "broken.png" in said
    assert "--skip-unreadable" in said
    assert not (tmp_path / "x.detector").exists()


def test_unreadable_images_are_left_out_if_asked_and_named(
    tmp_path: Path, painted_normals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(painted_normals, tmp_path / "good")
    (tmp_path / "good" / "broken.png").write_bytes((tmp_path / "good" / "000.png").read_bytes()[:500])
    words = ["--backbone", "random", "--size", "64", "--rows", "50", "--skip-unreadable"]
    with pytest.raises(SystemExit) as end:
        main(["export", "--normal", str(tmp_path / "good"), *words, "-o", str(tmp_path / "x.bundle")])
    assert end.value.code == 0
    assert "left out broken.png: " in capsys.readouterr().err
    card = (tmp_path / "x.bundle" / "card.md").read_text()
    assert "left_out_unreadable: 1" in card
    assert "broken.png" in card


def test_an_unknown_target_suggests_near_names_before_any_work(fails: Run, tmp_path: Path) -> None:
    said = fails("export", "--normal", tmp_path / "not-even-there", "--target", "opnvino", "-o", tmp_path / "b")
    assert "openvino" in said


def test_an_unknown_backbone_suggests_near_names(fails: Run, tmp_path: Path, painted_normals: Path) -> None:
    said = fails("fit", "--normal", painted_normals, "--backbone", "embeded", "-o", tmp_path / "x.detector")
    assert "embedded" in said


def test_an_unknown_method_is_refused(fails: Run, tmp_path: Path, painted_normals: Path) -> None:
    said = fails("fit", "--normal", painted_normals, "--method", "memory-bnak", "-o", tmp_path / "x.detector")
    assert "memory-bank" in said


@pytest.mark.parametrize(
    "words",
    [("--size", "100"), ("--size", "big"), ("--roi", "1,2,3"), ("--roi", "0,0,0,5"), ("--tiles", "99x1")],
)
def test_malformed_options_say_what_they_should_look_like(
    fails: Run, tmp_path: Path, painted_normals: Path, words: tuple[str, str]
) -> None:
    fails("fit", "--normal", painted_normals, *words, "-o", tmp_path / "x.detector")


def test_an_output_that_exists_is_kept_without_force(fails: Run, tmp_path: Path, small_detector: Path) -> None:
    out = tmp_path / "b.bundle"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "--force" in fails("export", small_detector, "-o", out)
    assert (out / "precious.txt").read_text() == "mine"


def test_both_or_neither_source_is_refused(fails: Run, tmp_path: Path, small_detector: Path) -> None:
    fails("export", "-o", tmp_path / "b")
    fails("export", small_detector, "--normal", tmp_path, "-o", tmp_path / "b")


def test_a_detector_that_is_damaged(fails: Run, tmp_path: Path, small_detector: Path) -> None:
    damaged = tmp_path / "x.detector"
    damaged.write_bytes(small_detector.read_bytes()[:-3000])
    assert "damaged" in fails("export", damaged, "-o", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("command", ["show", "run"])
def test_a_bundle_that_is_edited(fails: Run, tmp_path: Path, small_bundle: Path, command: str) -> None:
    copy = tmp_path / "copy.bundle"
    shutil.copytree(small_bundle, copy)
    model = copy / "engines" / "onnx-fp32" / "head.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(bytes(data))
    more = (small_bundle / "golden", "--target", "onnx") if command == "run" else ()
    assert "head.onnx" in fails(command, copy, *more)


def test_a_bundle_of_a_newer_schema(fails: Run, tmp_path: Path, small_bundle: Path) -> None:
    copy = tmp_path / "copy.bundle"
    shutil.copytree(small_bundle, copy)
    manifest = copy / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"schema":1', b'"schema":2'))
    assert "newer" in fails("show", copy)


def test_a_pack_of_another_engine(fails: Run, tmp_path: Path, small_bundle: Path) -> None:
    pack = read_pack(small_bundle / "knowledge" / "part.safetensors")
    stranger = tmp_path / "stranger.safetensors"
    write_pack(stranger, Pack(pack.product, "f" * 64, pack.calibration, pack.arrays))
    said = fails("run", small_bundle, small_bundle / "golden", "--target", "onnx", "--knowledge", stranger)
    assert "feature space" in said


def test_a_mask_without_its_image(fails: Run, tmp_path: Path, small_bundle: Path, painted_normals: Path) -> None:
    for kind in ("good", "dent"):
        shutil.copytree(painted_normals, tmp_path / "test" / kind)
    masks = tmp_path / "ground_truth" / "dent"
    masks.mkdir(parents=True)
    (masks / "nobody_mask.png").write_bytes(encode_png(np.zeros((96, 96, 3), np.uint8)))
    assert "nobody_mask.png" in fails("evaluate", small_bundle, "--data", tmp_path, "--target", "onnx")


def test_no_permission_to_write_is_a_failure_with_the_place(fails: Run, small_detector: Path) -> None:
    said = fails("export", small_detector, "-o", "/proc/edgead/b.bundle", code=1)
    assert "/proc/edgead" in said


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, small_detector: Path) -> None:
    # A limit on file size makes the system refuse the write itself, as a full disk does.
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "from edgead.cli import main\n"
        f"main(['export', {str(small_detector)!r}, '-o', {str(tmp_path / 'b.bundle')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == set()


def test_a_missing_optional_package_gives_the_exact_line_to_install(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from edgead.cli import main\n"
        f"main(['fit', '--normal', {str(tmp_path)!r}, '-o', 'x.detector'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'edgead[export]'" in done.stderr
