"""OpenVINO: knowledge parameters of the head are replaced by constants before it is compiled."""

from __future__ import annotations

from typing import Any

import openvino as ov
from numpy.typing import NDArray

from edgead.runtime.engines import Arrays, Engine, Session, contiguous
from edgead.runtime.spec import Port


class OpenVinoEngine(Engine):
    """Trunk and heads as OpenVINO models compiled with a fixed batch, on `CPU` unless `device` says else."""

    def _trunk(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> Session:
        return self._compile(self._model(self.record.trunk), self.record.trunk, inputs, outputs, {})

    def _head(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...], knowledge: Arrays) -> Session:
        bound = {name: contiguous(array) for name, array in knowledge.items()}
        return self._compile(self._model(self.record.head), self.record.head, inputs, outputs, bound)

    def _model(self, name: str) -> ov.Model:
        xml = self.bundle.read(name)
        weights = self.bundle.read(name.removesuffix(".xml") + ".bin")
        return _core().read_model(xml, ov.Tensor(_as_bytes(weights)))

    def _compile(
        self,
        model: ov.Model,
        name: str,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        knowledge: Arrays,
    ) -> Session:
        for parameter in model.get_parameters():
            constant = knowledge.get(parameter.get_output_tensor(0).get_any_name())
            if constant is not None:
                node = ov.op.Constant(constant)
                for target in parameter.output(0).get_target_inputs():
                    target.replace_source_output(node.output(0))
                model.remove_parameter(parameter)
        # Fixed shapes let the CPU plug-in choose its kernels once instead of on every frame.
        model.reshape({port.name: list(port.shape) for port in inputs})
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            # bfloat16, which some processors would choose by themselves, has 3 significant digits.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        device = self.device or "CPU"
        compiled = _core().compile_model(model, device, config if device == "CPU" else {})
        return _OpenVinoSession(name, inputs, outputs, compiled, knowledge)


def _as_bytes(data: bytes) -> NDArray[Any]:
    import numpy as np

    return np.frombuffer(data, dtype=np.uint8)


_CORE: list[ov.Core] = []


def _core() -> ov.Core:
    """One core for the process: it owns the plug-ins and takes a tenth of a second to make."""
    if not _CORE:
        _CORE.append(ov.Core())
    return _CORE[0]


class _OpenVinoSession(Session):
    def __init__(
        self,
        name: str,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        compiled: ov.CompiledModel,
        keep: object,
    ) -> None:
        super().__init__(name, inputs, outputs)
        self._keep = keep
        self._request: ov.InferRequest | None = compiled.create_infer_request()
        self._ports = [(port.name, compiled.output(port.name)) for port in outputs]

    def _infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        if self._request is None:
            raise RuntimeError("the session is closed")
        results = self._request.infer(dict(feeds), share_inputs=True, share_outputs=True)
        return {name: results[port] for name, port in self._ports}

    def close(self) -> None:
        self._request = None
        self._keep = None
