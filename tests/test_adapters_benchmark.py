"""The benchmark of many adapters runs, and does not time what gives other tokens."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import adapters
from benchmarks.model_jobs import ModelSettings
from softkv.cli import app

PROVIDERS = ["softkv", "one by one", "PEFT one by one"]


def test_quick_run(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["bench", "adapters", "--quick", "--seconds", "0", "-o", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "3 rows, 2 adapters" in said.output
    records = json.loads((tmp_path / "adapters.json").read_text())["results"]
    assert list(records) == list(adapters.QUICK)
    for record in records.values():
        assert list(record["seconds"]) == PROVIDERS
        assert record["absent"] == {}
        assert record["machine"]["torch"] == torch.__version__
    assert (tmp_path / "adapters.png").exists()
    assert "Many adapters in a batch" in (tmp_path / "report.html").read_text()


def test_other_tokens_are_listed_and_not_timed() -> None:
    case = adapters.QUICK["forward-2"]
    job = adapters.AdaptersJob(case, ModelSettings.of("cpu", quick=True))
    job.theirs.prompt_encoder["a1"].embedding.weight.data.mul_(-5)
    record = adapters.measure(job, case, 0)
    assert list(record["seconds"]) == PROVIDERS[:2]
    assert record["absent"] == {"PEFT one by one": "its tokens differ from softkv's in 1 of 3 rows"}


def test_without_peft_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    case = adapters.QUICK["forward-2"]
    record = adapters.measure(adapters.AdaptersJob(case, ModelSettings.of("cpu", quick=True)), case, 0)
    assert list(record["seconds"]) == PROVIDERS[:2]
    assert "peft" in record["absent"]["PEFT one by one"]
