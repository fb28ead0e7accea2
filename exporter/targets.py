"""What can be exported to, as words: 'onnx', 'openvino:fp16', 'tensorrt'."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from edgead.runtime.errors import InputError
from edgead.runtime.spec import Precision, TargetName

PRECISIONS: dict[TargetName, tuple[Precision, ...]] = {
    "onnx": ("fp32", "fp16"),
    "openvino": ("fp32", "fp16"),
    "tensorrt": ("fp32", "fp16"),
}


@dataclass(frozen=True)
class Target:
    """One engine to build."""

    name: TargetName
    precision: Precision

    @property
    def engine(self) -> str:
        """The engine's name in the bundle, such as 'openvino-fp16'."""
        return f"{self.name}-{self.precision}"


def parse_target(text: str) -> Target:
    """'onnx', 'openvino:fp16', ... -> a target; the precision is fp32 if none is named.

    Raises:
        InputError: unknown target or precision; near names are suggested.
    """
    known = {
        f"{name}:{precision}": Target(name, precision)
        for name, precisions in PRECISIONS.items()
        for precision in precisions
    }
    name, colon, precision = text.partition(":")
    if not colon:
        precision = "fp32"
    if f"{name}:{precision}" in known:
        return known[f"{name}:{precision}"]
    if precision == "int8" and name in PRECISIONS:
        raise InputError(
            wanted=f"one of {', '.join(known)}",
            got=f"'{text}': this version exports no int8 engines",
            next_step=f"Take {name}:fp16, which halves the weights too.",
        )
    near = difflib.get_close_matches(text, [*PRECISIONS, *known], n=3, cutoff=0.4)
    raise InputError(
        wanted=f"a target such as {', '.join(known)}",
        got=f"'{text}'",
        next_step=f"Did you mean {' or '.join(near)}?" if near else "Name one of these.",
    )
