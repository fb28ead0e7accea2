"""Where trainings happen: names of devices, and that a step keeps everything on one of them.

There is no GPU here. The other device of these tests computes on the CPU and refuses whatever mixes both.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgead.detector_file import weights_digest
from edgead.runtime.errors import InputError, OutOfMemoryError
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors import deep_sad, padim, recontrast, simplenet, ssd
from edgead.server_side.detectors.cmda import CmdaExtras, CmdaTask
from edgead.server_side.detectors.deep_sad import SphereTask
from edgead.server_side.detectors.efficientad_teacher import distil_teacher, standardise
from edgead.server_side.detectors.efficientad_training import EfficientAdNetworks, EfficientAdTask
from edgead.server_side.detectors.frozen_maps import maps_of
from edgead.server_side.detectors.masked_cells import ANOMALOUS, NORMAL, UNKNOWN
from edgead.server_side.detectors.memory_bank import MemoryBankTrunk, patch_grid
from edgead.server_side.detectors.recontrast import ReContrastTask
from edgead.server_side.detectors.recontrast_network import ReContrastNetwork
from edgead.server_side.detectors.simplenet import PatchSet, SimpleNetTask, patches_of
from edgead.server_side.detectors.trained import Anomalies, TrainedOptions
from edgead.server_side.detectors.training import Schedule, Task, train
from edgead.server_side.devices import CPU, computing_on, device_of, knows_bfloat16, placed, torch_device
from edgead.server_side.distil import StudentTask

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
D = 12


def test_without_a_name_a_gpu_is_taken_if_there_is_one() -> None:
    assert torch_device() == torch_device("auto") == torch.device("cuda:0" if GPUS else "cpu")
    assert torch_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:one", "cuda:-1", "cuda:1:2", "cuda:1\n", "cpu:0", "meta"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="auto, cpu, cuda"):
        torch_device(name)


def test_a_gpu_that_is_not_there_is_refused_and_not_replaced() -> None:
    with pytest.raises(InputError, match=rf"cuda:{GPUS}.*Leave --device out"):
        torch_device(f"cuda:{GPUS}")


def test_a_gpu_that_is_too_small_is_told_with_what_to_do() -> None:
    def fill() -> None:
        with computing_on(torch.device("cuda", 0)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

    with pytest.raises(OutOfMemoryError, match=r"cuda:0; got CUDA out of memory\. Name another --device"):
        fill()


def test_convolutions_of_a_gpu_have_the_precision_of_the_cpu_for_as_long_as_they_are_ours() -> None:
    before = torch.backends.cudnn.allow_tf32
    with computing_on(torch.device("cuda", 0)):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("method", [deep_sad, simplenet, recontrast, padim, ssd], ids=lambda module: module.METHOD)
def test_every_method_refuses_it_before_it_reads_a_photograph(method: ModuleType) -> None:
    options = TrainedOptions(backbone="random", device=f"cuda:{GPUS}")
    with pytest.raises(InputError, match="to train on"):
        method.learn([Path("nowhere/a.png"), Path("nowhere/b.png")], options)


def normal_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_other_device_refuses_what_a_gpu_refuses(other_device: ModuleType) -> None:
    with other_device.OtherDevice():
        there, here = normal_numbers(3, 4).to(other_device.DEVICE), normal_numbers(3, 4)
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here[there[:, 0] > 0],
            lambda: torch.randn(3, device=other_device.DEVICE, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match=r"two devices|another device"):
                mixed()
        assert float((there[torch.tensor([2])] * 2).sum()) == float((here[2] * 2).sum())


def frames(count: int, seed: int, side: int = 64) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def sphere(device: torch.device) -> SphereTask:
    """More anomalies than normals, which both kinds of batches and of validations depend on."""
    maps = [normal_numbers(count, 5, 4, 4, seed=count) for count in (6, 9, 3, 4)]
    return SphereTask(*maps, batch=4, steps=8, device=device)


def simple(device: torch.device) -> SimpleNetTask:
    """Anomalies with masks and without."""
    labels = torch.full((4, 16), UNKNOWN, dtype=torch.int8)
    labels[:2], labels[:2, :3] = NORMAL, ANOMALOUS
    known = torch.tensor([True, True, False, False])
    sets = [PatchSet(normal_numbers(4, 16, D, seed=seed), labels, known) for seed in (1, 2)]
    normals = normal_numbers(14, 16, D)
    return SimpleNetTask(normals[:10], sets[0], normals[10:], sets[1], batch=4, patches=32, hidden=16, device=device)


def contrast(device: torch.device) -> ReContrastTask:
    """The same for whole frames."""

    def anomalies(count: int, seed: int) -> Anomalies:
        masks = np.zeros((count, 64, 64), np.bool_)
        masks[::2, 16:40, 8:32] = True
        return Anomalies(frames(count, seed), masks, masks.any((1, 2)))

    network = ReContrastNetwork(load_backbone("random"), width=8)
    return ReContrastTask(
        network, frames(5, 0), anomalies(4, 1), frames(3, 2), anomalies(2, 3), steps=8, batch=2, device=device
    )


def cross_modal(device: torch.device) -> CmdaTask:
    """With pictures of anomalies beside the sentences."""
    parts = [torch.nn.functional.normalize(normal_numbers(n, 6, seed=n), dim=1) for n in (12, 4, 5, 6, 3, 2)]
    return CmdaTask(*parts, extras=CmdaExtras(batch=4, hidden=8), device=device)


def student(device: torch.device) -> StudentTask:
    """Two layers in float16, as a distillation keeps them."""
    parts = [[normal_numbers(n, 5, side, side, seed=n).half() for side in (8, 4)] for n in (9, 4)]
    targets = [normal_numbers(n, 8, 8, seed=n).exp() for n in (9, 4)]
    return StudentTask(parts[0], targets[0], parts[1], targets[1], batch=4, steps=8, device=device)


TASKS: dict[str, Callable[[torch.device], Any]] = {
    "deep-sad": sphere,
    "simplenet": simple,
    "recontrast": contrast,
    "cmda": cross_modal,
    "distilled": student,
}


@pytest.mark.parametrize("method", TASKS)
def test_a_training_is_on_its_device_and_comes_back_with_the_weights_of_the_cpu(
    method: str, other_device: ModuleType
) -> None:
    schedule = Schedule(8, validate_every=3)
    here = TASKS[method](CPU)
    expected = train(here, schedule, label="test")
    with other_device.OtherDevice():
        there = TASKS[method](other_device.DEVICE)
        found = train(there, schedule, label="test")
        state = [*there.module.state_dict().values(), *there.module.parameters()]
        state += [each.grad for each in there.module.parameters() if each.grad is not None]
        assert {each.device for each in state} == {other_device.DEVICE}
        there.module.to(CPU)
    assert device_of(there.module) == CPU
    assert weights_digest(there.module) == weights_digest(here.module)
    assert found.validations == expected.validations
    assert found.losses == expected.losses
    assert there.identity == here.identity


class _Interrupted:
    """A task in whose fifth step somebody presses Ctrl-C."""

    def __init__(self, task: Task) -> None:
        self.module, self.optimizers, self.identity = task.module, task.optimizers, task.identity
        self._task = task

    def step(self, number: int) -> dict[str, float]:
        if number == 4:
            signal.raise_signal(signal.SIGINT)
        return self._task.step(number)

    def validate(self) -> float:
        return self._task.validate()


# torch says so of every copy to its own meta device; here the numbers are copied.
@pytest.mark.filterwarnings("ignore:.*to a meta parameter in the current model, which is a no-op")
@pytest.mark.parametrize("back", [True, False], ids=["to the CPU", "from the CPU"])
@pytest.mark.parametrize("method", TASKS)
def test_a_training_that_was_interrupted_goes_on_elsewhere(
    method: str, back: bool, tmp_path: Path, other_device: ModuleType
) -> None:
    schedule, kept = Schedule(8, validate_every=3), tmp_path / "kept"
    whole = TASKS[method](CPU)
    train(whole, schedule, label="test")
    devices = (other_device.DEVICE, CPU) if back else (CPU, other_device.DEVICE)
    with other_device.OtherDevice(), pytest.raises(KeyboardInterrupt):
        train(_Interrupted(TASKS[method](devices[0])), schedule, label="test", checkpoint=kept)
    read = torch.load(kept, weights_only=True)
    assert {each.device.type for each in read["module"].values()} == {"cpu"}
    with other_device.OtherDevice():
        resumed = TASKS[method](devices[1])
        train(resumed, schedule, label="test", checkpoint=kept)
        resumed.module.to(CPU)
    assert weights_digest(resumed.module) == weights_digest(whole.module)


def test_efficientad_begins_and_trains_on_its_device_as_on_the_cpu(other_device: ModuleType) -> None:
    masks = np.zeros((2, 64, 64), np.bool_)
    masks[:, 20:40, 20:40] = True
    anomalies = Anomalies(frames(2, 1), masks, np.ones(2, np.bool_))

    def trained(device: torch.device) -> tuple[str, str]:
        teacher, _ = distil_teacher(
            load_backbone("random"), frames(3, 0), frames(2, 4), frames(1, 2), steps=1, device=device
        )
        assert device_of(teacher) == CPU
        networks = EfficientAdNetworks((64, 64))
        networks.teacher.load_state_dict(teacher.state_dict())
        standardise(networks.teacher, frames(3, 0), device)
        task = EfficientAdTask(networks, frames(3, 0), frames(2, 4), anomalies, frames(1, 2), steps=2, device=device)
        task.start()
        train(task, Schedule(2, from_start=True), label="test")
        assert {each.device for each in networks.state_dict().values()} == {device}
        return weights_digest(teacher).hex(), weights_digest(networks.to(CPU)).hex()

    here = trained(CPU)
    with other_device.OtherDevice():
        assert trained(other_device.DEVICE) == here


def test_every_device_says_whether_it_computes_in_bfloat16() -> None:
    assert knows_bfloat16(CPU) in (True, False)


def test_photographs_are_embedded_on_the_device_and_the_backbone_comes_back(other_device: ModuleType) -> None:
    backbone = load_backbone("random").eval()
    trunk, size = MemoryBankTrunk(backbone).eval(), Preprocessing(64, 64)
    grid, dimensions = patch_grid(trunk, size)
    modules = padim.padim_modules(backbone, np.arange(4), size)
    pictures, digest = frames(3, 0), weights_digest(backbone)
    maps, patches = maps_of(backbone, pictures), patches_of(trunk, pictures, grid, dimensions)
    embeddings = modules.embed_prepared(pictures)["embeddings"]
    with other_device.OtherDevice():
        there = other_device.DEVICE
        assert torch.equal(maps_of(backbone, pictures, there), maps)
        assert torch.equal(patches_of(trunk, pictures, grid, dimensions, there), patches)
        with placed(modules.trunk, there):
            assert device_of(modules.trunk) == there
            assert np.array_equal(modules.embed_prepared(pictures)["embeddings"], embeddings)
    assert device_of(backbone) == CPU
    assert weights_digest(backbone) == digest
