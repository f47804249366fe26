"""Every example runs, on a tiny model."""

import importlib
from pathlib import Path

import pytest

from tests.hf.tiny import model_of, tokenizer

# name → (what it prints, its options)
EXAMPLES: dict[str, tuple[str, dict[str, int]]] = {
    "classification": ("accuracy", {"steps": 2, "test_rows": 8}),
    "generation": ("positive:", {"steps": 2, "max_new_tokens": 3}),
    "serving": ("streaming     document", {"max_new_tokens": 3}),
    "template": ("A joy from start to end. →", {"steps": 2}),
}
FOLDER = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_of("Llama", "sdpa").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    prints, options = EXAMPLES[name]
    importlib.import_module(f"examples.{name}").main(str(tmp_path), **options)
    assert prints in capsys.readouterr().out
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60
