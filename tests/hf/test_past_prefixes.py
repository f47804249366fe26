"""P-tuning v2 and prefix-tuning on models that keep their own attention: as the bare base answers each row alone behind
a cache that holds the prefix."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import softkv
from softkv.hf.past import PrefixedPast
from softkv.prefix import Prefix
from tests.hf.base_state import assert_same_state, state_of
from tests.hf.naive import close
from tests.hf.own_attention import PAST, base_of, behind, config_of, padded
from tests.hf.tiny import METHODS, TEXT, tokenizer

KINDS = list(PAST)
# The others make NaN of padding in fp64, or don't run.
IN_FP64 = ("Falcon", "GPT-J", "CodeGen", "GPT Neo", "GPT-NeoX Japanese", "RemBERT")
ROWS = [[1, 20, 21, 22, 23], [1, 30, 31], [1, 40, 41, 42, 43, 44, 45]]
STEPS = 4


def attached(
    kind: str, method: str = "p-tuning v2", dtype: torch.dtype = torch.float32
) -> tuple[softkv.SoftModel, Any]:
    """A soft model whose prefix is nothing of the base's own, and its bare base."""
    torch.manual_seed(1)
    model = softkv.attach(base_of(kind).to(dtype), METHODS[method], tokenizer=tokenizer()).eval()
    with torch.no_grad():
        for parameter in model.soft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model, base_of(kind).to(dtype)


def prefix_of(model: softkv.SoftModel, name: str = "default") -> Prefix:
    prefix = model.adapters[name].prefix()  # type: ignore[operator]
    assert isinstance(prefix, Prefix)
    return prefix


def continued(bare: Any, prefix: Prefix | None, ids: list[int], steps: int = STEPS) -> list[int]:
    row = list(ids)
    for _ in range(steps):
        row.append(int(behind(bare, prefix, row)[-1].argmax()))
    return row[len(ids) :]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["p-tuning v2", "prefix-tuning"])
def test_rows(kind: str, method: str) -> None:
    """Either padding, with a cache and without, and packed. The cache holds tokens alone."""
    model, bare = attached(kind, method)
    prefix = prefix_of(model)
    want = [behind(bare, prefix, row) for row in ROWS]
    assert (want[0] - behind(bare, None, ROWS[0])).abs().max() > 1e-2
    for side in ("left", "right"):
        batch, places = padded(ROWS, side)
        for use_cache in (True, False):
            output = model(**batch, use_cache=use_cache)
            for got, place, truth in zip(output.logits, places, want, strict=True):
                close(got[place], truth, 1e-4)
            if use_cache:
                assert type(output.past_key_values) is transformers.DynamicCache
                assert output.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
            else:
                assert output.get("past_key_values") is None
    packed = softkv.PackingCollator()([{"input_ids": row, "labels": row} for row in ROWS])
    close(model(**packed).logits[0], torch.cat(want), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind: str) -> None:
    """Either padding, without a cache, beams, and step by step, from right-padded rows too."""
    model, bare = attached(kind)
    prefix = prefix_of(model)
    want = [continued(bare, prefix, row) for row in ROWS]
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    for side in ("left", "right"):
        batch, _ = padded(ROWS, side)
        for more in ({}, {"use_cache": False}):
            assert model.generate(**batch, **options, **more)[:, -STEPS:].tolist() == want
    batch, _ = padded(ROWS, "left")
    static = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert static[:, -STEPS:].tolist() == want
    beams = [model.generate(**batch, **options, num_beams=3, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*beams)
    batch, places = padded(ROWS, "right")
    output = model(**batch, use_cache=True)
    steps = [[int(row[place][-1].argmax())] for row, place in zip(output.logits, places, strict=True)]
    mask = batch["attention_mask"]
    for _ in range(STEPS - 1):
        mask = torch.cat([mask, torch.ones(len(ROWS), 1, dtype=torch.long)], 1)
        last = torch.tensor([step[-1:] for step in steps])
        output = model(last, attention_mask=mask, past_key_values=output.past_key_values)
        for step, logits in zip(steps, output.logits, strict=True):
            step.append(int(logits[-1].argmax()))
    assert steps == want


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    """Of padded and of packed rows, with blocks recomputed or not; in fp64 where the base runs in it."""
    dtype, tolerance = (torch.float64, 1e-6) if kind.startswith(IN_FP64) else (torch.float32, 1e-4)
    model, bare = attached(kind, dtype=dtype)
    k, v = (each.detach().to(dtype).requires_grad_() for each in (model.soft.k, model.soft.v))
    losses = [
        torch.nn.functional.cross_entropy(behind(bare, Prefix(k, v), row)[:-1], torch.tensor(row[1:]), reduction="sum")
        for row in ROWS
    ]
    want = torch.autograd.grad(sum(losses) / sum(len(row) - 1 for row in ROWS), (k, v))
    examples = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ROWS]
    model.train()
    for collator in (softkv.PaddingCollator(), softkv.PackingCollator()):
        for recomputed in (False, True) if model.base.supports_gradient_checkpointing else (False,):
            if recomputed:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            output = model(**collator(examples))
            reads, read = [], PrefixedPast.update

            def counted(self: Any, *args: Any, reads: Any = reads, read: Any = read) -> Any:
                reads.append(self)
                return read(self, *args)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PrefixedPast, "update", counted)
                output.loss.backward()
            assert bool(reads) == recomputed
            if recomputed:
                model.gradient_checkpointing_disable()
            for parameter, gradient in zip((model.soft.k, model.soft.v), want, strict=True):
                close(parameter.grad, gradient, tolerance)
    assert all(parameter.grad is None for parameter in model.base.parameters())


