"""ONNX -> OpenVINO IR, in fp32 or with weights compressed to fp16."""

from __future__ import annotations

from pathlib import Path

from edgead.runtime.errors import EngineError, missing_dependency
from edgead.runtime.spec import Precision


def openvino_from_onnx(source: Path, folder: Path, name: str, *, precision: Precision) -> list[str]:
    """Convert `source` into `<name>.xml` and `<name>.bin` in `folder`. Reads and writes files only.

    With 'fp16' the weights are stored in 16 bits, half the size; a processor still adds up in float32.

    Returns:
        the names of the files written.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        EngineError: OpenVINO refused the model.
    """
    try:
        import openvino as ov
    except ModuleNotFoundError as error:
        raise missing_dependency("openvino", "openvino", "the target 'openvino'") from error
    try:
        model = ov.Core().read_model(str(source))
        model.set_friendly_name("edgead")
        # OpenVINO counts unnamed nodes over the whole process; the same graph must give the same bytes.
        for number, node in enumerate(model.get_ordered_ops()):
            if node.get_type_name() not in ("Parameter", "Result"):
                node.set_friendly_name(f"{node.get_type_name()}_{number}")
        ov.save_model(model, str(folder / f"{name}.xml"), compress_to_fp16=precision == "fp16")
    except RuntimeError as error:
        raise EngineError(
            wanted=f"{name} as an OpenVINO model",
            got=str(error).strip().splitlines()[0],
            next_step="Run with --debug, or export to another target.",
        ) from error
    return [f"{name}.xml", f"{name}.bin"]


def openvino_version() -> str:
    """'openvino' and the version that is installed."""
    import openvino as ov

    return f"openvino {ov.__version__.split('-')[0]}"
