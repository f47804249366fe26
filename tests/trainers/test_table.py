"""The table of trainers, bases and strategies beside PEFT: its verdicts can be any."""

import pytest

from benchmarks.trainers import CASES, SIDES, attached, base, padded, steps, verdict


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return steps(attached(SIDES[0], base()), padded())


@pytest.mark.parametrize("name", ["packed rows", "gradient checkpointing", "LoRA in the base"])
def test_a_case(name: str, expected: list[float]) -> None:
    case = CASES["one process"][name]
    assert verdict(case, SIDES[0], expected) == "right"
    assert verdict(case, SIDES[0], [loss + 0.01 for loss in expected]) == "wrong"


def test_errors(expected: list[float]) -> None:
    def raising(error: Exception) -> str:
        def case(side: str) -> list[float]:
            raise error

        return verdict(case, SIDES[0], expected)

    assert raising(ValueError("expected one, got two")) == "refused"
    assert raising(RuntimeError("sizes")) == "fails (RuntimeError)"
