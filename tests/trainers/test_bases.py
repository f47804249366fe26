"""Bases that are not plain modules with their values in memory: offloaded and quantised ones."""

import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

import softkv
from tests.hf.tiny import model_of
from tests.trainers.quantised import KINDS, bitsandbytes, dequantised
from tests.training_runs import METHODS, arguments, attach, losses, rows, trainer

IDS = torch.tensor([[1, 20, 21, 22, 23]])
LABELS = torch.tensor([[-100, -100, 21, 22, 23]])


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Spares runs the search for garbage among all modules."""
    gc.freeze()
    yield
    gc.unfreeze()


def step(base: Any, method: str = "p-tuning v2") -> tuple[float, list[torch.Tensor]]:
    """The loss and the gradients of a soft prompt on a base."""
    torch.manual_seed(1)
    soft_model = softkv.attach(base, METHODS[method]).train()
    ids = IDS.clone()
    if method == "p-tuning":
        ids[0, 1] = -1
    loss = soft_model(ids, labels=LABELS).loss
    loss.backward()
    found = loss.item(), [parameter.grad.clone() for parameter in soft_model.soft.parameters()]
    soft_model.detach()
    return found


PLACES: dict[str, Callable[[Any, Path], Any]] = {
    "in memory": lambda base, path: accelerate.cpu_offload(base, execution_device="cpu"),
    "on disk": lambda base, path: accelerate.disk_offload(base, str(path), execution_device="cpu"),
    "a layer on disk": lambda base, path: accelerate.dispatch_model(
        base,
        {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
        | {"model.rotary_emb": "cpu", "lm_head": "disk"},
        main_device="cpu",
        offload_dir=str(path),
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_offloaded_bases(method: str, place: str, tmp_path: Path) -> None:
    expected = step(model_of("Llama"), method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = PLACES[place](model_of("Llama"), tmp_path)
    loss, gradients = step(base, method)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    for gradient, wanted in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(gradient, wanted)
    soft_model = softkv.attach(base, softkv.PTuningV2(length=2, init="vocabulary"))
    assert soft_model.device == torch.device("cpu")
    assert soft_model.generate(IDS, max_new_tokens=2).shape == (1, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_bases_learn_as_their_plain_weights_do(kind: str, tmp_path: Path) -> None:
    base = KINDS[kind](tmp_path / "base")
    if kind == "bitsandbytes 4-bit":
        base(IDS)  # packs the weights for inference on some processors
    for method in ("prompt-tuning before", "p-tuning v2"):
        loss, gradients = step(base, method)
        plain = dequantised(base)  # an attached base has its weights in their usual form
        expected, wanted = step(plain, method)
        assert loss == pytest.approx(expected, rel=1e-5)
        for gradient, right in zip(gradients, wanted, strict=True):
            assert (gradient - right).norm() <= 3e-5 * right.norm()  # torchao scales a product of int8 afterwards
            assert bool(right.any())


@pytest.mark.parametrize("kind", [*KINDS, "bitsandbytes 8-bit"])
def test_trainers_accept_quantised_bases(kind: str, tmp_path: Path) -> None:
    kinds = KINDS | {"bitsandbytes 8-bit": partial(bitsandbytes, load_in_8bit=True)}
    soft_model = softkv.attach(kinds[kind](tmp_path / "base"), METHODS["p-tuning v2"])
    examples = rows(soft_model.method, 4)
    data = {"train_dataset": examples, "eval_dataset": examples}
    settings = {"max_steps": 6, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    collator = softkv.PaddingCollator()
    plain = transformers.Trainer(soft_model, arguments(tmp_path, **settings), data_collator=collator, **data)
    plain.train()
    ours = trainer("", tmp_path, soft_model=soft_model, save_steps=6, **(settings | {"save_strategy": "steps"}), **data)
    ours.train()
    assert losses(ours)[-1] < losses(plain)[0]  # type: ignore[arg-type]
    with torch.no_grad():
        expected = soft_model.eval()(IDS).logits
    loaded = softkv.load(soft_model.detach(), tmp_path / "checkpoint-6")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected)
    assert loaded.generate(IDS, max_new_tokens=2).shape == (1, 7)


def test_first_gradients_of_zero_are_told(tmp_path: Path) -> None:
    soft_model = attach("p-tuning v2")
    for parameter in soft_model.soft.parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.warns(UserWarning, match="gradients of the first step are all zero"):
        trainer("p-tuning v2", tmp_path, soft_model=soft_model, max_steps=2).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer("p-tuning v2", tmp_path, max_steps=1).train()
