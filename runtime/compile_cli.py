"""`edgead compile`: build a bundle's TensorRT plans on the device that will run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.engines import normality_record
from edgead.runtime.engines.tensorrt_build import LIBRARIES, Library, check_capabilities, compile_engine, load_backend
from edgead.runtime.engines.tensorrt_plans import (
    CACHE_VARIABLE,
    describe,
    differences,
    plan_folder,
    read_record,
    sources_of,
)
from edgead.runtime.errors import BundleError, InputError
from edgead.runtime.spec import DeviceMatch, EngineRecord


@click.command(
    epilog="""\b
Example:
  edgead compile part.bundle
  edgead compile part.bundle --target tensorrt:fp16 --force
"""
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", help="Which engine, such as tensorrt:fp16; by default every TensorRT engine.")
@click.option("--library", type=click.Choice(LIBRARIES), help="By default the first that is installed.")
@click.option("--device", help="Number of the GPU.  [default: 0]")
@click.option(
    "--compute-capability",
    "capabilities",
    metavar="LIST",
    help="Build ahead of time for these GPUs, such as 8.6,8.9, instead of the one that is here "
    "(TensorRT for RTX only; needs no GPU).",
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar=CACHE_VARIABLE,
    help=f"Keep the plans here; set ${CACHE_VARIABLE} to the same folder where they are used.  "
    "[default: inside the bundle, or in the store that it lies in]",
)
@click.option("--force", is_flag=True, help="Build even where fitting plans are there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def compile_command(
    bundle: Path,
    target: str | None,
    library: Library | None,
    device: str | None,
    capabilities: str | None,
    cache_dir: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build the TensorRT plans of BUNDLE for this machine's GPU.

    A plan runs only on the kind of GPU, and with the version of TensorRT, that it was built for. So a bundle
    carries ONNX and a recipe, and this builds from them once per machine.
    """
    results = compile_bundle(
        open_bundle(bundle),
        target=target,
        library=library,
        device=device,
        capabilities=split_list(capabilities),
        cache=cache_dir,
        force=force,
    )
    if as_json:
        click.echo(json.dumps({"engines": results}))
        return
    for result in results:
        state = "built" if result["built"] else "up to date"
        click.echo(f"{result['engine']}: {state} for {result['for']} in {result['folder']}")


def compile_bundle(
    bundle: Bundle,
    *,
    target: str | None = None,
    library: Library | None = None,
    device: str | None = None,
    capabilities: tuple[str, ...] = (),
    cache: Path | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Build the plans of a bundle's TensorRT engines, where they are missing or do not fit this machine.

    Args:
        bundle: an open bundle.
        target: one engine (see `Bundle.engine`); None for all of its TensorRT engines.
        library: 'tensorrt' or 'tensorrt_rtx'; None for the first that is installed.
        device: number of the GPU.
        capabilities: build ahead of time for these instead of for the GPU that is here.
        cache: keep the plans here; None for $EDGEAD_PLAN_CACHE, or the folder of the bundle or of its store.
        force: build in any case.

    Returns:
        for each engine: engine, folder, built (false if a fitting plan was there), for.

    Raises:
        BundleError: the bundle has no TensorRT engine.
        MissingDependencyError: TensorRT or the CUDA bindings are not installed.
        EngineError: no GPU, or the library refused.
        InputError: a bundle in one file and no cache named, or an unknown compute capability.
        StorageError: the file system refused; older plans are still there.
    """
    records = [bundle.engine(target)] if target is not None else _tensorrt_engines(bundle)
    backend = load_backend(library)
    check_capabilities(backend, capabilities)
    if capabilities:
        match = DeviceMatch(backend.library, backend.version, ",".join(capabilities))
    else:
        from edgead.runtime.engines.cuda_memory import open_gpu

        gpu = open_gpu(device)
        gpu.activate()
        match = DeviceMatch(backend.library, backend.version, gpu.compute_capability, gpu.name)
    results = []
    pairs = [pair for record in records if (pair := normality_record(record)) is not None]
    for record in [*records, *pairs]:
        folder = plan_folder(bundle, record, cache)
        if folder is None:
            raise InputError(
                wanted="a folder to keep plans in, since the bundle is one file",
                got="none",
                next_step=f"Pass --cache-dir DIR, and set {CACHE_VARIABLE}=DIR where the bundle is used.",
            )
        found = read_record(folder)
        fits = found is not None and found.sources == sources_of(bundle, record) and _same(found.match, match)
        if force or not fits:
            compile_engine(bundle, record, folder, backend, match, capabilities=capabilities)
        results.append(
            {
                "engine": record.name,
                "folder": str(folder),
                "built": force or not fits,
                "for": describe(match),
            }
        )
    return results


def split_list(text: str | None) -> tuple[str, ...]:
    """'8.6, 8.9' -> ('8.6', '8.9'), each once, in order."""
    parts = (part.strip() for part in (text or "").split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def _same(built: DeviceMatch, wanted: DeviceMatch) -> bool:
    return built == wanted or (wanted.gpu is not None and not differences(built, wanted))


def _tensorrt_engines(bundle: Bundle) -> list[EngineRecord]:
    records = [record for record in bundle.manifest.engines if record.target == "tensorrt"]
    if not records:
        raise BundleError(
            wanted="a bundle with a TensorRT engine",
            got=f"only {', '.join(record.name for record in bundle.manifest.engines)}",
            next_step="Export it with: --target tensorrt",
        )
    return records
