"""Attaching and detaching: several at once, in any order, exact restoration, copies, and clear errors."""

import copy
import gc
import itertools
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import softkv
from softkv.hf import call_scope, checkpointing
from tests.hf.base_state import assert_same_state, state_of
from tests.hf.continuations import batch_of
from tests.hf.rows import padded, rows_for
from tests.hf.tiny import METHODS, attach, model_of, tokenizer

LABELLED = padded(rows_for("no soft tokens"), "left")[0]
PROMPTS = batch_of([row.ids[: row.prompt] for row in rows_for("no soft tokens")], "left")


def mixed(attention: str = "eager") -> Any:
    """GPT-2 in a state of its own: dropout, some parameters frozen, some modules in training mode."""
    model = model_of("GPT2: learned positions", attention, attn_pdrop=0.25, resid_pdrop=0.5)
    model.transformer.h[1].train()
    model.transformer.wte.requires_grad_(False)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa", "softkv"])
@pytest.mark.parametrize("method", METHODS)
def test_detach_restores_exactly(method: str, attention: str) -> None:
    model = mixed(attention)
    checkpointing.enable(model)  # the attributes that it leaves behind are transformers' own
    checkpointing.disable(model)
    model.disable_input_require_grads()
    before = state_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        soft = softkv.attach(model, METHODS[method], tokenizer=tokenizer())
    told = [str(warning.message) for warning in caught if "dropout" in str(warning.message)]
    assert told == ["softkv sets the attention dropout of the frozen model to 0 (it was 0.25)"]
    assert [module.training for module in model.modules()] == list(before[2].values())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert soft.num_trainable() == sum(parameter.numel() for parameter in soft.soft.parameters())
    assert soft.num_parameters(only_trainable=True) == soft.num_trainable()
    soft.train()
    soft.gradient_checkpointing_enable()
    ids = [[-1, 5, -2, -3, 6]] if method == "p-tuning" else [[4, 5, 6]]
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor([[-100] * (len(ids[0]) - 1) + [6]])}
    soft(**batch).loss.backward()
    with soft.disabled(), torch.no_grad():
        soft(torch.tensor([[4, 5, 6]]))
    assert soft.detach() is model
    assert soft.detach() is model  # a second time is harmless
    assert_same_state(state_of(model), before)
    with pytest.raises(RuntimeError, match="was detached"):
        soft(**batch)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_on_one_base(order: tuple[int, ...]) -> None:
    names = ["prompt-tuning after", "p-tuning v2", "p-tuning v2 encoder"]
    model = model_of("Qwen2")
    before = state_of(model)
    real = LABELLED["attention_mask"].bool()
    bare = model(**LABELLED).logits[real]
    attached = []
    for name in names:
        torch.manual_seed(1)
        attached.append(softkv.attach(model, METHODS[name]).eval())
    truth = [attach("Qwen2", name)(**LABELLED).logits[real] for name in names]
    for last in order:
        for number in range(3):
            if attached[number]._attached:
                torch.testing.assert_close(attached[number](**LABELLED).logits[real], truth[number])
                with attached[number].disabled():
                    torch.testing.assert_close(attached[number](**LABELLED).logits[real], bare)
        torch.testing.assert_close(model(**LABELLED).logits[real], bare)
        attached[last].detach()
    assert_same_state(state_of(model), before)


def test_errors_leave_nothing_behind() -> None:
    model = model_of("Llama")
    before = state_of(model)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        softkv.attach(model, METHODS["p-tuning v2 of a text"])
    assert_same_state(state_of(model), before)
    soft = softkv.attach(model, METHODS["p-tuning v2"])
    want = soft(**LABELLED).logits
    for call in (
        lambda: soft(torch.full((1, 3), 10_000)),
        lambda: soft.generate(torch.full((1, 3), 10_000)),
        lambda: soft.generate(**PROMPTS, no_such_option=1),
    ):
        with pytest.raises((IndexError, ValueError)):
            call()
        assert call_scope.current() is None
        assert torch.equal(soft(**LABELLED).logits, want)
        with soft.disabled():
            assert not torch.allclose(soft(**LABELLED).logits, want)
    soft.detach()
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_independent(method: str) -> None:
    soft = attach("Llama", method).eval()
    rows = padded(rows_for(method), "right")[0]
    with torch.no_grad():
        want = soft(**rows).logits
        twin = copy.deepcopy(soft)
        for parameter in soft.soft.parameters():
            parameter.add_(1)
        assert torch.equal(twin(**rows).logits, want)
        assert not torch.allclose(soft(**rows).logits, want)
        assert twin.base is not soft.base
        twin.detach()
        assert twin.base.config._attn_implementation == "eager"
        assert soft.base.config._attn_implementation == "softkv"
        soft.load_state_dict(copy.deepcopy(soft.state_dict()))
        other = attach("Llama", method).eval()
        other.soft.load_state_dict(soft.soft.state_dict())
        assert torch.equal(other(**rows).logits, soft(**rows).logits)


