"""Tiny models whose layers differ in key/value heads or head dims, and a naive run of them: each row alone, eager
attention of transformers', each block's own slots really concatenated to its keys and values."""

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from softkv.methods.base import SoftPrompt
from tests.hf.naive import Row
from tests.hf.tiny import VOCAB, WINDOW

_GEMMA4: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": WINDOW,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.25,
}

# name (what is awkward about it) → (configuration, its fields, (G, D, Dv) of each block)
MODELS: dict[str, tuple[str, dict[str, Any], list[tuple[int, int, int]]]] = {
    "Gemma 4: other heads and widths in full attention": (
        "Gemma4Text",
        _GEMMA4
        | {"num_hidden_layers": 3, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
        },
        [(2, 8, 8), (2, 8, 8), (1, 16, 16)],
    ),
    "Gemma 4: the last layers read keys of earlier ones": (
        "Gemma4Text",
        _GEMMA4
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        [(2, 8, 8), (2, 16, 16)] * 2,
    ),
    "MiMo-V2-Flash: twice the heads in windows, with sinks; narrow values": (
        "MiMoV2Flash",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "v_head_dim": 6,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "max_position_embeddings": 96,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "initializer_range": 0.25,
        },
        [(1, 8, 6), (2, 8, 6), (2, 8, 6)],
    ),
}
SHARING = "Gemma 4: the last layers read keys of earlier ones"
EMBEDS = [name for name in MODELS if name != SHARING]  # where embeddings say all of tokens


def fresh(name: str) -> Any:
    """A model with random weights, the same for every call."""
    kind, fields, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


_bare = cache(fresh)


def row_logits(name: str, soft: SoftPrompt, row: Row) -> Tensor:
    """Logits `[T, V]` of one row under the soft prompt, aligned with the row's ids."""
    model = _bare(name)
    tokens = soft.soft_tokens()
    if tokens is None:
        return behind(model, soft, row)
    words = model.get_input_embeddings()(torch.tensor(row.ids))
    at = 0 if soft.placement == "before" else row.prompt
    logits = model(inputs_embeds=torch.cat([words[:at], tokens, words[at:]])[None]).logits[0]
    return logits[[t + len(tokens) if t >= at - 1 else t for t in range(len(row.ids))]]


def behind(model: Any, soft: SoftPrompt, row: Row, mask_of: Callable[..., Tensor] | None = None) -> Tensor:
    """As `row_logits`, of a soft prompt that has slots.

    Args:
        mask_of: gives, of a block, T and P, what queries see: bool `[T, P + T]`. None: every slot, and the tokens that
            transformers' own mask shows.
    """
    turn, entered, handles = count(0), {}, []
    prefix = None if soft.encodes_rows else soft.prefix()
    P = int(soft.config.length)  # type: ignore[attr-defined]

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[module] = args[0] if args else kwargs["hidden_states"]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        at = next(turn)
        if prefix is None:
            k, v = soft.row_prefix(at, entered[module][:, : row.prompt], torch.tensor([row.prompt]))
        else:
            k, v = (of[at % len(of)] for of in (prefix.k, prefix.v))
        eager = type(module).forward.__globals__["eager_attention_forward"]
        key, value, mask = torch.cat([k, key], 2), torch.cat([v, value], 2), F.pad(mask, (P, 0))  # 0: it is seen
        if mask_of is not None:
            seen = mask_of(module, query.shape[2], P)
            mask = torch.zeros_like(mask).masked_fill(~seen, torch.finfo(mask.dtype).min)
        return eager(module, query, key, value, mask, **options)

    AttentionInterface.register("naive_slots", attend)
    AttentionMaskInterface.register("naive_slots", eager_mask)
    model.set_attn_implementation("naive_slots")
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
    positions = P + torch.arange(len(row.ids))[None]
    try:
        return model(input_ids=torch.tensor([row.ids]), position_ids=positions, use_cache=False).logits[0]
    finally:
        model.set_attn_implementation("eager")
        for handle in handles:
            handle.remove()


@torch.no_grad()
def greedy(name: str, soft: SoftPrompt, ids: list[int], steps: int) -> list[int]:
    """Greedy continuation, everything recomputed at each step."""
    row = Row(list(ids), len(ids))
    for _ in range(steps):
        row = Row([*row.ids, int(row_logits(name, soft, row)[-1].argmax())], row.prompt)
    return row.ids[row.prompt :]