@pytest.mark.parametrize("kind", ["BLOOM: ALiBi"])
def test_trains_saves_and_loads(kind: str, tmp_path: Path) -> None:
    model, bare = attached(kind)
    before, learned = copy.deepcopy(model.base.state_dict()), copy.deepcopy(model.soft.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=0.1, report_to=[], save_strategy="no",
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    examples = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ROWS]
    softkv.Trainer(model=model, args=arguments, train_dataset=examples).train()
    assert all(not torch.equal(value, learned[name]) for name, value in model.soft.state_dict().items() if name in "kv")
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())
    model.eval().save_pretrained(tmp_path / "adapter")
    batch, _ = padded(ROWS, "left")
    with torch.no_grad():
        close(softkv.load(bare, tmp_path / "adapter").eval()(**batch).logits, model(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_text_in_context(kind: str) -> None:
    """A text as a start, as a prefix, and baked: as the text in front of each row, by distances and windows too."""
    bare = base_of(kind)
    text = tokenizer()(TEXT)["input_ids"]
    started = softkv.attach(base_of(kind), METHODS["p-tuning v2 of a text"], tokenizer=tokenizer()).eval()
    added = softkv.attach(base_of(kind), METHODS["p-tuning v2"]).eval()
    added.add_adapter("text", Prefix.from_text(added, tokenizer(), TEXT))
    added.set_adapter("text")
    baked = softkv.bake(base_of(kind), text=TEXT, tokenizer=tokenizer())
    for model in (started, added, baked):
        batch, places = padded(ROWS, "left")
        for got, place, row in zip(model(**batch).logits, places, ROWS, strict=True):
            close(got[place], behind(bare, None, text + row)[len(text) :], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_rows(kind: str) -> None:
    """Prefixes of several lengths, soft tokens and none in one batch, padded on either side."""
    model, bare = attached(kind)
    model.add_adapter("long", softkv.PTuningV2(length=9, init_std=0.5))
    model.add_adapter("short", softkv.PrefixTuning(length=2, init_std=0.5))
    model.add_adapter("tokens", softkv.PromptTuning(length=3, position="before"))
    names = ["long", None, "short", "default", "tokens"]
    rows = [[1, 20, 21, 22, 23], [1, 30, 31], [1, 40, 41, 42, 43, 44, 45], [1, 50], [1, 51, 52]]
    soft = bare.get_input_embeddings()(torch.tensor(rows[4]))
    soft = bare(inputs_embeds=torch.cat([model.adapters["tokens"].soft_tokens(), soft])[None]).logits[0, 3:]  # type: ignore[operator]
    prefixes = [None if name is None else prefix_of(model, name) for name in names[:4]]
    want = [behind(bare, prefix, row) for prefix, row in zip(prefixes, rows, strict=False)] + [soft]
    for side in ("left", "right"):
        batch, places = padded(rows, side)
        for got, place, truth in zip(model(**batch, adapter_names=names).logits, places, want, strict=True):
            close(got[place], truth, 1e-4)
    given, _ = padded(rows[:4], "left")
    got = model.generate(**given, adapter_names=names[:4], max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
    assert got.tolist() == [continued(bare, prefix, row) for prefix, row in zip(prefixes, rows, strict=False)]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_disabled_and_taken_off(kind: str) -> None:
    base, bare = base_of(kind), base_of(kind)
    before = state_of(base)
    model = softkv.attach(base, METHODS["p-tuning v2"]).eval()
    other = softkv.attach(base, METHODS["prefix-tuning"]).eval()
    ids = torch.tensor([[1, 20, 21]])
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    with model.disabled():
        assert torch.equal(model(ids).logits, bare(ids).logits)
        assert torch.equal(model.generate(ids, **options), bare.generate(ids, **options))
    close(model(ids).logits[0], behind(bare, prefix_of(model), ids[0].tolist()), 1e-4)
    model.detach()
    close(other(ids).logits[0], behind(bare, prefix_of(other), ids[0].tolist()), 1e-4)
    other.detach()
    assert torch.equal(base(ids).logits, bare(ids).logits)
    assert_same_state(state_of(base), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["BLOOM: ALiBi", "MPT: ALiBi by columns", "GPT-J", "Nemotron", "StableLM"])
def test_static_buffers(kind: str) -> None:
    """A buffer longer than the rows: what is not filled is not seen, also by one query that SDPA gives no mask."""
    model, bare = attached(kind)
    if kind in ("Nemotron", "StableLM"):
        model.base.model.config._attn_implementation = "sdpa"
    cache = transformers.StaticCache(config=bare.config, max_cache_len=16)
    rows = torch.tensor([[1, 20, 21, 22], [1, 30, 31, 32]])
    want = torch.stack([behind(bare, prefix_of(model), row) for row in rows.tolist()])
    close(model(rows[:, :3], past_key_values=cache).logits, want[:, :3], 1e-4)
    close(model(rows[:, 3:], past_key_values=cache).logits, want[:, 3:], 1e-4)


@torch.no_grad()
def test_heads() -> None:
    """Classes of rows and of tokens, on BLOOM."""
    for head in ("SequenceClassification", "TokenClassification"):
        config = config_of("BLOOM: ALiBi")
        config.num_labels = 3
        torch.manual_seed(0)
        base = getattr(transformers, f"BloomFor{head}")(config).eval()
        bare = copy.deepcopy(base)
        model = softkv.attach(base, METHODS["p-tuning v2"]).eval()
        for side in ("left", "right"):
            batch, places = padded(ROWS, side)
            for got, place, row in zip(model(**batch).logits, places, ROWS, strict=True):
                if head == "SequenceClassification":
                    cache = transformers.DynamicCache(config=bare.config)
                    for layer, (k, v) in enumerate(prefix_of(model).layers(2)):
                        cache.update(k, v, layer)
                    mask = torch.ones(1, 7 + len(row), dtype=torch.long)
                    close(got, bare(torch.tensor([row]), past_key_values=cache, attention_mask=mask).logits[0], 1e-4)
                else:
                    close(got[place], behind(bare, prefix_of(model), row), 1e-4)


def test_refusals() -> None:
    base = base_of("BLOOM: ALiBi")
    before = state_of(base)
    with pytest.raises(ValueError, match=r"keeps its own attention, .*leave the encoder out"):
        softkv.attach(base, METHODS["p-tuning v2 encoder"])
    with pytest.raises(ValueError, match="slots are tokens in front of the row: leave window_covers=False out"):
        softkv.attach(base, softkv.PTuningV2(length=4, window_covers=False))
    assert_same_state(state_of(base), before)
    model, _ = attached("Falcon")
    model.train().gradient_checkpointing_enable()
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="would add every token to the cache twice"):
        model(torch.tensor([[1, 20]]), past_key_values=cache)


def test_a_block_that_leaves_the_past_out_is_noticed() -> None:
    base = base_of("StableLM")
    base.set_attn_implementation("sdpa")  # where one query needs no mask that would not fit
    model = softkv.attach(base, METHODS["p-tuning v2"]).eval()
    model(torch.tensor([[20]]))
    block = model.base.model.layers[1].self_attn
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **(kwargs | {"past_key_values": None}))
    with pytest.raises(ValueError, match="passed its cache to only 1 of 2 attention blocks"):
        model(torch.tensor([[20]]))


def test_gradients_are_summed_over_rows() -> None:
    """The prefix is expanded, not copied, over the batch: a row more adds its own gradient."""
    model, _ = attached("BLOOM: ALiBi")

    def gradient(rows: list[list[int]]) -> Tensor:
        model.zero_grad()
        model(torch.tensor(rows)).logits[:, -1].sum().backward()
        return model.soft.k.grad.clone()  # type: ignore[union-attr, operator]

    first, second = [1, 20, 21], [1, 30, 31]
    close(gradient([first, second]), gradient([first]) + gradient([second]), 1e-4)
