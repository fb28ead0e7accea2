"""Your own method on every engine: any two modules that obey the contract become a bundle.

This one calls a frame anomalous if the mean colour of one of its 8 x 8 blocks is far from what it knows. What it
knows, one colour, is knowledge: a running inspector can be given another.

    python own_detector.py own.bundle
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgead.detector_file import FittedDetector, detector_spec, export_programs
from edgead.exporter import export_bundle
from edgead.runtime import Inspector, new_pack
from edgead.runtime.spec import Calibration, KnowledgePort, Port, Preprocessing

SIDE = 64


class Trunk(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        pixels = image.permute(0, 3, 1, 2).float() / 255.0
        return nn.functional.avg_pool2d(pixels, SIDE // 8)


class Head(nn.Module):
    def forward(self, colours: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        distance = (colours - known[None, :, None, None]).square().sum(1, keepdim=True).sqrt()
        anomaly_map = nn.functional.interpolate(distance, scale_factor=SIDE // 8.0, mode="nearest")
        return distance.flatten(1).amax(1), anomaly_map[:, 0]


def main(output: Path) -> list[str]:
    trunk, head = Trunk().eval(), Head().eval()
    spec = detector_spec(
        trunk,
        method="block-colour",
        preprocessing=Preprocessing(SIDE, SIDE),
        features=(Port("colours", "float32", ("B", 3, 8, 8)),),
        knowledge=(KnowledgePort("colour.known", "float32", (3,)),),
        outputs=(Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", SIDE, SIDE))),
    )

    def knows(*colour: float):  # type: ignore[no-untyped-def]
        calibration = Calibration(threshold=0.2, map_threshold=0.2)
        arrays = {"colour.known": np.array(colour, np.float32)}
        return new_pack(product="card", fingerprint=spec.fingerprint, calibration=calibration, arrays=arrays)

    grey = np.full((SIDE, SIDE, 3), 128, np.uint8)
    spotted = grey.copy()
    spotted[8:24, 8:24] = (255, 0, 0)
    programs = export_programs(trunk, head, spec)
    card = {"method": "block-colour"}
    fitted = FittedDetector(spec, *programs, knows(0.5, 0.5, 0.5), np.stack([grey, spotted]), card)
    bundle = export_bundle(fitted, output, ["onnx", "openvino"], force=True)
    with Inspector(bundle, target="onnx") as inspector:
        verdicts = [inspector.inspect(frame).verdict.value for frame in (grey, spotted)]
        inspector.swap(knows(1.0, 0.0, 0.0))
        verdicts.append(inspector.inspect(grey).verdict.value)
    print("grey, spotted, then grey when red is normal:", *verdicts)
    return verdicts


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
