"""A method of one's own is one class and one line in the registry: every part of softkv that takes methods takes it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

import softkv
from softkv.cli import app
from softkv.methods import METHODS
from softkv.methods.base import FrozenModel, Method, SoftPrompt
from softkv.prefix import Prefix
from tests.hf.tiny import model_of, tokenizer

NAME = "low-rank"


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Keys and values of n slots as products of two small matrices.

    Args:
        length: n.
        rank: of the products.
        template: how `encode` builds a row.
    """

    length: int
    rank: int = 2
    template: str = "[X] [Y]"
    learns: ClassVar[str] = "r·(n + 2·G·D·L)"

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        shape = base.shape
        return Products(replace(self), (shape.layers, 1, shape.kv_heads), self.length, self.rank, shape.head_dim)


class Products(SoftPrompt):
    def __init__(self, config: LowRank, outer: tuple[int, ...], slots: int, rank: int, width: int) -> None:
        super().__init__(config)
        self.slots = nn.Parameter(torch.randn(slots, rank))
        self.keys, self.values = (nn.Parameter(0.1 * torch.randn(*outer, rank, width)) for _ in range(2))

    def prefix(self) -> Prefix:
        return Prefix(self.slots @ self.keys, self.slots @ self.values)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, NAME, LowRank)


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def logits(model: softkv.SoftModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 5, 6, 7]])).logits


def test_explained_and_planned(tmp_path: Path) -> None:
    said = command("methods", NAME, "--length", 4)
    assert "rank=2" in said
    assert f"learns r·(n + 2·G·D·L) values: {2 * (4 + 2 * 3 * 64 * 30):,} for smollm2-135m" in said  # G=3, D=64, L=30
    model_of("Llama").config.save_pretrained(tmp_path)
    sizes = ["--model", tmp_path, "-P", 4, "-B", 2, "-T", 12, "--answer", 2, "--json"]
    costs = json.loads(command("plan", "--method", NAME, *sizes))["costs"]
    assert costs["softkv"]["trainable"] == 16 * softkv.attach(model_of("Llama"), LowRank(length=4)).num_trainable()
    assert costs["softkv"]["total"] < costs["concatenating"]["total"]


def test_trained_and_used_on_the_command_line(tmp_path: Path) -> None:
    model_of("Llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    data, adapter = tmp_path / "rows.jsonl", tmp_path / "adapter"
    data.write_text("".join(json.dumps({"text": f"w{i} w6", "answer": "w9"}) + "\n" for i in range(2, 6)))
    base = ["-m", tmp_path / "base"]
    rows = ["-d", data, "--prompt", "text"]
    command(
        "train", *base, *rows, "-o", adapter, "--method", NAME, "--length", 3, "-s", "rank=1", "--steps", 2, "--cpu"
    )
    assert f"method {NAME}" in " ".join(command("inspect", adapter).split())
    command("eval", adapter, *base, *rows, "--device", "cpu")
    command("generate", adapter, "w3 w4", *base, "--max-new-tokens", 2, "--device", "cpu")


def test_saved_loaded_and_resumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = softkv.attach(model_of("Llama"), LowRank(length=3))
    before = logits(model)
    rows = [{"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]}] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=1, learning_rate=0.1, report_to=[], use_cpu=True
    )
    softkv.Trainer(model, arguments, train_dataset=rows).train()
    trained = logits(model)
    assert not torch.allclose(trained, before)
    model.save_pretrained(tmp_path / "adapter")
    loaded = softkv.load(model_of("Llama"), tmp_path / "adapter")
    assert loaded.method == LowRank(length=3)
    assert torch.equal(logits(loaded), trained)
    other = softkv.attach(model_of("Llama"), LowRank(length=3))
    softkv.Trainer(other, arguments, train_dataset=rows).train(
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-2")
    )
    assert torch.equal(logits(other), trained)
