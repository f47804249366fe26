"""A start from the vocabulary draws words: no special, added or unused tokens, no places of images."""

from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor

import softkv
from softkv.methods.base import Method

ROWS = 61
SPECIAL = {0, 1, 2}  # of the tokenizer: padding, start, end
ADDED = {40, 41}
UNUSED = {38, 39} | set(range(42, ROWS))  # "<unused0>", "[reserved_1]"; rows past the tokenizer's


def words_tokenizer() -> Any:
    names = {f"w{i}": i for i in range(3, 38)} | {"<pad>": 0, "<s>": 1, "</s>": 2, "<unused0>": 38, "[reserved_1]": 39}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="w3")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    made.add_tokens(["<extra>", "<|more|>"])
    return made


def text_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=ROWS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=5, bos_token_id=6, eos_token_id=[7, 8],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = [7, 9]
    model.generation_config.suppress_tokens = [10, 11]
    return model


def image_model() -> Any:
    text = {
        "vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 5, "bos_token_id": 6, "eos_token_id": 7,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, boi_token_index=12, eoi_token_index=13, image_token_index=14,
        mm_tokens_per_image=4,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def drawn(model: Any) -> set[int]:
    """The ids whose embeddings the soft tokens start from."""
    table: Tensor = model.base.get_input_embeddings()(torch.arange(ROWS)).detach().float()
    return {int((table - soft).abs().sum(1).argmin()) for soft in model.soft.embeddings.detach()}


CASES: dict[str, tuple[Any, Any, set[int]]] = {
    "configs": (text_model, None, {5, 6, 7, 8, 9, 10, 11}),
    "configs of parts, places of images": (image_model, None, {5, 6, 7, 12, 13, 14}),
    "a tokenizer": (text_model, words_tokenizer, {5, 6, 7, 8, 9, 10, 11} | SPECIAL | ADDED | UNUSED),
    "a tokenizer, places of images": (image_model, words_tokenizer, {5, 6, 7, 12, 13, 14} | SPECIAL | ADDED | UNUSED),
}


@pytest.mark.parametrize("case", CASES)
def test_prompts_start_from_words(case: str) -> None:
    model, tokenizer, others = CASES[case]
    words = set(range(ROWS)) - others
    method = softkv.PromptTuning(length=len(words))
    soft = softkv.attach(model(), method, tokenizer=None if tokenizer is None else tokenizer())
    assert drawn(soft) == words


@pytest.mark.parametrize(
    "method", [softkv.PTuningV2(length=40, init="vocabulary"), softkv.PrefixTuning(length=40, init="vocabulary")]
)
def test_prefixes_start_from_words(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    monkeypatch.setattr(
        softkv.hf.frozen.FrozenBase, "prefix_of", lambda self, ids, **options: read.append(ids) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        softkv.attach(text_model(), method, tokenizer=words_tokenizer())
    assert set(read[0].tolist()) == set(range(ROWS)) - CASES["a tokenizer"][2]


def test_a_vocabulary_without_words_is_refused() -> None:
    model = text_model()
    model.config.extra_token_ids = list(range(ROWS))
    with pytest.raises(ValueError, match="expects words in the vocabulary"):
        softkv.attach(model, softkv.PromptTuning(length=2))
