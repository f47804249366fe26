"""P-tuning v2 and prefix-tuning on encoders that keep their own attention: DeBERTa and MPNet, beside whose scores slots
stand without a position, and encoders that read a past."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import softkv
from softkv.prefix import Prefix
from tests.hf.base_state import assert_same_state, state_of
from tests.hf.naive import close
from tests.hf.own_attention import padded
from tests.hf.tiny import METHODS

HEADS = ["MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"]
ROWS = [[3, 20, 21, 22, 23, 24, 25], [3, 30, 31], [3, 40, 41, 42]]
_SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
_RELATIVE = _SIZES | {"relative_attention": True, "position_biased_input": False}
# name → (class, fields of its config)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeBERTa v3": (
        "DebertaV2",
        _RELATIVE | {"pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "share_att_key": True,
                     "norm_rel_ebd": "layer_norm", "type_vocab_size": 0},
    ),
    "DeBERTa v2: a convolution": ("DebertaV2", _RELATIVE | {"pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3}),
    "DeBERTa v2: one term of position": ("DebertaV2", _RELATIVE | {"pos_att_type": ["c2p"]}),
    "DeBERTa v2: learned positions alone": ("DebertaV2", _SIZES),
    "MPNet": ("MPNet", _SIZES),
    "RemBERT: a past": (
        "RemBert", _SIZES | {"input_embedding_size": 16, "output_embedding_size": 24, "classifier_dropout_prob": 0.0}
    ),
    "Megatron-BERT: a past": ("MegatronBert", _SIZES),
}  # fmt: skip
Attention = Callable[[nn.Module, Tensor, tuple[Tensor, Tensor], dict[str, Any]], Any]


def base_of(kind: str, head: str) -> Any:
    name, fields = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(0)
    base = getattr(transformers, f"{name}For{head}")(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    return base


def attached(kind: str, head: str, method: str = "p-tuning v2") -> tuple[softkv.SoftModel, Any]:
    torch.manual_seed(1)
    base = base_of(kind, head)
    model, bare = softkv.attach(base, METHODS[method]).eval(), copy.deepcopy(base_of(kind, head))
    with torch.no_grad():
        for parameter in model.soft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model, bare


def in_heads(x: Tensor, H: int) -> Tensor:
    """`[1, T, C]` → `[H, T, D]`"""
    return x[0].unflatten(1, (H, -1)).transpose(0, 1)


def attended(scores: Tensor, q: Tensor, v: Tensor, slots: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """`[1, T, C]` of scores `[H, T, T]` of tokens, behind those of the slots `[H, P, D]`."""
    k, more = slots
    weights = torch.cat([q @ k.mT * scale, scores], -1).softmax(-1)
    return (weights @ torch.cat([more, v], 1)).transpose(0, 1).flatten(1)[None]


def of_deberta(module: Any, hidden: Tensor, slots: tuple[Tensor, Tensor], given: dict[str, Any]) -> Any:
    """He et al. 2020 (arXiv:2006.03654), equation 4, pair by pair: the distance of i and j, in buckets, picks a
    position for the content of each."""
    H, T = module.num_attention_heads, hidden.shape[1]
    q, k, v = (in_heads(project(hidden), H) for project in (module.query_proj, module.key_proj, module.value_proj))
    terms = 1 + len(module.pos_att_type)
    scores = q @ k.mT
    if module.relative_attention:
        span, table = module.pos_ebd_size, given["rel_embeddings"][None]
        shared = module.share_att_key
        rows = []
        for i in range(T):
            row = []
            for j in range(T):
                at, score = int(given["relative_pos"].view(T, T)[i, j]), scores[:, i, j]
                at = min(max(at + span, 0), 2 * span - 1)
                if "c2p" in module.pos_att_type:
                    position = in_heads((module.key_proj if shared else module.pos_key_proj)(table), H)[:, at]
                    score = score + (q[:, i] * position).sum(-1)
                if "p2c" in module.pos_att_type:
                    position = in_heads((module.query_proj if shared else module.pos_query_proj)(table), H)[:, at]
                    score = score + (k[:, j] * position).sum(-1)
                row.append(score)
            rows.append(torch.stack(row, -1))
        scores = torch.stack(rows, 1)
    scale = (q.shape[-1] * terms) ** -0.5
    return attended(scores * scale, q, v, slots, scale), None


def of_mpnet(module: Any, hidden: Tensor, slots: tuple[Tensor, Tensor], given: dict[str, Any]) -> Any:
    H = module.num_attention_heads
    q, k, v = (in_heads(project(hidden), H) for project in (module.q, module.k, module.v))
    scale = q.shape[-1] ** -0.5
    return (module.o(attended(q @ k.mT * scale + given["position_bias"][0], q, v, slots, scale)),)


def of_bert(module: Any, hidden: Tensor, slots: tuple[Tensor, Tensor], given: dict[str, Any]) -> Any:
    H = module.num_attention_heads
    q, k, v = (in_heads(project(hidden), H) for project in (module.query, module.key, module.value))
    scale = q.shape[-1] ** -0.5
    return attended(q @ k.mT * scale, q, v, slots, scale), None


NAIVE: dict[str, Attention] = {
    "DisentangledSelfAttention": of_deberta, "MPNetSelfAttention": of_mpnet, "RemBertSelfAttention": of_bert,
    "MegatronBertSelfAttention": of_bert,
}  # fmt: skip


def alone(bare: Any, prefix: Prefix | None, row: list[int]) -> Any:
    """The output for one row, every attention module of the bare model replaced by a naive one."""
    bare = copy.deepcopy(bare)
    modules = [module for module in bare.modules() if type(module).__name__ in NAIVE]
    nothing = next(bare.parameters()).new_zeros(4, 0, 8)
    slots = [(nothing, nothing)] * len(modules)
    if prefix is not None:
        slots = [(k[0], v[0]) for k, v in prefix.layers(len(modules))]
    for module, of_module in zip(modules, slots, strict=True):

        def forward(hidden: Tensor, *args: Any, module: Any = module, slots: Any = of_module, **given: Any) -> Any:
            if type(module).__name__ == "MPNetSelfAttention":
                given["position_bias"] = args[1]
            return NAIVE[type(module).__name__](module, hidden, slots, given)

        module.forward = forward
    first = 2 if bare.config.model_type == "mpnet" else 0  # behind the position of padding
    positions = torch.arange(len(row))[None] + first + (0 if prefix is None else prefix.length)
    return bare(torch.tensor([row]), position_ids=positions)


def answers(output: Any) -> Tensor:
    return torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_naive_attention_is_the_bare_models(kind: str) -> None:
    bare = base_of(kind, "TokenClassification")
    close(alone(bare, None, ROWS[0]).logits, bare(torch.tensor(ROWS[:1])).logits, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", ["p-tuning v2", "prefix-tuning"])
def test_rows(kind: str, head: str, method: str) -> None:
    model, bare = attached(kind, head, method)
    prefix = model.soft.prefix()
    want = [answers(alone(bare, prefix, row))[0] for row in ROWS]
    assert (want[0] - answers(bare(torch.tensor(ROWS[:1])))[0]).abs().max() > 5e-3
    for side in ("left", "right"):
        batch, places = padded(ROWS, side)
        for got, place, truth in zip(answers(model(**batch)), places, want, strict=True):
            close(got if head == "SequenceClassification" else got[place], truth, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    """In fp64."""
    model, bare = attached(kind, "TokenClassification")
    model.base.double()
    k, v = (each.detach().double().requires_grad_() for each in (model.soft.k, model.soft.v))
    want = torch.autograd.grad(
        sum(alone(bare.double(), Prefix(k, v), row).logits.square().sum() for row in ROWS), (k, v)
    )
    for side in ("left", "right"):
        batch, places = padded(ROWS, side)
        model.train().zero_grad()
        logits = model(**batch).logits
        sum(row[place].square().sum() for row, place in zip(logits, places, strict=True)).backward()
        for parameter, gradient in zip((model.soft.k, model.soft.v), want, strict=True):
            close(parameter.grad, gradient, 1e-6)
    assert all(parameter.grad is None for parameter in model.base.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_rows(kind: str) -> None:
    """Prefixes of several lengths and none in one batch, soft tokens beside them."""
    model, bare = attached(kind, "TokenClassification")
    model.add_adapter("long", softkv.PTuningV2(length=9, init_std=0.5), modules_to_save=())
    model.add_adapter("short", softkv.PrefixTuning(length=2, init_std=0.5), modules_to_save=())
    names = ["long", None, "short"]
    batch, places = padded(ROWS, "right")
    for got, place, row, name in zip(model(**batch, adapter_names=names).logits, places, ROWS, names, strict=True):
        prefix = None if name is None else model.adapters[name].prefix()  # type: ignore[operator]
        close(got[place], alone(bare, prefix, row).logits[0], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_disabled_and_taken_off(kind: str) -> None:
    base, bare = (base_of(kind, "MaskedLM") for _ in range(2))
    before, ids = state_of(base), torch.tensor(ROWS[:1])
    model, other = (softkv.attach(base, METHODS[method]).eval() for method in ("p-tuning v2", "prefix-tuning"))
    with model.disabled():
        assert torch.equal(model(ids).logits, bare(ids).logits)
    model.detach()
    close(other(ids).logits, alone(bare, other.soft.prefix(), ROWS[0]).logits, 1e-4)
    copied = copy.deepcopy(other)
    other.detach()
    close(copied(ids).logits, alone(bare, copied.soft.prefix(), ROWS[0]).logits, 1e-4)
    assert torch.equal(base(ids).logits, bare(ids).logits)
    assert_same_state(state_of(base), before)


def test_attention_dropout_is_silenced() -> None:
    """As in every model whose attention softkv computes."""
    base = base_of("DeBERTa v3", "MaskedLM")
    drop = base.deberta.encoder.layer[0].attention.self.dropout
    drop.p = 0.5
    with pytest.warns(UserWarning, match="sets the attention dropout"):
        model = softkv.attach(base, METHODS["p-tuning v2"])
    assert drop.p == 0
    model.detach()
    assert drop.p == 0.5


def test_recomputed_blocks_are_refused_or_right() -> None:
    ids = torch.tensor(ROWS[:1])
    model, _ = attached("DeBERTa v3", "MaskedLM")
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="recomputed blocks would ignore the prefix"):
        model(ids)
    model, _ = attached("RemBERT: a past", "MaskedLM")
    model.train()
    model(ids).logits.square().sum().backward()
    want = model.soft.k.grad.clone()
    model.gradient_checkpointing_enable()
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    close(model.soft.k.grad, want, 1e-5)


def test_trains_a_head_saves_and_loads(tmp_path: Path) -> None:
    model, bare = attached("DeBERTa v3", "SequenceClassification")
    before = copy.deepcopy(model.base.state_dict())
    examples = [{"input_ids": row, "labels": at % 2} for at, row in enumerate(ROWS)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=0.1, report_to=[], save_strategy="no",
        per_device_train_batch_size=3, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    learned = copy.deepcopy(model.soft.state_dict())
    softkv.Trainer(
        model=model, args=arguments, train_dataset=examples, data_collator=softkv.TaskCollator(0, token_labels=False)
    ).train()
    assert all(not torch.equal(value, learned[name]) for name, value in model.soft.state_dict().items() if name in "kv")
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())
    model.eval().save_pretrained(tmp_path / "adapter")
    batch, _ = padded(ROWS, "right")
    with torch.no_grad():
        close(softkv.load(bare, tmp_path / "adapter").eval()(**batch).logits, model(**batch).logits)


def test_encoders_of_prompts_and_texts_in_front_are_refused() -> None:
    base = base_of("DeBERTa v3", "MaskedLM")
    before = state_of(base)
    with pytest.raises(ValueError, match="leave the encoder out"):
        softkv.attach(base, METHODS["p-tuning v2 encoder"])
    with pytest.raises(ValueError, match="K/V alone can't stand for a text in front"):
        Prefix.from_ids(base, torch.tensor(ROWS[:1]))
    assert_same_state(state_of(base), before)
