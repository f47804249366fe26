"""Adapters that older versions wrote keep loading, and those of newer ones say so."""

import json
from pathlib import Path

import pytest
import torch

import softkv
from softkv.io import checkpoint
from softkv.io.config import FORMAT
from tests.fixtures.write import FOLDER, METHODS, classifier, numbered
from tests.hf.tiny import model_of

FORMATS = sorted(path.name for path in FOLDER.glob("format-*"))


def test_there_is_a_fixture_of_every_format() -> None:
    assert [f"format-{number}" for number in range(1, FORMAT + 1)] == FORMATS


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("version", FORMATS)
def test_adapters_of_every_format(version: str, name: str) -> None:
    loaded = softkv.load(model_of("Llama"), FOLDER / version / name)
    assert loaded.method == METHODS[name]
    state = loaded.soft.state_dict()
    assert state
    assert all(torch.equal(state[key], value) for key, value in numbered(state).items())
    row = [3, -1, 4, 5] if loaded.soft.placement == "inline" else [3, 4, 5]
    with torch.no_grad():
        assert loaded(torch.tensor([row])).logits.isfinite().all()


@pytest.mark.parametrize("version", [name for name in FORMATS if (FOLDER / name / "head").is_dir()])
def test_heads_of_every_format(version: str) -> None:
    loaded = softkv.load(classifier(), FOLDER / version / "head")
    state = loaded.modules_to_save["default"].state_dict()
    assert list(state) == ["score.weight"]
    assert torch.equal(state["score.weight"], numbered(state)["score.weight"])


def test_an_older_adapter_is_saved_in_the_new_format(tmp_path: Path) -> None:
    loaded = softkv.load(model_of("Llama"), FOLDER / "format-1" / "p-tuning-v2")
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "softkv_config.json").read_text())["format"] == FORMAT
    again = softkv.load(model_of("Llama"), tmp_path)
    assert again.method == loaded.method
    assert torch.equal(again.soft.k, loaded.soft.k)


def test_a_newer_adapter_says_so(tmp_path: Path) -> None:
    # Its settings may be unknown too: the version is what is said.
    config, tensors = checkpoint.read(FOLDER / "format-1" / "p-tuning-v2")
    config |= {"format": FORMAT + 1, "method": "p-tuning-v3"}
    checkpoint.save_file(tensors, tmp_path / "softkv.safetensors", metadata=checkpoint.header(config, tensors))
    with pytest.raises(ValueError, match=rf"has format {FORMAT + 1}, .* upgrade softkv"):
        softkv.load(model_of("Llama"), tmp_path)
