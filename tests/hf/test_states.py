"""Models that look at earlier tokens beside attention (convolutions, state spaces, linear attention): what stands in
front of a row must be in it, and rows must not follow each other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import softkv
from softkv.prefix import Prefix
from tests.hf.naive import Row, close, row_logits
from tests.hf.tiny import METHODS, tokenizer

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": ("Lfm2", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
    "linear attention": ("Qwen3_5Text", LINEAR | {"num_hidden_layers": 2}),
    "state spaces beside attention in a block": (
        "FalconH1",
        {"num_hidden_layers": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4,
         "mamba_n_groups": 1, "mamba_d_conv": 3, "mamba_chunk_size": 4},
    ),
}  # fmt: skip
ROWS = [Row([1, 20, 21, 22, 23], 3), Row([1, 30, 31], 2), Row([1, 40, 41, 42, 43, 44, 45], 4)]


def base_of(kind: str) -> Any:
    name, fields = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    return model


def attached(kind: str, method: Any) -> softkv.SoftModel:
    base = base_of(kind)
    torch.manual_seed(1)
    return softkv.attach(base, method, tokenizer=tokenizer())


def packed(rows: list[Row]) -> dict[str, Any]:
    return softkv.PackingCollator()([{"input_ids": row.ids, "labels": row.labels} for row in rows])


def padded(rows: list[Row]) -> dict[str, Any]:
    return softkv.PaddingCollator()([{"input_ids": row.ids, "labels": row.labels} for row in rows])


def rows_of(logits: Tensor, layout: Callable[..., Any]) -> list[Tensor]:
    if layout is packed:
        return list(logits[0].split([len(row.ids) for row in ROWS]))
    return [logits[at, : len(row.ids)] for at, row in enumerate(ROWS)]


def truth_of(model: softkv.SoftModel, rows: list[Row]) -> list[Tensor]:
    """Soft tokens really in the rows; K/V as the method's own, which the op's tests hold."""
    if model.soft.soft_tokens() is not None:
        with model.disabled():
            return [row_logits(model.base, model.soft, row) for row in rows]
    return [model(torch.tensor([row.ids]), use_cache=False).logits[0] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["prompt-tuning before", "prompt-tuning after", "p-tuning v2"])
@pytest.mark.parametrize("layout", [packed, padded])
def test_rows_are_independent(kind: str, method: str, layout: Callable[..., Any]) -> None:
    model, batch = attached(kind, METHODS[method]), layout(ROWS)
    with torch.no_grad():
        want = truth_of(model, ROWS)
        output = model(**batch)
    for got, truth in zip(rows_of(output.logits, layout), want, strict=True):
        close(got, truth, 1e-4)
    losses = [torch.nn.functional.cross_entropy(
        logits[row.prompt - 1 : -1], torch.tensor(row.ids[row.prompt :]), reduction="sum"
    ) for logits, row in zip(want, ROWS, strict=True)]  # fmt: skip
    close(output.loss, torch.stack(losses).sum() / sum(len(row.ids) - row.prompt for row in ROWS), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_packed_rows(kind: str) -> None:
    model = attached(kind, METHODS["prompt-tuning before"]).train()
    gradients = []
    for layout in (packed, padded):
        model.zero_grad()
        model(**layout(ROWS)).loss.backward()
        gradients.append(torch.cat([each.grad.flatten() for each in model.soft.parameters()]))
    close(*gradients, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_generates_with_soft_tokens_in_front(kind: str, pad: str) -> None:
    """As recomputed from the whole rows, padded on either side, step by step too."""
    text = softkv.PromptTuning(length=3, position="before", init="text", init_text="w7 w8 w9")
    model = attached(kind, text)
    prompts = [[1, 20, 21, 22], [1, 30]]
    want = []
    with model.disabled():
        for ids in prompts:
            row = torch.tensor([[7, 8, 9, *ids]])
            want.append(model.base.generate(row, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, -5:])
    fill = [0, 0]
    batch = torch.tensor([prompts[0], fill + prompts[1] if pad == "left" else prompts[1] + fill])
    got = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(got[:, -5:], torch.stack(want))
    one = torch.tensor([prompts[0]])
    with torch.no_grad():
        output = model(one, use_cache=True)
        steps = [output.logits[0, -1].argmax()]
        for _ in range(4):
            output = model(steps[-1].view(1, 1), past_key_values=output.past_key_values)
            steps.append(output.logits[0, -1].argmax())
    assert torch.equal(torch.stack(steps), want[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_the_state_is_refused(kind: str) -> None:
    base = base_of(kind)
    refused = r"looks at other tokens beside causal attention .* put the text into the rows"
    for call in (
        lambda: softkv.attach(base, METHODS["p-tuning v2 of a text"], tokenizer=tokenizer()),
        lambda: softkv.bake(base, text="w7 w8", tokenizer=tokenizer()),
        lambda: Prefix.from_text(base, tokenizer(), "w7 w8"),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    assert base.config._attn_implementation == "eager"
    softkv.attach(base, softkv.PTuningV2(length=2, init="vocabulary"))
