"""What training asks of the wrapper: checkpointing, two forwards before one backward, bf16, autocast, Trainer."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import softkv
from softkv.hf import checkpointing
from tests.hf.naive import close
from tests.hf.rows import LAYOUTS, rows_for
from tests.hf.tiny import METHODS, attach, model_of, tokenizer


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.soft.named_parameters()}
    model.zero_grad()
    return found


def batches(method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rows = rows_for(method)
    return LAYOUTS["left-padded"](rows[:2])[0], LAYOUTS["packed, restarting positions"](rows[1:])[0]


@pytest.mark.parametrize("name", ["Llama", "Gemma2: softcap, alternating windows", "GPT2: learned positions"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing(name: str, method: str) -> None:
    """Two batches, so that what is recomputed for the first comes after the second's forward."""
    model = attach(name, method).train()
    sum(model(**batch).loss for batch in batches(method)).backward()
    want = gradients(model)
    assert not any(parameter.grad is not None for parameter in model.base.parameters())
    for every, use_cache in ((1, None), (2, True)):
        model.activation_checkpointing_enable(every_n_layers=every)
        sum(model(**batch, use_cache=use_cache).loss for batch in batches(method)).backward()
        for key, gradient in gradients(model).items():
            close(gradient, want[key], 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_two_forwards_before_one_backward(method: str) -> None:
    """Two soft prompts on one base, as in preference learning."""
    base = model_of("Llama")
    torch.manual_seed(1)
    one = softkv.attach(base, METHODS[method], tokenizer=tokenizer())
    two = softkv.attach(base, METHODS[method], tokenizer=tokenizer())
    first, second = batches(method)
    separate = []
    for model, batch in ((one, first), (two, second)):
        model(**batch).loss.backward()
        separate.append(gradients(model))
    (one(**first).loss + two(**second).loss).backward()
    for model, want in zip((one, two), separate, strict=True):
        for key, gradient in gradients(model).items():
            close(gradient, want[key], 1e-6)


def test_no_tokens_by_tokens_work_in_layer_0() -> None:
    """A frozen base needs no gradient of its embeddings, with and without checkpoints."""
    model = attach("Llama", "p-tuning v2").train()
    entered = []
    model.base.get_input_embeddings().register_forward_hook(lambda *call: entered.append(call[2].requires_grad))
    model(**batches("p-tuning v2")[0])
    model.activation_checkpointing_enable()
    model(**batches("p-tuning v2")[0])
    assert entered == [False, False]


def test_training_keeps_no_cache() -> None:
    model, batch = attach("Llama", "p-tuning v2"), batches("p-tuning v2")[0]
    assert model.train()(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values is not None
    assert model.eval()(**batch).past_key_values is not None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mixed", ["bf16 base", "autocast", "bf16 base, autocast"])
def test_low_precision(method: str, mixed: str) -> None:
    """Learned parameters and their gradients are fp32; results are fp32's to bf16's precision."""
    batch = batches(method)[0]
    full = attach("Qwen3: q/k-norm, head_dim is not C/H", method, initializer_range=0.05)
    full(**batch).loss.backward()
    want = gradients(full)
    model = attach("Qwen3: q/k-norm, head_dim is not C/H", method, initializer_range=0.05)
    if "base" in mixed:
        model.base.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in mixed):
        output = model(**batch)
    output.loss.backward()
    real = batch["attention_mask"].bool()
    close(output.logits.float()[real], full(**batch).logits[real], 0.05)
    for key, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), want[key].flatten(), 0) > 0.98, key
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in mixed):
        ids = batch["input_ids"][:, -4:].clamp(min=2)
        if method == "p-tuning":
            ids[:, 0] = -1
        assert model.eval().generate(ids, max_new_tokens=3).shape[1] == 7


def test_trainer_runs(tmp_path: Any) -> None:
    """transformers' own Trainer: accumulation, checkpointing, evaluation."""
    model = attach("Llama", "p-tuning v2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row.ids, "labels": row.labels} for row in rows_for("p-tuning v2")] * 2
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        gradient_checkpointing=True, save_strategy="no", use_cpu=True, learning_rate=0.1, disable_tqdm=True,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(tokenizer(), padding=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("base."), name


def test_generate_while_layers_are_recomputed() -> None:
    """In training mode their cache is dropped: without a word, tokens would be wrong."""
    model, ids = attach("Llama", "p-tuning v2").train(), torch.tensor([[5, 6, 7]])
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing keeps no cache.*call eval\(\) first"):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False), want)
    assert torch.equal(model.eval().generate(ids, max_new_tokens=4, do_sample=False), want)


def test_whether_layers_are_recomputed_is_as_the_base_says() -> None:
    for base in (model_of("Llama"), model_of("GPT2: learned positions")):
        for change in (base.activation_checkpointing_enable, base.activation_checkpointing_disable):
            assert checkpointing.is_on(base) == base.is_activation_checkpointing
            change()
            assert checkpointing.is_on(base) == base.is_activation_checkpointing
        base.activation_checkpointing_enable(every_n_layers=2)
        assert checkpointing.is_on(base)
        assert base.is_activation_checkpointing
