"""matplotlib is for plots alone: without it one line says how to get it, before time is spent."""

import logging
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from softkv.cli import app
from softkv.train.trainer import Trainer
from tests.training_runs import arguments, attach, rows


@pytest.fixture(autouse=True)
def without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("matplotlib", "softkv.benchmarks")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "command", [["profile", "trace", "-m", "model", "-o", "out"], ["bench", "attention", "--quick"]], ids=" ".join
)
def test_commands_that_draw(command: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1), result.output
    assert "the package matplotlib, which is not installed: pip install 'softkv[plots]'" in result.output


def test_training_draws_no_learning_curve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = attach("p-tuning v2")
    with caplog.at_level(logging.WARNING):
        Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(model.method, 4)).train()
    said = [record.getMessage() for record in caplog.records if record.name == "softkv.train.trainer"]
    assert said == ["no learning curve is drawn without matplotlib: pip install 'softkv[plots]'"]
    assert not (tmp_path / "learning_curve.png").exists()
