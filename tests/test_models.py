"""A sample of the sweep over transformers' models, one of each kind; `make models` runs all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import entries
from benchmarks.models.__main__ import PAGE, RESULTS
from benchmarks.models.methods import METHODS
from benchmarks.models.page import kind_of, page, peers, summary
from softkv.hf.encoder_decoder.model import PromptedEncoderDecoder
from softkv.hf.model import PromptedModel

SAMPLE = {
    "gemma3_text": "two kinds of layers, each with positions of its own",
    "deepseek_v3": "keys wider than values, a cache of latents",
    "mixtral": "experts",
    "minimax": "state beside attention, in a cache that the model makes itself",
    "diffllama": "attention that runs twice in a block",
    "camembert": "positions that start behind padding's",
    "fuyu": "a wrapper that counts positions",
    "bloom": "attention of its own, biases from its mask",
    "gpt_neo": "attention of its own, with windows",
    "ctrl": "embeddings that the model writes into",
    "whisper": "a head that gives all logits",
}
MEDIA = {
    "Llava": "images found by their ids",
    "Qwen2_5_VL": "positions of three axes, counted by ids",
    "Gemma3": "images that see all of themselves",
    "PaliGemma": "a wrapper that counts positions from 1",
}
PAIRS = {
    "t5": "position biases",
    "marian": "sinusoids",
    "encoder-decoder": "two models of encoders",
}
HEADS = {
    "masked/rembert": "attention of its own, which reads a past",
    "masked/roberta": "positions that start behind padding's",
    "tokens/distilbert": "blocks without numbers",
    "spans/albert": "one block, run several times",
    "rows/llama": "the last token is pooled",
    "rows/deberta-v2": "attention of its own",
    "rows/mpnet": "attention of its own, and a bias of positions",
}


def some(*names: str) -> dict[str, Any]:
    return {name: METHODS[name] for name in names}


@pytest.mark.parametrize("name", SAMPLE)
def test_model_is_right(name: str) -> None:
    methods = some("P-tuning v2", "Prompt-tuning, before", "Prompt-tuning, after")
    record = entries.check("causal", entries.entries("causal")[name], methods, peers=False)
    assert kind_of(record) == "right", summary(record)


@pytest.mark.parametrize("name", MEDIA)
def test_rows_with_images_are_right(name: str) -> None:
    methods = some("P-tuning v2", "Prompt-tuning, after", "Prompt-tuning, before")
    record = entries.check("media", entries.entries("media")[name], methods, peers=False)
    assert kind_of(record) == "right", summary(record)


@pytest.mark.parametrize("name", PAIRS)
def test_encoder_decoder_is_right(name: str) -> None:
    methods = some("P-tuning v2", "P-tuning")
    record = entries.check("pairs", entries.entries("pairs")[name], methods, peers=False)
    assert kind_of(record) == "right", summary(record)


@pytest.mark.parametrize("name", HEADS)
def test_head_is_right(name: str) -> None:
    task, model = name.split("/")
    methods = some("P-tuning v2", "Prompt-tuning, before")
    record = entries.check(task, entries.entries(task)[model], methods, peers=False)
    assert kind_of(record) == "right", summary(record)


def test_a_head_that_pools_the_last_column_is_right() -> None:
    methods = some("Prompt-tuning, before", "P-tuning")  # its attention takes no prefix
    record = entries.check("rows", entries.entries("rows")["xlnet"], methods, peers=False)
    assert kind_of(record) == "right", summary(record)


@pytest.mark.parametrize("name", ["llama4_text", "modernbert-decoder", "recurrent_gemma"])
def test_model_is_right_or_refused(name: str) -> None:
    record = entries.check("causal", entries.entries("causal")[name], some("P-tuning v2"), peers=False)
    assert kind_of(record) not in ("wrong", "crash", "not built"), summary(record)


@pytest.mark.parametrize("name", ["masked/ibert", "masked/mra", "rows/canine", "pairs/fsmt"])
def test_model_is_refused(name: str) -> None:
    task, model = name.split("/")
    record = entries.check(task, entries.entries(task)[model], some("P-tuning v2", "P-tuning"), peers=False)
    assert kind_of(record) == "refused", summary(record)


def test_peft_beside() -> None:
    """Prompts are right on rows of one length; the last token that is pooled may be padding."""
    record = entries.check("rows", "LlamaForSequenceClassification", {})
    assert peers(record) == "✔, wrong if padded, wrong if padded"
    record = entries.check("causal", "JambaForCausalLM", {})
    assert peers(record).startswith("error")


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(forward: Any) -> Any:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            number = output.logits.shape[-1]
            output.logits = output.logits + 0.05 * torch.arange(number) / number * output.logits.std()
            return output

        return changed

    for kind in (PromptedModel, PromptedEncoderDecoder):
        monkeypatch.setattr(kind, "forward", off(kind.forward))
    for task, name in (
        ("causal", "LlamaForCausalLM"),
        ("rows", "BertForSequenceClassification"),
        ("pairs", "BartForConditionalGeneration"),
    ):
        record = entries.check(task, name, some("Prefix-tuning"), peers=False)
        checks = record["checks"]["Prefix-tuning"]
        assert kind_of(record) == "wrong"
        trials = ("rows alone", "padded left", *(["packed"] if task == "causal" else []))
        assert all(checks[trial].startswith("wrong") for trial in trials), checks


def test_the_page_is_of_the_results() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    text = Path(PAGE).read_text(encoding="utf-8")
    assert text == page(results)
    number = sum(len(results.get(task, {})) + 1 for task in entries.TASKS)
    assert text.count("\n| ") == number + len(entries.TASKS) + 1
