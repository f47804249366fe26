"""P-tuning v2's encoder mode: it reads prompts, and nothing of an answer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softkv
from tests.hf.naive import close, row_logits
from tests.hf.rows import LAYOUTS, direction, rows_for
from tests.hf.tiny import VOCAB, model_of


class Own(nn.Module):
    """A user's encoder: mixes the whole prompt into every position."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 12)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        states = self.linear(hidden).masked_fill(~mask[:, :, None], 0)
        return states + states.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]


ENCODERS: dict[str, dict[str, Any]] = {
    "lstm": {"encoder": "lstm", "encoder_size": 8},
    "lstm of each layer": {"encoder": "lstm", "encoder_size": 8, "share_encoder": False},
    "attention": {"encoder": "attention", "encoder_size": 8},
    "own": {"encoder": Own()},
    "own of each layer": {"encoder": Own(), "share_encoder": False},
}


def soft_model(name: str, encoder: str) -> softkv.SoftModel:
    torch.manual_seed(1)
    model = softkv.attach(model_of(name), softkv.PTuningV2(length=3, **ENCODERS[encoder]))
    with torch.no_grad():  # large enough to show
        for mlp in model.soft.mlps:
            mlp[-1].weight.mul_(4)
    return model


@pytest.mark.parametrize("name", ["Llama", "Gemma2: softcap, alternating windows", "GPT2: learned positions"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_alone_are_the_truth(name: str, encoder: str, checkpointing: bool) -> None:
    rows, eager = rows_for("encoder"), model_of(name)
    truth = soft_model(name, encoder).soft
    wants = [row_logits(eager, truth, row) for row in rows]
    sum((want * direction(row, VOCAB)).sum() for want, row in zip(wants, rows, strict=True)).backward()
    model = soft_model(name, encoder).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    for arrange in LAYOUTS.values():
        batch, parts = arrange(rows)
        got = parts(model(**batch).logits)
        sum((one * direction(row, VOCAB)).sum() for one, row in zip(got, rows, strict=True)).backward()
        for one, want in zip(got, wants, strict=True):
            close(one, want)
        for parameter, want in zip(model.soft.parameters(), truth.parameters(), strict=True):
            close(parameter.grad, want.grad)
        model.zero_grad()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_nothing_leaks(encoder: str) -> None:
    model = soft_model("Llama", encoder).eval()
    row = rows_for("encoder")[1]
    ids, lengths = torch.tensor([row.ids]), torch.tensor([row.prompt])

    def changed_by(column: int) -> list[int]:
        """The columns whose logits change with the token of this one."""
        other = ids.clone()
        other[0, column] = ids[0, column] % 50 + 3
        both = [model(x, prompt_lengths=lengths).logits[0] for x in (ids, other)]
        return (both[0] - both[1]).abs().amax(1).gt(1e-6).nonzero().flatten().tolist()

    T = len(row.ids)
    for column in range(row.prompt, T):
        assert changed_by(column) == list(range(column, T))  # causal from there on
    # Within the prompt, a later token reaches earlier positions through the K/V that all of it gave.
    assert changed_by(row.prompt - 1) == list(range(T))
    assert changed_by(0) == list(range(T))


def test_a_reused_cache_is_read_anew() -> None:
    """Whatever is kept with a cache goes when the cache is emptied."""
    import transformers

    model = soft_model("Llama", "lstm").eval()
    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    for seed in range(2):
        ids = torch.randint(2, VOCAB, (2, 6), generator=torch.Generator().manual_seed(seed))
        want = model.generate(ids, max_new_tokens=4)
        cache.reset()
        assert torch.equal(model.generate(ids, max_new_tokens=4, past_key_values=cache), want)
        cache.reset()
        with torch.no_grad():
            close(model(ids, past_key_values=cache).logits, model(ids).logits)
