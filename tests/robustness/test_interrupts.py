"""Ctrl-C at random points: attach, load, detach and save leave all or nothing behind, calls leave no trace, and the
next attempt works."""

import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import softkv
from softkv.hf import call_scope
from tests.robustness.models import IDS, attached, llama

POINTS = int(os.environ.get("SOFTKV_POINTS", "40"))  # `make soak` takes 400
HERE = __file__


class Interrupted(KeyboardInterrupt):
    pass


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        # An exception in a destructor or in this file would say nothing of what is tested.
        if frame is not None and frame.f_code.co_filename != HERE:
            raise Interrupted

    previous = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def interrupted(action: Callable[[], Any], seconds: float) -> bool:
    """Whether an action was interrupted, `seconds` after its start or not at all."""
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        action()
        return False
    except Interrupted:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        torch.set_grad_enabled(True)  # torch's own no_grad may be interrupted on its way out


def points(action: Callable[[], Any]) -> list[float]:
    action()
    start = time.perf_counter()
    action()
    lasts = time.perf_counter() - start
    return [random.Random(number).random() * lasts for number in range(POINTS)]


def state_of(base: Any) -> list[Any]:
    return [
        base.config._attn_implementation,
        [parameter.requires_grad for parameter in base.parameters()],
        [(module.training, sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks),
          getattr(module, "attention_dropout", None)) for module in base.modules()],
    ]  # fmt: skip


METHODS = {
    "prefix": softkv.PTuningV2(length=4),
    "vocabulary": softkv.PrefixTuning(length=2, init="vocabulary"),
    "encoder": softkv.PTuningV2(length=2, encoder="lstm", encoder_size=8),
    "template": softkv.PTuning(template="[P1][X][Y]", encoder_size=8),
}


@pytest.mark.parametrize("method", METHODS)
def test_attach(method: str) -> None:
    base = llama()
    base.train()
    base.model.layers[0].self_attn.attention_dropout = 0.25
    before, hit = state_of(base), 0
    held: list[softkv.SoftModel] = []

    def attach() -> None:
        held.append(softkv.attach(base, METHODS[method]))

    def detach() -> None:
        held.pop().detach()

    for after in points(lambda: (attach(), detach())):
        if interrupted(attach, after):
            hit += 1
        while held:
            detach()
        assert state_of(base) == before
    assert hit > POINTS // 10


def test_detach() -> None:
    base = llama()
    before, hit = state_of(base), 0
    for after in points(lambda: softkv.attach(base, METHODS["encoder"]).detach()):
        model = softkv.attach(base, METHODS["encoder"])
        hit += interrupted(model.detach, after / 8)
        model.detach()
        assert state_of(base) == before


def test_load(tmp_path: Any) -> None:
    saved = attached()
    saved.save_pretrained(tmp_path)
    want = saved(IDS).logits
    base = llama()
    before, held = state_of(base), []
    for after in points(lambda: softkv.load(base, tmp_path).detach()):
        interrupted(lambda: held.append(softkv.load(base, tmp_path)), after)
        while held:
            held.pop().detach()
        assert state_of(base) == before
    assert torch.equal(softkv.load(base, tmp_path)(IDS).logits, want)


def test_a_warning_that_is_an_error_attaches_nothing(tmp_path: Any) -> None:
    saved = attached()
    saved.base.config.name_or_path = "one"
    saved.save_pretrained(tmp_path)
    base = llama()
    base.config.name_or_path = "another"
    before = state_of(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was trained on one, not on another"):
            softkv.load(base, tmp_path)
    assert state_of(base) == before


@pytest.mark.parametrize("method", METHODS)
def test_calls(method: str) -> None:
    """Interrupted calls leave no call under way, and the model answers as before."""
    model = attached(METHODS[method])
    ids = torch.tensor([[-1, 5, 6, 7]]) if method == "template" else IDS
    want, written = model(ids).logits, model.generate(ids, max_new_tokens=3)
    bare = llama()(IDS).logits
    for after in points(lambda: model.generate(ids, max_new_tokens=3)):
        interrupted(lambda: model.generate(ids, max_new_tokens=3), after)
        assert call_scope.current() is None
        assert torch.equal(model(ids).logits, want)
        assert torch.equal(model.generate(ids, max_new_tokens=3), written)
    torch.testing.assert_close(model.base(IDS).logits, bare)


def test_add_adapter() -> None:
    model = attached()
    want = model(IDS).logits

    def add() -> None:
        model.add_adapter("b", softkv.PrefixTuning(length=2, init="vocabulary"))

    for after in points(lambda: (add(), model.delete_adapter("b"))):
        interrupted(add, after)
        if "b" in model.adapters:
            model.delete_adapter("b")
        assert list(model.adapters) == ["default"]
        assert torch.equal(model(IDS).logits, want)


def test_save(tmp_path: Any) -> None:
    """The old adapter or the new one, whole."""
    old, new = attached(), attached(softkv.PTuningV2(length=2))
    folder = tmp_path / "adapter"
    for after in points(lambda: new.save_pretrained(folder)):
        old.save_pretrained(folder)
        interrupted(lambda: new.save_pretrained(folder), after)
        assert softkv.load(llama(), folder).method in (old.method, new.method)
        assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
