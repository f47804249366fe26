"""Soft tokens in front of rows run in one pass with them: outputs and gradients are those of soft tokens put into every
row, and the decoder runs once."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softkv
from softkv.hf.heads import PackedHeads
from tests.hf.naive import close
from tests.hf.rows import LAYOUTS, rows_for
from tests.hf.tiny import NAMES, VOCAB, model_of
from tests.robustness.models import scatter

METHOD = softkv.PromptTuning(length=3, position="before")
LONG = softkv.PromptTuning(length=7, position="before")  # longer than the windows below
OTHERS = {
    "short": softkv.PromptTuning(length=2, position="before"),
    "learned": softkv.PTuningV2(length=4),
    "projected": softkv.PrefixTuning(length=3),
    "behind": softkv.PromptTuning(length=2),
}


def attached(name: str, method: Any = METHOD, *, in_rows: bool = False, **others: Any) -> softkv.SoftModel:
    torch.manual_seed(1)
    model = softkv.attach(model_of(name), method, head_once=not in_rows).train()
    for key, other in others.items():
        model.add_adapter(key, other)
    scatter(model)
    return model


def run(model: softkv.SoftModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Logits of the real tokens, the loss, and the gradients of a mixture of both."""
    model.zero_grad()
    output = model(**batch, use_cache=False)
    real = batch.get("attention_mask")
    logits = output.logits if real is None else output.logits[real.bool()]
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    ((logits * direction).sum() + output.loss).backward()
    return logits.detach(), output.loss.detach(), [parameter.grad for parameter in model.adapters.parameters()]


def same(got: Any, want: Any) -> None:
    close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got[2], want[2], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            close(mine, theirs)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[PackedHeads]:
    """The lines that are made."""
    made: list[PackedHeads] = []
    lead = PackedHeads.lead

    def noted(self: PackedHeads, *args: Any) -> None:
        made.append(self)
        lead(self, *args)

    monkeypatch.setattr(PackedHeads, "lead", noted)
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [METHOD, LONG], ids=["short", "past the window"])
def test_one_pass_is_a_head_in_every_row(name: str, method: Any, lines: list[PackedHeads]) -> None:
    once, every = attached(name, method), attached(name, method, in_rows=True)
    for arrange in LAYOUTS.values():
        batch, _ = arrange(rows_for("prompt-tuning before"))
        same(run(once, batch), run(every, batch))
    assert len(lines) == len(LAYOUTS)


