"""What a SoftModel is given and does not fit is refused in one sentence, before anything is computed."""

from typing import Any

import pytest
import torch
import transformers

import softkv
from tests.robustness.models import IDS, VOCAB, attached, llama

METHODS = {
    "prefix": softkv.PTuningV2(length=3),
    "head": softkv.PromptTuning(length=3, position="before"),
    "after": softkv.PromptTuning(length=3),
    "encoder": softkv.PTuningV2(length=2, encoder="lstm", encoder_size=8),
}
TWO = IDS.expand(2, -1).contiguous()
ONES = torch.ones_like(TWO)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)

# name → (arguments of forward, what the sentence says)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a wider mask": ({"attention_mask": torch.ones(2, 9)}, r"attention_mask expects \[2, 5\]"),
    "a mask that counts slots": ({"attention_mask": torch.ones(2, 8)}, r"none for soft prompts"),
    "a narrower mask": ({"attention_mask": ONES[:, :4]}, r"attention_mask expects \[2, 5\]"),
    "one row of mask": ({"attention_mask": ONES[:1]}, r"attention_mask expects \[2, 5\]"),
    "a mask of four axes": ({"attention_mask": torch.ones(2, 1, 5, 5)}, "expects a padding mask"),
    "a mask of one axis": ({"attention_mask": torch.ones(5)}, "expects a padding mask"),
    "a mask that is a list": ({"attention_mask": [[1] * 5] * 2}, "expects a padding mask"),
    "1-D ids": ({"input_ids": IDS[0]}, r"input_ids expects integers \[B, T\]"),
    "float ids": ({"input_ids": TWO.float()}, "input_ids expects integers"),
    "no rows": ({"input_ids": TWO[:0]}, "at least one row"),
    "no tokens": ({"input_ids": TWO[:, :0]}, "at least one row and one token"),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(2, 5, 16)}, "either input_ids or inputs_embeds"),
    "flat embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(5, 16)}, "inputs_embeds expects floats"),
    "a mask of other values": ({"attention_mask": ONES * 2}, "1 for a token and 0 for padding"),
    "a mask of NaN": ({"attention_mask": ONES * float("nan")}, "1 for a token and 0 for padding"),
    "bool positions": ({"position_ids": ONES.bool()}, "position_ids expects integers"),
    "lengths that are no numbers": ({"prompt_lengths": [None, 1]}, r"prompt_lengths expects \[2\] integers"),
    "lengths past 64 bits": ({"prompt_lengths": [2**70, 1]}, r"prompt_lengths expects \[2\] integers"),
    "a long name": ({"adapter_names": ["x" * 3000] * 2}, "has no adapter 'x{299}: expected"),
    "other positions": ({"position_ids": torch.arange(4)[None]}, "position_ids expects"),
    "other labels": ({"labels": TWO[:, :4]}, "labels expects"),
    "one row of labels": ({"labels": TWO[:1]}, "labels expects"),
    "lengths of other rows": ({"prompt_lengths": torch.tensor([1, 2, 3])}, r"prompt_lengths expects \[2\] integers"),
    "float lengths": ({"prompt_lengths": torch.tensor([1.0, 2.0])}, "prompt_lengths expects"),
    "bool lengths": ({"prompt_lengths": torch.tensor([True, False])}, "prompt_lengths expects"),
    "a negative length": ({"prompt_lengths": torch.tensor([-1, 2])}, "no more than each row's tokens"),
    "a length past a row": ({"prompt_lengths": torch.tensor([2, 6])}, "no more than each row's tokens"),
    "a table of lengths": ({"prompt_lengths": torch.ones(2, 1, dtype=torch.long)}, "prompt_lengths expects"),
    "packed rows of two lines": ({"cu_seq_lens_q": CU, "max_length_q": 3}, "into one sequence"),
    "packed and padded": ({"input_ids": IDS, "attention_mask": ONES[:1], "cu_seq_lens_q": CU}, "have no padding"),
    "lengths that fall": ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 4, 3, 5])}, "to rise from 0 to 5"),
    "lengths that end early": ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 4])}, "to rise from 0 to 5"),
    "a tuple for a cache": ({"past_key_values": ((IDS, IDS),)}, "expects a transformers Cache"),
    "a soft token": ({"input_ids": -TWO}, "soft token id"),
    "a name too many": ({"adapter_names": ["default"] * 3}, "one name per row, 2"),
    "attention weights": ({"output_attentions": True}, "needs attention weights"),
}


