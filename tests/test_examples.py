"""Every example runs, on a tiny model."""

import importlib
from pathlib import Path

import pytest

from tests.hf.tiny import model_of, tokenizer

EXAMPLES = {"classification": "accuracy", "generation": "positive:", "template": "A joy from start to end. →"}
FOLDER = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_of("Llama", "sdpa").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    options = {"classification": {"test_rows": 8}, "generation": {"max_new_tokens": 3}}.get(name, {})
    importlib.import_module(f"examples.{name}").main(str(tmp_path), steps=2, **options)
    assert EXAMPLES[name] in capsys.readouterr().out
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60
