"""Tiny random encoder-decoders, and their naive truth: each row alone, unpadded, keys and values really concatenated in
an attention function of its own."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import eager_mask

VOCAB, PAD, EOS = 61, 0, 1

_BART = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 48,
    "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.25,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip

# name → (kind of configuration, its fields)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("T5", _T5),
    "MT5: gated, untied": ("MT5", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "UMT5: biases in each layer": ("UMT5", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "Bart": ("Bart", _BART),
    "MBart: scaled embeddings": ("MBart", _BART | {"scale_embedding": True}),
    "Pegasus: sinusoids, scaled outside the table": ("Pegasus", _BART | {"scale_embedding": True}),
    "Marian": ("Marian", _BART | {"scale_embedding": True, "decoder_vocab_size": VOCAB}),
    "M2M100: positions by ids": ("M2M100", _BART | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
    "Blenderbot": ("Blenderbot", _BART),
    "BlenderbotSmall": ("BlenderbotSmall", _BART),
    "PLBart": ("PLBart", _BART),
}
NAMES = list(FAMILIES)
WHISPER = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 10,
    "max_target_positions": 48, "num_mel_bins": 5, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2,
    "decoder_start_token_id": 2, "dropout": 0.0, "init_std": 0.25, "begin_suppress_tokens": None,
    "suppress_tokens": None,
}  # fmt: skip


def model_of(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights, the same for every call with the same configuration."""
    kind, fields = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**fields | changes)
    return _filled(transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention), dtype)


def whisper(attention: str = "eager") -> Any:
    config = transformers.WhisperConfig(**WHISPER)
    config._attn_implementation = attention
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config.update(no_timestamps_token_id=VOCAB - 1, is_multilingual=False)
    return _filled(model, torch.float32)


def _filled(model: Any, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.2 if parameter.dim() == 1 else 0.7 if "relative_attention_bias" in name else 0.25
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
            elif "embed_positions" not in name or parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.generation_config.update(
        forced_eos_token_id=None, forced_bos_token_id=None, num_beams=1, max_length=None, encoder_no_repeat_ngram_size=0
    )
    return model.to(dtype).eval()


KV = list[tuple[Tensor, Tensor]]  # of each block, [G, P, D]


def naive_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    added = 0.0 if attention_mask is None else attention_mask
    bias = 0.0 if position_bias is None else position_bias
    slots = vars(module).get("naive_kv")
    if slots is not None:
        key, value = (torch.cat([x[None], y], 2) for x, y in zip(slots, (key, value), strict=True))
        added, bias = (F.pad(x, (slots[0].shape[1], 0)) if isinstance(x, Tensor) else x for x in (added, bias))
    if isinstance(bias, Tensor) and (zero := vars(module).get("naive_without_bias", 0)):
        bias = F.pad(bias[..., zero:], (zero, 0))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling) + bias + added
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("naive", naive_attention)
AttentionMaskInterface.register("naive", eager_mask)


def self_attention(stack: Any) -> list[Any]:
    return [module for name, module in stack.named_modules() if name.endswith(("self_attn", "SelfAttention"))]


def cross_attention(stack: Any) -> list[Any]:
    return [module for name, module in stack.named_modules() if name.endswith(("encoder_attn", "EncDecAttention"))]


class Naive:
    """The truth on a copy of a model.

    Args:
        model: bare, eager.
        encoder, decoder, cross: the prefix at each site, or none.
        covers: whether relative position biases count the slots.
    """

    def __init__(
        self, model: Any, *, encoder: KV | None = None, decoder: KV | None = None, cross: KV | None = None,
        covers: bool = False,
    ) -> None:  # fmt: skip
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.set_attn_implementation("naive")
        self.decoder = decoder
        stacks = {
            "encoder": self_attention(self.model.get_encoder()),
            "cross": cross_attention(self.model.get_decoder()),
        }
        for kv, modules in ((encoder, stacks["encoder"]), (cross, stacks["cross"])):
            for module, each in zip(modules, kv or [], strict=kv is not None):
                module.__dict__["naive_kv"] = each
        if encoder:
            self._shift(self.model.get_encoder(), encoder[0][0].shape[1])
        if decoder and not covers:
            for module in self_attention(self.model.get_decoder()):
                module.__dict__["naive_without_bias"] = decoder[0][0].shape[1]
        if encoder and covers:
            raise NotImplementedError

    @staticmethod
    def _shift(stack: Any, slots: int) -> None:
        """Has tokens stand behind the slots: the table's rows move up."""
        table = getattr(stack, "embed_positions", None)
        if table is None:
            return
        if isinstance(table, torch.nn.Embedding):
            table.weight.data = F.pad(table.weight.data[slots:], (0, 0, 0, slots), value=float("nan"))
        else:
            table.make_weights(60, table.embedding_dim, table.padding_idx)
            table.weights = table.weights[slots:]

    def __call__(self, embeds: Tensor, written: list[int], **inputs: Any) -> Tensor:
        """Logits `[T, V]` of one row: what the encoder reads, `[S, C]`, and the ids that the decoder has written."""
        cache = None
        if self.decoder:
            filled = DynamicCache()
            for layer, (k, v) in enumerate(self.decoder):
                filled.update(k[None], v[None], layer)
            cache = EncoderDecoderCache(filled, DynamicCache())
        given = inputs or {"inputs_embeds": embeds[None]}
        return self.model(
            **given, decoder_input_ids=torch.tensor([written]), past_key_values=cache, use_cache=cache is not None
        ).logits[0]

    def generate(self, embeds: Tensor, start: int, tokens: int, **inputs: Any) -> list[int]:
        """Greedy decoding without keeping anything."""
        written = [start]
        with torch.no_grad():
            for _ in range(tokens):
                written.append(int(self(embeds, written, **inputs)[-1].argmax()))
                if written[-1] == EOS:
                    break
        return written


def embedded(model: Any, ids: list[int], soft: Tensor | None = None) -> Tensor:
    """What the encoder reads `[S, C]`: embeddings of ids, soft token -i-1 where one is negative."""
    scale = getattr(model.get_encoder(), "embed_scale", 1.0)
    rows = [
        model.get_input_embeddings()(torch.tensor([each]))[0] * scale if each >= 0 else soft[-each - 1] for each in ids
    ]
    return torch.stack(rows)


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """ids and mask."""
    width = max(map(len, rows))
    front = [(width - len(row)) if side == "left" else 0 for row in rows]
    ids = [[PAD] * at + row + [PAD] * (width - len(row) - at) for at, row in zip(front, rows, strict=True)]
    mask = [[0] * at + [1] * len(row) + [0] * (width - len(row) - at) for at, row in zip(front, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)
