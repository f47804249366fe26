"""The benchmark of many adapters runs, and refuses to time what gives other tokens."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import adapters
from benchmarks.model_jobs import ModelSettings


def test_quick_run(tmp_path: Path) -> None:
    adapters.main([], seconds=0, quick=True, output=tmp_path / "adapters.json")
    records = json.loads((tmp_path / "adapters.json").read_text())["results"]
    assert list(records) == list(adapters.QUICK)
    for record in records.values():
        assert list(record["seconds"]) == list(adapters.PROVIDERS)
        assert record["machine"]["torch"] == torch.__version__
    assert (tmp_path / "adapters.png").exists()


def test_other_tokens_are_not_timed() -> None:
    case = adapters.QUICK["forward-2"]
    job = adapters.Job(case, ModelSettings.of("cpu", quick=True))
    job.theirs.prompt_encoder["a1"].embedding.weight.data.mul_(-5)
    with pytest.raises(RuntimeError, match="tokens of 'PEFT one by one' differ"):
        adapters.measure(job, case, 0)
