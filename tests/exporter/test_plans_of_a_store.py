"""Plans that a device compiles from an engine of its store: kept beside it, found there, and removed with it."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgead.runtime.bundle import Bundle, open_bundle, write_bundle
from edgead.runtime.compile_cli import compile_bundle
from edgead.runtime.disk import RealDisk
from edgead.runtime.engines.tensorrt import choose_plans
from edgead.runtime.engines.tensorrt_plans import has_plan, plan_folder
from edgead.runtime.errors import EngineMismatchError, InputError
from edgead.runtime.slots import Store
from edgead.runtime.slots_files import ENGINES, StoreFiles, plans_of

A, B = "a" * 64, "b" * 64


@dataclass
class Gpu:
    """What choosing a plan asks a GPU for."""

    compute_capability: str
    name: str = "NVIDIA RTX A2000"


@pytest.fixture
def single(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    """The recipe bundle in one file, as it is published."""
    bundle = open_bundle(tensorrt_bundle)
    return write_bundle(
        tmp_path / "part.edgead",
        name="part",
        detector=bundle.manifest.detector,
        engines=bundle.manifest.engines,
        packs={bundle.pack().product: bundle.pack()},
        files={name: bundle.read(name) for name in bundle.manifest.files if name.startswith("engines/")},
    ).path


def stored(single: Path, store: Store) -> Bundle:
    data = single.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    store.put_engine([data], digest, len(data))
    return open_bundle(store.folder / ENGINES / f"{digest}.edgead", verify=False)


def test_plans_of_an_engine_of_a_store_lie_beside_it_and_go_with_it(single: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds plans without a GPU")
    store = Store(tmp_path / "camera")
    bundle = stored(single, store)
    engine = bundle.engine("tensorrt")
    gpu = Gpu("8.6")
    with pytest.raises(EngineMismatchError, match="edgead compile") as refused:
        choose_plans(bundle, engine, gpu)  # type: ignore[arg-type]
    assert str(bundle.path) in refused.value.next_step
    (built,) = compile_bundle(bundle, capabilities=("8.6",))
    place = tmp_path / "camera" / "plans" / bundle.path.name.removesuffix(".edgead") / engine.name
    assert Path(built["folder"]) == place == plan_folder(bundle, engine)
    assert has_plan(bundle, engine)
    _, read = choose_plans(open_bundle(bundle.path, verify=False), engine, gpu)  # type: ignore[arg-type]
    assert read("head") == (place / "head.plan").read_bytes()
    # The store that fetched it keeps it for the release that will name it; to any other it is garbage.
    assert store.garbage() == 0
    assert has_plan(bundle, engine)
    size = sum(path.stat().st_size for path in (bundle.path, *place.iterdir()))
    assert Store(store.folder).garbage() == size
    assert list((store.folder / "plans").iterdir()) == []
    assert list((store.folder / ENGINES).iterdir()) == []


def test_a_bundle_that_lies_in_no_store_has_no_such_place(single: Path, tmp_path: Path) -> None:
    folder = tmp_path / ENGINES
    folder.mkdir()
    for name in ("part.edgead", f"{A}.bundle", f"{A[:-1]}.edgead"):
        assert plans_of(folder / name) is None
    assert plans_of(tmp_path / f"{A}.edgead") is None
    assert plans_of(folder / f"{A}.edgead") == tmp_path / "plans" / A
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds plans without a GPU")
    with pytest.raises(InputError, match="--cache-dir"):
        compile_bundle(open_bundle(single), capabilities=("8.6",))


def test_a_named_cache_comes_before_the_place_in_the_store(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = stored(single, Store(tmp_path / "camera"))
    monkeypatch.setenv("EDGEAD_PLAN_CACHE", str(tmp_path / "cache"))
    folder = plan_folder(bundle, bundle.engine("tensorrt"))
    assert folder is not None
    assert folder.parent == tmp_path / "cache"


def test_plans_stay_as_long_as_their_engine_whatever_lies_among_them(tmp_path: Path) -> None:
    files = StoreFiles(tmp_path, RealDisk(), 0, lambda: None)
    for digest in (A, B):
        place = tmp_path / "plans" / digest / "tensorrt-fp16"
        place.mkdir(parents=True)
        (place / "trunk.plan").write_bytes(b"x" * 100)
        (place.parent / "a-build-that-was-killed.part").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"y")
    (tmp_path / "plans" / B / "link").symlink_to(outside)
    (tmp_path / "plans" / "strange").write_bytes(b"z")
    assert files.remove_but({f"engines/{A}.edgead"}) == 101
    assert [path.name for path in (tmp_path / "plans").iterdir()] == [A]
    assert (tmp_path / "plans" / A / "tensorrt-fp16" / "trunk.plan").is_file()
    assert (outside / "kept").is_file()
    shutil.rmtree(tmp_path / "plans")
    assert files.remove_but(set()) == 0
