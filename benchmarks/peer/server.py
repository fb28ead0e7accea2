"""The peer's side of the timings: JSON lines in, JSON lines out. Runs in the peer's environment only.

Requests are `{"do": OPERATION, ...}`; an operation is a method of `Server` below. Times are milliseconds, each
around one call, so that the asking process can let contenders take turns.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np


class Server:
    """What the peer is asked for."""

    def __init__(self) -> None:
        self._runners: dict[str, Any] = {}

    def versions(self) -> dict[str, Any]:
        from peer_model import versions

        return {"versions": versions()}

    def weights(self, path: str, seed: int) -> dict[str, Any]:
        """Write random ResNet-18 weights."""
        from peer_model import write_resnet18

        write_resnet18(Path(path), seed)
        return {}

    def export(self, weights: str, bank: str, folder: str, size: int, neighbours: int) -> dict[str, Any]:
        """The peer's own export to OpenVINO (timed) and to ONNX, with the bank [N, D] of a `.npy` file inside."""
        from peer_model import patchcore

        model = patchcore(Path(weights), np.load(bank), neighbours)
        # Batch 1: the default is a batch of 2 for this model, which the peer's inferencer then refuses.
        options = {"input_size": (size, size), "onnx_kwargs": {"dynamic_shapes": None}}
        start = time.perf_counter()
        xml = model.to_openvino(Path(folder), **options)
        seconds = time.perf_counter() - start
        onnx = model.to_onnx(Path(folder), input_size=(size, size), dynamic_shapes=None)
        written = sum(file.stat().st_size for file in (xml, xml.with_suffix(".bin")))
        return {"seconds": seconds, "bytes": written, "xml": str(xml), "onnx": str(onnx)}

    def export_efficientad(self, weights: str, quantiles: list[list[float]], folder: str, size: int) -> dict[str, Any]:
        """The peer's own export of EfficientAD small, with given weights, to OpenVINO (timed) and to ONNX."""
        from peer_model import efficientad

        model = efficientad(Path(weights), quantiles)
        options = {"input_size": (size, size), "onnx_kwargs": {"dynamic_shapes": None}}
        start = time.perf_counter()
        xml = model.to_openvino(Path(folder), **options)
        seconds = time.perf_counter() - start
        onnx = model.to_onnx(Path(folder), input_size=(size, size), dynamic_shapes=None)
        written = sum(file.stat().st_size for file in (xml, xml.with_suffix(".bin")))
        return {"seconds": seconds, "bytes": written, "xml": str(xml), "onnx": str(onnx)}

    def load(self, name: str, kind: str, path: str, threads: int) -> dict[str, Any]:
        """Open an exported model: kind `inferencer`, `openvino`, `openvino-f32` or `onnxruntime`."""
        self._runners[name] = _RUNNERS[kind](path, threads)
        return {"precision": getattr(self._runners[name], "precision", None)}

    def forget(self, name: str) -> dict[str, Any]:
        self._runners.pop(name, None)
        return {}

    def time(self, name: str, images: str, repeats: int, warm: int) -> dict[str, Any]:
        """Time calls on the frames uint8 RGB [G, H, W, 3] of a `.npy` file, one after the other."""
        runner = self._runners[name]
        frames = [runner.ready(frame) for frame in np.load(images)]
        milliseconds, scores = [], []
        for place in range(warm + repeats):
            frame = frames[max(place - warm, 0) % len(frames)]
            start = time.perf_counter()
            score = runner(frame)
            if place >= warm:
                milliseconds.append((time.perf_counter() - start) * 1e3)
                scores.append(score)
        return {"milliseconds": milliseconds, "scores": scores}

    def coreset(self, rows: str, size: int, seed: int) -> dict[str, Any]:
        """Seconds of the peer's greedy coreset of `size` out of the rows [n, D] of a `.npy` file."""
        import torch
        from anomalib.models.components import KCenterGreedy

        torch.manual_seed(seed)
        embedding = torch.from_numpy(np.load(rows))
        start = time.perf_counter()
        chosen = KCenterGreedy(embedding, sampling_ratio=(size + 0.5) / len(embedding)).select_coreset_idxs()
        return {"seconds": time.perf_counter() - start, "chosen": chosen}


class Inferencer:
    """The peer's OpenVINOInferencer as its users call it: an array in, scores and maps out."""

    def __init__(self, path: str, threads: int, precision: str | None = None) -> None:
        from anomalib.deploy import OpenVINOInferencer

        config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision:
            config["INFERENCE_PRECISION_HINT"] = precision
        self._inferencer = OpenVINOInferencer(path, device="CPU", config=config)
        self.precision = str(self._inferencer.model.get_property("INFERENCE_PRECISION_HINT"))

    def ready(self, frame: Any) -> Any:
        return frame

    def __call__(self, frame: Any) -> float:
        return float(np.asarray(self._inferencer.predict(frame).pred_score).reshape(-1)[0])


class InferencerF32(Inferencer):
    """The same held to float32, where the processor would have it choose bfloat16 by itself."""

    def __init__(self, path: str, threads: int) -> None:
        super().__init__(path, threads, "f32")


class BareOpenVino:
    """The exported graph alone, held to float32; the frame is made ready outside."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino as ov

        core = ov.Core()
        compiled = core.compile_model(
            core.read_model(path),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        self.precision = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
        self._request = compiled.create_infer_request()
        self._score = compiled.output("pred_score")

    def ready(self, frame: Any) -> Any:
        return _planar(frame)

    def __call__(self, frame: Any) -> float:
        results = self._request.infer([frame], share_inputs=True, share_outputs=True)
        return float(results[self._score].reshape(-1)[0])


class BareOnnxRuntime:
    """The exported graph alone; the frame is made ready outside."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def ready(self, frame: Any) -> Any:
        return _planar(frame)

    def __call__(self, frame: Any) -> float:
        score = self._session.run(["pred_score"], {self._input: frame})[0]
        return float(score.reshape(-1)[0])


_RUNNERS = {
    "inferencer": Inferencer,
    "inferencer-f32": InferencerF32,
    "openvino": BareOpenVino,
    "onnxruntime": BareOnnxRuntime,
}


def _planar(frame: Any) -> Any:
    """float32 [1, 3, H, W] in 0..1, which the exported graph takes."""
    return np.ascontiguousarray(frame.transpose(2, 0, 1)[None], dtype=np.float32) / np.float32(255.0)


def main() -> None:
    # The peer's libraries print; the answers must be alone on their line.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
