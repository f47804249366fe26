"""A base sharded over two processes learns as one process does, and saves the same adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights

import softkv
from softkv.io import checkpoint
from tests.hf.tiny import config_of, model_of, tokenizer
from tests.trainers.sharded_runs import RUNS, train
from tests.training_runs import attach, rows

ROOT = Path(__file__).parents[2]


def torchrun(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *command]
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    torchrun("-m", "tests.trainers.sharded_runs", str(folder))
    return folder


@pytest.mark.parametrize(("strategy", "method"), RUNS, ids=[": ".join(run) for run in RUNS])
def test_two_processes_learn_as_one(strategy: str, method: str, sharded: Path) -> None:
    soft_model = attach(method)
    losses = train(soft_model, soft_model, rows(soft_model.method, 6), 1)
    close: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
    if "mixed" in strategy:
        close = {"atol": 0.05, "rtol": 0.02}
    found = json.loads((sharded / "losses.json").read_text())[f"{strategy}: {method}"]
    torch.testing.assert_close(found, losses, **close)
    _, saved = checkpoint.read(sharded / strategy / method)
    for name, value in soft_model.soft.folded().state_dict().items():
        torch.testing.assert_close(saved[name], value, **(close | {"atol": max(2e-4, close["atol"])}))
    softkv.load(model_of("Llama"), sharded / strategy / method)


def test_the_example(tmp_path: Path) -> None:
    model_of("Llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    printed = torchrun("examples/fsdp2.py", str(tmp_path / "base"), str(tmp_path / "adapter"), "3")
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    softkv.load(model_of("Llama"), tmp_path / "adapter")
    code = (ROOT / "examples/fsdp2.py").read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line]) <= 40


@pytest.mark.parametrize("method", [softkv.PTuningV2(length=7), softkv.PrefixTuning(length=7)])
def test_a_base_without_values(method: Any) -> None:
    with init_empty_weights():
        base = transformers.AutoModelForCausalLM.from_config(config_of("Llama"))
    soft_model = softkv.attach(base, method)
    learned = [parameter.clone() for parameter in soft_model.soft.parameters()]
    soft_model.to_empty(device="cpu")
    base.load_state_dict(model_of("Llama").state_dict())
    expected = softkv.attach(model_of("Llama"), method)
    expected.load_state_dict(soft_model.state_dict())
    ids = torch.tensor([[1, 20, 21, 22]])
    with torch.no_grad():
        for parameter, value in zip(soft_model.soft.parameters(), learned, strict=True):
            assert torch.equal(parameter, value)
        torch.testing.assert_close(soft_model.eval()(ids).logits, expected.eval()(ids).logits)


def test_what_a_base_without_values_can_not_start() -> None:
    with init_empty_weights():
        base = transformers.AutoModelForCausalLM.from_config(config_of("Llama"))
    with pytest.raises(ValueError, match='which a base on "meta" has none of'):
        softkv.attach(base, softkv.PTuningV2(length=3, init="vocabulary"))


def test_what_is_not_supported(tmp_path: Path) -> None:
    base = model_of("Llama")
    base._tp_size = 2
    with pytest.raises(ValueError, match="split over 2 processes by tensor parallelism"):
        softkv.attach(base, softkv.PTuningV2(length=3))
    soft_model = attach("p-tuning v2")
    soft_model.soft.k._fsdp_flattened = True  # as FSDP1 marks them
    with pytest.raises(ValueError, match="FSDP1 shards this soft prompt"):
        soft_model.save_pretrained(tmp_path)
