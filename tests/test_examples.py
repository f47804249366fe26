"""Every example runs, on a tiny model, as the plain file it is."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf.encoder_decoders import model_of as encoder_decoder
from tests.hf.tiny import model_of, tokenizer

# name → (what it prints, its options)
EXAMPLES: dict[str, tuple[str, dict[str, int]]] = {
    "classification": ("accuracy", {"steps": 2, "test_rows": 8}),
    "encoder_decoder": ("A joy from start to end. →", {"steps": 2}),
    "generation": ("positive:", {"steps": 2, "max_new_tokens": 3}),
    "lm_eval": ("soft prompt: accuracy", {}),
    "quantised": ("loss on test rows:", {"steps": 2}),
    "serving": ("streaming     document", {"max_new_tokens": 3}),
    "template": ("A joy from start to end. →", {"steps": 2}),
    "trl_dpo": ("reward margin:", {"steps": 2}),
    "trl_grpo": ("mean reward:", {"steps": 2}),
    "trl_sft": ("loaded again: PTuningV2", {"steps": 2}),
}
NEEDS = {"lm_eval": "lm_eval", "quantised": "bitsandbytes", "trl_dpo": "trl", "trl_grpo": "trl", "trl_sft": "trl"}
FOLDER = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    (encoder_decoder("T5") if name == "encoder_decoder" else model_of("Llama", "sdpa")).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    prints, options = EXAMPLES[name]
    runpy.run_path(str(FOLDER / f"{name}.py"))["main"](str(tmp_path), **options)
    assert prints in capsys.readouterr().out
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60


def test_examples_need_no_clone_around_them(tmp_path: Path) -> None:
    code = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"
    there = {path: importlib.util.find_spec(NEEDS.get(path.stem, "torch")) for path in FOLDER.glob("*.py")}
    paths = [str(path) for path, needed in there.items() if needed]
    done = subprocess.run([sys.executable, "-c", code, *paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
