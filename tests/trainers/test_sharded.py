"""A base sharded over two processes learns as one process does, and saves the same adapter."""

import gc
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights

import softkv
from softkv.io import checkpoint
from softkv.profiling.strategies import share
from tests.hf.tiny import config_of, model_of, tokenizer
from tests.trainers import planned_runs, split_runs
from tests.trainers.sharded_runs import FSDP1, OF_FSDP1, RUNS, STEPS, optimizer_of, resume, save, train
from tests.training_runs import METHODS, attach, rows

ROOT = Path(__file__).parents[2]


def torchrun(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *command]
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def one_process(method: str, folder: Path) -> list[float]:
    """Twice as many steps of one process, which leaves its state after the first half of them."""
    soft_model = attach(method)
    optimizer, examples = optimizer_of(soft_model), rows(soft_model.method, 6)
    losses = train(soft_model, soft_model, optimizer, examples, 1)
    soft_model.save_pretrained(folder)
    save(soft_model, optimizer, str(folder / "state"))
    return losses + train(soft_model, soft_model, optimizer, examples, 1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    gc.freeze()  # torch's checkpoints look for garbage among all modules
    folder = tmp_path_factory.mktemp("sharded")
    model_of("Llama").save_pretrained(folder / "base")
    expected = {method: one_process(method, folder / "one process" / method) for method in METHODS}
    (folder / "expected.json").write_text(json.dumps(expected))
    torchrun("-m", "tests.trainers.sharded_runs", str(folder))
    yield folder
    gc.unfreeze()


@pytest.mark.parametrize(("strategy", "method"), RUNS, ids=[": ".join(run) for run in RUNS])
def test_two_processes_learn_as_one(strategy: str, method: str, sharded: Path) -> None:
    expected = json.loads((sharded / "expected.json").read_text())[method]
    close: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
    if "mixed" in strategy:
        close = {"atol": 0.05, "rtol": 0.02}
    found = json.loads((sharded / "losses.json").read_text())[f"{strategy}: {method}"]
    torch.testing.assert_close(found, expected, **close)  # the second half resumes a run of one process
    _, saved = checkpoint.read(sharded / strategy / method)
    _, values = checkpoint.read(sharded / "one process" / method)
    assert saved.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(saved[name], value, **(close | {"atol": max(2e-4, close["atol"])}))
    softkv.load(model_of("Llama"), sharded / strategy / method)

    soft_model = attach(method)  # one process resumes a run of two
    optimizer = optimizer_of(soft_model)
    resume(soft_model, optimizer, str(sharded / strategy / method / "state"))
    resumed = train(soft_model, soft_model, optimizer, rows(soft_model.method, 6), 1)
    torch.testing.assert_close(resumed, expected[STEPS:], **close)


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


@pytest.mark.parametrize("kind", [softkv.PTuningV2, softkv.PrefixTuning])
def test_a_base_without_values(kind: Any) -> None:
    method = kind(length=7, init_std=0.1)
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
    with pytest.raises(ValueError, match='which a base on "meta" does not have'):
        softkv.attach(base, softkv.PTuningV2(length=3, init="vocabulary"))


def test_tensor_parallel_models(sharded: Path) -> None:
    found = json.loads((sharded / "split.json").read_text())
    assert found.keys() == split_runs.CASES.keys()
    assert all(found.values()), found


@pytest.mark.parametrize("case", planned_runs.CASES, ids=str)
def test_the_plan(case: tuple[Any, ...], sharded: Path) -> None:
    received, held, allocated = json.loads((sharded / "planned.json").read_text())[str(case)]
    found = share(planned_runs.job(*case), case[0])
    assert found.parameters == held
    assert found.received == pytest.approx(received, rel=0.01)
    assert found.step + found.gathered == pytest.approx(allocated, rel=0.15)


def test_context_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    soft_model, ids = attach("p-tuning v2"), torch.tensor([[1, 20, 21, 22]])

    def replaced(*operands: Any, **options: Any) -> None: ...

    replaced.__module__ = "torch.distributed.tensor.experimental._context_parallel._attention"  # as torch does
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", replaced)
    with pytest.raises(ValueError, match="context_parallel splits rows over processes"):
        soft_model(ids)


def test_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    soft_model = attach("p-tuning v2")
    soft_model.soft.k.ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 has partitioned this model"):
        soft_model(torch.tensor([[1, 20, 21, 22]]))
    next(soft_model.detach().parameters()).ds_id = 1
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 has partitioned this model"):
        softkv.attach(soft_model.base, softkv.PTuningV2(length=3))


@pytest.mark.parametrize("method", OF_FSDP1)
def test_fsdp1(method: str, sharded: Path) -> None:
    expected = json.loads((sharded / "expected.json").read_text())[method][:STEPS]
    found = json.loads((sharded / "losses.json").read_text())[f"{FSDP1}: {method}"]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    _, saved = checkpoint.read(sharded / FSDP1 / method)
    _, values = checkpoint.read(sharded / "one process" / method)
    for name, value in values.items():
        torch.testing.assert_close(saved[name], value, atol=2e-4, rtol=1e-4)
