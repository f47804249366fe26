"""The op against its oracle: outputs and every gradient, on every named case."""

import pytest
import torch

from tests.attention_cases import CASES


def assert_matches(got: dict, want: dict, tolerance: float) -> None:
    for name, expected in want.items():
        torch.testing.assert_close(
            got[name].double(), expected.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_matches_the_oracle(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = CASES[name]()
    assert_matches(case.to(dtype).run(), case.run("reference"), tolerance)