def test_pickles() -> None:
    soft = attach("Llama", "prompt-tuning after").eval()
    twin = pickle.loads(pickle.dumps(soft))
    assert torch.equal(twin(**LABELLED).logits, soft(**LABELLED).logits)
    twin.detach()


def test_a_detached_soft_model_is_freed() -> None:
    model = model_of("Llama")
    soft = softkv.attach(model, METHODS["p-tuning v2"])
    soft.generate(**PROMPTS, max_new_tokens=2)
    gone = weakref.ref(soft)
    soft.detach()
    del soft
    gc.collect()
    assert gone() is None


def test_parameters_that_change_are_seen() -> None:
    """What is remembered between calls must not outlive its parameters."""
    for method in METHODS:
        soft = attach("Llama", method).eval()
        rows = padded(rows_for(method), "right")[0]
        with torch.no_grad():
            first = soft(**rows).logits
            assert torch.equal(soft(**rows).logits, first)
            for parameter in soft.soft.parameters():
                parameter.mul_(1.5)
            assert not torch.allclose(soft(**rows).logits, first), method
            soft(**rows)
            wide, fresh = soft.double(), copy.deepcopy(soft).train()  # training remembers nothing
            torch.testing.assert_close(wide(**rows).logits, fresh(**rows).logits, rtol=0, atol=1e-10)


# Errors ---------------------------------------------------------------------------------------------------------------


class ModelsOwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mix(hidden_states)


class OwnConfig(transformers.PreTrainedConfig):
    model_type = "own"
    hidden_size = 8
    num_hidden_layers = 1
    vocab_size = 11


class OwnModel(transformers.PreTrainedModel):
    """A model that computes its attention itself."""

    config_class = OwnConfig
    _supports_attention_backend = True

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed, self.attention = nn.Embedding(11, 8), ModelsOwnAttention()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_decoder(self) -> Any:
        return self

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, use_cache: Any = None) -> Any:
        return self.attention(self.embed(input_ids))


