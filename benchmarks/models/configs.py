"""Configs of transformers shrunk to tiny random models: two layers, 32 channels, and the rest of the architecture."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

VOCAB = 97
IMAGE = MELS = 16  # pixels of an image's side, features of a sound
WINDOW = 64  # of windowed layers: longer than the rows of the sweep, prefix included
LARGEST = 8_000_000  # parameters: a config that is not shrunk is not built

# Fields of configs, of any model that has them.
_WIDTHS = {
    32: "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim backbone_hidden_size",
    48: "intermediate_size moe_intermediate_size shared_expert_intermediate_size ffn_dim encoder_ffn_dim"
    " decoder_ffn_dim n_inner d_inner dim_ff dff d_ff hidden_dim"
    " ffn_hidden_size expert_ffn_hidden_size shared_intermediate_size"
    " moe_shared_expert_intermediate_size dense_intermediate_size intermediate_size_mlp feed_forward_size"
    " shared_experts_intermediate_size block_ffn_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads"
    " num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_experts n_routed_experts"
    " num_local_experts moe_num_experts linear_num_value_heads mamba_n_heads mamba_num_heads linear_num_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers"
    " num_decoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k"
    " linear_num_key_heads depth global_attn_every_n_layers index_n_heads layer_group_size sliding_window_pattern"
    " attn_layer_period expert_layer_period num_nextn_predict_layers o_groups",
    1: "n_group topk_group n_groups n_shared_experts attn_layer_offset mamba_n_groups first_k_dense_replace"
    " no_rope_layer_interval max_window_layers",
    8: "head_dim dim_head v_head_dim qk_nope_head_dim qk_rope_head_dim swa_head_dim swa_v_head_dim index_head_dim"
    " linear_key_head_dim linear_value_head_dim linear_head_dim kv_channels attention_head_size d_kv d_rel"
    " hidden_size_per_layer_input laurel_rank query_pre_attn_scalar global_head_dim rel_extent",
    16: "q_lora_rank kv_lora_rank mamba_d_state state_size ssm_state_size mamba_head_dim mamba_d_head o_lora_rank"
    " time_step_rank mamba_dt_rank image_size num_mel_bins chunk_size mamba_chunk_size lru_width qk_head_dim",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions"
    " context_length original_max_position_embeddings",
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size shape_vocab_size",
    WINDOW: "sliding_window sliding_window_size window_size local_attention attention_window_size"
    " local_attention_window_len attention_chunk_size",
}
_VALUES: dict[str, Any] = {name: size for size, names in _WIDTHS.items() for name in names.split()}
_VALUES |= {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "patch_size": 8,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "use_mamba_kernels": False, "decoder_start_token_id": 1,
}  # fmt: skip
_WINDOWS = {name for name, size in _VALUES.items() if size == WINDOW}
_TOKENS = {f"{kind}_token_id" for kind in ("image", "video", "audio", "vision_start", "vision_end")}

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}

_BERT = {"model_type": "bert", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip

# What an architecture wants beside: its layers have several kinds, or sizes depend on each other.
_OWN: dict[str, dict[str, Any]] = {
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_headdim": 16,
               "n_mamba_heads": 4, "num_mem_blocks": 1, "num_key_value_heads": 4, "attention_hidden_size": 64,
               "attention_head_dim": 16, "hybrid_layer_ids": [1, 3]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 2,
              "num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "mamba"], "num_hidden_layers": 4,
                   "mamba_num_heads": 4, "mamba_head_dim": 16},
    "mamba2": {"n_groups": 1, "num_heads": 4, "head_dim": 16, "expand": 2},
    "qwen3_next": {"num_hidden_layers": 4, "full_attention_interval": 2},
    "qwen3_5_text": {"num_hidden_layers": 4, "full_attention_interval": 2},
    "qwen3_5_moe_text": {"num_hidden_layers": 4, "full_attention_interval": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "olmo_hybrid": {"num_hidden_layers": 4, "num_key_value_heads": 4},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4,
                     "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [48] * 4},
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 16,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128},
    "dots3_note_text": {"num_key_value_heads": 4}, "dots3_note": {"num_key_value_heads": 4},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0}, "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("sliding_attention", "full_attention")}},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "kimi_linear": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen4_exp_text": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "encoder-decoder": {"decoder": _BERT | {"is_decoder": True, "add_cross_attention": True}},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "dots1": {"num_key_value_heads": 4},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
                   "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "dbrx": {"d_model": 32, "attn_config": {"kv_n_heads": 2, "clip_qkv": None}, "ffn_config": {
        "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16],
                 "num_buckets": 4},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 2, "zero_expert_num": 2, "num_attention_heads": 4,
                      "head_dim": 8, "qk_head_dim": 16, "num_key_value_heads": 4},
    "voxtral_encoder": {"intermediate_size": 128},
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "llava_next": {"image_grid_pinpoints": [[IMAGE, IMAGE]]},
    "llava_onevision": {"image_grid_pinpoints": [[IMAGE, IMAGE]]},
    "paligemma": {"projection_dim": 32},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "gemma3": {"mm_tokens_per_image": 4},
    "qwen2_vl": {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                                   "patch_size": 8}},
    "qwen2_vl_text": _MROPE, "qwen2_5_vl_text": _MROPE, "qwen3_vl_text": _MROPE,
    "qwen2_5_vl_vision": {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 32},
    "qwen3_vl_vision": {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "qwen3_5_vision": {"out_hidden_size": 32, "num_position_embeddings": 16},
    "xlstm": {"hidden_size": 64, "num_heads": 2, "qk_dim_factor": 1.0, "v_dim_factor": 1.0,
              "mlstm_round_up_to_multiple_of": 8,
              "ffn_round_up_to_multiple_of": 8, "chunk_size": 16},
}  # fmt: skip


def _shrunk(kind: Any, window: int, decodes: bool) -> Any:
    """The config of an architecture, tiny, its parts too."""
    fields = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    names = list(fields) or list(inspect.signature(kind).parameters)
    names += [name for name in kind.attribute_map if name not in names]
    values = _VALUES | {"is_decoder": decodes}
    chosen = {name: window if name in _WINDOWS else value for name, value in values.items() if name in names}
    chosen |= {name: VOCAB - 1 - at for at, name in enumerate(sorted(_TOKENS)) if name in names}
    for name, value in chosen.items():
        if isinstance(value, float) and type(getattr(fields.get(name), "default", None)) is int:
            chosen[name] = int(value)
    if "qk_rope_head_dim" in names:  # multi-head latent attention: keys of one width a head
        chosen = {name: value for name, value in chosen.items() if name not in ("head_dim", "qk_head_dim")}
        chosen |= {"num_key_value_heads": 4} if "num_key_value_heads" in names else {}
    chosen |= _OWN.get(kind.model_type, {})
    # A width that the architecture leaves out by default stays out, but for experts and attention's own.
    for name in (
        "q_lora_rank",
        "sliding_window",
        "index_n_heads",
        "index_head_dim",
        "num_kv_shared_layers",
        "hidden_size_per_layer_input",
    ):
        default = getattr(fields.get(name), "default", ...)
        if name in chosen and name not in _OWN.get(kind.model_type, {}) and (default is None or default == 0):
            chosen.pop(name)
    for alias, name in kind.attribute_map.items():
        if alias in chosen and name in chosen:
            chosen.pop(alias)
    parts = getattr(kind, "sub_configs", None) or {}
    whole = kind() if parts else None
    for name in parts:
        part = getattr(whole, name, None)
        if part is not None and name not in chosen:
            chosen[name] = _shrunk(type(part), window, decodes)
    return kind(**chosen)


def tiny_model(class_name: str, *, decodes: bool, window: int = WINDOW) -> Any:
    """A model of random weights, in evaluation mode, with transformers' eager attention.

    Args:
        decodes: whether encoders that can be decoders are.
        window: of windowed layers.

    Raises:
        ValueError: when it is not tiny.
    """
    import torch
    import transformers

    kind = getattr(transformers, class_name)
    config = _shrunk(kind.config_class, window, decodes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its config is not shrunk: {size:,} parameters")
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:  # biases and norms are 0 and 1 at first, which hides what reads them
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.2)
        for buffer in model.buffers():
            if not torch.isfinite(buffer).all():
                buffer.zero_()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        if config.is_encoder_decoder:
            model.generation_config.update(
                decoder_start_token_id=1, forced_bos_token_id=None, forced_eos_token_id=None, num_beams=1
            )
    return model
