"""Ways to compute attention with a prefix, as data: `PROVIDERS`.

A variant takes an `AttentionProblem`, prepares what outlives a call (masks, caches, compiled code) and returns the
function to time, which returns out [B, H, T, D]. It raises `Unavailable` if it can't run. The fastest variant is
measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from softkv import prefix_attention

from .shapes import Mode, Shape

Forward = Callable[[], Any]
Variant = Callable[["AttentionProblem"], Forward]


class Unavailable(Exception):
    """Why a provider can't run here."""


@dataclass(frozen=True)
class AttentionProblem:
    """The operands of one case, laid out in memory as transformers leaves them."""

    shape: Shape
    mode: Mode
    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, G, S, D]
    v: Tensor
    prefix_k: Tensor  # [A, G, P, D]
    prefix_v: Tensor
    index: Tensor | None  # [B], where A > 1

    @classmethod
    def random(
        cls, shape: Shape, mode: Mode, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> AttentionProblem:
        torch.manual_seed(0)
        B, H, G, P, D, S = shape.B, shape.H, shape.G, shape.P, shape.D, shape.keys
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        def tokens(heads: int, length: int) -> Tensor:
            return torch.randn(B, length, heads, D, **options).transpose(1, 2)

        q = tokens(H, shape.T)
        if mode == "decoding":  # k, v come from a cache
            k, v = (torch.randn(B, G, S, D, **options) for _ in range(2))
        else:
            k, v = tokens(G, S), tokens(G, S)
        prefix_k, prefix_v = (torch.randn(shape.A, G, P, D, **options) for _ in range(2))
        index = torch.arange(B, device=device) % shape.A if shape.A > 1 else None
        for leaf in (q, k, v, prefix_k, prefix_v):
            leaf.requires_grad_(mode == "forward + backward")
        return cls(shape, mode, q, k, v, prefix_k, prefix_v, index)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.prefix_k, self.prefix_v]

    @property
    def grouped(self) -> bool:
        return self.shape.H != self.shape.G

    @property
    def on_gpu(self) -> bool:
        return self.q.is_cuda

    def joined(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, P + S, D]` with each row's prefix in front."""
        rows = slice(None) if self.index is None else self.index
        pairs = ((self.prefix_k, self.k), (self.prefix_v, self.v))
        k, v = (torch.cat([prefix[rows].expand(self.shape.B, -1, -1, -1), x], 2) for prefix, x in pairs)
        return k, v

    def joiner(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """`joined`, in each call; in decoding a cache that holds the prefix already, once for each row."""
        if self.mode != "decoding":
            return self.joined
        cache = self.joined()
        return lambda: cache

    def seen(self) -> Tensor:
        """Bool `[T, P + S]`: the whole prefix, and the tokens up to the query's own."""
        T, P, S = self.shape.T, self.shape.P, self.shape.keys
        return torch.ones(T, P + S, dtype=torch.bool, device=self.q.device).tril(P + S - T)

    def repeated(self, x: Tensor) -> Tensor:
        """`[B, G, S, D]` → `[B, H, S, D]`"""
        return x.repeat_interleave(self.shape.H // self.shape.G, 1) if self.grouped else x

    def step(self, forward: Forward, direction: Tensor, leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
        """The call of this problem's mode: out, and with a backward the gradients of the leaves."""

        def with_gradients() -> list[Tensor]:
            out = forward()
            return [out.detach(), *torch.autograd.grad(out, leaves, direction)]

        def without() -> list[Tensor]:
            with torch.no_grad():
                return [forward()]

        return with_gradients if self.mode == "forward + backward" else without


# softkv ---------------------------------------------------------------------------------------------------------------


def softkv(backend: str) -> Variant:
    def variant(problem: AttentionProblem) -> Forward:
        if backend in ("triton", "cudnn", "flash") and not problem.on_gpu:
            raise Unavailable("needs a GPU")
        return partial(prefix_attention, *problem.leaves, prefix_index=problem.index, backend=backend)

    return variant


# Concatenation, then torch's own attention ----------------------------------------------------------------------------


def sdpa_of(problem: AttentionProblem, heads: str) -> Callable[..., Tensor]:
    """SDPA with grouped heads, in one of the two ways there are."""
    if heads == "repeated heads":
        if not problem.grouped:
            raise Unavailable("every head has keys of its own")
        return lambda q, k, v, **options: sdpa(q, problem.repeated(k), problem.repeated(v), **options)
    return partial(sdpa, enable_gqa=problem.grouped)


def masked(problem: AttentionProblem, kind: str) -> dict[str, Any]:
    """The mask of the concatenated keys, as SDPA takes it."""
    if problem.mode == "decoding":
        if kind != "no mask":
            raise Unavailable("a single query sees every key")
        return {}
    if kind == "no mask":
        raise Unavailable("queries must not see later tokens")
    if kind == "lower right":  # torch's name for this very mask: no tensor where a fused kernel takes it
        if not problem.on_gpu:
            raise Unavailable("on CPU it becomes a mask tensor")
        from torch.nn.attention.bias import causal_lower_right

        return {"attn_mask": causal_lower_right(problem.shape.T, problem.shape.P + problem.shape.keys)}
    seen = problem.seen()
    return {"attn_mask": torch.zeros_like(seen, dtype=problem.q.dtype).masked_fill_(~seen, float("-inf"))
            if kind == "float mask" else seen}  # fmt: skip


def concatenate(kind: str, heads: str) -> Variant:
    def variant(problem: AttentionProblem) -> Forward:
        attend, options = sdpa_of(problem, heads), masked(problem, kind)
        return lambda: attend(problem.q, *problem.joined(), **options)

    return variant


def concatenated(heads: str) -> Variant:
    """On a cache in which the prefix already stands, once for each row."""

    def variant(problem: AttentionProblem) -> Forward:
        return partial(sdpa_of(problem, heads), problem.q, *problem.joined())

    return variant


def without_prefix(heads: str) -> Variant:
    def variant(problem: AttentionProblem) -> Forward:
        attend = sdpa_of(problem, heads)
        return partial(attend, problem.q, problem.k, problem.v, is_causal=problem.mode != "decoding")

    return variant


# Peers ----------------------------------------------------------------------------------------------------------------


def flex(problem: AttentionProblem) -> Forward:
    """FlexAttention over concatenated keys, compiled with a mask of its own."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not problem.on_gpu and problem.mode == "forward + backward":
        raise Unavailable("no backward on CPU")
    if not problem.on_gpu and not _cpp_compiler():
        raise Unavailable("needs a C++ compiler")
    T, P, S = problem.shape.T, problem.shape.P, problem.shape.keys

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key - P - S <= query - T

    torch.compiler.reset()  # or its limit on recompilations is reached
    mask = create_block_mask(visible, None, None, T, P + S, device=str(problem.q.device))
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    keys = problem.joiner()
    return lambda: attend(problem.q, *keys(), block_mask=mask, enable_gqa=problem.grouped)


def flash_attn(problem: AttentionProblem) -> Forward:
    """flash-attn over concatenated keys: its causal mask is aligned bottom-right, as is ours."""
    if not problem.on_gpu:
        raise Unavailable("needs a GPU")
    _need("flash_attn")
    from flash_attn import flash_attn_func

    keys = problem.joiner()

    def call() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (problem.q, *keys()))
        return flash_attn_func(q, k, v, causal=True).transpose(1, 2)

    return call


def cascade(problem: AttentionProblem) -> Forward:
    """FlashInfer's two levels: a page of the shared prefix, and a page of each row's tokens."""
    if not problem.on_gpu:
        raise Unavailable("needs a GPU")
    if problem.index is not None:
        raise Unavailable("one shared prefix only")
    _need("flashinfer")
    import flashinfer

    shape = problem.shape
    on: dict[str, Any] = {"device": problem.q.device, "dtype": torch.int32}
    rows = torch.arange(shape.B + 1, **on)
    levels = flashinfer.MultiLevelCascadeAttentionWrapper(
        2, torch.empty(128 << 20, dtype=torch.uint8, device=problem.q.device), "HND"
    )
    # A level has one page size: pages of all levels are as long as the longer of prefix and tokens.
    page = max(shape.P, shape.keys)
    pages = torch.zeros(shape.B + 1, 2, shape.G, page, shape.D, device=problem.q.device, dtype=problem.q.dtype)
    pages[0, 0, :, : shape.P], pages[0, 1, :, : shape.P] = problem.prefix_k[0], problem.prefix_v[0]
    pages[1:, 0, :, : shape.keys], pages[1:, 1, :, : shape.keys] = problem.k, problem.v
    levels.plan(
        [torch.tensor([0, shape.B], **on), rows],
        [torch.tensor([0, 1], **on), rows],
        [torch.zeros(1, **on), rows[1:]],
        [torch.full((1,), shape.P, **on), torch.full((shape.B,), shape.keys, **on)],
        shape.H, shape.G, shape.D, page, causal=False, q_data_type=problem.q.dtype,
    )  # fmt: skip
    q = problem.q.squeeze(2)
    return lambda: levels.run(q, pages).unsqueeze(2)


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def _cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@dataclass(frozen=True)
class Provider:
    """
    Attributes:
        variants: by what tells them apart.
        modes: those in which it means something.
        prefix: whether it computes attention to the prefix (the floor does not).
    """

    variants: dict[str, Variant]
    modes: tuple[Mode, ...] = ("forward", "forward + backward", "decoding")
    prefix: bool = True


HEADS = ("grouped heads", "repeated heads")
MASKS = ("float mask", "bool mask", "lower right", "no mask")

PROVIDERS = {
    "softkv torch": Provider({"": softkv("torch")}),
    "softkv triton": Provider({"": softkv("triton")}),
    "softkv cudnn": Provider({"": softkv("cudnn")}),
    "softkv flash": Provider({"": softkv("flash")}),
    "cat": Provider({f"{mask}, {heads}": concatenate(mask, heads) for mask in MASKS for heads in HEADS}),
    "cat cached": Provider({heads: concatenated(heads) for heads in HEADS}, ("decoding",)),
    "flex": Provider({"": flex}),
    "flash-attn cat": Provider({"": flash_attn}),
    "flashinfer cascade": Provider({"": cascade}, ("decoding",)),
    "no prefix": Provider({heads: without_prefix(heads) for heads in HEADS}, prefix=False),
}
OURS = {"cpu": "softkv torch", "cuda": "softkv triton"}
