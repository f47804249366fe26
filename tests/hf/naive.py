"""The independent truth: each row alone, unpadded, eager attention; prefixes really concatenated to the keys, soft
embeddings really concatenated to the embeddings."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from softkv.methods.base import SoftPrompt


@dataclass(frozen=True)
class Row:
    """Token ids (negative: soft tokens) and how many of them are the prompt."""

    ids: list[int]
    prompt: int

    @property
    def labels(self) -> list[int]:
        return [-100] * self.prompt + self.ids[self.prompt :]


def row_logits(model: Any, soft: SoftPrompt, row: Row, embeds: Tensor | None = None) -> Tensor:
    """Logits `[T, V]` of one row of the eager `model` under the soft prompt, aligned with the row's ids."""
    ids = torch.tensor(row.ids)
    words = model.get_input_embeddings()(ids.clamp(min=0)) if embeds is None else embeds
    tokens = soft.soft_tokens()
    if tokens is not None:
        tokens = tokens.to(words.dtype)
        if soft.placement == "inline":
            words = torch.stack([tokens[-i - 1] if i < 0 else words[at] for at, i in enumerate(row.ids)])
            return _run(model, words)
        at = 0 if soft.placement == "before" else row.prompt
        logits = _run(model, torch.cat([words[:at], tokens, words[at:]]))
        inserted = len(tokens)
        columns = [t + inserted if t >= at - 1 else t for t in range(len(ids))]
        return logits[columns]
    if soft.encodes_rows:
        return _run_encoded(model, soft, words, row.prompt)
    prefix = soft.prefix()
    if prefix is None:
        return _run(model, words)
    cache = DynamicCache()
    for layer, (k, v) in enumerate(prefix.layers(model.config.num_hidden_layers)):
        cache.update(k.to(words.dtype), v.to(words.dtype), layer)
    return _run(model, words, cache, prefix.length, prefix.window_covers)


def _run(model: Any, embeds: Tensor, cache: Any = None, P: int = 0, window_covers: bool = False) -> Tensor:
    T = len(embeds)
    return model(
        inputs_embeds=embeds[None],
        past_key_values=cache,
        position_ids=P + torch.arange(T)[None],
        attention_mask=_masks(model.config, T, P, window_covers, embeds.dtype),
        use_cache=cache is not None,
    ).logits[0]


class _Expecting(DynamicCache):
    """A cache that counts the slots that each block will get: some models place tokens by its length."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) or self.slots


def _run_encoded(model: Any, soft: SoftPrompt, embeds: Tensor, prompt: int) -> Tensor:
    """The K/V of each block are put into the cache just before the block runs."""
    P = soft.config.length  # type: ignore[attr-defined]
    cache, handles = _Expecting(P), []

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        k, v = soft.row_prefix(module.layer_idx, hidden[:, :prompt], torch.tensor([prompt]))
        cache.update(k, v, module.layer_idx)

    for module in model.modules():
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        return _run(model, embeds, cache, P)
    finally:
        for handle in handles:
            handle.remove()


def _masks(config: Any, T: int, P: int, window_covers: bool, dtype: torch.dtype) -> Any:
    """Additive masks `[1, 1, T, P + T]` that say outright which key each query sees."""
    query, key = P + torch.arange(T)[:, None], torch.arange(P + T)
    causal = key <= query

    def additive(seen: Tensor) -> Tensor:
        return torch.zeros(1, 1, T, P + T, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    if window is None:
        return additive(causal)
    inside = key > query - window
    if not window_covers:
        inside = inside | (key < P)
    masks = {"full_attention": additive(causal), "sliding_attention": additive(causal & inside)}
    return masks if config.model_type in ("gemma2", "gemma4_text") else masks["sliding_attention"]


def greedy(model: Any, soft: SoftPrompt, ids: list[int], steps: int) -> list[int]:
    """Greedy continuation, everything recomputed at each step."""
    row = Row(list(ids), len(ids))
    with torch.no_grad():
        for _ in range(steps):
            row = Row([*row.ids, int(row_logits(model, soft, row)[-1].argmax())], row.prompt)
    return row.ids[row.prompt :]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest value wanted."""
    scale = max(1.0, want.abs().max().item())
    torch.testing.assert_close(got.to(want), want, rtol=0, atol=tolerance * scale)


def recomputing(model: Any, soft: SoftPrompt, prompts: list[list[int]]) -> Any:
    """The eager `model` made to answer `generate` from everything recomputed, row by row; no cache, no batch. It is
    to be given the real tokens of the prompts."""
    width = max(sum(i >= 0 for i in prompt) for prompt in prompts)

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        repeats = len(input_ids) // len(prompts)
        last = []
        for r, ids in enumerate(input_ids.tolist()):
            prompt = prompts[r // repeats]
            last.append(row_logits(model, soft, Row([*prompt, *ids[width:]], len(prompt)))[-1:])
        return CausalLMOutputWithPast(logits=torch.stack(last))

    generating = copy.copy(model)
    generating.__dict__["forward"] = forward
    return generating