@pytest.mark.parametrize("method", METHODS)
def test_refused_by_forward(method: str) -> None:
    model = attached(METHODS[method])
    want = model(TWO).logits
    for name, (given, sentence) in REFUSED.items():
        with pytest.raises((ValueError, TypeError), match=sentence) as error:
            model(**({"input_ids": TWO} | given))
        assert "\n" not in str(error.value), name
    assert torch.equal(model(TWO).logits, want)


@pytest.mark.parametrize("method", METHODS)
def test_refused_by_generate(method: str) -> None:
    model = attached(METHODS[method])
    cases = {name: each for name, each in REFUSED.items() if {"attention_mask", "input_ids"} >= each[0].keys()}
    for given, sentence in cases.values():
        with pytest.raises(ValueError, match=sentence):
            model.generate(**({"input_ids": TWO} | given), max_new_tokens=1)


def test_soft_tokens_without_a_soft_prompt() -> None:
    model = attached(softkv.PTuning(template="[P1][P2][X][Y]", encoder_size=8))
    ids = torch.tensor([[-1, -2, 5, 6]])
    with model.disabled():
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="a disabled SoftModel is the bare model"):
                call(ids)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="the bare model places 0"):
            call(ids, adapter_names=[None])


def test_rows_that_leave_their_soft_tokens_out() -> None:
    """Plain ids would get the bare model's answer; some rows of a batch, or parts of a row, may have no soft token."""
    model = attached(softkv.PTuning(template="[P1][P2][X][Y]", encoder_size=8))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="they would be left out: make rows with"):
            call(TWO)
    with pytest.raises(ValueError, match="they would be left out"):
        model.train()(TWO, labels=TWO)
    model.eval()
    ids = torch.tensor([[-1, -2, 5, 6, 7], [5, 6, 7, 8, 9]])
    want = llama()(ids[1:]).logits
    torch.testing.assert_close(model(ids).logits[1:], want)
    torch.testing.assert_close(model(ids[1:], adapter_names=[None]).logits, want)
    row = torch.tensor([[5, 6, -1, -2, 7]])
    begun = model(row[:, :2], use_cache=True).past_key_values
    rest = model(row[:, 2:], past_key_values=begun)
    torch.testing.assert_close(rest.logits, model(row).logits[:, 2:])
    model(row[:, :1], past_key_values=rest.past_key_values)
    assert model.generate(row, max_new_tokens=2, prefill_chunk_size=2).shape == (1, 7)


def test_other_attention_is_refused() -> None:
    model = attached()
    with pytest.raises(ValueError, match="needs softkv's attention"):
        model.set_attn_implementation("sdpa")
    model.base.set_attn_implementation("sdpa")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="reads no prefix"):
            call(IDS)
    with model.disabled():
        torch.testing.assert_close(model(IDS).logits, llama()(IDS).logits)


