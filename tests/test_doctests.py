"""The examples of public docstrings run, on a tiny model."""

import doctest
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import softkv
from tests.hf.tiny import model_of, tokenizer

PUBLIC = {
    **{name: getattr(softkv, name) for name in softkv.__all__ if name != "SoftModel"},
    "Prefix.from_text": softkv.Prefix.from_text,
    **{f"SoftModel.{name}": getattr(softkv.SoftModel, name) for name in (
        "forward", "generate", "add_adapter", "using", "disabled"
    )},
}  # fmt: skip
WITHOUT_EXAMPLE = ("Prefix",)  # its constructors have their own


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - set(WITHOUT_EXAMPLE)))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"softkv": softkv, "torch": torch, "transformers": transformers, "peft": peft}
    names |= {"base": model_of("Llama", "sdpa"), "tokenizer": tokenizer()}
    example = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__ or "", names, name, None, 0)
    assert example.examples, f"{name} has no example"
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(example, out=report.append).failed == 0, "".join(report)
