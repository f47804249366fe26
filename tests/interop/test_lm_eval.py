"""lm-eval's HFLM around a soft model: the log-likelihoods are the soft model's own, row by row."""

import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import softkv
from tests.hf.tiny import model_of, tokenizer

pytest.importorskip("lm_eval")
MAIN = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "lm_eval.py"))["main"]


@torch.no_grad()
def log_likelihood(model: Any, context: str, answer: str) -> float:
    """Of an answer after a context, alone."""
    encode = tokenizer()
    ids, start = encode(context + answer)["input_ids"], len(encode(context)["input_ids"])
    logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].double()
    return sum(logits[at - 1].log_softmax(-1)[ids[at]].item() for at in range(start, len(ids)))


@pytest.mark.parametrize("method", [softkv.PTuningV2(length=4), softkv.PromptTuning(length=4, position="before")])
def test_log_likelihoods(method: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = model_of("Llama", "sdpa")
    base.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = softkv.attach(base, method).eval()
    with torch.no_grad():
        for parameter in model.soft.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    found = MAIN(str(tmp_path), adapter=str(tmp_path / "adapter"), batch_size="auto")
    values = {}
    for name, samples in found.items():
        values[name] = [value for sample in samples for value, _ in sample["filtered_resps"]]
        asked = [arguments for sample in samples for arguments in sample["arguments"]]
        with model.disabled() if name == "bare model" else nullcontext():
            own = [log_likelihood(model, *arguments) for arguments in asked]
        assert values[name] == pytest.approx(own, abs=1e-4)
    assert values["soft prompt"] != pytest.approx(values["bare model"], abs=1e-3)


def test_soft_tokens_after_the_prompt_are_refused(tmp_path: Path) -> None:
    base = model_of("Llama", "sdpa")
    base.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    softkv.attach(base, softkv.PromptTuning(length=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(Exception, match="does not say where a row's prompt ends"):
        MAIN(str(tmp_path), adapter=str(tmp_path / "adapter"))
