"""Named ranges appear in a profile, and nowhere else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import softkv
from softkv import ranges
from softkv.cli import app
from softkv.profiling import allocations, trace

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def tiny(method: Any) -> softkv.SoftModel:
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    return softkv.attach(base, method)


def test_a_training_step_names_its_parts() -> None:
    model = tiny(softkv.PromptTuning(length=3, position="before", init="random"))
    found = trace.train(model, trace.rows(model, 4, 12, 3), batch=2, steps=1)
    named = {line.name: line.calls for line in trace.lines(found)[0]}
    assert named == {
        "prefix": 1,
        "loss": 1,
        "attention, layer 0": 2,  # of the head, and of the rows
        "attention, layer 1": 2,
        "backward of attention, layer 0": 2,
        "backward of attention, layer 1": 2,
    }


def test_generation_names_its_parts() -> None:
    model = tiny(softkv.PromptTuning(length=3, position="before", init="random"))
    found = trace.generate(model, trace.rows(model, 2, 6, 1), new_tokens=4)
    named = {line.name: line.calls for line in trace.lines(found)[0]}
    assert named == {"prefix": 1, "head once": 1, "attention, layer 0": 5, "attention, layer 1": 5}


def test_generation_with_a_learned_prefix_names_its_parts() -> None:
    model = tiny(softkv.PTuningV2(length=3))
    found = trace.generate(model, trace.rows(model, 2, 6, 1), new_tokens=4)
    named = {line.name: line.calls for line in trace.lines(found)[0]}
    assert named == {"prefix": 1, "attention, layer 0": 4, "attention, layer 1": 4}


def test_ranges_cost_nothing_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(ranges, "record_function", refuse)
    model = tiny(softkv.PTuningV2(length=3))
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    assert ranges.named("anything") is ranges.named("something else")
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(AssertionError, match="prefix"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_the_timeline_sees_what_is_allocated() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        large = torch.ones(1 << 18)
        small = large[: 1 << 10].clone()
        del large
    assert allocations.peak(found) == 4 * ((1 << 18) + (1 << 10))
    assert allocations.timeline(found)[-1][1] == small.nbytes


@pytest.mark.parametrize("what", ["train", "generate"])
def test_the_command_writes_a_trace_and_a_picture(what: str, tmp_path: Path) -> None:
    """Of a folder that holds a model and no tokenizer."""
    folder, tmp_path = tmp_path / "model", tmp_path / "trace"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(folder)
    options = ["profile", "trace", "--model", str(folder), "-o", str(tmp_path)]
    options += ["--what", what, "--device", "cpu", "-P", "3"]
    said = CliRunner().invoke(app, [*options, "-B", "2", "-T", "8", "--answer", "2", "--new-tokens", "2"])
    assert said.exit_code == 0, said.output
    assert "attention, layer 1" in said.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "trace.json"]
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "softkv: attention, layer 0" in names
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--answer", "8"], "--answer expects fewer than --tokens 8, got 8"),
        (["--device", "nowhere"], "that torch can use on this machine, got 'nowhere': "),
        (["-o", __file__], f"--output expects a folder, got the file {__file__}"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(options: list[str], message: str, tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(tmp_path)
    given = ["profile", "trace", "--model", str(tmp_path), "-o", str(tmp_path / "trace"), "-T", "8", "--answer", "2"]
    said = CliRunner().invoke(app, [*given, *options])
    assert said.exit_code == 2, said.output
    assert message in said.stderr.replace("\n", "")
