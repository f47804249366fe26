"""Heads of tasks: learned, saved and restored with the adapter; the base keeps its own."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import softkv
from tests.hf.base_state import assert_same_state, state_of
from tests.hf.encoder_rows import ROWS, of_rows, padded
from tests.hf.encoders import DECODERS, PAD, TABLE, encoder, outputs_of, row_output
from tests.hf.naive import close
from tests.hf.task_decoders import decoder

TASKS = [(family, head) for family, head in TABLE if head != "MaskedLM"]
SOME = [("Bert", "SequenceClassification"), ("Roberta", "TokenClassification"), ("DistilBert", "QuestionAnswering")]


def labels_of(head: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    B, T = batch["input_ids"].shape
    real = batch["attention_mask"].bool()
    if head == "QuestionAnswering":
        first, last = real.int().argmax(1), T - 1 - real.flip(1).int().argmax(1)
        return {"start_positions": first + 1, "end_positions": last}
    if head == "SequenceClassification":
        return {"labels": torch.arange(B) % 3}
    return {"labels": (batch["input_ids"] % 3).masked_fill(~real, -100)}


def shake(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.5)


@pytest.mark.parametrize(("family", "head"), TASKS)
def test_the_head_is_learned_and_saved(family: str, head: str, tmp_path: Path) -> None:
    base = encoder(family, head)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = softkv.attach(base, softkv.PTuningV2(length=3)).train()
    names = {name.split(".")[0] for name, _ in base.named_children()} - {base.base_model_prefix}
    heads = [name for name in names if any(True for _ in getattr(base, name).parameters())]
    assert sorted(model.modules_to_save["default"]) == sorted(heads)
    sizes = sum(parameter.numel() for name in heads for parameter in getattr(base, name).parameters())
    assert model.num_trainable() == sum(p.numel() for p in model.soft.parameters()) + sizes
    batch = padded(ROWS, "right")
    shake(model)
    model(**batch, **labels_of(head, batch)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (not name.startswith("base."))
        assert parameter.grad is None or parameter.grad.abs().max() > 0 or name.endswith("bias"), name
    wanted = outputs_of(model.eval()(**batch))
    model.save_pretrained(tmp_path)
    assert model.detach() is base
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any("forward" in vars(module) for module in base.modules())
    loaded = softkv.load(encoder(family, head), tmp_path)
    for got, want in zip(outputs_of(loaded(**batch)), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("family", "head"), SOME)
def test_rows_of_several_adapters(family: str, head: str) -> None:
    model = softkv.attach(encoder(family, head), softkv.PTuningV2(length=3)).eval()
    model.add_adapter("other", softkv.PTuningV2(length=5))
    model.add_adapter("bare head", softkv.PrefixTuning(length=2), modules_to_save=())
    shake(model)
    rows = [*ROWS, [30, 31, 32]]
    names = ["other", "default", None, "bare head"]
    batch = padded(rows, "left")
    together = outputs_of(model(**batch, adapter_names=names))
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        alone = outputs_of(model(torch.tensor([row]), adapter_names=[name]))
        for got, want in zip(together, alone, strict=True):
            close(of_rows(got, batch, rows)[r], want[0])
    with model.disabled():
        bare = outputs_of(model(**batch))
    for got, want in zip(bare, outputs_of(encoder(family, head)(**batch)), strict=True):
        close(got, want)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"])
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "ModernBert"])
def test_soft_tokens_in_rows_of_encoders(family: str, position: Any, head: str) -> None:
    truth, model = (
        encoder(family, head),
        softkv.attach(encoder(family, head), softkv.PromptTuning(length=3, position=position)),
    )
    model.eval()
    shake(model.soft)
    soft = model.soft.embeddings
    wanted = []
    for row in ROWS:
        words = truth.get_input_embeddings()(torch.tensor(row))
        embeds = torch.cat([soft, words] if position == "before" else [words, soft])[None]
        positions = torch.arange(embeds.shape[1])[None] + (PAD + 1 if family == "Roberta" else 0)
        output = outputs_of(truth(inputs_embeds=embeds, position_ids=positions))
        at = slice(3, None) if position == "before" else slice(0, len(row))
        wanted.append([x[0] if x.dim() == 2 and head[0] == "S" else x[0, at] for x in output])
    for side in ("right", "left"):
        batch = padded(ROWS, side) | {"token_type_ids": torch.zeros(3, 12, dtype=torch.long)}
        if family == "ModernBert":
            del batch["token_type_ids"]
        output = model(**batch, **({} if head == "MaskedLM" else labels_of(head, batch)))
        for n, got in enumerate(outputs_of(output)):
            for r, row in enumerate(of_rows(got, batch, ROWS)):
                close(row, wanted[r][n])


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_rows_with_blocks_of_several_lengths(family: str, head: str) -> None:
    """Heads of encoders look at a row's first column, which is none of padding."""
    truth, model = encoder(family, head), softkv.attach(encoder(family, head), softkv.PTuningV2(length=3)).eval()
    model.add_adapter("two", softkv.PromptTuning(length=2, position="before"))
    model.add_adapter("four", softkv.PromptTuning(length=4, position="before"))
    model.add_adapter("behind", softkv.PromptTuning(length=3))
    rows, names = [*ROWS, [30, 31, 32]], ["two", None, "four", "behind"]
    for side in ("right", "left"):
        batch = padded(rows, side)
        together = outputs_of(model(**batch, adapter_names=names))
        for r, (row, name) in enumerate(zip(rows, names, strict=True)):
            ids = torch.tensor([row])
            alone = outputs_of(truth(ids) if name is None else model(ids, adapter_names=[name]))
            for got, want in zip(together, alone, strict=True):
                close(of_rows(got, batch, rows)[r], want[0])


