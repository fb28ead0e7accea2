"""Does a traced graph have the border that its detector declares? Checked on the trace, without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

from edgead.runtime.errors import DetectorError
from edgead.runtime.spec import DetectorSpec, Port


def check_contract(spec: DetectorSpec, trunk: ExportedProgram, head: ExportedProgram) -> None:
    """Check both graphs of a detector against its spec.

    Raises:
        DetectorError: names the first port that is missing, of another dtype or shape, or whose batch or
            row count was frozen when it was traced.
    """
    check_border(trunk, (spec.image,), spec.features, "trunk")
    check_border(head, spec.head_inputs(), spec.outputs, "head")
    if not any(port.name == "score" for port in spec.outputs):
        raise DetectorError(
            wanted="an output 'score' of the head",
            got=", ".join(port.name for port in spec.outputs) or "no output",
            next_step="Every detector gives an image score, float32 [B]; a map is optional.",
        )


def check_border(program: ExportedProgram, inputs: tuple[Port, ...], outputs: tuple[Port, ...], part: str) -> None:
    """Check one graph: as many inputs and outputs as ports, each of its port's dtype and shape.

    Args:
        program: the traced graph.
        inputs: its ports, in graph order. Equal symbols must be equal sizes throughout.
        outputs: likewise.
        part: 'trunk' or 'head', for the message.

    Raises:
        DetectorError: names the first port that does not fit.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    bound: dict[str, str] = {}
    signature = program.graph_signature
    for kind, names, ports in (
        ("input", signature.user_inputs, inputs),
        ("output", signature.user_outputs, outputs),
    ):
        if len(names) != len(ports):
            extra = ports[min(len(names), len(ports) - 1)].name if ports else "none"
            raise DetectorError(
                wanted=f"{len(ports)} {kind}s of the {part} ({', '.join(port.name for port in ports)})",
                got=f"{len(names)}; see port '{extra}'",
                next_step="Take and return tensors in the order of the spec, as a tuple.",
            )
        for name, port in zip(names, ports, strict=True):
            _check_port(values.get(str(name)), port, f"{kind} '{port.name}' of the {part}", bound)


def _check_port(value: Any, port: Port, what: str, bound: dict[str, str]) -> None:
    wanted = f"{what} as {port.dtype} {list(port.shape)}"
    if not isinstance(value, torch.Tensor):
        raise DetectorError(wanted=wanted, got=f"{type(value).__name__}", next_step="Return a tensor for this port.")
    dtype = str(value.dtype).removeprefix("torch.")
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    if dtype != port.dtype or len(shape) != len(port.shape):
        raise DetectorError(
            wanted=wanted,
            got=f"{dtype} {shape}",
            next_step="Cast or reshape it in the module, or correct the port in the spec.",
        )
    for size, declared in zip(shape, port.shape, strict=True):
        if isinstance(declared, int):
            fits = size == declared
        else:
            fits = isinstance(size, str) and bound.setdefault(declared, size) == size
        if not fits:
            frozen = isinstance(declared, str) and isinstance(size, int)
            raise DetectorError(
                wanted=wanted,
                got=f"{dtype} {shape}" + (f", where '{declared}' is frozen to {size}" if frozen else ""),
                next_step="Trace it with free sizes (edgead.detector_file.write_detector does)."
                if frozen
                else "Reshape it in the module, or correct the port in the spec.",
            )
