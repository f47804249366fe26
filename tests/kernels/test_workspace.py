"""What `softkv plan` says the kernels allocate for themselves is what they allocate."""

from typing import Any

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import softkv.kernels as engine
from softkv.kernels.launch import target_of
from softkv.methods.base import BaseShape
from softkv.profiling import compile as offline
from softkv.profiling import plan as planning
from softkv.profiling.allocations import peak
from tests.kernels.device import DEVICE

H, G, D, P = 4, 2, 16, 20
LENGTHS = (5, 30, 12, 30)
BLOCK, MOST_BLOCKS = 512, 16  # of torch's allocator for CUDA


@pytest.mark.parametrize(("encoder", "split"), [(None, True), ("lstm", False)])
def test_a_backward_allocates_what_is_planned(encoder: Any, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    N, A = sum(LENGTHS), 1 if encoder is None else len(LENGTHS)
    q, k, v = (torch.randn(N, heads, D, device=DEVICE) for heads in (H, G, G))
    prefix = [torch.randn(A, G, P, D, device=DEVICE) for _ in "kv"]
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=DEVICE)
    nothing: dict[str, Any] = dict.fromkeys(
        ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "sinks", "window", "softcap")
    )
    options = nothing | {"scale": 0.25, "is_causal": True, "window_covers_prefix": False}
    options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 30, "max_seqlen_k": 30}
    out, lse = engine.forward(q, k, v, *prefix, **options)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=activities, profile_memory=True) as measured:
        gradients = engine.backward(q, None, out, lse, q, k, v, *prefix, needs=(True,) * 5 + (False,), **options)
    allocated = peak(measured, DEVICE) - sum(gradient.nbytes for gradient in gradients if gradient is not None)

    monkeypatch.setitem(offline.TARGETS, "here", (None, target_of(q)))
    config = transformers.LlamaConfig(hidden_size=H * D, num_attention_heads=H, num_key_value_heads=G)
    job = planning.PlannedStep(config, "p-tuning-v2", P, 4, LENGTHS, 1, torch.float32, encoder=encoder, target="here")
    planned = planning._kernels(job, BaseShape(1, G, D, D, H * D, H * D, 100), packed=True)
    if DEVICE == "cuda":  # blocks are rounded up, and more multiprocessors split more
        assert planned <= allocated < planned + BLOCK * MOST_BLOCKS
        return
    assert planned == allocated
    statistics = 2 * 4 * H * N
    assert (planned > statistics) is split
