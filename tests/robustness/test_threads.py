"""What is safe from several threads (the table in docs/adapters.md), a test for each row: while one thread does it, the
answers of others stay exactly what they are alone."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import softkv
from tests.robustness.models import IDS, attached, scatter

ROUNDS = int(os.environ.get("SOFTKV_ROUNDS", "150"))  # `make threads` takes 1,000


@pytest.fixture(autouse=True)
def _many_switches() -> Iterator[None]:
    """Threads take turns often enough to meet each other everywhere."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def model() -> softkv.SoftModel:
    model = attached()
    model.add_adapter("other", softkv.PTuningV2(length=2))
    scatter(model)
    return model


def save(model: softkv.SoftModel, folder: Any) -> None:
    model.save_pretrained(folder / "adapter", adapter_name="other")


def add_and_delete(model: softkv.SoftModel, folder: Any) -> None:
    model.add_adapter("third", softkv.PromptTuning(length=1, position="before"))
    model.delete_adapter("third")


def text_prefix(model: softkv.SoftModel, folder: Any) -> None:
    softkv.Prefix.from_ids(model, IDS)


def use_another(model: softkv.SoftModel, folder: Any) -> None:
    with model.using("other"):
        model(IDS)


def disable(model: softkv.SoftModel, folder: Any) -> None:
    with model.disabled():
        model(IDS)


def name_rows(model: softkv.SoftModel, folder: Any) -> None:
    model(IDS.expand(3, -1), adapter_names=["other", None, "default"])


def generate(model: softkv.SoftModel, folder: Any) -> None:
    model.generate(IDS, max_new_tokens=1, adapter_names=["other"])


def differentiate(model: softkv.SoftModel, folder: Any) -> None:
    with model.using("other"):
        gradients(model, "other")


def gradients(model: softkv.SoftModel, name: str = "default") -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        return torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.adapters[name].parameters()))


def answers(model: softkv.SoftModel, round: int) -> list[torch.Tensor]:
    """What a thread asks, by turns: logits, tokens, gradients, rows with different adapters."""
    if round % 5 == 1:
        return [model.generate(IDS, max_new_tokens=2)]
    if round % 5 == 3:
        return [*gradients(model)]
    if round % 5 == 4:
        return [model(IDS.expand(3, -1), adapter_names=["other", None, "default"]).logits]
    return [model(IDS).logits]


ACTIONS = (save, add_and_delete, text_prefix, use_another, disable, name_rows, generate, differentiate)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_while_another_thread(action: Callable[..., None], model: softkv.SoftModel, tmp_path: Any) -> None:
    with torch.no_grad():
        want = [answers(model, round) for round in range(5)]
        errors = working(lambda: action(model, tmp_path))
        for round in range(ROUNDS):
            for got, expected in zip(answers(model, round), want[round % 5], strict=True):
                assert torch.equal(got, expected), (round, action.__name__)
        errors.stop()
    assert errors.rounds > 1


def test_set_adapter(model: softkv.SoftModel) -> None:
    """Each answer is one adapter's, or the other's."""
    with torch.no_grad():
        want = [model(IDS, adapter_names=[name]).logits for name in ("default", "other")]
        errors = working(lambda: (model.set_adapter("other"), model.set_adapter("default")))
        for _ in range(ROUNDS):
            found = model(IDS).logits
            assert any(torch.equal(found, each) for each in want)
        errors.stop()


def test_adapters_that_come_and_go(model: softkv.SoftModel) -> None:
    """Whoever names one gets its answer, or hears that there is none."""
    prefix = softkv.Prefix.from_ids(model, IDS)
    model.add_adapter("guest", prefix)
    want, met = model(IDS, adapter_names=["guest"]).logits, 0
    errors = working(lambda: (model.delete_adapter("guest"), model.add_adapter("guest", prefix), model(IDS)))
    for _ in range(ROUNDS):
        try:
            assert torch.equal(model(IDS, adapter_names=["guest"]).logits, want)
            met += 1
        except ValueError as error:
            if "no adapter 'guest'" not in str(error):
                raise
            time.sleep(0.001)  # a refusal is quick: all rounds would fall between a deletion and the next addition
    errors.stop()
    assert met


@pytest.mark.parametrize("format", ["softkv", "peft"])
def test_saves_to_one_folder(format: Any, model: softkv.SoftModel, tmp_path: Any) -> None:
    """Whoever reads finds one save or the other, whole; the last one stays."""
    model.add_adapter("alike", softkv.PTuningV2(length=2 if format == "peft" else 3))
    folder = tmp_path / "adapter"

    def save(name: str) -> None:
        model.save_pretrained(folder, adapter_name=name, format=format)

    save("other")
    errors = [working(lambda name=name: save(name)) for name in ("other", "alike")]
    wanted = [model.adapters[name].state_dict() for name in ("other", "alike")]

    def is_one_of(wanted: list[Any]) -> bool:
        model.add_adapter("read", folder)
        found = model.adapters["read"].state_dict()
        model.delete_adapter("read")
        return any(same_state(found, each) for each in wanted)

    for _ in range(ROUNDS // 5):
        assert is_one_of(wanted)
    for each in errors:
        each.stop()
    for name in ("other", "alike"):
        save(name)
        assert is_one_of([model.adapters[name].state_dict()])
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


def same_state(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return all(name in want and torch.equal(value, want[name]) for name, value in found.items())


def test_generate_in_many_threads(model: softkv.SoftModel) -> None:
    names: list[Any] = ["default", "other", None]
    want = [model.generate(IDS, max_new_tokens=3, adapter_names=[name]).tolist() for name in names]
    assert len({str(each) for each in want}) == 3
    found: list[Any] = [[], [], []]

    def run(number: int) -> None:
        for _ in range(ROUNDS // 10):
            found[number].append(model.generate(IDS, max_new_tokens=3, adapter_names=[names[number]]).tolist())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert found[number] == [want[number]] * (ROUNDS // 10)


def test_two_soft_models_on_one_base(model: softkv.SoftModel) -> None:
    second = attached(softkv.PromptTuning(length=2, position="before"), model.base)
    with torch.no_grad():
        want, others = model(IDS).logits, second(IDS).logits
        errors = working(lambda: _same(second(IDS).logits, others))
        for _ in range(ROUNDS // 2):
            assert torch.equal(model(IDS).logits, want)
        errors.stop()


def test_an_evaluation_leaves_training_flags_alone(model: softkv.SoftModel) -> None:
    """Text prefixes run the base in evaluation mode, and a thread that trains sees its own mode all the while."""
    model.train()
    errors = working(lambda: softkv.Prefix.from_ids(model, IDS))
    for _ in range(ROUNDS):
        assert all(module.training for module in model.modules())
    errors.stop()


def test_tasks_have_scopes_of_their_own(model: softkv.SoftModel) -> None:
    with torch.no_grad():
        want = {name: model(IDS, adapter_names=[name]).logits for name in ("default", "other")}

        async def serve(name: str) -> None:
            with model.using(name):
                for _ in range(20):
                    await asyncio.sleep(0)
                    assert model.active_adapter == name
                    assert torch.equal(model(IDS).logits, want[name])

        async def both() -> None:
            await asyncio.gather(serve("default"), serve("other"))

        asyncio.run(both())


def _same(found: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(found, want)


class working:
    """Something done again and again in a thread, until `stop`."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action, self.rounds, self.error, self.ended = action, 0, None, threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while not self.ended.is_set():
                    self.action()
                    self.rounds += 1
        except BaseException as error:
            self.error: Any = error

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()
        if self.error is not None:
            raise self.error