@pytest.mark.parametrize("position", ["before", "after", None])
@pytest.mark.parametrize("family", DECODERS)
def test_pooled_decoders(family: str, position: Any) -> None:
    """The last real token of a row answers, or the soft tokens behind it; padding never does."""
    truth = decoder(family)
    method = softkv.PTuningV2(length=3) if position is None else softkv.PromptTuning(length=3, position=position)
    model = softkv.attach(decoder(family), method).eval()
    shake(model)
    truth.score.load_state_dict(model.modules_to_save["default"]["score"].state_dict())
    for side in ("right", "left"):
        batch = padded(ROWS, side)
        got = model(**batch).logits
        for r, row in enumerate(ROWS):
            if position is None:
                want = row_output(truth, model.soft.prefix(), row).logits[0]
            else:
                words, soft = truth.get_input_embeddings()(torch.tensor(row)), model.soft.embeddings
                want = truth(inputs_embeds=torch.cat([soft, words] if position == "before" else [words, soft])[None])
                want = want.logits[0]
            close(got[r], want)
            close(model(torch.tensor([row])).logits[0], want)


def test_what_is_refused() -> None:
    base = decoder("Llama", "TokenClassification")
    with pytest.raises(ValueError, match='expected PromptTuning\\(position="before"\\)'):
        softkv.attach(base, softkv.PromptTuning(length=2))
    with pytest.raises(ValueError, match="has no module 'scores'"):
        softkv.attach(base, softkv.PTuningV2(length=2), modules_to_save=["scores"])
    with pytest.raises(ValueError, match="attention blocks"):
        softkv.attach(base, softkv.PTuningV2(length=2), modules_to_save=["layers"])
    model = softkv.attach(decoder("Llama"), softkv.PTuningV2(length=2))
    with pytest.raises(ValueError, match="one output per row expects padded rows"):
        model(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert not hasattr(base, "_softkv_base_state")


def test_a_base_in_bfloat16_keeps_an_exact_head() -> None:
    base = encoder("DistilBert", "SequenceClassification").to(torch.bfloat16)
    model = softkv.attach(base, softkv.PTuningV2(length=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    logits = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([1])).logits
    assert logits.dtype == torch.float32  # the whole head runs in fp32
    alone = softkv.attach(base, softkv.PTuningV2(length=2), modules_to_save=["pre_classifier"])
    assert alone(torch.tensor([[5, 6, 7]])).logits.dtype == torch.bfloat16


KINDS = {"PREFIX_TUNING": peft.PrefixTuningConfig, "PROMPT_TUNING": peft.PromptTuningConfig}
PEFT_TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", PEFT_TASKS)
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_peft(family: str, head: str, kind: str, tmp_path: Path) -> None:
    """PEFT's adapters of tasks give the same answers here, live or from a folder, and go back."""
    config = KINDS[kind](task_type=PEFT_TASKS[head], num_virtual_tokens=4)
    theirs = peft.get_peft_model(encoder(family, head), config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    batch = padded(ROWS, "right", extra=0)

    def answers(model: Any) -> list[torch.Tensor]:
        found = outputs_of(model(**batch))
        if head != "SequenceClassification":
            found = [x[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()] for x in found]
        return found

    with torch.no_grad():
        wanted = answers(theirs)
        loaded = softkv.load(encoder(family, head), tmp_path / "peft")
        for model in (loaded, softkv.from_peft(theirs)):
            for got, want in zip(answers(model), wanted, strict=True):
                close(got, want)
        loaded.save_pretrained(tmp_path / "back", format="peft")
        back = peft.PeftModel.from_pretrained(encoder(family, head), tmp_path / "back").eval()
        for got, want in zip(answers(back), wanted, strict=True):
            close(got, want)


@pytest.mark.parametrize("head", ["BertForPreTraining", "ElectraForPreTraining"])
@pytest.mark.parametrize("method", [softkv.PromptTuning(length=2), softkv.PTuningV2(length=2, init="random")])
def test_heads_of_pretraining_are_refused(head: str, method: Any) -> None:
    kind = getattr(transformers, head)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = kind(kind.config_class(vocab_size=61, **sizes))
    before = state_of(base)
    with pytest.raises(ValueError, match="has a head for pretraining"):
        softkv.attach(base, method)
    assert_same_state(state_of(base), before)
