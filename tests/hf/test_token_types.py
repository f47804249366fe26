"""Token types of images travel with their tokens, and masks of images beside windows take a prefix: a row of Gemma 3 is
the same alone and padded on either side."""

from typing import Any

import pytest
import torch
import transformers

import softkv
from softkv.methods.base import Method
from tests.hf.naive import close

ROW = [1, 5, 6, 58, 60, 60, 60, 60, 59, 7, 8, 9]
SHORT = [1, 58, 60, 60, 60, 60, 59, 9, 10]
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def gemma3() -> Any:
    text = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "initializer_range": 0.25,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def batch(rows: list[list[int]], images: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "token_type_ids": (ids == 60).long(),
        "pixel_values": images,
    }


@pytest.mark.parametrize("method", [softkv.PTuningV2(length=6), softkv.PromptTuning(length=3)])
def test_padding_moves_token_types(method: Method) -> None:
    torch.manual_seed(1)
    model = softkv.attach(gemma3(), method).eval()
    alone = batch([ROW], IMAGES[:1]), batch([SHORT], IMAGES[1:])
    with torch.no_grad():
        wants = [model(**one).logits[0] for one in alone]
        texts = [model.generate(**one, max_new_tokens=3, do_sample=False)[0, -3:] for one in alone]
        for padding in ("left", "right"):
            pad, at = [0] * (len(ROW) - len(SHORT)), slice(-len(SHORT), None) if padding == "left" else len(SHORT)
            both = batch([ROW, pad + SHORT if padding == "left" else SHORT + pad], IMAGES)
            got = model(**both).logits
            close(got[0], wants[0])
            close(got[1][at if isinstance(at, slice) else slice(at)], wants[1])
            assert torch.equal(model.generate(**both, max_new_tokens=3, do_sample=False)[:, -3:], torch.stack(texts))


def test_windows_show_learned_slots_beside_an_image_mask() -> None:
    """Beside the bare eager model with the prefix in its cache and masks that say what each query sees."""
    model, bare = softkv.attach(gemma3(), softkv.PTuningV2(length=6)).eval(), gemma3()
    one, (P, T) = batch([ROW], IMAGES[:1]), (6, len(ROW))
    image = one["input_ids"][0] == 60
    prefix = model.soft.prefix()
    assert prefix is not None
    cache = transformers.DynamicCache()
    with torch.no_grad():
        for layer, (k, v) in enumerate(prefix.layers(2)):
            cache.update(k, v, layer)
        query, key = P + torch.arange(T)[:, None], torch.arange(P + T)
        block = torch.zeros(T, P + T, dtype=torch.bool)
        block[:, P:] = image[:, None] & image[None]
        inside = (key > query - 4) | (key < P)
        masks = {
            kind: torch.zeros(1, 1, T, P + T).masked_fill(~seen, torch.finfo(torch.float32).min)
            for kind, seen in (
                ("full_attention", (key <= query) | block),
                ("sliding_attention", ((key <= query) & inside) | block),
            )
        }
        words = bare.model.get_input_embeddings()(one["input_ids"])
        words[0][image] = bare.model.get_image_features(one["pixel_values"]).pooler_output.reshape(-1, 32)
        hidden = bare.model.language_model(
            inputs_embeds=words,
            past_key_values=cache,
            position_ids=P + torch.arange(T)[None],
            attention_mask=masks,
        ).last_hidden_state
        close(model(**one).logits, bare.lm_head(hidden))


TEXT = [1, 20, 21, 22, 23]  # longer than the window


def test_a_text_in_front_of_images() -> None:
    """Windows count the slots of a text, beside a mask of images: as the text in context."""
    truth = gemma3()
    model = softkv.attach(gemma3(), softkv.PTuningV2(length=6)).eval()
    model.add_adapter("text", softkv.Prefix.from_ids(model, torch.tensor([TEXT])))
    model.add_adapter("short", softkv.Prefix.from_ids(model, torch.tensor([TEXT[:2]])))
    rows, pad = [ROW, SHORT, SHORT], [0] * (len(ROW) - len(SHORT))
    texts: list[list[int]] = [TEXT, TEXT[:2], []]
    images = IMAGES[[0, 1, 1]]
    with torch.no_grad():
        wants = [
            truth(**batch([text + row], image[None])).logits[0, len(text) :]
            for text, row, image in zip(texts, rows, images, strict=True)
        ]
        for left in (True, False):
            together = batch(
                [pad[: len(ROW) - len(row)] + row if left else row + pad[: len(ROW) - len(row)] for row in rows], images
            )
            got = model(**together, adapter_names=["text", "short", None]).logits
            for r, (row, want) in enumerate(zip(rows, wants, strict=True)):
                close(got[r, -len(row) :] if left else got[r, : len(row)], want)
        with model.using("text"):
            alone = batch([ROW], images[:1])
            close(model(**alone).logits[0], wants[0])
            new = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, len(ROW) :]
            longer = batch([TEXT + ROW], images[:1])
            want = truth.generate(**longer, max_new_tokens=4, do_sample=False)[0, len(TEXT + ROW) :]
            assert torch.equal(new, want)