@pytest.mark.parametrize(
    ("name", "why"),
    [("x" * 256, "255 bytes"), ("ä" * 128, "255 bytes"), ("a/b", "expects letters"), ("", "expects letters"),
     ("../x", "expects letters"), (7, "expects letters"), ("keys", "no attribute"), ("default", "already has")],
)  # fmt: skip
def test_names(name: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        attached().add_adapter(name, softkv.PTuningV2(length=1))
    assert len(str(error.value)) < 500


def test_the_meta_device() -> None:
    model = attached().to("meta")
    assert model(IDS.to("meta")).logits.shape == (1, 5, VOCAB)


# Masks over a cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("static", [False, True])
def test_masks_over_a_cache(static: bool, method: str) -> None:
    """At each step a mask is as wide as the tokens given so far, or as a static cache's whole buffer."""
    model, steps = attached(METHODS[method]), 3
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask, next_ids = (ids > 0).long(), torch.tensor([[13, 14, 15], [16, 17, 18]])
    soft = 3 if method == "after" else 0

    def cache() -> Any:
        if not static:
            return transformers.DynamicCache()
        return transformers.StaticCache(config=model.base.config, max_cache_len=16)

    whole = torch.cat([ids, next_ids], 1)
    seen = torch.cat([mask, torch.ones_like(next_ids)], 1)
    with torch.no_grad():
        lengths = mask.sum(1)
        want = model(whole, attention_mask=seen, prompt_lengths=lengths).logits[:, 4:]
        for buffer in (False, True) if static else (False,):
            wide = torch.nn.functional.pad(seen, (0, 8))
            kept = cache()
            step = wide.clone()
            step[:, 5:] = 0
            logits = [model(ids, attention_mask=step if buffer else mask, past_key_values=kept).logits[:, -1:]]
            for t in range(steps):
                step[:, 5 + t] = 1
                given = step if buffer else step[:, : 6 + t]
                logits.append(model(next_ids[:, t : t + 1], attention_mask=given, past_key_values=kept).logits)
            torch.testing.assert_close(torch.cat(logits, 1), want, rtol=1e-4, atol=1e-4)
            for width in (4, 5 + steps + soft + 2, 15, 17):
                if width not in (8, 8 + soft, 9 + soft):
                    with pytest.raises(ValueError, match="attention_mask expects"):
                        model(next_ids[:, :1], attention_mask=torch.ones(2, width), past_key_values=kept)


def test_a_mask_of_windowed_buffers() -> None:
    """Static caches of sliding windows have buffers that are shorter than rows: no mask may be as narrow."""
    config = transformers.MistralConfig(**{**llama().config.to_dict(), "sliding_window": 3})
    model = attached(base=transformers.MistralForCausalLM(config).eval())
    for mask in (torch.ones(1, 3), torch.ones(1, 16)):
        cache = transformers.StaticCache(config=config, max_cache_len=16)
        with pytest.raises(ValueError, match="attention_mask expects"):
            model(IDS, attention_mask=mask, past_key_values=cache)


LONG = "x" * 5000
DOORS: dict[str, Any] = {
    "init": lambda model: softkv.PTuningV2(length=1, init=LONG),  # type: ignore[arg-type]
    "length": lambda model: softkv.PTuningV2(length=2**70),
    "template": lambda model: softkv.PTuning(template="[P1]" * 5000 + "[Y]"),
    "folder": lambda model: model.add_adapter("b", LONG),
    "backend": lambda model: softkv.attach(llama(), softkv.PTuningV2(length=1), backend=LONG)(IDS),
    "modules_to_save": lambda model: softkv.attach(llama(), softkv.PTuningV2(length=1), modules_to_save=[LONG]),
    "format": lambda model: model.save_pretrained("nowhere", format=LONG),
    "using": lambda model: model.using(LONG).__enter__(),
    "ids of one axis": lambda model: softkv.Prefix.from_ids(model, IDS[0]),
    "float ids": lambda model: softkv.Prefix.from_ids(model, IDS.float()),
    "no ids": lambda model: softkv.Prefix.from_ids(model, IDS[:, :0]),
    "negative ids": lambda model: softkv.Prefix.from_ids(model, -IDS),
    "ids in a list": lambda model: softkv.Prefix.from_ids(model, [[5]]),
    "flat embeddings": lambda model: softkv.Prefix.from_embeddings(model, torch.ones(3, 16)),
}


@pytest.mark.parametrize("door", DOORS)
def test_one_short_sentence(door: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        DOORS[door](attached())
    assert len(str(error.value)) < 800
    assert "\n" not in str(error.value)
