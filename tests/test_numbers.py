"""Every number and switch of a public door: what only looks like one is refused before anything is computed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import softkv
from softkv.train.batches import TokenBatches
from softkv.train.classification import classify, perplexity
from softkv.train.factors import factor_of
from softkv.train.range_test import range_test
from tests.training_runs import attach

NO_NUMBERS: tuple[Any, ...] = (True, math.nan, math.inf, -math.inf, 0, -1, "many", [2])
NO_INTEGERS: tuple[Any, ...] = (*NO_NUMBERS, 2.0, 2**31, "2")
NO_SWITCHES: tuple[Any, ...] = ("no", "false", 0, 2, [True])


def op(**options: Any) -> Any:
    q = torch.zeros(1, 1, 2, 4)
    return softkv.prefix_attention(q, q, q, **options)


# name → a call that takes it
INTEGERS: dict[str, Callable[[Any], Any]] = {
    "length of prompt-tuning": lambda x: softkv.PromptTuning(length=x),
    "length of prefix-tuning": lambda x: softkv.PrefixTuning(length=x),
    "length of P-tuning v2": lambda x: softkv.PTuningV2(length=x),
    "encoder_size of P-tuning": lambda x: softkv.PTuning(encoder_size=x),
    "encoder_size of P-tuning v2": lambda x: softkv.PTuningV2(encoder="lstm", encoder_size=x),
    "reparametrize_size": lambda x: softkv.PTuningV2(reparametrize=True, reparametrize_size=x),
    "max_length, packed": lambda x: softkv.PackingCollator(max_length=x),
    "max_length, padded": lambda x: softkv.PaddingCollator(max_length=x),
    "max_tokens": lambda x: TokenBatches([1], x, padded=False, seed=0, epoch=lambda: 0),
    "batch_size of classify": lambda x: classify(attach("p-tuning v2"), None, [], ["a"], batch_size=x),
    "batch_size of perplexity": lambda x: perplexity(attach("p-tuning v2"), [], batch_size=x),
    "steps of a range test": lambda x: range_test(None, x),
}
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "init_std": lambda x: softkv.PTuningV2(length=2, init_std=x),
    "learning_rate": factor_of,
    "softcap": lambda x: op(softcap=x),
}
SWITCHES: dict[str, Callable[[Any], Any]] = {
    "reparametrize": lambda x: softkv.PrefixTuning(length=2, reparametrize=x),
    "share_encoder": lambda x: softkv.PTuningV2(encoder="lstm", share_encoder=x),
    "window_covers": lambda x: softkv.PTuningV2(length=2, window_covers=x),
    "continues": lambda x: softkv.PTuningV2(length=2, continues=x),
    "is_causal": lambda x: op(is_causal=x),
    "window_covers_prefix": lambda x: op(window_covers_prefix=x),
}
REFUSED = {
    **{name: (call, NO_INTEGERS) for name, call in INTEGERS.items()},
    **{name: (call, NO_NUMBERS) for name, call in NUMBERS.items()},
    **{name: (call, NO_SWITCHES) for name, call in SWITCHES.items()},
    "scale": (lambda x: op(scale=x), (True, math.nan, math.inf, "1", [2])),
    "window": (lambda x: op(window=x), (True, math.nan, 2.0, 0, -1, "1", [2])),
    "chunk": (lambda x: op(chunk=x), (True, math.nan, 2.0, 0, -1, "1", [2])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_number_is_refused(name: str) -> None:
    call, values = REFUSED[name]
    for value in values:
        with pytest.raises((ValueError, TypeError), match="expect") as error:
            call(value)
        assert "\n" not in str(error.value)


def test_a_trainer_checks_its_numbers_first(tmp_path: Path) -> None:
    soft_model = attach("p-tuning v2")
    for name in ("learning_rate", "max_tokens", "max_length"):
        for value in (True, math.nan, 0, -1):
            with pytest.raises(ValueError, match=f"{name} expects"):
                softkv.Trainer(soft_model, **{name: value})
    assert soft_model.soft.k.requires_grad


def test_what_is_one_is_not() -> None:
    for call, value in (
        (INTEGERS["length of P-tuning v2"], 3),
        (NUMBERS["init_std"], 1),
        (SWITCHES["continues"], True),
    ):
        call(value)
    assert [factor_of(rate) for rate in ("auto", "2x", 1e-2, "1e-2")] == [1.0, 2.0, None, None]
