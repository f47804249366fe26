"""Tiny models with multi-head latent attention, and the independent truth on them: their caches hold compressed keys
and values, so prefixes are concatenated inside attention."""

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from softkv.methods.base import SoftPrompt
from tests.hf import naive
from tests.hf.naive import Row

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LATENT = SIZES | {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {"DeepseekV3": LATENT | EXPERTS, "MiniCPM3": LATENT, "Youtu": LATENT}
C, L, G, D, DV = 32, 2, 4, 8, 6
_NAME, _PREFIX = "concatenating", "_prefix_in_front"


def fresh(name: str, attention: str = "eager") -> Any:
    """A model with random weights, the same at every call."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.dim() == 1))
    return base


@cache
def _truthful(name: str) -> Any:
    return fresh(name, _NAME)


def row_logits(name: str, soft: SoftPrompt, row: Row) -> Tensor:
    """Logits `[T, V]` of one row alone under a soft prompt."""
    model = _truthful(name)
    prefix = soft.prefix()
    if prefix is None and not soft.encodes_rows:
        return naive.row_logits(model, soft, row)
    blocks = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    assert len(blocks) == L

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        kv = soft.row_prefix(block.layer_idx, hidden[:, : row.prompt], torch.tensor([row.prompt]))
        setattr(block, _PREFIX, kv)

    if prefix is None:
        handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
        length = soft.config.length  # type: ignore[attr-defined]
    else:
        handles, length = [], prefix.length
        for block, kv in zip(blocks, prefix.layers(L), strict=True):
            setattr(block, _PREFIX, kv)
    try:
        positions = length + torch.arange(len(row.ids))[None]
        return model(torch.tensor([row.ids]), position_ids=positions, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            delattr(block, _PREFIX)


@torch.no_grad()
def greedy(name: str, soft: SoftPrompt, prompt: list[int], steps: int) -> list[int]:
    """Greedy continuation, everything recomputed at each step."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(row_logits(name, soft, Row(ids, len(prompt)))[-1].argmax()))
    return ids[len(prompt) :]


def _concatenating(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    scores, (prefix_k, prefix_v) = q @ k.mT * scaling, getattr(module, _PREFIX, (k[:, :, :0], v[:, :, :0]))
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    weights = torch.cat([q @ prefix_k.mT * scaling, scores], -1).softmax(-1)
    return (weights @ torch.cat([prefix_v, v], 2)).transpose(1, 2), None


AttentionInterface.register(_NAME, _concatenating)
AttentionMaskInterface.register(_NAME, eager_mask)
