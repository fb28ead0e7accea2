"""The teacher: MobileNetV2 read from a quantised TensorFlow Lite file into a torch module.

OpenVINO reads the file; its 8-bit weights are dequantised (scale * (q - zero point)) into float32, so that
the module runs wherever torch runs and needs no OpenVINO afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgead.runtime.errors import BackboneError, missing_dependency
from edgead.server_side.backbones.base import Backbone
from edgead.server_side.backbones.inverted_residuals import EXPANSIONS, InvertedResiduals, convolutions

INPUT_SCALE = 255 / 128
INPUT_SHIFT = -1.0
"""Pixels in 0..1 times the scale plus the shift: the file's own (byte - 128) / 128."""

DEFAULT_TAPS = (6, 13)

_CONVOLUTIONS = ("Convolution", "GroupConvolution")


class MobileNetV2(Backbone):
    """MobileNetV2's expansions as feature maps.

    Args:
        taps: numbers of the blocks whose expansion is returned: of 1, 3, 6, 10, 13 (strides 2, 4, 8, 16, 16).

    Raises:
        BackboneError: a tap that is not one of these.
    """

    def __init__(self, taps: Sequence[int] = DEFAULT_TAPS) -> None:
        super().__init__()
        if not taps or set(taps) - set(EXPANSIONS):
            raise BackboneError(
                wanted=f"blocks of MobileNetV2 from {sorted(EXPANSIONS)}",
                got=f"{tuple(taps)}",
                next_step="Name one or more of these blocks.",
            )
        self.name = "mobilenet_v2_tflite"
        taps = sorted(set(taps))
        self.strides = tuple(EXPANSIONS[tap][0] for tap in taps)
        self.channels = tuple(EXPANSIONS[tap][1] for tap in taps)
        self.trunk = InvertedResiduals(taps, down_kernel=3)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """As `Backbone.forward`; maps are in 0..6."""
        maps: list[torch.Tensor] = self.trunk(image * INPUT_SCALE + INPUT_SHIFT)
        return maps


def load_mobilenet_v2(path: Path, taps: Sequence[int] = DEFAULT_TAPS) -> MobileNetV2:
    """Read and dequantise `path`, a MobileNetV2 1.0 in TensorFlow Lite format.

    Returns:
        the frozen module, float32, in evaluation mode.

    Raises:
        BackboneError: no such file, not a TensorFlow Lite file, or another network.
        MissingDependencyError: OpenVINO is not installed.
    """
    model = MobileNetV2(taps)
    layers = convolutions(model.trunk)
    weights = _dequantised(path)
    for layer, (weight, bias) in zip(layers, weights, strict=False):
        if weight.size != layer.weight.numel() or bias.size != layer.out_channels:
            raise _foreign(path, f"a convolution of {weight.shape} in place of {tuple(layer.weight.shape)}")
        layer.weight.data = torch.from_numpy(weight.reshape(tuple(layer.weight.shape)))
        assert layer.bias is not None
        layer.bias.data = torch.from_numpy(bias.reshape(-1))
    if len(weights) < len(layers):
        raise _foreign(path, f"{len(weights)} convolutions with a bias")
    return model.eval().requires_grad_(False)


def _dequantised(path: Path) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """(weight [O, I / groups, kh, kw] or a shape of equal order, bias [O]) of each convolution, in order."""
    try:
        import openvino
    except ImportError as error:
        raise missing_dependency("openvino", "openvino", "reading a TensorFlow Lite file") from error
    if not path.is_file():
        raise BackboneError(
            wanted=f"the teacher's TensorFlow Lite file at {path}",
            got="no such file",
            next_step="Download mobilenet_v2_1.0_224_quant.tflite and name it.",
        )
    core = openvino.Core()
    try:
        graph = core.read_model(path)
    except RuntimeError as error:
        raise _foreign(path, "a file that OpenVINO cannot read") from error
    constants: list[Any] = []
    for node in graph.get_ordered_ops():
        if node.get_type_name() not in _CONVOLUTIONS:
            continue
        followers = [port.get_node() for port in node.output(0).get_target_inputs()]
        if len(followers) == 1 and followers[0].get_type_name() == "Add":
            constants += [node.input_value(1), followers[0].input_value(1)]
    if not constants:
        return []
    values = core.compile_model(openvino.Model(constants, [], "weights"), "CPU")({})
    arrays = [np.array(values[index], dtype=np.float32) for index in range(len(constants))]
    return list(zip(arrays[0::2], arrays[1::2], strict=True))


def _foreign(path: Path, got: str) -> BackboneError:
    return BackboneError(
        wanted=f"a quantised MobileNetV2 1.0 in TensorFlow Lite format at {path}",
        got=got,
        next_step="Use mobilenet_v2_1.0_224_quant.tflite.",
    )
