"""Build TensorRT plans from ONNX. One code over two libraries with the same interface.

`tensorrt` (JetPack, data-centre GPUs) builds for the GPU it runs on. `tensorrt_rtx` (TensorRT for RTX) also
builds ahead of time, on machines without any GPU. Networks are strongly typed: precision is what the ONNX
says, nothing is lowered behind its back.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from edgead.runtime.bundle import Bundle
from edgead.runtime.engines.tensorrt_plans import (
    PARTS,
    RECORD,
    TIMING_CACHE,
    PlanRecord,
    Shapes,
    folder_of,
    read_recipe,
    sources_of,
)
from edgead.runtime.errors import EngineError, InputError, missing_dependency, storage_errors
from edgead.runtime.files import new_folder
from edgead.runtime.progress import Progress
from edgead.runtime.spec import DeviceMatch, EngineRecord, canonical_json

Library = Literal["tensorrt", "tensorrt_rtx"]
LIBRARIES: tuple[Library, ...] = ("tensorrt", "tensorrt_rtx")
_EXTRA = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


@dataclass(frozen=True)
class Backend:
    """One of the two libraries, imported.

    Attributes:
        library: its import name.
        trt: the module.
        logger: its logger; the libraries keep one for the whole process.
        errors: the last error messages that went to the logger.
    """

    library: Library
    trt: Any
    logger: Any
    errors: deque[str]

    @property
    def version(self) -> str:
        """Such as '10.3.0' or '1.7.1.116'."""
        return str(self.trt.__version__)

    @property
    def made_with(self) -> str:
        """Library and version, for records."""
        return f"{self.library} {self.version}"

    def failure(self, wanted: str, next_step: str) -> EngineError:
        """An error with what the library said last."""
        said = self.errors[-1] if self.errors else "a refusal without a reason"
        return EngineError(wanted=wanted, got=f"{self.made_with} saying: {said}", next_step=next_step)


def load_backend(library: Library | None = None) -> Backend:
    """Import a TensorRT library.

    Args:
        library: which; None for the first that is installed, `tensorrt` before `tensorrt_rtx`.

    Raises:
        MissingDependencyError: it is not installed.
        EngineError: it is installed, but cannot be loaded.
    """
    for name in LIBRARIES if library is None else (library,):
        try:
            return _backend(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise _unloadable(name, error) from error
        except (ImportError, OSError) as error:
            raise _unloadable(name, error) from error
    name = library or "tensorrt_rtx"
    raise missing_dependency(name, _EXTRA[name], "the target 'tensorrt'")


@cache
def _backend(name: Library) -> Backend:
    trt = importlib.import_module(name)
    errors: deque[str] = deque(maxlen=20)

    # The library is chosen at run time, so no checker knows its class.
    class Messages(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(" ".join(message.split()))

    return Backend(name, trt, Messages(), errors)


def check_capabilities(backend: Backend, capabilities: Sequence[str]) -> None:
    """Check that a library can build ahead of time for GPUs of these compute capabilities.

    Args:
        backend: the library.
        capabilities: such as '8.6'.

    Raises:
        InputError: the library builds for its own GPU only, or does not know one of them.
    """
    if not capabilities:
        return
    if backend.library != "tensorrt_rtx":
        raise InputError(
            wanted="TensorRT for RTX, which alone builds plans ahead of time",
            got=f"the library '{backend.library}'",
            next_step="Run: pip install 'edgead[tensorrt-rtx]', or leave the compute capability out and "
            "run edgead compile on the device.",
        )
    members = [re.fullmatch(r"SM(\d+)(\d)", name) for name in backend.trt.ComputeCapability.__members__]
    known = [f"{member[1]}.{member[2]}" for member in members if member is not None]
    for capability in capabilities:
        if capability not in known:
            raise InputError(
                wanted=f"a compute capability among {', '.join(known)}",
                got=f"'{capability}'",
                next_step="See the GPU's own with: nvidia-smi --query-gpu=compute_cap --format=csv",
            )


def build_plan(
    backend: Backend,
    model: bytes | Path,
    profiles: Mapping[str, Shapes],
    *,
    part: str,
    capabilities: Sequence[str] = (),
    timing_cache: bytes = b"",
) -> tuple[bytes, bytes]:
    """Build one plan.

    Args:
        backend: the library.
        model: ONNX, or its path where weights lie beside it.
        profiles: shapes of every input with free sizes.
        part: 'trunk' or 'head', for messages.
        capabilities: build ahead of time for these (see `check_capabilities`); none: for this GPU.
        timing_cache: measurements of an earlier build on this GPU, which make the next one faster.

    Returns:
        the plan, and the timing cache to keep (empty if the library has none).

    Raises:
        EngineError: the library refused the model or failed; names the node where it knows.
    """
    backend.errors.clear()
    advice = "Export the bundle again, or take another target."
    try:
        trt, builder = backend.trt, backend.trt.Builder(backend.logger)
        network = builder.create_network(_flags(trt))
        _parse(backend, network, model, part)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        if capabilities:
            check_capabilities(backend, capabilities)
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                member = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
                config.set_compute_capability(member, index)
        profile = builder.create_optimization_profile()
        for name, shapes in profiles.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
        cached = not capabilities and backend.library == "tensorrt"
        if cached:
            config.set_timing_cache(config.create_timing_cache(timing_cache), ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise backend.failure(f"a plan of the {part}", advice)
        kept = bytes(config.get_timing_cache().serialize()) if cached else b""
        return bytes(plan), kept
    except (EngineError, InputError):
        raise
    except Exception as error:  # bindings raise whatever their C++ side threw
        backend.errors.append(backend.errors[-1] if backend.errors else f"{type(error).__name__}: {error}")
        raise backend.failure(f"a plan of the {part}", advice) from error


def check_parses(backend: Backend, model: bytes | Path, part: str) -> None:
    """Check that the library's parser takes a model; nothing is built, no GPU is needed for RTX.

    Raises:
        EngineError: it does not; names the node.
    """
    backend.errors.clear()
    builder = backend.trt.Builder(backend.logger)
    _parse(backend, builder.create_network(_flags(backend.trt)), model, part)


def _flags(trt: Any) -> int:
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(backend: Backend, network: Any, model: bytes | Path, part: str) -> None:
    parser = backend.trt.OnnxParser(network, backend.logger)
    parsed = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
    if parsed:
        return
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    # Errors without a node come from the layers below and repeat the one that has it.
    named = next((error for error in found if error.node_name()), found[0] if found else None)
    said = " ".join(named.desc().split()) if named is not None else "no reason"
    node = f"{named.node_operator()} (node '{named.node_name()}'): " if named and named.node_name() else ""
    raise EngineError(
        wanted=f"a {part} that {backend.made_with} parses",
        got=f"{node}{said}",
        next_step="Write that step of the module with other operations.",
    )


def compile_engine(
    bundle: Bundle,
    record: EngineRecord,
    folder: Path,
    backend: Backend,
    match: DeviceMatch,
    *,
    capabilities: Sequence[str] = (),
) -> PlanRecord:
    """Build both plans of an engine into `folder`, replacing what is there; all or nothing.

    Args:
        bundle: has the engine's ONNX and recipe.
        record: the engine.
        folder: see `tensorrt_plans.plan_folder`.
        backend: the library.
        match: what is built for, as it goes into the record.
        capabilities: see `build_plan`.

    Raises:
        BundleError: the bundle has no recipe for this engine, or was edited.
        EngineError: the library refused or failed.
        StorageError: the file system refused; what was in `folder` is still there.
    """
    recipe = read_recipe(bundle, record)
    cache = _old_cache(folder)
    with new_folder(folder, force=True) as work, Progress("building plans", len(PARTS)) as progress:
        digests = {}
        for part in PARTS:
            with tempfile.TemporaryDirectory(prefix="edgead-compile-") as scratch:
                model = _model(bundle, f"{folder_of(record)}/{part}.onnx", Path(scratch))
                plan, cache = build_plan(
                    backend,
                    model,
                    recipe.profiles[part],
                    part=part,
                    capabilities=capabilities,
                    timing_cache=cache,
                )
            (work / f"{part}.plan").write_bytes(plan)
            digests[f"{part}.plan"] = hashlib.sha256(plan).hexdigest()
            progress.advance(note=part)
        if cache:
            (work / TIMING_CACHE).write_bytes(cache)
        made = PlanRecord(1, record.name, match, sources_of(bundle, record), digests)
        (work / RECORD).write_bytes(canonical_json(made))
    return made


def _old_cache(folder: Path) -> bytes:
    path = folder / TIMING_CACHE
    with storage_errors(path, "to read a timing cache"):
        return path.read_bytes() if path.is_file() else b""


def _model(bundle: Bundle, name: str, scratch: Path) -> bytes | Path:
    """The ONNX as bytes, or as a file where its weights lie beside it and parsers need a folder."""
    if not bundle.has(f"{name}.data"):
        return bundle.read(name)
    base = name.rpartition("/")[2]
    for suffix in ("", ".data"):
        (scratch / f"{base}{suffix}").write_bytes(bundle.read(f"{name}{suffix}"))
    return scratch / base


def _unloadable(name: str, error: Exception) -> EngineError:
    return EngineError(
        wanted=f"the library '{name}' to load",
        got=f"{type(error).__name__}: {error}",
        next_step=f"Install it again: pip install --force-reinstall 'edgead[{_EXTRA[name]}]'",
    )