class Swallowing(OwnModel):
    """A model that takes any keyword and passes none on."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        return self.attention(self.embed(input_ids))


@pytest.mark.parametrize("kind", [OwnModel, Swallowing])
@pytest.mark.parametrize("settable", [True, False])
def test_attention_that_cannot_be_reached(kind: type, settable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "_can_set_attn_implementation", classmethod(lambda cls: settable))
    model = kind(OwnConfig(attn_implementation="eager"))
    before = state_of(model)
    with pytest.raises(ValueError, match=f"{kind.__name__} does not .*attention interface"):
        softkv.attach(model, METHODS["p-tuning v2"])
    assert_same_state(state_of(model), before)


def test_not_a_causal_language_model() -> None:
    with pytest.raises(TypeError, match="expects a transformers model, got Linear"):
        softkv.attach(nn.Linear(2, 2), METHODS["p-tuning v2"])
    with pytest.raises(TypeError, match="expects a method such as"):
        softkv.attach(model_of("Llama"), softkv.PTuningV2)
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
    with pytest.raises(ValueError, match=r"an encoder-decoder that generates .*, got T5Model"):
        softkv.attach(transformers.T5Model(config), METHODS["p-tuning v2"])


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def test_a_bidirectional_model() -> None:
    """What makes K and V from a prompt has none to read in it: all its tokens see each other."""
    config = transformers.BertConfig(**SIZES, initializer_range=0.25)
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(config).eval()
    with pytest.raises(ValueError, match=r"BertForMaskedLM is bidirectional.*leave the encoder out"):
        softkv.attach(base, METHODS["p-tuning v2 encoder"])
    soft = softkv.attach(base, softkv.PTuningV2(length=3, init="random")).eval()
    row, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    alone = soft(row).logits
    assert not torch.allclose(alone[:, 0], soft(other).logits[:, 0])  # it sees what follows
    padded_row, mask = torch.tensor([[0, 0, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(soft(padded_row, attention_mask=mask).logits[:, 2:], alone)


def test_attention_in_some_layers_only() -> None:
    """A hybrid: one state-space layer, then one of attention, which alone has a prefix."""
    config = transformers.JambaConfig(
        **SIZES, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, num_experts=1
    )
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    for method in ("p-tuning v2", "p-tuning v2 encoder", "prompt-tuning after"):
        soft = softkv.attach(base, METHODS[method]).eval()
        batch, parts = padded(rows_for("no soft tokens"), "right")
        for row, got in zip(rows_for("no soft tokens"), parts(soft(**batch).logits), strict=True):
            alone = soft(torch.tensor([row.ids]), labels=torch.tensor([row.labels])).logits[0]
            torch.testing.assert_close(got, alone)
        ids = batch["input_ids"][1:2, :6]
        cached, recomputed = (soft.generate(ids, max_new_tokens=4, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached, recomputed)
        assert soft.detach() is base


@pytest.mark.parametrize("name", ["GPT2: learned positions", "OPT: learned positions, a narrow embedding"])
def test_past_a_learned_table(name: str) -> None:
    soft = attach(name, "p-tuning v2").eval()  # a table of 96, a prefix of 7
    fits, long = torch.full((2, 89), 5), torch.full((2, 90), 5)
    want = soft(fits).logits
    with pytest.raises(ValueError, match=r"positions up to 96, .* table ends at 95"):
        soft(long)
    with pytest.raises(ValueError, match="positions up to 97"):
        soft(fits, position_ids=torch.arange(2, 91)[None])
    with pytest.raises(ValueError, match="positions up to 96"):
        soft.generate(fits, max_new_tokens=5)
    # Padding takes no position, and packed rows restart.
    mask = torch.cat([torch.zeros(2, 9), torch.ones(2, 89)], 1).long()
    torch.testing.assert_close(soft(torch.cat([fits[:, :9], fits], 1), attention_mask=mask).logits[:, 9:], want)
    line = soft(fits.view(1, -1), position_ids=torch.arange(89).repeat(2)[None]).logits
    torch.testing.assert_close(line.view_as(want), want)


def test_refusals() -> None:
    ids = PROMPTS["input_ids"]
    for method in METHODS:
        soft = attach("Llama", method).eval()
        for call in (soft, soft.generate):
            with pytest.raises(ValueError, match=r"output_attentions=True needs attention weights"):
                call(**PROMPTS, output_attentions=True)
            with pytest.raises(ValueError, match=r"expects .*input_ids or inputs_embeds"):
                call()
            with pytest.raises(ValueError, match="contain the soft token id -4"):
                call(torch.tensor([[1, -4, 2]]))
        with pytest.raises(ValueError, match="use_reentrant"):
            soft.gradient_checkpointing_enable({"use_reentrant": True})
        checkpointing.enable(soft.base, {"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant"):
            soft.train()(**LABELLED)
        if method in ("prompt-tuning after", "p-tuning v2 encoder"):
            checkpointing.disable(soft.base)
            with pytest.raises(ValueError, match="must know where each row's prompt ends"):
                soft.train()(ids)
            soft.eval()
            filled = soft.base(ids, use_cache=True).past_key_values
            with pytest.raises(ValueError, match="needs a cache that this SoftModel has filled"):
                soft(ids[:, :1], past_key_values=filled)


def test_what_peft_offers_has_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    soft = attach("Llama", "p-tuning v2")
    learned, base = soft.num_trainable(), sum(each.numel() for each in soft.base.parameters())
    assert soft.get_nb_trainable_parameters() == (learned, learned + base)
    soft.print_trainable_parameters()
    said = capsys.readouterr().out
    assert said.startswith(f"trainable params: {learned:,} || all params: {learned + base:,} || trainable%: ")
    for call in (soft.merge_and_unload, soft.merge_adapter, soft.unmerge_adapter):
        with pytest.raises(NotImplementedError, match=r"can't be merged .* softkv\.bake"):
            call()


SHORT_TABLE = {"vocab_size": 61, "max_position_embeddings": 24}
LAYERS_OF_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BOTH_STACKS = dict.fromkeys(("encoder_layers", "decoder_layers"), 2) | dict.fromkeys(
    ("encoder_attention_heads", "decoder_attention_heads"), 4
)
TABLES = {
    "GPT2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=24)
    ),
    "BERT": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SHORT_TABLE, **LAYERS_OF_ENCODER)),
    "RoBERTa": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SHORT_TABLE, **LAYERS_OF_ENCODER)),
    "BART": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**SHORT_TABLE, **BOTH_STACKS, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64)
    ),
}


@pytest.mark.parametrize("method", [softkv.PTuningV2(), softkv.PrefixTuning(length=25)])
@pytest.mark.parametrize("name", TABLES)
def test_a_start_longer_than_the_table_of_positions_is_refused(name: str, method: Any) -> None:
    base = TABLES[name]()
    attention = base.config._attn_implementation
    with pytest.raises(ValueError, match="position table ends at 23: use a shorter prefix"):
        softkv.attach(base, method)
    assert base.config._attn_implementation == attention
    softkv.attach(base, softkv.PTuningV2(length=8))
