"""Prompt encoders of P-tuning v2, which compute K and V of an attention block from the hidden states that enter it.

    hidden [R, M, C] → encoder → states [R, M, E] → average pool over the row's own length → [R, n, E] → MLP → K, V

R is the number of rows, M the longest prompt; row r has `lengths[r]` positions, followed by padding.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softkv.methods import initial
from softkv.methods.base import BaseShape, Method, SoftPrompt

HEADS = 4  # of the attention encoder


class LSTMEncoder(nn.Module):
    """A bidirectional LSTM, half of E for each direction."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.forwards = nn.LSTM(hidden_size, size // 2, batch_first=True)
        self.backwards = nn.LSTM(hidden_size, size // 2, batch_first=True)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """States `[R, M, E]` of `hidden [R, M, C]`."""
        # Each row is reversed within its own length, so that neither direction reads padding before its tokens. (Packed
        # sequences need the lengths on the CPU and don't support empty rows.)
        at = torch.arange(hidden.shape[1], device=hidden.device).expand(mask.shape)
        mirrored = torch.where(mask, mask.sum(1, keepdim=True) - 1 - at, at)[:, :, None]
        right, _ = self.forwards(hidden)
        left, _ = self.backwards(_rows_at(hidden, mirrored))
        return torch.cat([right, _rows_at(left, mirrored)], -1)


def _rows_at(x: Tensor, at: Tensor) -> Tensor:
    """`x [R, M, C]` at the positions `at [R, M, 1]`, because `take_along_dim` would save an index as large as x."""
    return x.gather(1, at.expand(x.shape))


class AttentionEncoder(nn.Module):
    """One bidirectional pre-norm transformer layer of width E. It adds no positions: the hidden states of a causal
    model already contain them."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.enter = nn.Linear(hidden_size, size)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.leave = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """States `[R, M, E]` of `hidden [R, M, C]`."""
        states = self.enter(hidden)
        qkv = self.qkv(self.attention_norm(states)).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [R, HEADS, M, E / HEADS]
        # Every position sees itself, so that padding sees something too.
        seen = mask[:, None, :] | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        states = states + self.leave(attended.transpose(1, 2).flatten(2))
        return states + self.mlp(self.mlp_norm(states))


ENCODERS: dict[str, type[LSTMEncoder] | type[AttentionEncoder]] = {"lstm": LSTMEncoder, "attention": AttentionEncoder}


class EncodedRows(SoftPrompt):
    """The K and V of each attention block, computed for each row from its prompt.

    Args:
        config: the method.
        encoders: one for all layers, which has an MLP for each size of K and V that layers have, or one for each:
            `forward(hidden [R, M, C], mask [R, M] bool) -> [R, M, E]`.
        slots: n.
        std: initial standard deviation of the MLP's K and V, for inputs of about 1.
    """

    encodes_rows = True

    def __init__(self, config: Method, encoders: list[nn.Module], shape: BaseShape, slots: int, std: float) -> None:
        super().__init__(config)
        self.slots, self.widths = slots, shape.by_layer
        of_mlps = self.widths if len(encoders) > 1 else tuple(dict.fromkeys(self.widths))
        self._mlp_of = [layer if len(encoders) > 1 else of_mlps.index(each) for layer, each in enumerate(self.widths)]
        self.encoders = nn.ModuleList(encoder.to("cpu", torch.float32) for encoder in encoders)
        self.mlps = nn.ModuleList()
        for number, widths in enumerate(of_mlps):
            encoder = encoders[number if len(encoders) > 1 else 0]
            size = _probe(encoder, shape.hidden_size)
            last = nn.Linear(size, widths.of_slot)
            mlp = nn.Sequential(nn.Linear(size, size), nn.ReLU(), last)
            self.mlps.append(mlp)
            with torch.no_grad():
                hidden = torch.randn(4, 16, shape.hidden_size)
                pooled = pool_rows(encoder(hidden, torch.ones(4, 16, dtype=torch.bool)), torch.full((4,), 16), slots)
                initial.scale_outputs(last, mlp(pooled), std)

    def row_prefix(self, layer: int, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        encoder, mlp = self.encoders[layer if len(self.encoders) > 1 else 0], self.mlps[self._mlp_of[layer]]
        device = hidden.device.type
        # torch has no autocast on the meta device, and raises.
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            weight = next(mlp.parameters())
            if hidden.shape[1] == 0:
                hidden = hidden.new_zeros(len(hidden), 1, hidden.shape[2])
            mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # [R, M]
            states = encoder(hidden.to(weight.dtype).masked_fill(~mask[:, :, None], 0), mask)
            expected = (*mask.shape, weight.shape[1])
            if states.shape != expected:
                raise ValueError(f"the encoder's states must be [R, M, E] = {expected}, got {tuple(states.shape)}")
            kv = mlp(pool_rows(states, lengths, self.slots))  # [R, n, G·(D + Dv)]
        k, v = self.widths[layer].split(kv.to(hidden.dtype))
        return k.transpose(1, 2), v.transpose(1, 2)


def build_rows(
    config: Method, encoder: str | nn.Module, shape: BaseShape, *, slots: int, size: int, shared: bool, std: float
) -> EncodedRows:
    """`EncodedRows` with new encoders of the given name, or with copies of the user's module."""
    count = 1 if shared else shape.layers
    if isinstance(encoder, nn.Module):
        modules: list[nn.Module] = [copy.deepcopy(encoder) for _ in range(count)]
    else:
        modules = [ENCODERS[encoder](shape.hidden_size, size) for _ in range(count)]
    return EncodedRows(config, modules, shape, slots, std)


def pool_rows(states: Tensor, lengths: Tensor, slots: int) -> Tensor:
    """Adaptive average pooling of each row over its own length.

    Args:
        states: `[R, M, E]`.
        lengths: `[R]` integers; positions past it are not read. A row of length 0 gives zeros.
        slots: n; slot i averages the positions from `i·length // n` to `(i + 1)·length / n`, rounded up.

    Returns:
        `[R, n, E]`.
    """
    slot = torch.arange(slots, device=states.device)
    first = slot * lengths[:, None] // slots  # [R, n]
    end = ((slot + 1) * lengths[:, None] + slots - 1) // slots
    at = torch.arange(states.shape[1], device=states.device)
    inside = (at >= first[:, :, None]) & (at < end[:, :, None])  # [R, n, M]
    weights = inside.to(states.dtype) / (end - first).clamp_min(1)[:, :, None]
    mask = at < lengths[:, None]
    return weights @ states.masked_fill(~mask[:, :, None], 0)


@torch.no_grad()
def _probe(encoder: nn.Module, hidden_size: int) -> int:
    """E, from calling the encoder on two positions."""
    states = encoder(torch.zeros(1, 2, hidden_size), torch.ones(1, 2, dtype=torch.bool))
    if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[:2] != (1, 2):
        got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise ValueError(
            f"{type(encoder).__name__} as an encoder must map hidden [R, M, {hidden_size}] and mask [R, M] to states "
            f"[R, M, E]; for [1, 2, {hidden_size}] it gave {got}"
        )
    return states.shape[2]
