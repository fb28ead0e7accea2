"""Loading a model: what was named and nothing else; every mistake is told in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edgead.detector_file import weights_digest
from edgead.runtime.errors import BackboneError
from edgead.server_side.vision_language import VisionLanguageModel, encode_texts, load_model

Config = Callable[..., Path]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The switch that the hub's own client knows; says the same on every machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_seed_is_a_model(tiny_model: VisionLanguageModel, tiny_config: Config) -> None:
    again = load_model(str(tiny_config()), "random:1")
    other = load_model(str(tiny_config()), "random:2")
    assert again.weights_sha256 == tiny_model.weights_sha256 != other.weights_sha256
    assert again.weights_sha256 == weights_digest(again.module).hex()
    assert (again.name, again.weights, again.size) == ("tiny", "random:1", (64, 64))
    assert again.logit_scale == pytest.approx(1 / 0.07)
    assert not again.module.training
    assert not any(parameter.requires_grad for parameter in again.module.parameters())


def test_making_a_model_leaves_torchs_random_state_alone(tiny_config: Config) -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    load_model(str(tiny_config()), "random:1")
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".wrapped.pt"])
def test_a_checkpoint_gives_back_its_weights(
    tiny_model: VisionLanguageModel, tiny_config: Config, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    state = tiny_model.module.state_dict()
    if suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if "wrapped" in suffix else state, path)
    loaded = load_model(str(tiny_config()), path)
    assert loaded.weights_sha256 == tiny_model.weights_sha256
    assert loaded.weights == path.name


def test_a_config_brings_its_own_mean_and_deviation(tiny_config: Config, tmp_path: Path) -> None:
    content = {
        "model_cfg": json.loads(tiny_config().read_text()),
        "preprocess_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3},
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own/open_clip_config.json").write_text(json.dumps(content))
    model = load_model(str(tmp_path / "own"), "random:0")
    assert (model.name, model.mean, model.std) == ("own", (0.1,) * 3, (0.2,) * 3)


def test_a_local_file_of_a_tag_takes_the_tags_mean_and_deviation(tmp_path: Path) -> None:
    from edgead.server_side.vision_language.pretrained import find_weights

    path = tmp_path / "weights.safetensors"
    path.touch()
    named = find_weights("ViT-L-14", f"laion2b_s32b_b82k={path}")
    assert (named.name, named.file, named.settings["mean"]) == ("laion2b_s32b_b82k", path, (0.5, 0.5, 0.5))
    assert find_weights("MobileCLIP-S1", path).settings["mean"] == (0.0, 0.0, 0.0)
    assert "mean" not in find_weights("ViT-L-14", path).settings


def test_text_towers_of_mobileclip_encode_without_a_hub() -> None:
    model = load_model("MobileCLIP-S1", "random:0")
    rows = encode_texts(model, ["a photo of a nut."], batch=1, progress=False)
    assert rows.shape == (1, 512)


def test_a_tokenizer_on_a_hub_is_asked_for_only_by_sentences(tiny_config: Config, offline: None) -> None:
    text = {
        "context_length": 32,
        "vocab_size": 1000,
        "width": 64,
        "heads": 2,
        "layers": 1,
        "hf_tokenizer_name": "no/where",
    }
    model = load_model(str(tiny_config("elsewhere", text_cfg=text)), "random:0")
    with pytest.raises(BackboneError, match=r"tokenizer 'no/where'.*HF_HUB_OFFLINE"):
        encode_texts(model, ["a nut"], progress=False)


def test_a_tag_that_is_not_cached_is_one_line_without_a_network(offline: None) -> None:
    with pytest.raises(
        BackboneError, match=r"pretrained weights 'laion400m_e31'.*--model-weights laion400m_e31=FILE"
    ) as caught:
        load_model("ViT-B-16-plus-240", "laion400m_e31")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("ViT-B-16-plus", None, r"none named.*TAG|none named.*FILE"),
        ("MobileCLIP-S1", None, r"none named.*datacompdr"),
        ("ViT-B-16-plus-24", "random:0", r"did you mean ViT-B-16-plus-240"),
        ("MobileCLIP-S1", "datacompd", r"did you mean datacompdr"),
        ("ViT-B-16-plus", "openai", r"there is none"),
        ("ViT-B-32", "random:-1", r"random:SEED"),
        ("ViT-B-32", "random:x", r"random:SEED"),
        ("ViT-B-32", "absent.safetensors", r"no such file"),
        ("ViT-B-32", "absent/weights", r"no such file"),
        ("absent.json", "random:0", r"absent.json.*no such file"),
    ],
)
def test_names_that_mean_nothing_are_refused_with_the_near_ones(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load_model(name, weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "something else"),
        ("[]", "something else"),
        ('{"embed_dim": 3}', "not all there"),
        ('{"embed_dim": 48, "vision_cfg": {"width": "wide"}, "text_cfg": {}}', "open_clip's refusal"),
        ('{"embed_dim": 48, "vision_cfg": {"bogus": 1}, "text_cfg": {}}', "open_clip's refusal"),
    ],
)
def test_configs_that_make_no_model_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(BackboneError, match=message):
        load_model(str(tmp_path / "own.json"), "random:0")


def test_weights_that_do_not_fit_are_refused(
    tiny_model: VisionLanguageModel, tiny_config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    state: dict[str, Any] = dict(tiny_model.module.state_dict())
    torch.save(state, path)
    with pytest.raises(BackboneError, match="those of another architecture"):
        load_model(str(tiny_config("deeper", vision={"layers": 4})), path)
    with pytest.raises(BackboneError, match="those of another architecture"):
        load_model(str(tiny_config("wider", vision={"width": 96})), path)
    torch.save(state | {"visual.proj": state["visual.proj"] * float("nan")}, path)
    with pytest.raises(BackboneError, match=r"'visual.proj' with NaN"):
        load_model(str(tiny_config()), path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(BackboneError, match="another architecture"):
        load_model(str(tiny_config()), path)
    path.write_bytes(b"no weights")
    with pytest.raises(BackboneError, match="does not load"):
        load_model(str(tiny_config()), path)


def test_pickled_code_in_a_checkpoint_is_never_run(tiny_config: Config, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    torch.save({"state_dict": Trap()}, tmp_path / "weights.pt")
    with pytest.raises(BackboneError, match="does not load"):
        load_model(str(tiny_config()), tmp_path / "weights.pt")
    assert not (tmp_path / "sprung").exists()