@pytest.mark.parametrize("name", ["Llama", "Gemma2: softcap, alternating windows", "GPT2: learned positions"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing(name: str, layout: str, lines: list[PackedHeads]) -> None:
    once, every = attached(name), attached(name, in_rows=True)
    batch, _ = LAYOUTS[layout](rows_for("prompt-tuning before"))
    want = run(every, batch)
    once.activation_checkpointing_enable()
    same(run(once, batch), want)
    assert len(lines) == 1


@pytest.mark.parametrize(
    "name", ["Llama", "Gemma2: softcap, alternating windows", "OPT: learned positions, a narrow embedding"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "names",
    [
        ("default", "short", "short", "default"),
        (None, "short", "default", None),
        ("learned", "default", "short", "learned"),
        ("behind", "short", "learned", "projected"),
        ("short", "projected", None, "learned"),
    ],
    ids=str,
)  # fmt: skip
def test_adapters_side_by_side(name: str, layout: str, names: tuple[str | None, ...], lines: list[PackedHeads]) -> None:
    if layout.startswith("packed, restart") and "learned" in names:
        pytest.skip("the same as by lengths")
    once, every = (attached(name, in_rows=in_rows, **OTHERS) for in_rows in (False, True))
    batch, _ = LAYOUTS[layout](rows_for("prompt-tuning before"))
    batch["adapter_names"] = list(names)
    same(run(once, batch), run(every, batch))
    assert len(lines) == 1


def test_small_batches(lines: list[PackedHeads]) -> None:
    """One row, one token, and rows without padding."""
    for ids in (torch.tensor([[5, 6]]), torch.tensor([[5, 6, 7], [8, 9, 10]])):
        batch = {"input_ids": ids, "labels": ids}
        same(run(attached(NAMES[0]), batch), run(attached(NAMES[0], in_rows=True), batch))
    once, every = attached(NAMES[0]), attached(NAMES[0], in_rows=True)
    one = torch.tensor([[5]])
    close(once(one, use_cache=False).logits, every(one, use_cache=False).logits)
    assert len(lines) == 3


def test_hidden_states_and_inner_modules() -> None:
    """What is asked of the decoder for each token is of the tokens given."""
    once, every = attached(NAMES[0]), attached(NAMES[0], in_rows=True)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for ask in (
        lambda model: model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1],
        lambda model: model.get_decoder()(ids, use_cache=False).last_hidden_state,
    ):
        got, want = ask(once), ask(every)
        close(got, want[:, -3:])


def test_routers_say_nothing_of_heads(lines: list[PackedHeads]) -> None:
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0, initializer_range=0.3,
        output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = softkv.attach(transformers.MixtralForCausalLM(config), METHOD).train()
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    output = model(ids, attention_mask=(ids != 0).long(), labels=ids, use_cache=False)
    assert len(lines) == 1
    assert {tuple(of_layer.shape) for of_layer in output.router_logits} == {(8, 3)}


@pytest.mark.parametrize("part", ["base", "decoder"])
@pytest.mark.parametrize("name", [NAMES[0], "Gemma2: softcap, alternating windows"])
def test_compiled_bases(part: str, name: str, lines: list[PackedHeads]) -> None:
    """A base that was compiled by itself traces the line."""
    every, once = attached(name, in_rows=True), attached(name)
    (once.base if part == "base" else once.base.get_decoder()).compile(backend="eager")
    for layout in ("padded on the right", "no padding"):
        ids = torch.tensor([[5, 6, 7, 9], [8, 9, 10, 0]])
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if layout != "no padding":
            batch["attention_mask"] = (ids != 0).long()
        same(run(once, batch), run(every, batch))


def test_hooks_of_others_on_the_decoder_see_the_rows(lines: list[PackedHeads]) -> None:
    base, shapes = model_of(NAMES[0]), []
    base.get_decoder().register_forward_hook(lambda _, __, output: shapes.append(output[0].shape[:2]))
    model = softkv.attach(base, METHOD).train()
    shapes.clear()
    model(torch.tensor([[5, 6, 7], [8, 9, 10]]), use_cache=False)
    assert len(lines) == 1
    assert shapes == [(2, 3)]


class Calls(TorchDispatchMode):
    """Counts products of matrices, and those of them at batch 1 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.name() in ("aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_more_launches_than_a_learned_prefix(layout: str) -> None:
    """Every matrix of the model multiplies once, forward; a prefix of attention costs none of its own."""
    batch, _ = LAYOUTS[layout](rows_for("prompt-tuning before"))
    counted = []
    for method in (METHOD, softkv.PTuningV2(length=3)):
        model = attached(NAMES[0], method)
        with Calls() as seen:
            model(**batch, use_cache=False)
        counted.append(seen.products)
    assert counted[0] == counted[1]


def test_images_positions_keep_a_pass_of_their_own(lines: list[PackedHeads]) -> None:
    """Positions of three kinds: a head could not be lined up with them."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )  # fmt: skip
    models = []
    for once in (True, False):
        torch.manual_seed(0)
        base = transformers.Qwen2_5_VLForConditionalGeneration(config)
        models.append(softkv.attach(base, METHOD, head_once=once).train())
    scatter(models[0])
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.tensor([[5, 6, 7, 8], [8, 9, 10, 11]])
    batch = {"input_ids": ids, "labels": ids}
    same(run(models[0], batch), run(models[1], batch))


def test_positions_of_heads_begin_where_those_of_rows_do(lines: list[PackedHeads]) -> None:
    """RoBERTa's first token stands behind the index of padding."""
    config = transformers.RobertaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, is_decoder=True, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    got, want = [], []
    for head_once, results in ((True, got), (False, want)):
        torch.manual_seed(1)
        model = softkv.attach(transformers.RobertaForCausalLM(config), METHOD, head_once=head_once).train()
        scatter(model)
        results.extend(run(model, {"input_ids": ids, "labels": ids}))
    same(got, want)
    assert len(lines) == 1
