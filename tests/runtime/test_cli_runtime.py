"""`run`, `show` and `bench` as a person or a script meets them: output, exit codes, files that are whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgead.runtime.cli import bench, run, show
from edgead.runtime.errors import EdgeadError, FailureError, InputError, KnowledgeError, OutputExistsError
from edgead.runtime.image import encode_png, read_image
from edgead.runtime.inspection import decode_line
from edgead.runtime.knowledge import write_pack

KEYS = [
    *("path", "verdict", "decision", "score", "normalised", "threshold", "regions", "evidence"),
    *("product", "knowledge", "ms", "reason", "time", "suppressed", "base_score", "sentences"),
]
COMMAND = "from edgead.runtime.cli import run; import sys; sys.exit(run.main(sys.argv[1:], standalone_mode=False))"
Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Runs a command in this process; errors of edgead are raised as the command raises them."""

    def call(command: Any, *words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(command, [str(word) for word in words])
        if isinstance(result.exception, EdgeadError):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture
def photos(tiny: ModuleType, tmp_path: Path) -> Path:
    """A good part, a defective one, a file that is no picture, and a good one that was made later."""
    folder = tmp_path / "photos"
    (folder / "late").mkdir(parents=True)
    defect = tiny.frame(size=(64, 64))
    defect[16:32, 32:48] = (200, 30, 30)
    (folder / "a.png").write_bytes(encode_png(tiny.frame(size=(64, 64))))
    (folder / "b.png").write_bytes(encode_png(defect))
    (folder / "c.png").write_bytes(b"no picture")
    (folder / "late" / "d.png").write_bytes(encode_png(tiny.frame(101, size=(64, 64))))
    return folder


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_has_one_line_per_frame_with_the_documented_keys(
    invoke: Invoke, tiny: ModuleType, tiny_bundle: Path, photos: Path
) -> None:
    result = invoke(run, tiny_bundle, photos, "--json")
    found = lines(result.stdout)
    assert all(list(line) == KEYS for line in found)
    assert [line["verdict"] for line in found] == ["OK", "NG", "NOT_INSPECTED", "OK"]
    assert [line["decision"] for line in found] == ["OK", "NG", "NG", "OK"]
    assert [Path(line["path"]) for line in found] == [
        photos / name for name in ("a.png", "b.png", "c.png", "late/d.png")
    ]
    bad = found[1]
    assert bad["score"] > bad["threshold"]
    (region,) = bad["regions"]
    assert [region[key] for key in ("x", "y", "width", "height", "area")] == [32, 16, 16, 16, 256]
    assert list(bad["ms"]) == ["prepare", "trunk", "head", "normality", "regions", "total"]
    assert bad["knowledge"] == tiny.pack().version
    assert bad["evidence"][0]["id"] == 1
    assert found[2]["reason"].startswith("image: ")
    assert found[2]["score"] is None
    assert "not inspected  1" in result.stderr, "the summary goes to standard error"


def test_people_get_a_line_per_image_and_a_summary(invoke: Invoke, tiny_bundle: Path, photos: Path) -> None:
    text = invoke(run, tiny_bundle, photos).stdout
    assert "NG  score 140.7    threshold 30       1 region  " in text
    assert "--  image: " in text
    rows = dict(
        row.rsplit(maxsplit=1)
        for row in text.splitlines()
        if row.startswith(("frames", "OK  ", "NG  ")) and "ms" not in row
    )
    assert rows == {"frames": "4", "OK": "2", "NG": "1"}
    assert "median" in text
    assert "p95" in text


def test_only_ng_leaves_out_what_passes_and_the_output_still_has_all(
    invoke: Invoke, tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    out, pictures = tmp_path / "out.jsonl", tmp_path / "pictures"
    result = invoke(run, tiny_bundle, photos, "--json", "--only-ng", "-o", out, "--overlays", pictures)
    assert [line["verdict"] for line in lines(result.stdout)] == ["NG", "NOT_INSPECTED"]
    assert len(lines(out.read_text())) == 4
    assert [path.name for path in pictures.rglob("*.*")] == ["b.png.jpg"]


def test_unanswered_frames_can_be_let_pass(invoke: Invoke, tiny_bundle: Path, photos: Path) -> None:
    result = invoke(run, tiny_bundle, photos, "--json", "--unanswered", "ok")
    assert lines(result.stdout)[2]["verdict"] == "NOT_INSPECTED"
    assert lines(result.stdout)[2]["decision"] == "OK"


def test_overlays_are_pictures_under_the_names_of_their_frames(
    invoke: Invoke, tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    invoke(run, tiny_bundle, photos, "--overlays", folder)
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert found == ["a.png.jpg", "b.png.jpg", "late/d.png.jpg"]
    assert read_image(folder / "b.png.jpg").shape[1] >= 64
    with pytest.raises(OutputExistsError):
        invoke(run, tiny_bundle, photos, "--overlays", folder)
    invoke(run, tiny_bundle, photos, "--overlays", folder, "--force")


def test_an_output_is_never_replaced_unasked(invoke: Invoke, tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"precious")
    with pytest.raises(OutputExistsError):
        invoke(run, tiny_bundle, photos, "-o", out)
    out.write_bytes(b"precious\n")
    with pytest.raises(InputError, match="line 1"):
        invoke(run, tiny_bundle, photos, "-o", out, "--resume")
    assert out.read_bytes() == b"precious\n"
    invoke(run, tiny_bundle, photos, "-o", out, "--force")
    assert len(lines(out.read_text())) == 4


def test_a_resumed_run_skips_what_is_answered_and_mends_a_torn_line(
    invoke: Invoke, tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    invoke(run, tiny_bundle, photos, "-o", out, "--limit", "2")
    whole = out.read_bytes()
    out.write_bytes(whole + b'{"path":"' + str(photos / "c.png").encode())
    result = invoke(run, tiny_bundle, photos, "-o", out, "--resume", "--json")
    assert [Path(line["path"]).name for line in lines(result.stdout)] == ["c.png", "d.png"]
    assert out.read_bytes().startswith(whole)
    assert [Path(decode_line(line).path).name for line in out.read_bytes().splitlines()] == [
        "a.png",
        "b.png",
        "c.png",
        "d.png",
    ]
    again = invoke(run, tiny_bundle, photos, "-o", out, "--resume")
    assert "done before    4" in again.stdout


def test_a_resumed_run_says_if_the_knowledge_is_another(
    invoke: Invoke, tiny: ModuleType, tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    invoke(run, tiny_bundle, photos, "-o", out, "--limit", "1")
    write_pack(tmp_path / "new.safetensors", tiny.pack([[50] * 3]))
    result = invoke(run, tiny_bundle, photos, "-o", out, "--resume", "--knowledge", tmp_path / "new.safetensors")
    assert tiny.pack().version in result.stderr
    versions = [line["knowledge"] for line in lines(out.read_text())]
    assert versions == [tiny.pack().version] + [tiny.pack([[50] * 3]).version] * 3


def test_knowledge_from_a_file_takes_the_place_of_the_bundles_own(
    invoke: Invoke, tiny: ModuleType, tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    pack = tiny.pack([[100] * 3, [200, 30, 30]])
    write_pack(tmp_path / "new.safetensors", pack)
    result = invoke(run, tiny_bundle, photos, "--json", "--knowledge", tmp_path / "new.safetensors")
    assert [line["verdict"] for line in lines(result.stdout)] == ["OK", "OK", "NOT_INSPECTED", "OK"]
    assert {line["knowledge"] for line in lines(result.stdout)} == {pack.version}
    with pytest.raises(InputError):
        invoke(run, tiny_bundle, photos, "--knowledge", tmp_path / "new.safetensors", "--product", "nut")
    foreign = tiny.pack(spec=tiny.detector(tiny.Preprocessing(16, 16, rotate=90)))
    write_pack(tmp_path / "foreign.safetensors", foreign)
    with pytest.raises(KnowledgeError):
        invoke(run, tiny_bundle, photos, "--knowledge", tmp_path / "foreign.safetensors")


def test_knowledge_that_is_not_there_is_the_callers_mistake(
    invoke: Invoke, tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="nothing there"):
        invoke(run, tiny_bundle, photos, "--knowledge", tmp_path / "nowhere.safetensors")
    with pytest.raises(InputError, match="a folder"):
        invoke(run, tiny_bundle, photos, "--knowledge", tmp_path)


def test_pictures_to_time_with_that_are_none_are_the_callers_mistake(
    invoke: Invoke, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="images"):
        invoke(bench, tiny_bundle, "--images", tmp_path / "empty", "--seconds", "0.2")


def test_a_run_in_which_nothing_was_inspected_has_failed(invoke: Invoke, tiny_bundle: Path, photos: Path) -> None:
    with pytest.raises(FailureError, match="1 frames and none inspected"):
        invoke(run, tiny_bundle, photos / "c.png")


def test_a_deadline_that_cannot_be_met_is_said_on_each_frame(invoke: Invoke, slow_bundle: Path, photos: Path) -> None:
    with pytest.raises(FailureError, match="deadline of 5 ms"):
        invoke(run, slow_bundle, photos / "a.png", "--deadline-ms", "5", "--threads", "1")


@pytest.mark.parametrize("words", [["--resume"], ["--limit", "0"], ["--deadline-ms", "0"], ["--target", "tpu"]])
def test_options_that_make_no_sense_are_refused(words: list[str], tiny_bundle: Path, photos: Path) -> None:
    result = CliRunner().invoke(run, [str(tiny_bundle), str(photos), *words])
    code = result.exception.exit_code if isinstance(result.exception, EdgeadError) else result.exit_code
    assert code == 2


def started(*words: object, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


@pytest.fixture
def many(tiny: ModuleType, tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(encode_png(tiny.frame(90 + number)))
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_after_its_frame_with_whole_lines_and_a_summary(
    slow_bundle: Path, many: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out.jsonl"
    with started(slow_bundle, many, "--json", "-o", out, "--threads", "1") as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(number)
        rest, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert "frames" in said
    printed = (first + rest).splitlines()
    assert 1 <= len(printed) < 40
    assert out.read_text().splitlines() == printed
    assert all(decode_line(line.encode()) for line in printed)


def test_a_killed_run_is_gone_on_with_and_no_frame_is_lost_or_doubled(
    invoke: Invoke, slow_bundle: Path, tiny_bundle: Path, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with started(slow_bundle, many, "--json", "-o", out, "--threads", "1") as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.kill()
        process.communicate()
    done = len(out.read_bytes().splitlines())
    assert 3 <= done < 40
    invoke(run, tiny_bundle, many, "-o", out, "--resume")
    names = [Path(line["path"]).name for line in lines(out.read_text())]
    assert names == [f"{number:02d}.png" for number in range(40)]


def test_a_full_disk_is_an_error_and_leaves_whole_lines(tiny_bundle: Path, many: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    out = tmp_path / "out.jsonl"

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    with started(tiny_bundle, many, "--json", "-o", out, preexec_fn=small_disk) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "StorageError" in said
    data = out.read_bytes()
    assert 0 < len(data) <= 2000
    assert data.endswith(b"\n")
    assert all(decode_line(line) for line in data.splitlines())


def test_show_says_what_is_in_a_bundle(invoke: Invoke, tiny: ModuleType, tiny_bundle: Path) -> None:
    text = invoke(show, tiny_bundle).stdout
    pack = tiny.pack()
    for said in (
        "tiny",
        "mean-colour",
        "16 x 16",
        "onnx-fp32",
        "1 rows x 3 float32",
        pack.version,
        "2 images, 1 of them",
    ):
        assert said in text
    record = json.loads(invoke(show, tiny_bundle, "--json").stdout)
    assert record["kind"] == "bundle"
    assert record["detector"]["fingerprint"] == pack.fingerprint
    assert record["knowledge"][0]["digest"] == pack.digest
    assert record["bytes"] == sum(
        path.stat().st_size for path in tiny_bundle.rglob("*") if path.is_file() and path.name != "manifest.json"
    )


def test_show_reads_a_pack_and_states_its_false_alarms_honestly(
    invoke: Invoke, tiny: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "part.safetensors"
    write_pack(path, tiny.pack())
    assert "rests on no held-out images" in invoke(show, path).stdout
    record = json.loads(invoke(show, path, "--json").stdout)
    assert (record["kind"], record["bytes"]) == ("pack", path.stat().st_size)


def test_show_reads_a_fitted_detector_without_torch(invoke: Invoke, small_detector: Path) -> None:
    text = invoke(show, small_detector).stdout
    assert "fitted detector" in text
    assert "memory-bank" in text
    assert "made from" in text
    code = f"import sys, edgead.runtime.show as s; s.describe(__import__('pathlib').Path({str(small_detector)!r}))"
    check = "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code + check], check=True)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 rot", b"\xff" * 100])
def test_show_refuses_what_it_does_not_know(invoke: Invoke, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(EdgeadError) as refusal:
        invoke(show, tmp_path / "x")
    assert refusal.value.exit_code == 2


def test_show_notices_an_edited_bundle(invoke: Invoke, tiny: ModuleType, tmp_path: Path) -> None:
    tiny.bundle(tmp_path / "b")
    head = tmp_path / "b" / "engines" / "onnx-fp32" / "head.onnx"
    data = bytearray(head.read_bytes())
    data[50] ^= 1
    head.write_bytes(data)
    with pytest.raises(EdgeadError, match=r"head\.onnx"):
        invoke(show, tmp_path / "b")


def test_bench_times_an_engine_in_a_process_of_its_own(invoke: Invoke, tiny_bundle: Path) -> None:
    result = invoke(bench, tiny_bundle, "--seconds", "0.2", "--threads", "1", "--json")
    figures = json.loads(result.stdout)
    (engine,) = figures["engines"]
    assert engine["engine"] == "onnx-fp32"
    assert engine["threads"] == 1
    assert engine["frame"] == [1280, 1024]
    assert engine["frames"] >= 5
    assert 0 < engine["ng"] < engine["frames"], "golden frames of both verdicts"
    assert 0 < engine["median"]["total"] <= engine["p90"]["total"]
    assert 0.05 < engine["cold_start_s"] < 60
    assert 20 < engine["resident_mb"] <= engine["peak_mb"]
    assert figures["machine"]["threads_available"] >= 1


def test_bench_goes_on_past_an_engine_that_does_not_run(invoke: Invoke, tiny: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    tiny.bundle(tmp_path / "b", targets=["onnx", "openvino"])
    (tmp_path / "b" / "engines" / "openvino-fp32" / "trunk.xml").write_text("rot")
    with pytest.raises(EdgeadError):
        invoke(bench, tmp_path / "b", "--all", "--seconds", "0.1")
    tiny.bundle(tmp_path / "c", targets=["onnx", "openvino"])
    xml = tmp_path / "c" / "engines" / "openvino-fp32" / "trunk.xml"
    xml.write_bytes(bytes(reversed(xml.read_bytes())))
    text = invoke(bench, tmp_path / "c", "--all", "--seconds", "0.1").stdout
    assert "openvino-fp32: not measured" in text
    assert "onnx-fp32 " in text


def test_bench_with_photographs_uses_their_size(invoke: Invoke, tiny_bundle: Path, photos: Path) -> None:
    (photos / "c.png").unlink()
    figures = json.loads(invoke(bench, tiny_bundle, "--images", photos, "--seconds", "0.1", "--json").stdout)
    assert figures["engines"][0]["frame"] == [64, 64]


def test_results_do_not_depend_on_the_folder_that_the_command_runs_in(tiny_bundle: Path, photos: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    outputs = []
    for folder in (photos, photos.parent):
        with started(tiny_bundle, photos, "--json", cwd=folder, env=environment) as process:
            text, _ = process.communicate(timeout=60)
        outputs.append([(line["path"], line["score"], line["verdict"]) for line in lines(text)])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 4
