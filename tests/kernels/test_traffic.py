"""Bytes that each kernel reads and writes, counted load by load in the interpreter, are those of docs/kernels.md.

Counted are addresses: what neighbouring programs read again is found in L2. Lanes that are masked off move nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import softkv.kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")


@dataclass
class CountedLaunch:
    kernel: str
    bytes: dict[int, set[int]] = field(default_factory=dict)  # element size → addresses
    moved: int = 0  # with what is read again

    @property
    def unique(self) -> int:
        return sum(size * len(addresses) for size, addresses in self.bytes.items())


@contextmanager
def counting() -> Iterator[list[CountedLaunch]]:
    from triton.runtime import interpreter

    builder, launches = interpreter.InterpreterBuilder, []
    load, store, call = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__

    def count(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        launches[-1].bytes.setdefault(size, set()).update(addresses.tolist())
        launches[-1].moved += size * addresses.size

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_call(self: Any, *values: Any, **named: Any) -> Any:
        launches.append(CountedLaunch(self.fn.__name__.removesuffix("_kernel")))
        return call(self, *values, **named)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_call),
    ):
        yield launches


B, H, G, S, P, D, e = 3, 4, 2, 40, 33, 32, 2


def operands(T: int, P: int, B: int = B, S: int = S) -> tuple[torch.Tensor, ...]:
    make = lambda *shape: torch.randn(*shape, dtype=torch.float16)  # noqa: E731
    q, k, v = make(B, H, T, D), make(B, G, S, D), make(B, G, S, D)
    return (q, k, v, make(1, G, P, D), make(1, G, P, D)) if P else (q, k, v, None, None)


OPTIONS = dict.fromkeys(
    ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q")
) | {
    "max_seqlen_k": None,
    "sinks": None,
    "scale": D**-0.5,
    "is_causal": True,
    "window": None,
    "window_covers_prefix": False,
    "softcap": None,
}


def test_training_moves_what_the_formulas_say() -> None:
    T = S
    tensors = operands(T, P)
    with counting() as launches:
        out, lse = softkv.kernels.forward(*tensors, **OPTIONS)
        softkv.kernels.backward(out, None, out, lse, *tensors, needs=(True,) * 5 + (False,), **OPTIONS)
    forward, prepare, dq, dkv, _ = launches
    items = B * T * H
    assert forward.unique == e * D * (2 * items + 2 * G * (P + B * S)) + 4 * items
    assert prepare.unique == e * D * items + 12 * items  # dout is out here: read once
    assert dq.unique == e * D * (3 * items + 2 * G * (P + B * S)) + 8 * items
    parts, rest = divmod(dkv.unique - e * D * (2 * items + 4 * G * B * S + 2 * G * P) - 8 * items, 8 * G * P * D)
    assert (parts, rest) == (2, 0)  # of the prefix's gradients, fp32


def test_a_reduction_in_parts_adds_its_parts() -> None:
    short = 9
    tensors = operands(S, short)
    with counting() as launches:
        out, lse = softkv.kernels.forward(*tensors, **OPTIONS)
        needs = (False, False, False, True, True, False)  # a frozen base's first layer
        softkv.kernels.backward(out, None, out, lse, *tensors, needs=needs, **OPTIONS)
    _, _, dprefix, *adds = launches
    assert [add.kernel for add in adds] == ["add_parts"]
    items, slots = B * S * H, G * short
    parts, rest = divmod(adds[0].unique - 2 * e * D * slots, 8 * D * slots)
    assert rest == 0
    assert parts > 1
    assert dprefix.unique == e * D * (2 * items + 2 * slots) + 8 * items + parts * 8 * slots * D


def test_a_concatenated_prefix_moves_it_once_a_row() -> None:
    T = S
    q, k, v, prefix_k, prefix_v = operands(T, P)
    joined = [torch.cat([x.expand(B, -1, -1, -1), y], 2) for x, y in ((prefix_k, k), (prefix_v, v))]
    with counting() as launches:
        ours, _ = softkv.kernels.forward(q, k, v, prefix_k, prefix_v, **OPTIONS)
        theirs, _ = softkv.kernels.forward(q, *joined, None, None, **OPTIONS)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    assert launches[1].unique - launches[0].unique == e * D * 2 * G * P * (B - 1)


def test_decoding_reads_the_shared_prefix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softkv.kernels.decode, "LAUNCH_BYTES", 0)
    rows = 8
    tensors = operands(1, P, B=rows)
    with counting() as launches:
        softkv.kernels.forward(*tensors, **OPTIONS)
    decode, merge = launches
    items = rows * H
    keys = e * D * 2 * G * (P + rows * S)
    parts, rest = divmod(decode.unique - keys - e * D * items, 4 * (D + 1) * items)
    assert rest == 0
    assert parts >= 2
    assert merge.unique == parts * 4 * (D + 1) * items + (e * D + 4) * items
    assert decode.moved - decode.unique <= e * D * items * parts  # keys are read once, q by each part


def test_a_short_decoding_reads_the_prefix_for_each_row_and_writes_no_parts() -> None:
    rows, P, S = 8, 17, 20
    tensors = operands(1, P, B=rows, S=S)
    with counting() as launches:
        softkv.kernels.forward(*tensors, **OPTIONS)
    (alone,) = launches
    items = rows * H
    assert alone.unique == e * D * (2 * items + 2 * G * (P + rows * S)) + 4 * items
    assert alone.moved - alone.unique == e * D * 2 * G * P * (rows - 1)
