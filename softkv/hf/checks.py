"""Input validation of a `SoftModel`. Each message gives the expected and the actual value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softkv.hf.layout import RowLayout
from softkv.hf.placement import check_not_partitioned, is_sharded
from softkv.hf.prefixes import SoftRows

_NOT_PAGED = (
    "continuous batching supports only transformers' own attention, which takes no prefix: use generate with "
    "a padded batch"
)
PAGED = {
    name: f"SoftModel has no {name}: {_NOT_PAGED}"
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
}


def check_base(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"softkv.attach expects a transformers model, got {type(model).__name__}")
    check_in_one_piece(model)
    check_not_partitioned(model)
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # Canine hashes characters
        table = None
    if getattr(table, "weight", None) is None:
        raise ValueError(
            f"softkv.attach expects a model with input embeddings of a vocabulary, got {type(model).__name__}"
        )
    if model.config.is_encoder_decoder and (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"softkv has no tensor parallelism of encoder-decoders: load this {type(model).__name__} without tp_plan "
            "and shard it with FSDP2"
        )


def check_in_one_piece(model: Any) -> None:
    """Raise for a base that FSDP has already sharded: learned parameters would not be part of it, and would differ
    between processes."""
    if is_sharded(model):
        raise ValueError(
            f"FSDP has sharded this {type(model).__name__} already: attach every soft prompt first, then shard the "
            "blocks and the SoftModel (examples/fsdp2.py starts from a base without values)"
        )


def check_tokens(ids: Any, embeds: Any) -> Tensor:
    """The one of `input_ids` `[B, T]` and `inputs_embeds` `[B, T, C]` that was given."""
    if (ids is None) == (embeds is None):
        raise ValueError("SoftModel expects either input_ids or inputs_embeds")
    if ids is not None:
        check_ids(ids)
        return ids
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or not embeds.is_floating_point():
        raise ValueError(f"inputs_embeds expects floats [B, T, C], got {described(embeds)}")
    _check_not_empty("inputs_embeds", embeds)
    return embeds


def check_ids(ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids expects integers [B, T], got {described(ids)}")
    _check_not_empty("input_ids", ids)


def _check_not_empty(name: str, tokens: Tensor) -> None:
    if not tokens.shape[0] or not tokens.shape[1]:
        raise ValueError(f"{name} expects at least one row and one token, got {list(tokens.shape)}")


def check_cache(cache: Any) -> None:
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise ValueError(
            f"past_key_values expects a transformers Cache such as DynamicCache(), got {type(cache).__name__}"
        )


def check_mask(mask: Any, rows: int, widths: Sequence[int]) -> None:
    """Refuse anything but a padding mask `[rows, S]` of one of the widths."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            f"attention_mask expects a padding mask [B, S] (no prefix could join another), got {described(mask)}"
        )
    # Compared by "==", because for a tracer numbers are not `in` a tuple of traced ones.
    if mask.shape[0] != rows or not any(mask.shape[1] == width for width in widths):
        columns = " or ".join(map(str, dict.fromkeys(widths)))
        raise ValueError(
            f"attention_mask expects [{rows}, {columns}], a column for each token (none for soft prompts), "
            f"got {list(mask.shape)}"
        )
    if mask.dtype != torch.bool and is_readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"attention_mask expects 1 for a token and 0 for padding, got values from {mask.min()} to {mask.max()}"
        )


def check_positions(positions: Any, shape: tuple[int, int]) -> None:
    """Position ids end in `[B or 1, T]`; some decoders have more axes in front."""
    if positions is None:
        return
    B, T = shape
    fits = isinstance(positions, Tensor) and positions.dim() >= 2 and positions.shape[-1] == T
    fits = fits and (positions.dtype == torch.int64 or positions.dtype == torch.int32)
    if not fits or (positions.shape[-2] != B and positions.shape[-2] != 1):
        raise ValueError(f"position_ids expects integers [{B}, {T}] or [1, {T}], got {described(positions)}")


def check_labels(labels: Any, shape: tuple[int, int]) -> None:
    if labels is not None and (not isinstance(labels, Tensor) or tuple(labels.shape) != shape):
        raise ValueError(f"labels expects {list(shape)}, one for each token, got {described(labels)}")


def check_packing(kwargs: dict[str, Any], mask: Any, shape: tuple[int, int], past: int) -> None:
    """Refuse cumulative lengths that don't describe one packed sequence."""
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        return
    if shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q packs rows into one sequence: expected [1, N] tokens, got {list(shape)}")
    if mask is not None or past:
        raise ValueError("packed rows have no padding and no cache: leave attention_mask and past_key_values out")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seq_lens_q expects cumulative lengths [rows + 1], got {described(cu_seqlens)}")
    if is_readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != shape[1] or sorted(ends) != ends:
            raise ValueError(f"cu_seq_lens_q expects to rise from 0 to {shape[1]}, the number of tokens, got {ends}")


