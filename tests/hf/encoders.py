"""Tiny random models of encoder families with task heads, and their independent truth: each row alone, unpadded, in a
plain attention that really concatenates a prefix to the keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from softkv.prefix import Prefix
from tests.hf.tiny import VOCAB

PAD = 1  # an id whose embedding is not 0 in every family, and RoBERTa's row for padding in the table of positions
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA = {name: value for name, value in _BERT.items() if "dropout" not in name}
_DISTIL = {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "pad_token_id": PAD}
_DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0}

# family (what is awkward about it) → configuration
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": _BERT,
    "Roberta": _BERT,  # positions from 2
    "XLMRoberta": _BERT,
    "Camembert": _BERT,
    "Electra": _BERT | {"embedding_size": 16, "summary_last_dropout": 0.0},  # a narrow embedding
    "DistilBert": _DISTIL | {"max_position_embeddings": 40},  # no layer_idx
    "Albert": _BERT | {"embedding_size": 16, "classifier_dropout_prob": 0.0},  # one block, run three times
    # windows on either side, in two layers of three
    "ModernBert": _LLAMA | {"local_attention": 6, "global_attn_every_n_layers": 3},
    "EuroBert": _LLAMA | {"num_key_value_heads": 2},  # rotary, grouped heads
}
HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
TABLE = [(family, head) for family in FAMILIES for head in HEADS if hasattr(transformers, f"{family}For{head}")]
# Decoders with the same heads: the last token is pooled.
DECODERS = ("Llama", "Qwen3", "GPT2", "GPTNeoX", "Mistral")


def encoder(family: str, head: str, **changes: Any) -> Any:
    """A model with random weights, the same for every call with the same configuration."""
    labels = {} if head in ("MaskedLM", "QuestionAnswering") else {"num_labels": 3}
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family] | labels | changes))
    return shaken(getattr(transformers, f"{family}For{head}"), config)


def shaken(kind: Any, config: Any) -> Any:
    """A model whose weights are large enough that a wrong key shows."""
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    return model


def first_position(model: Any) -> int:
    """Of a row's first token, by the family's own rule."""
    return PAD + 1 if model.config.model_type in ("roberta", "xlm-roberta", "camembert") else 0


_PREFIX: list[tuple[Tensor, Tensor]] = []  # of the blocks still to run


def _concatenating(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    P = 0
    tokens = torch.arange(query.shape[2])
    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    if module.is_causal:
        seen = seen.tril()
    if sliding_window is not None:
        seen &= (tokens[:, None] - tokens).abs() < sliding_window
    if _PREFIX:
        k, v = _PREFIX.pop(0)
        P = k.shape[2]
        key, value = torch.cat([k.to(key), key], 2), torch.cat([v.to(value), value], 2)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = scores.masked_fill(~torch.cat([torch.ones(len(tokens), P, dtype=torch.bool), seen], 1), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("concatenating_encoders", _concatenating)
AttentionMaskInterface.register("concatenating_encoders", lambda *args, **kwargs: None)


@contextmanager
def _concatenated(model: Any, prefix: Prefix | None) -> Iterator[None]:
    model.set_attn_implementation("concatenating_encoders")
    if prefix is not None:
        _PREFIX.extend(prefix.layers(model.config.num_hidden_layers))
    try:
        yield
        assert not _PREFIX, "some block has not read its part of the prefix"
    finally:
        _PREFIX.clear()
        model.set_attn_implementation("eager")


def row_output(model: Any, prefix: Prefix | None, ids: list[int], P: int | None = None, **labels: Any) -> Any:
    """The output of the eager `model` for one row, unpadded, with a prefix in front."""
    slots = prefix.length if P is None and prefix is not None else P or 0
    positions = torch.arange(len(ids))[None] + slots + first_position(model)
    with _concatenated(model, prefix):
        return model(input_ids=torch.tensor([ids]), position_ids=positions, **labels)


def outputs_of(output: Any) -> list[Tensor]:
    """What a head gives, without the loss: `[B, ...]` each."""
    return [output[name] for name in ("logits", "start_logits", "end_logits") if name in output]
