"""ONNX Runtime: knowledge becomes constants of the head when its session is made."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from edgead.runtime.engines import Arrays, Engine, Session, contiguous
from edgead.runtime.engines.onnx_binding import bind_inputs
from edgead.runtime.spec import Port

_ERRORS_ONLY = 3


class OnnxRuntimeEngine(Engine):
    """Trunk and heads as ONNX Runtime sessions, on the CPU or the execution provider named by `device`."""

    def _trunk(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> Session:
        model = self._model(self.record.trunk)
        return _OnnxSession(self.record.trunk, inputs, outputs, self._open(model, self._options()))

    def _head(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...], knowledge: Arrays) -> Session:
        bound = {name: contiguous(array) for name, array in knowledge.items()}
        model = bind_inputs(self.bundle.read(self.record.head), bound)
        options = self._options()
        # Packed ahead, each product with the bank would keep a copy of it of its own.
        options.add_session_config_entry("session.disable_prepacking", "1")
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in bound.values()]
        options.add_external_initializers(list(bound), values)
        session = self._open(model, options)
        return _OnnxSession(self.record.head, inputs, outputs, session, keep=(bound, values))

    def _model(self, name: str) -> str | bytes:
        # A model with external weights can only be opened from its folder.
        path = self.bundle.file(name)
        if path is not None and self.bundle.has(f"{name}.data"):
            self.bundle.read(f"{name}.data")
            return str(path)
        return self.bundle.read(name)

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # A pattern keeps a block for the whole graph beside what the first frames allocated; it saves no time here.
        options.enable_mem_pattern = False
        # A thread that sleeps between two operators of a frame wakes too late to share a short one; one that
        # spins on between frames starves the other stage and the rest of the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _open(self, model: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        providers = [self.device or "CPUExecutionProvider"]
        return ort.InferenceSession(model, options, providers=providers)


class _OnnxSession(Session):
    def __init__(
        self,
        name: str,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        session: ort.InferenceSession,
        keep: object = None,
    ) -> None:
        super().__init__(name, inputs, outputs)
        self._session: ort.InferenceSession | None = session
        self._names = [port.name for port in outputs]
        # The session reads the knowledge from these arrays for as long as it lives.
        self._keep = keep

    def _infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        if self._session is None:
            raise RuntimeError("the session is closed")
        return dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))

    def close(self) -> None:
        self._session = None
        self._keep = None
