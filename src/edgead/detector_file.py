"""The fitted-detector file: all that the exporter and the server side share.

A `.detector` file is a zip (stored, without times, so that the same content gives the same bytes) of

    detector.json          the detector's spec (ports, preprocessing, fingerprint)
    trunk.pt2, head.pt2    the two graphs as `torch.export` programs
    knowledge.safetensors  the initial knowledge pack
    golden.safetensors     uint8 [G, H, W, 3] engine-sized frames under `frames`
    card.json              what it was made from and how

Any `torch.nn.Module` pair that obeys the graph contract can be written with `write_detector`; the exporter
reads the file back without knowing the method.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import ExportedProgram

from edgead.runtime.errors import DetectorError, storage_errors
from edgead.runtime.files import refuse_existing, write_file
from edgead.runtime.knowledge import Pack, check_fits, decode_pack, encode_pack
from edgead.runtime.spec import (
    CONTRACT,
    DetectorSpec,
    KnowledgePort,
    Port,
    Preprocessing,
    canonical_json,
    fingerprint_of,
)

SUFFIX = ".detector"
_MEMBERS = (
    "detector.json",
    "trunk.pt2",
    "head.pt2",
    "knowledge.safetensors",
    "golden.safetensors",
    "card.json",
)
_TORCH = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "float32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
}


@dataclass(frozen=True)
class FittedDetector:
    """A fitted detector as read from its file.

    Attributes:
        spec: the border of the graphs.
        trunk: image uint8 [B, H, W, 3] -> tuple of features.
        head: features and knowledge -> tuple of outputs.
        pack: the initial knowledge.
        golden: uint8 [G, H, W, 3] engine-sized frames on which engines are compared with torch.
        card: JSON-like facts for the model card.
    """

    spec: DetectorSpec
    trunk: ExportedProgram
    head: ExportedProgram
    pack: Pack
    golden: NDArray[np.uint8]
    card: dict[str, Any]


def weights_digest(module: nn.Module) -> bytes:
    """SHA-256 (32 bytes) over the module's parameters and buffers: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        digest.update(array.numpy().tobytes())
    return digest.digest()


def detector_spec(
    trunk: nn.Module,
    *,
    method: str,
    preprocessing: Preprocessing,
    features: tuple[Port, ...],
    knowledge: tuple[KnowledgePort, ...],
    outputs: tuple[Port, ...],
) -> DetectorSpec:
    """The spec of a trunk and head, with the feature-space fingerprint of `trunk`'s weights."""
    return DetectorSpec(
        contract=CONTRACT,
        method=method,
        preprocessing=preprocessing,
        features=features,
        knowledge=knowledge,
        outputs=outputs,
        fingerprint=fingerprint_of(weights=weights_digest(trunk), preprocessing=preprocessing, features=features),
    )


def write_detector(
    path: Path,
    *,
    trunk: nn.Module,
    head: nn.Module,
    spec: DetectorSpec,
    pack: Pack,
    golden: NDArray[np.uint8],
    card: Mapping[str, Any],
    force: bool = False,
) -> None:
    """Check a trunk and a head against the contract and write the fitted-detector file.

    Args:
        path: the file to write.
        trunk: image uint8 [B, H, W, 3] -> a feature or a tuple of features, in the order of the spec.
        head: features, then knowledge arrays (each directly followed by its int32 [1] row count if it has
            one) -> an output or a tuple of outputs, in the order of the spec.
        spec: see `detector_spec`.
        pack: initial knowledge; its fingerprint is the spec's.
        golden: uint8 [G, H, W, 3] with G >= 1, engine-sized frames for the parity gate, best with
            both verdicts among them.
        card: facts for the model card: anything JSON holds.
        force: replace an existing file.

    Raises:
        DetectorError: the modules do not obey the contract, or torch.export cannot trace them.
        KnowledgeError: the pack does not fit the spec.
        OutputExistsError: `path` exists and `force` is false.
        StorageError: the file system refused.
    """
    refuse_existing(path, force)
    check_fits(pack, spec)
    size = spec.preprocessing
    if golden.dtype != np.uint8 or golden.shape[1:] != (size.height, size.width, 3) or not len(golden):
        raise DetectorError(
            wanted=f"golden frames as uint8 [G, {size.height}, {size.width}, 3] with G >= 1",
            got=f"{golden.dtype} {list(golden.shape)}",
            next_step="Pass frames that went through edgead.runtime.image.prepare.",
        )
    trunk_program, head_program = export_programs(trunk, head, spec)
    members = {
        "detector.json": canonical_json(spec),
        "trunk.pt2": _saved(trunk_program),
        "head.pt2": _saved(head_program),
        "knowledge.safetensors": encode_pack(pack),
        "golden.safetensors": safetensors.numpy.save({"frames": np.ascontiguousarray(golden)}),
        "card.json": canonical_json(dict(card)),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in _MEMBERS:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), members[name])
    write_file(path, buffer.getvalue())


