"""Padded prompts are read packed in `generate`, and nothing else about it changes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import softkv
from softkv.hf.generation.prefill import PackedPrefill
from tests.hf.continuations import batch_of, prompts_of
from tests.hf.naive import close
from tests.hf.tiny import attach, model_of

PACKED = ["prompt-tuning after", "prompt-tuning before", "p-tuning", "prefix-tuning", "p-tuning v2"]


def widths(model: Any) -> list[tuple[int, ...]]:
    """Shapes of what enters the first attention block, as they come."""
    seen: list[tuple[int, ...]] = []

    def note(block: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(tuple(hidden.shape[:2]))

    model._hooks.order.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("method", PACKED)
@pytest.mark.parametrize("name", ["Llama", "GPT2: learned positions"])
def test_reading_packed_changes_no_logit_and_no_cache(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = attach(name, method), batch_of(prompts_of(method), "left")
    seen, options = widths(model), {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    real = batch["attention_mask"].bool()
    soft = 3 * len(real) if method == "prompt-tuning after" else 0
    got = model.generate(**batch, **options)
    if method == "prompt-tuning before":
        assert seen.pop(0) == (1, 3)  # what stands before every row, once a generate
    assert seen == [(1, int(real.sum()) + soft)] + [(len(real), 1)] * 3

    monkeypatch.setattr(PackedPrefill, "of", lambda kwargs: None)
    seen.clear()
    want = model.generate(**batch, **options)
    assert seen[-4][0] == len(real)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits))
    columns = want.past_key_values.get_seq_length() - 3
    held = F.pad(real, (0, columns - real.shape[1]), value=True)  # with the soft tokens at the end of each row
    for ours, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        for x, y in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(*(one[:, :, :columns].transpose(1, 2)[held] for one in (x, y)))


@pytest.mark.parametrize(
    ("name", "method", "options", "why"),
    [
        ("Llama", "p-tuning v2 encoder", {}, "encoders read rows where they lie"),
        ("Llama", "p-tuning v2", {"cache_implementation": "static"}, "a buffer"),
        ("Llama", "p-tuning v2", {"output_hidden_states": True, "return_dict_in_generate": True}, "more to lay out"),
        ("Mistral: a sliding window", "p-tuning v2", {}, "layers that drop tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_not_be_undone_is_read_as_it_is(name: str, method: str, options: dict[str, Any], why: str) -> None:
    model, batch = attach(name, method), batch_of(prompts_of(method), "left")
    seen = widths(model)
    model.generate(**batch, max_new_tokens=2, **options)
    assert seen[0][0] == len(batch["input_ids"]), why


def test_rows_without_padding_are_read_as_they_are() -> None:
    model = attach("Llama", "p-tuning v2")
    seen = widths(model)
    ids = torch.randint(2, 60, (3, 5))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    assert seen == [(3, 5)]


def test_heads_of_models_whose_rotations_follow_the_length_stay_in_rows() -> None:
    """Past `original_max_position_embeddings`, keys of a head alone are rotated otherwise than in front of a row."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    }  # fmt: skip
    model = softkv.attach(model_of("Llama", rope_parameters=rope), softkv.PromptTuning(length=5, position="before"))
    model.eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    soft = model.soft.soft_tokens()
    joined = torch.cat([soft.expand(1, -1, -1), model.get_input_embeddings()(ids)], 1)
    with torch.no_grad(), model.disabled():
        truth = model(inputs_embeds=joined).logits[:, 5:]
    for cached in (True, False):
        close(model(ids, use_cache=cached).logits, truth)
