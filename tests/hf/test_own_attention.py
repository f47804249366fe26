"""Models that keep their own attention: soft tokens inside rows, as the bare base answers really concatenated
embeddings, row by row and unpadded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import softkv
from softkv.methods.base import SoftPrompt
from tests.hf.base_state import assert_same_state, state_of
from tests.hf.naive import Row, close
from tests.hf.own_attention import KINDS, PAST, base_of, config_of
from tests.hf.tiny import METHODS, tokenizer

IN_ROWS = ["prompt-tuning before", "prompt-tuning after", "p-tuning"]


def rows_for(method: str) -> list[Row]:
    if method == "p-tuning":
        return [Row([-1, 20, 21, 22, -2, 25, -3, 24, 8], 7), Row([-1, 30, -2, 25, -3, 33], 5)]
    return [Row([1, 20, 21, 22, 23], 3), Row([1, 30, 31], 2), Row([1, 40, 41, 42, 43, 44, 45], 4)]


def attached(kind: str, method: str) -> tuple[softkv.SoftModel, Any]:
    """A soft model, and its bare base."""
    torch.manual_seed(1)
    return softkv.attach(base_of(kind), METHODS[method], tokenizer=tokenizer()), base_of(kind)


def true_logits(bare: Any, soft: SoftPrompt, row: Row) -> Tensor:
    """`[T, V]`, aligned with the row's ids."""
    ids, tokens = torch.tensor(row.ids), soft.soft_tokens()
    assert tokens is not None
    words = bare.get_input_embeddings()(ids.clamp(min=0))
    if soft.placement == "inline":
        words = torch.stack([tokens[-i - 1] if i < 0 else words[at] for at, i in enumerate(row.ids)])
        return bare(inputs_embeds=words[None]).logits[0]
    at = 0 if soft.placement == "before" else row.prompt
    logits = bare(inputs_embeds=torch.cat([words[:at], tokens, words[at:]])[None]).logits[0]
    return logits[[t + len(tokens) if t >= at - 1 else t for t in range(len(ids))]]


def continued(bare: Any, soft: SoftPrompt, prompt: list[int], steps: int) -> list[int]:
    row = Row(list(prompt), len(prompt))
    for _ in range(steps):
        row = Row([*row.ids, int(true_logits(bare, soft, row)[-1].argmax())], row.prompt)
    return row.ids[row.prompt :]


