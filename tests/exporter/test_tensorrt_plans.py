"""Plans on the device: compiled once, used only where they fit, refused with the reason elsewhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgead.detector_file import FittedDetector
from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import Bundle, open_bundle, write_bundle
from edgead.runtime.compile_cli import compile_bundle, compile_command
from edgead.runtime.engines import open_engine
from edgead.runtime.engines.tensorrt import choose_plans, deserialise
from edgead.runtime.engines.tensorrt_build import load_backend
from edgead.runtime.engines.tensorrt_plans import has_plan, plan_folder, read_record
from edgead.runtime.errors import BundleError, EngineError, EngineMismatchError, InputError, StorageError

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds plans without a GPU")


def has_gpu() -> bool:
    try:
        from edgead.runtime.engines.cuda_memory import open_gpu

        open_gpu()
    except Exception:
        return False
    return True


NO_GPU = pytest.mark.skipif(has_gpu(), reason="says what happens without a GPU")
NEEDS_GPU = pytest.mark.skipif(not has_gpu(), reason="runs plans, which needs an NVIDIA GPU")


@dataclass
class Gpu:
    """What choosing a plan asks a GPU for."""

    compute_capability: str
    name: str = "NVIDIA RTX A2000"


def choose(bundle: Bundle, gpu: Gpu) -> Any:
    return choose_plans(bundle, bundle.engine("tensorrt"), gpu)  # type: ignore[arg-type]


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path) -> Bundle:
    """The recipe bundle in a place of the test's own."""
    return open_bundle(shutil.copytree(tensorrt_bundle, tmp_path / "part.bundle"))


