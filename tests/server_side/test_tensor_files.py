"""Files of named tensors: what comes back, and what each kind of harm is told as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgead.runtime.errors import StorageError
from edgead.server_side.tensor_files import ForeignFileError, read_checkpoint, read_tensors, write_tensors


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    write_tensors(tmp_path / "x", layer, "layer", "1", {"model": "small", "layers": [1]})
    state, content = read_tensors(tmp_path / "x", "layer", "1")
    assert content == {"model": "small", "layers": [1]}
    assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())
    first = (tmp_path / "x").read_bytes()
    for _ in range(16):
        write_tensors(tmp_path / "x", layer, "layer", "1", {"layers": [1], "model": "small"})
        assert (tmp_path / "x").read_bytes() == first
    for kind, schema in (("teacher", "1"), ("layer", "2")):
        with pytest.raises(ForeignFileError, match=f"no {kind} of schema {schema}"):
            read_tensors(tmp_path / "x", kind, schema)


@pytest.mark.parametrize("content", ["code", "numbers", "list", "text", "cut"])
def test_a_checkpoint_of_anything_else_is_foreign(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    if content == "text":
        path.write_text("no weights")
    elif content == "cut":
        torch.save({"weight": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:300])
    else:
        torch.save({"code": {"w": Path()}, "numbers": {"w": 3.0}, "list": [torch.zeros(1)]}[content], path)
    with pytest.raises(ForeignFileError) as refused:
        read_checkpoint(path, "layers")
    assert "\n" not in str(refused.value)
    with pytest.raises(ForeignFileError):
        read_tensors(path, "layers", "1")


def test_a_dictionary_within_a_checkpoint_is_read(tmp_path: Path) -> None:
    torch.save({"layers": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth", "layers", within="layers")["w"].tolist() == [1.0, 1.0]
    with pytest.raises(ForeignFileError, match="only tensors"):
        read_checkpoint(tmp_path / "x.pth", "layers")
    with pytest.raises(ForeignFileError, match="no 'others'"):
        read_checkpoint(tmp_path / "x.pth", "layers", within="others")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that the system refuses to read")
def test_a_file_that_cannot_be_read_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "x.pth").symlink_to("/proc/self/mem")
    with pytest.raises(StorageError, match=r"to read the layers at .*x\.pth"):
        read_checkpoint(tmp_path / "x.pth", "layers")