def padded(rows: list[Row], side: str) -> tuple[dict[str, Tensor], list[slice]]:
    """A batch, and where its rows lie."""
    width = max(len(row.ids) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    places = []
    for row in rows:
        pad, real = width - len(row.ids), len(row.ids)
        for name, values, fill in (("input_ids", row.ids, 0), ("attention_mask", [1] * real, 0),
                                   ("labels", row.labels, -100)):  # fmt: skip
            batch[name].append([fill] * pad + values if side == "left" else values + [fill] * pad)
        places.append(slice(pad, width) if side == "left" else slice(0, real))
    return {name: torch.tensor(values) for name, values in batch.items()}, places


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", IN_ROWS)
def test_rows(kind: str, method: str) -> None:
    """Forward with either padding and packed, then generate with either padding, beams, and step by step."""
    model, bare = attached(kind, method)
    rows = rows_for(method)
    want = [true_logits(bare, model.soft, row) for row in rows]
    for side in ("left", "right"):
        batch, places = padded(rows, side)
        for more in ({}, {"use_cache": False}):
            output = model(**batch, **more)
            for got, place, truth in zip(output.logits, places, want, strict=True):
                close(got[place], truth, 1e-4)
    packed = softkv.PackingCollator()([{"input_ids": row.ids, "labels": row.labels} for row in rows])
    close(model(**packed).logits[0], torch.cat(want), 1e-4)

    prompts = [row.ids[: row.prompt] for row in rows]
    tokens = [continued(bare, model.soft, prompt, 5) for prompt in prompts]
    for side in ("left", "right"):
        batch, _ = padded([Row(prompt, 0) for prompt in prompts], side)
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 5}
        assert model.generate(**given, do_sample=False)[:, -5:].tolist() == tokens
        assert model.generate(**given, do_sample=False, use_cache=False)[:, -5:].tolist() == tokens
    for prompt, expected in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt])
        assert model.generate(ids, max_new_tokens=5, do_sample=False)[0, -5:].tolist() == expected
        output = model(ids, use_cache=True)
        steps = [int(output.logits[0, -1].argmax())]
        for _ in range(4):
            output = model(torch.tensor([steps[-1:]]), past_key_values=output.past_key_values)
            steps.append(int(output.logits[0, -1].argmax()))
        assert steps == expected


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_beams(kind: str) -> None:
    """As with everything computed anew at each step."""
    model, _ = attached(kind, "prompt-tuning before")
    prompts = torch.tensor([[1, 20, 21], [1, 30, 31]])
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    cached, anew = (model.generate(prompts, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, anew)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_between_tokens(kind: str) -> None:
    """Right-padded rows that go on behind a cache, where columns of padding would count."""
    model, bare = attached(kind, "prompt-tuning before")
    rows = [Row([1, 20, 21, 22], 4), Row([1, 30], 2)]
    batch, _ = padded(rows, "right")
    del batch["labels"]
    output = model(**batch, use_cache=True)
    more = torch.tensor([[5], [6]])
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    go_on: dict[str, Any] = {"attention_mask": mask, "past_key_values": output.past_key_values}
    logits = model(more, **go_on).logits[:, -1]
    for got, row, new in zip(logits, rows, (5, 6), strict=True):
        close(got, true_logits(bare, model.soft, Row([*row.ids, new], row.prompt))[-1], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", IN_ROWS)
def test_trains_saves_and_loads(kind: str, method: str, tmp_path: Path) -> None:
    model, bare = attached(kind, method)
    rows = rows_for(method)
    examples = [{"input_ids": row.ids, "labels": row.labels} for row in rows]
    losses = [
        torch.nn.functional.cross_entropy(
            true_logits(bare, model.soft, row)[row.prompt - 1 : -1],
            torch.tensor(row.ids[row.prompt :]),
            reduction="sum",
        )
        for row in rows
    ]
    want = torch.autograd.grad(sum(losses) / sum(len(row.ids) - row.prompt for row in rows), model.soft.parameters())
    for collator in (softkv.PackingCollator(), softkv.PaddingCollator()):
        model.train()
        model.zero_grad()
        model(**collator(examples)).loss.backward()
        for parameter, gradient in zip(model.soft.parameters(), want, strict=True):
            close(parameter.grad, gradient, 1e-4)
        assert all(parameter.grad is None for parameter in model.base.parameters())
    before = copy.deepcopy(model.base.state_dict())
    learned = copy.deepcopy(model.soft.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=0.1, report_to=[], save_strategy="no",
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    softkv.Trainer(model=model, args=arguments, train_dataset=examples).train()
    assert any(not torch.equal(value, learned[name]) for name, value in model.soft.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())
    model.eval().save_pretrained(tmp_path / "adapter")
    batch = softkv.PaddingCollator()(examples)
    with torch.no_grad():
        close(softkv.load(bare, tmp_path / "adapter").eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_attached_and_taken_off(kind: str) -> None:
    base, bare = base_of(kind), base_of(kind)
    before = state_of(base)
    refused = ["p-tuning v2 encoder"] if kind in PAST else ["p-tuning v2", "prefix-tuning", "p-tuning v2 encoder"]
    for method in refused:
        with pytest.raises(ValueError, match="keeps its own attention"):
            softkv.attach(base, METHODS[method], tokenizer=tokenizer())
        assert_same_state(state_of(base), before)
    model = softkv.attach(base, METHODS["prompt-tuning before"])
    model.add_adapter("template", METHODS["p-tuning"])
    model.add_adapter("after", METHODS["prompt-tuning after"])
    for method in refused:
        with pytest.raises(ValueError, match="keeps its own attention"):
            model.add_adapter("refused", METHODS[method])
        with pytest.raises(ValueError, match="keeps its own attention"):
            softkv.attach(base, METHODS[method])
    assert list(model.adapters) == ["default", "template", "after"]
    assert base.config._attn_implementation == "eager"

    ids = torch.tensor([[1, 20, 21], [1, 30, 31], [1, 40, 41], [-1, -2, -3]])
    names = ["default", None, "after", "template"]
    with torch.no_grad():
        logits = model(ids, adapter_names=names).logits
        for got, row, name in zip(logits, ids.tolist(), names, strict=True):
            if name is None:
                close(got, bare(torch.tensor([row])).logits[0], 1e-4)
            else:
                close(got, true_logits(bare, model.adapters[name], Row(row, len(row))), 1e-4)  # type: ignore[arg-type]
        with model.disabled():
            assert torch.equal(model(ids[:1]).logits, bare(ids[:1]).logits)
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(model.generate(ids[:1], **options), bare.generate(ids[:1], **options))
        model.detach()
        assert torch.equal(base(ids[:1]).logits, bare(ids[:1]).logits)
    assert_same_state(state_of(base), before)


def test_dropout_stays() -> None:
    """softkv's attention has none; that of the base is not softkv's."""
    config = config_of("StableLM")
    config.attention_dropout = 0.5
    base = transformers.AutoModelForCausalLM.from_config(config)
    softkv.attach(base, METHODS["prompt-tuning before"]).train()
    assert {module.attention_dropout for module in base.modules() if hasattr(module, "attention_dropout")} == {0.5}


def test_positions_where_there_are_none() -> None:
    model, _ = attached("BLOOM: ALiBi", "prompt-tuning before")
    with pytest.raises(ValueError, match="takes no position_ids: leave them out"):
        model(torch.tensor([[1, 20]]), attention_mask=torch.ones(1, 2), position_ids=torch.tensor([[3, 4]]))


def test_decoders_that_count_padding_are_refused() -> None:
    config = transformers.MvpConfig(
        vocab_size=61, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, is_decoder=True,
        is_encoder_decoder=False,
    )  # fmt: skip
    base = transformers.MvpForCausalLM(config)
    before = state_of(base)
    with pytest.raises(
        ValueError, match=r"ignores left padding, got Mvp.* does not use transformers' attention interface"
    ):
        softkv.attach(base, METHODS["prompt-tuning before"])
    assert_same_state(state_of(base), before)


@torch.no_grad()
@pytest.mark.parametrize("head", ["TokenClassification", "SequenceClassification", "QuestionAnswering", "MaskedLM"])
def test_encoders(head: str) -> None:
    """DeBERTa: soft tokens in front of rows padded on either side."""
    config = transformers.DebertaV2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = getattr(transformers, f"DebertaV2For{head}")(config).eval()
    for parameter in base.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    bare = copy.deepcopy(base)
    model = softkv.attach(base, METHODS["prompt-tuning before"]).eval()
    tokens, rows = model.soft.soft_tokens(), [Row([1, 20, 21, 22], 4), Row([1, 30], 2)]
    for side in ("left", "right"):
        batch, places = padded(rows, side)
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for at, (row, place) in enumerate(zip(rows, places, strict=True)):
            words = bare.get_input_embeddings()(torch.tensor(row.ids))
            want = bare(inputs_embeds=torch.cat([tokens, words])[None])
            without = bare(inputs_embeds=words[None])
            for name in output:
                got = output[name][at]
                if got.shape[:1] == batch["input_ids"].shape[1:]:
                    got, truth, other = got[place], want[name][0, len(tokens) :], without[name][0]
                else:
                    truth, other = want[name][0], without[name][0]
                close(got, truth, 1e-4)
                assert not torch.allclose(got, other, atol=1e-2)


def test_models_without_attention_are_refused() -> None:
    base = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    before = state_of(base)
    with pytest.raises(ValueError, match=r"caches in past_key_values .*, got MambaForCausalLM"):
        softkv.attach(base, METHODS["prompt-tuning before"])
    assert_same_state(state_of(base), before)