def read_detector(path: Path) -> FittedDetector:
    """Read a fitted-detector file.

    Raises:
        DetectorError: not a detector file, damaged, or of another contract version.
        KnowledgeError: its pack is damaged or does not fit.
        StorageError: the file cannot be read.
    """
    if not path.is_file():
        raise DetectorError(
            wanted=f"a fitted-detector file at {path}",
            got="a folder" if path.is_dir() else "nothing there",
            next_step="Make one with: edgead fit --normal DIR -o FILE",
        )
    with storage_errors(path, "to read a fitted detector"):
        data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in _MEMBERS}
        spec = msgspec.json.decode(members["detector.json"], type=DetectorSpec)
        card = msgspec.json.decode(members["card.json"], type=dict[str, Any])
        golden = safetensors.numpy.load(members["golden.safetensors"])["frames"]
    except (zipfile.BadZipFile, KeyError, msgspec.DecodeError, safetensors.SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if spec.contract != CONTRACT:
        raise DetectorError(
            wanted=f"a detector of graph contract {CONTRACT}",
            got=f"one of contract {spec.contract} in {path}",
            next_step="Fit it again with this version of edgead, or use the version that wrote it.",
        )
    pack = decode_pack(members["knowledge.safetensors"])
    check_fits(pack, spec)
    try:
        trunk = torch.export.load(io.BytesIO(members["trunk.pt2"]))
        head = torch.export.load(io.BytesIO(members["head.pt2"]))
    except Exception as error:  # torch.export.load raises whatever its readers raise
        raise _damaged(path, str(error)) from error
    return FittedDetector(spec=spec, trunk=trunk, head=head, pack=pack, golden=golden, card=card)


def export_programs(trunk: nn.Module, head: nn.Module, spec: DetectorSpec) -> tuple[ExportedProgram, ExportedProgram]:
    """Trace both modules with `torch.export`, batch and row counts dynamic, and check their borders.

    Raises:
        DetectorError: a module's outputs differ from the spec, or it cannot be traced; names the port.
    """
    trunk_program = _export(trunk.eval(), (spec.image,), spec.features, "trunk", {})
    fewest: dict[str, int] = {}
    for port in spec.knowledge:
        for size in (size for size in port.shape if isinstance(size, str)):
            fewest[size] = max(fewest.get(size, 1), port.min_rows)
    head_program = _export(head.eval(), spec.head_inputs(), spec.outputs, "head", fewest)
    return trunk_program, head_program


def _export(
    module: nn.Module,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    part: str,
    fewest: Mapping[str, int],
) -> ExportedProgram:
    # Sizes that differ from each other and from 1, so that torch cannot take two symbols for one.
    symbols: dict[str, Any] = {}
    examples: dict[str, int] = {}
    for port in inputs:
        for symbol in (size for size in port.shape if isinstance(size, str)):
            if symbol not in symbols:
                examples[symbol] = 2 if symbol == "B" else 1031 + 16 * len(examples)
                symbols[symbol] = torch.export.Dim(symbol, min=fewest.get(symbol, 1))
    generator = torch.Generator().manual_seed(0)
    arguments = tuple(_example(port, examples, generator) for port in inputs)
    dynamic = tuple(
        {axis: symbols[size] for axis, size in enumerate(port.shape) if isinstance(size, str)} for port in inputs
    )
    with torch.inference_mode():
        result = _attempt(lambda: module(*arguments), f"a {part} that accepts {_shapes(inputs)}")
    got = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    _check_outputs(got, outputs, examples, part)
    program: ExportedProgram = _attempt(
        lambda: torch.export.export(_AsTuple(module), arguments, dynamic_shapes=(dynamic,), strict=False),
        f"a {part} that torch.export can trace with a free batch and free row counts",
    )
    return program


class _AsTuple(nn.Module):
    """Gives every graph the same calling convention: positional tensors in, a tuple out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(*arguments)
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _example(port: Port, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in port.shape]
    if port.dtype == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if port.dtype in ("int32", "int64"):
        return torch.ones(shape, dtype=_TORCH[port.dtype])
    return torch.rand(shape, generator=generator).to(_TORCH[port.dtype])


def _check_outputs(got: tuple[torch.Tensor, ...], ports: tuple[Port, ...], sizes: Mapping[str, int], part: str) -> None:
    if len(got) != len(ports):
        raise DetectorError(
            wanted=f"{len(ports)} outputs of the {part}: {', '.join(port.name for port in ports)}",
            got=f"{len(got)}",
            next_step="Return the outputs as a tuple in the order of the spec.",
        )
    for tensor, port in zip(got, ports, strict=True):
        shape = [sizes.get(size, -1) if isinstance(size, str) else size for size in port.shape]
        if tensor.dtype != _TORCH.get(port.dtype) or list(tensor.shape) != shape:
            raise DetectorError(
                wanted=f"output '{port.name}' of the {part} as {port.dtype} {list(port.shape)}",
                got=f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}",
                next_step="Cast or reshape it in the module, or correct the port in the spec.",
            )


def _shapes(ports: tuple[Port, ...]) -> str:
    return ", ".join(f"{port.name} {port.dtype} {list(port.shape)}" for port in ports)


def _attempt(action: Callable[[], Any], wanted: str) -> Any:
    try:
        return action()
    except Exception as error:  # a stranger's module can raise anything; the contract is ours to report
        text = str(error).strip().splitlines()
        raise DetectorError(
            wanted=wanted,
            got=f"{type(error).__name__}: {text[0] if text else 'no message'}",
            next_step="Run with --debug for the whole traceback.",
        ) from error


def _saved(program: ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _damaged(path: Path, reason: str) -> DetectorError:
    return DetectorError(
        wanted=f"a fitted-detector file at {path}",
        got=f"something damaged or foreign ({reason})",
        next_step="Make it again with: edgead fit --normal DIR -o FILE",
    )
