"""A sample of the sweep over transformers' models, one of each kind; `make models` runs all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import model_checks, models
from softkv.methods.base import Method

SAMPLE = {
    "gemma3_text": "two kinds of layers, each with positions of its own",
    "deepseek_v3": "keys wider than values, a cache of latents",
    "mixtral": "experts",
    "minimax": "state beside attention, in a cache that the model makes itself",
    "diffllama": "attention that runs twice in a block",
    "camembert": "positions that start behind padding's",
    "fuyu": "a wrapper that counts positions",
    "ctrl": "embeddings that the model writes into",
    "whisper": "a head that gives all logits",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_model_is_right(name: str) -> None:
    methods = {
        kind: model_checks.METHODS[kind] for kind in ("P-tuning v2", "Prompt-tuning, before", "Prompt-tuning, after")
    }
    record = model_checks.check_model(models.entries()[name], methods)
    assert models.kind_of(record) == "right", models.summary(record)


@pytest.mark.parametrize("name", ["bloom", "modernbert-decoder", "recurrent_gemma"])
def test_model_is_right_or_refused(name: str) -> None:
    methods: dict[str, Method] = {"P-tuning v2": model_checks.METHODS["P-tuning v2"]}
    record = model_checks.check_model(models.entries()[name], methods)
    assert models.kind_of(record) not in ("wrong", "crash", "not built"), models.summary(record)


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model_checks.softkv.SoftModel.forward

    def off(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + 0.05 * torch.arange(output.logits.shape[-1]) * output.logits.std() / 97
        return output

    monkeypatch.setattr(model_checks.softkv.SoftModel, "forward", off)
    record = model_checks.check_model("LlamaForCausalLM", {"Prefix-tuning": model_checks.METHODS["Prefix-tuning"]})
    checks = record["checks"]["Prefix-tuning"]
    assert models.kind_of(record) == "wrong"
    assert all(checks[name].startswith("wrong") for name in ("rows alone", "padded left", "packed")), checks


def test_the_page_is_of_the_results() -> None:
    results = json.loads(models.RESULTS.read_text(encoding="utf-8"))["results"]
    page = Path(models.PAGE).read_text(encoding="utf-8")
    assert page == models.page(results)
    assert page.count("\n| ") == len(models.entries()) + 1
