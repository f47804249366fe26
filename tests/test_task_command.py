"""`softkv train --task`: rows of each task become a head and a soft prompt that load again."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors
from typer.testing import CliRunner

import softkv
from softkv.cli import app
from softkv.train.tasks import CLASSES, classes_of, examples
from tests.hf.encoders import encoder
from tests.hf.tiny import tokenizer

ROWS: dict[str, list[dict[str, Any]]] = {
    "seq-cls": [{"text": f"w{n} w{n + 1}", "label": ("up", "down")[n % 2]} for n in range(5, 15)],
    "token-cls": [{"text": [f"w{n}", "w9"], "label": ["B", "O"]} for n in range(5, 15)],
    "qa": [{"text": "w5 w6", "context": f"w7 w{n} w8", "label": f"w{n}"} for n in range(10, 20)],
    "mlm": [{"text": f"w{n} w{n + 1} w{n + 2}"} for n in range(5, 15)],
}


@pytest.fixture
def words() -> Any:
    found = copy.deepcopy(tokenizer())
    found.mask_token = "w60"
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A:0 <s> $B:1", special_tokens=[("<s>", 1)]
    )
    return found


@pytest.mark.parametrize("task", ROWS)
def test_train(task: str, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softkv.train.trainer.draw_learning_curve", lambda *arguments: None)
    encoder("Bert", "MaskedLM").save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[task])))
    options = {"-m": tmp_path / "base", "--data": tmp_path / "rows.jsonl", "-o": tmp_path / "out", "--answer": "label"}
    options |= {"--task": task, "--length": 2, "--steps": 2, "--batch-size": 4, "--eval-data": tmp_path / "rows.jsonl"}
    given = [str(part) for option in options.items() for part in option]
    result = CliRunner().invoke(app, ["train", "--cpu", *given])
    assert result.exit_code == 0, (result.output, result.exception)
    base = getattr(transformers, CLASSES[task]).from_pretrained(tmp_path / "base")
    loaded = softkv.load(base, tmp_path / "out")
    assert ("default" in loaded.modules_to_save) == (task != "mlm")
    saved = loaded.modules_to_save["default"].tensors() if task != "mlm" else {}
    assert all(not torch.equal(value, base.get_parameter(name)) for name, value in saved.items())


def test_examples(words: Any) -> None:
    def made(task: str, row: dict[str, Any]) -> dict[str, Any]:
        classes = classes_of(task, ROWS[task], "label")
        (found,) = examples(task, words, [row], text="text", answer="label", classes=classes, max_length=8)
        return found

    assert classes_of("seq-cls", ROWS["seq-cls"], "label") == ["down", "up"]
    assert made("seq-cls", {"text": "w5", "label": "up"})["labels"] == 1
    row = made("token-cls", {"text": ["w5", "w6"], "label": ["O", "B"]})
    assert row["input_ids"] == [1, 5, 6]
    assert row["labels"] == [-100, 1, 0]
    row = made("qa", {"text": "w5", "context": "w7 w30 w31 w8", "label": "w30 w31"})
    span = slice(row["start_positions"], row["end_positions"] + 1)
    assert row["input_ids"][span] == [30, 31]
    squad = {"text": "w5", "context": "w7 w8 w7", "label": {"text": ["w7"], "answer_start": [6]}}
    assert made("qa", squad)["end_positions"] == len(made("qa", squad)["input_ids"]) - 1
    with pytest.raises(ValueError, match="contained in the context"):
        made("qa", {"text": "w5", "context": "w7", "label": "w9"})
    with pytest.raises(ValueError, match="does not occur in the training rows"):
        made("seq-cls", {"text": "w5", "label": "sideways"})


def test_what_does_not_fit_a_task(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["seq-cls"][0]))
    (tmp_path / "base").mkdir()
    given = ["-m", tmp_path / "base", "-d", tmp_path / "rows.jsonl", "-o", tmp_path / "out", "--task", "seq-cls"]
    result = CliRunner().invoke(app, ["train", *map(str, given), "--length", "2", "--template", "[text] [Y]"])
    assert result.exit_code != 0
    assert "leave --template, --field and --verbalizer out" in " ".join(result.output.split())