@pytest.fixture(scope="module")
def compiled(tensorrt_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe bundle with plans compiled for 8.6 and 8.9."""
    path = shutil.copytree(tensorrt_bundle, tmp_path_factory.mktemp("compiled") / "part.bundle")
    compile_bundle(open_bundle(path), capabilities=("8.6", "8.9"))
    return path


def test_compiled_plans_are_used_on_the_gpus_that_they_were_built_for(compiled: Path) -> None:
    opened = open_bundle(compiled)
    backend, read = choose(opened, Gpu("8.9"))
    assert backend.library == "tensorrt_rtx"
    folder = plan_folder(opened, opened.engine("tensorrt"))
    assert folder is not None
    assert read("head") == (folder / "head.plan").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["head.plan", "record.json", "trunk.plan"]
    assert has_plan(opened, opened.engine("tensorrt"))


def test_another_compute_capability_is_refused_with_both_and_the_next_step(compiled: Path) -> None:
    with pytest.raises(EngineMismatchError) as caught:
        choose(open_bundle(compiled), Gpu("7.5"))
    assert "for tensorrt_rtx" in caught.value.wanted
    assert "7.5" in caught.value.wanted
    assert "compute capability 8.6,8.9, here 7.5" in caught.value.got
    assert caught.value.next_step == f"Run: edgead compile {compiled}"


def edit_record(folder: Path, change: Any) -> None:
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("library_version", "1.0.0.1", "tensorrt_rtx 1.0.0.1, here"),
        ("gpu", "NVIDIA L4", "GPU 'NVIDIA L4', here 'NVIDIA RTX A2000'"),
    ],
)
def test_another_version_or_gpu_is_refused(compiled: Path, tmp_path: Path, field: str, value: str, reason: str) -> None:
    opened = open_bundle(shutil.copytree(compiled, tmp_path / "part.bundle"))
    edit_record(tmp_path / "part.bundle/compiled/tensorrt-fp16", lambda record: record["match"].update({field: value}))
    with pytest.raises(EngineMismatchError, match=reason):
        choose(opened, Gpu("8.6"))


def test_plans_of_another_source_are_not_used(compiled: Path, tmp_path: Path) -> None:
    opened = open_bundle(shutil.copytree(compiled, tmp_path / "part.bundle"))
    edit_record(
        tmp_path / "part.bundle/compiled/tensorrt-fp16",
        lambda record: record["sources"].update({"trunk.onnx": "0" * 64}),
    )
    with pytest.raises(EngineMismatchError, match=r"another version of the bundle"):
        choose(opened, Gpu("8.6"))
    assert not has_plan(opened, opened.engine("tensorrt"))


def test_a_damaged_plan_is_refused_before_the_library_sees_it(compiled: Path, tmp_path: Path) -> None:
    opened = open_bundle(shutil.copytree(compiled, tmp_path / "part.bundle"))
    plan = tmp_path / "part.bundle/compiled/tensorrt-fp16/head.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    _, read = choose(opened, Gpu("8.6"))
    read("trunk")
    with pytest.raises(EngineMismatchError, match=r"another SHA-256"):
        read("head")


def test_a_bundle_that_was_not_compiled_says_how(bundle: Bundle) -> None:
    with pytest.raises(EngineMismatchError, match=r"has not compiled yet.*edgead compile"):
        choose(bundle, Gpu("8.6"))


def test_plans_of_the_bundle_come_after_those_of_the_device(colours: FittedDetector, tmp_path: Path) -> None:
    opened = export_bundle(colours, tmp_path / "bundle", ["tensorrt"], compute_capabilities=["8.6"])
    engine = opened.engine("tensorrt")
    _, read = choose(opened, Gpu("8.6"))
    assert read("head") == opened.read(engine.head)
    compile_bundle(opened, capabilities=("8.9",))
    _, read = choose(opened, Gpu("8.9"))
    assert read("head") != opened.read(engine.head)
    _, read = choose(opened, Gpu("8.6"))
    assert read("head") == opened.read(engine.head)
    with pytest.raises(EngineMismatchError, match=r"capability 8\.9.*; a plan .* capability 8\.6"):
        choose(opened, Gpu("12.0"))


def test_compiling_again_builds_only_what_does_not_fit(bundle: Bundle) -> None:
    first = compile_bundle(bundle, capabilities=("8.6",))
    assert [result["built"] for result in first] == [True]
    assert [r["built"] for r in compile_bundle(bundle, capabilities=("8.6",))] == [False]
    assert [r["built"] for r in compile_bundle(bundle, capabilities=("8.6",), force=True)] == [True]
    assert [r["built"] for r in compile_bundle(bundle, capabilities=("12.0",))] == [True]
    record = read_record(plan_folder(bundle, bundle.engine("tensorrt")))
    assert record is not None
    assert record.match.compute_capability == "12.0"
    open_bundle(bundle.path)  # what the device compiled does not make the bundle an edited one


def test_a_failed_build_keeps_the_plans_that_were_there(bundle: Bundle) -> None:
    compile_bundle(bundle, capabilities=("8.6",))
    folder = plan_folder(bundle, bundle.engine("tensorrt"))
    assert folder is not None
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    head = bundle.path / "engines/tensorrt-fp16/head.onnx"
    head.write_bytes(head.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError):
        compile_bundle(bundle, capabilities=("8.9",))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_bundle_in_one_file_keeps_its_plans_in_a_named_folder(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: bundle.read(name) for name in bundle.manifest.files if name.startswith("engines/")}
    single = write_bundle(
        tmp_path / "part.edgead",
        name="part",
        detector=bundle.manifest.detector,
        engines=bundle.manifest.engines,
        packs={bundle.pack().product: bundle.pack()},
        files=files,
    )
    with pytest.raises(InputError, match=r"--cache-dir"):
        compile_bundle(single, capabilities=("8.6",))
    compile_bundle(single, capabilities=("8.6",), cache=tmp_path / "cache")
    with pytest.raises(EngineMismatchError):
        choose(single, Gpu("8.6"))
    monkeypatch.setenv("EDGEAD_PLAN_CACHE", str(tmp_path / "cache"))
    choose(single, Gpu("8.6"))
    choose(bundle, Gpu("8.6"))  # equal sources share one folder


def test_the_command_prints_what_it_built_as_json(bundle: Bundle) -> None:
    words = [str(bundle.path), "--compute-capability", "8.6, 8.9", "--json"]
    result = CliRunner().invoke(compile_command, words, catch_exceptions=False)
    assert result.exit_code == 0
    (engine,) = json.loads(result.stdout)["engines"]
    assert engine["engine"] == "tensorrt-fp16"
    assert engine["built"] is True
    assert engine["for"] == f"tensorrt_rtx {rtx.__version__}, compute capability 8.6,8.9"
    assert Path(engine["folder"]) == bundle.path / "compiled" / "tensorrt-fp16"


def test_a_bundle_without_tensorrt_says_how_to_get_it(small_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"--target tensorrt"):
        compile_bundle(open_bundle(small_bundle), capabilities=("8.6",))
    with pytest.raises(BundleError, match=r"'onnx-fp32' without them"):
        compile_bundle(open_bundle(small_bundle), target="onnx", capabilities=("8.6",))


def test_a_cache_that_cannot_be_written_is_a_storage_error(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError):
        compile_bundle(bundle, capabilities=("8.6",), cache=tmp_path / "file")


@NO_GPU
def test_loading_a_plan_without_a_driver_says_what_the_library_said(compiled: Path) -> None:
    _, read = choose(open_bundle(compiled), Gpu("8.6"))
    with pytest.raises(EngineError, match=r"the plan of the trunk to load; got tensorrt_rtx .*CUDA"):
        deserialise(load_backend("tensorrt_rtx"), read("trunk"), "trunk")


@NO_GPU
def test_opening_the_engine_without_a_gpu_points_to_the_others(compiled: Path) -> None:
    with pytest.raises(EngineError, match=r"NVIDIA GPU with its driver.*--target onnx"):
        open_engine(open_bundle(compiled), "tensorrt")


@NO_GPU
def test_compiling_for_this_machine_without_a_gpu_is_refused(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match=r"NVIDIA GPU with its driver"):
        compile_bundle(bundle)


@NEEDS_GPU
def test_a_plan_that_this_machine_compiled_says_what_torch_says(bundle: Bundle, bank: FittedDetector) -> None:
    from edgead.exporter.parity import TOLERANCE, check_parity, reference_of

    compile_bundle(bundle)
    with open_engine(bundle, "tensorrt:fp16") as engine:
        check_parity(engine, bank, reference_of(bank), TOLERANCE["fp16"])