def refuse_restarts() -> None:
    raise ValueError(
        "torch.compile can't read position ids to detect packed rows: give cu_seq_lens_q and max_length_q "
        "as well, or an attention_mask for a batch of one row"
    )


def check_prompt_lengths(lengths: Any, layout: RowLayout) -> Tensor:
    """`prompt_lengths` `[R]` as a tensor of the layout."""
    rows = layout.rows
    try:
        lengths = torch.as_tensor(lengths, device=layout.first.device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"prompt_lengths expects [{rows}] integers, got {lengths!r:.100}") from None
    if lengths.shape != (rows,) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"prompt_lengths expects [{rows}] integers, got {described(lengths)}")
    if is_readable(lengths):  # elsewhere reading would synchronise
        tokens = layout.last - layout.first
        if bool(((lengths < 0) | (lengths > tokens)).any()):
            raise ValueError(
                f"prompt_lengths expects no more than each row's tokens, {tokens.tolist()}, got {lengths.tolist()}"
            )
    return lengths.to(layout.first)


def check_soft_ids(ids: Tensor, soft: SoftRows, layout: RowLayout, *, whole: bool) -> bool:
    """Whether ids hold soft tokens; refuses those that their row's soft prompt does not place. Where values can't be
    read, they hold some if any soft prompt places them by id.

    With `whole` rows (and not parts of those that a cache will hold) refuses a batch that leaves a soft prompt out.
    """
    places = any(each.placement == "inline" for each in soft.softs.values())
    if not is_readable(ids):
        return places
    if not bool((ids < 0).any()):
        if whole and soft.softs and soft.inline:
            raise ValueError(
                "PTuning's soft tokens stand in rows as negative ids, but input_ids hold none, so they would be left "
                "out: make rows with model.method.encode(tokenizer, ...), or call the bare model within "
                "model.disabled()"
            )
        return False
    placed = {name: int(each.config.length) for name, each in soft.softs.items() if each.placement == "inline"}  # type: ignore[attr-defined]
    of_token = torch.tensor(soft.of_rows(layout.rows, placed, 0))[layout.row_of_token].view_as(ids)
    wrong = (ids < -of_token).flatten()
    if bool(wrong.any()):
        at = int(wrong.int().argmax())
        row = int(layout.row_of_token[at])
        kinds = {name: type(each.config).__name__ for name, each in soft.softs.items()}
        raise ValueError(
            f"input_ids contain the soft token id {int(ids.flatten()[at])} in row {row}, but "
            f"{soft.of_rows(layout.rows, kinds, 'the bare model')[row]} places {int(of_token.flatten()[at])} "
            "soft tokens by id"
        )
    return True


def check_bare(ids: Any, adapter_names: Any) -> None:
    """Refuse inputs that a bare model can't process."""
    if adapter_names is not None:
        raise ValueError("a disabled SoftModel is the bare model: leave adapter_names out")
    if isinstance(ids, Tensor) and is_readable(ids) and bool((ids < 0).any()):
        raise ValueError(
            f"input_ids contain the soft token id {int(ids.min())}, but a disabled SoftModel is the bare model, "
            "which has no soft tokens"
        )


def check_names(names: Any, rows: int) -> None:
    if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names expects a list of names (None: the bare model), got {names!r}")
    if len(names) != rows:
        raise ValueError(f"adapter_names expects one name per row, {rows}, got {len(names)}")


def check_attention(decoder: Any, name: str) -> None:
    """Refuse a base whose attention implementation was changed from softkv's, which would ignore the prefix."""
    found = decoder.config._attn_implementation
    if found != name:
        raise ValueError(
            f'the base\'s attention was set to "{found}", which reads no prefix: expected "{name}" (detach the soft '
            "prompt to use another)"
        )


def check_ways(options: dict[str, Any]) -> None:
    """Refuse generation features that would ignore the soft prompt."""
    if options["cache_implementation"] == "paged":
        raise ValueError(f'SoftModel.generate does not support cache_implementation="paged": {_NOT_PAGED}')
    if options["token_healing"]:
        raise ValueError(
            "token_healing rewrites prompts inside generate, including soft tokens: heal them first, with "
            "heal_tokens(input_ids, tokenizer), and leave it out here"
        )


def check_reentrant(checkpointing: dict[str, Any]) -> None:
    if checkpointing.get("use_reentrant"):
        raise ValueError(
            "softkv needs non-reentrant gradient checkpointing: expected use_reentrant=False, got True (reentrant "
            "checkpoints can't carry the gradient of a prefix)"
        )


def is_readable(x: Tensor) -> bool:
    """Whether values can be checked: without synchronising with a device, and not while tracing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def described(x: Any) -> str:
    return f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
