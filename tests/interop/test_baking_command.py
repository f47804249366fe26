"""`softkv bake`, and the other commands on PEFT's folders."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

import softkv
from softkv.cli import app
from tests.hf.tiny import TEXT, model_of, tokenizer

ROW = "w3 w4 w5"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model_of("Llama", "sdpa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompt(base: Path) -> Path:
    """P-tuning whose soft tokens stand in front."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    softkv.attach(model, softkv.PTuning(template="[P1]w9 [P2] [X] [Y]", encoder_size=8)).save_pretrained(
        base / "prompt"
    )
    return base / "prompt"


def run(*arguments: Any, code: int = 0, given: str | None = None) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], input=given)
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def generated(adapter: Path, *options: Any) -> str:
    return run("generate", adapter, ROW, "--max-new-tokens", 6, *options)


def test_soft_tokens(prompt: Path, tmp_path: Path) -> None:
    said = run("bake", prompt, "--output", tmp_path)
    assert said == f"4 slots, 256 values Prefix: {tmp_path}"  # a BOS, two soft tokens and w9
    assert "p-tuning-v2" in run("inspect", tmp_path)
    assert generated(tmp_path) == generated(prompt)


def test_texts(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    ways = [(["--text", TEXT], None), (["--text-file", tmp_path / "text.txt"], None), (["--text", "-"], TEXT)]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([tokenizer()(f"{TEXT} w20 {ROW}")["input_ids"]])
    want = tokenizer().decode(model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :], skip_special_tokens=True)
    for number, (way, given) in enumerate(ways):
        output = tmp_path / str(number)
        run("bake", "-m", base, *way, "-o", output, "--template", r"w20\n[X] [Y]", given=given)
        assert generated(output) == want


def test_peft_s_files(base: Path, prompt: Path, tmp_path: Path) -> None:
    run("bake", prompt, "-o", tmp_path, "--format", "peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    read = peft.PeftModel.from_pretrained(model, tmp_path)
    ids = torch.tensor([tokenizer()(ROW, add_special_tokens=False)["input_ids"]])
    tokens = read.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)[0, ids.shape[1] :]
    assert tokenizer().decode(tokens, skip_special_tokens=True) == generated(prompt)
    assert "PEFT PREFIX_TUNING" in run("inspect", tmp_path)
    # PEFT keeps no template, so these rows begin with a BOS: the command answers, if not the same.
    assert generated(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bake expects one of: an adapter, --text, --text-file"),
        (["{prompt}", "--text", "w3"], "bake expects one of"),
        (["{prompt}", "--template", "[X] [Y]"], "--template is only for texts"),
        (["--text", "w3"], "which base? Give --model"),
        (["-m", "{base}", "--text", ""], "at least one token, got ''"),
        (["-m", "{base}", "--text-file", "nowhere.txt"], "No such file"),
        (["nowhere"], "nowhere contains no soft prompt"),
    ],
)
def test_mistakes(arguments: list[str], message: str, base: Path, prompt: Path, tmp_path: Path) -> None:
    known = [one.format(base=base, prompt=prompt) for one in arguments]
    output = tmp_path / "out"
    said = run("bake", *known, "-o", output, code=2)
    assert message in said
    assert not output.exists()
