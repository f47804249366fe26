"""Llama shapes with random weights, rows and prompts of random ids, and the timing of whole steps."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

from . import Settings

SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 400},
}  # fmt: skip
_built: dict[str, Any] = {}  # the one that this process holds


def base(name: str, settings: Settings) -> Any:
    """The frozen model, built once for the jobs that follow each other."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    warnings.filterwarnings("ignore")
    if name not in _built:
        _built.clear()
        free(settings)
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[name], max_position_embeddings=32768, pad_token_id=0)
        with torch.device(settings.device):
            _built[name] = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa"
            )
    return _built[name].requires_grad_(False).eval()


def free(settings: Settings) -> None:
    import torch

    gc.collect()
    if settings.on_gpu:
        torch.cuda.empty_cache()


def rows(count: int, low: int, high: int, vocabulary: int, soft: int = 0) -> list[dict[str, Any]]:
    """Rows of low to high tokens, the second half of each with labels; `soft` soft tokens in front of each."""
    import torch

    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        ids = torch.randint(10, vocabulary, (length,), generator=generator).tolist()
        answer = length // 2
        labels = [-100] * (soft + answer) + ids[answer:]
        found.append({"input_ids": [*range(-1, -soft - 1, -1), *ids], "labels": labels})
    return found


def padded(batch: list[dict[str, Any]], device: str) -> dict[str, Any]:
    from softkv.train.batches import PaddingCollator

    return {name: x.to(device) for name, x in PaddingCollator()(batch).items()}


def packed(batch: list[dict[str, Any]], device: str) -> dict[str, Any]:
    from softkv.train.batches import PackingCollator

    return {name: x.to(device) if hasattr(x, "to") else x for name, x in PackingCollator()(batch).items()}


def training_step(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    """A step of softkv as `softkv.Trainer` makes it: logits where a label is, AdamW on what is learned."""
    import torch

    from softkv.train.label_logits import label_logits

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

    def step() -> Any:
        output, targets = label_logits(model, dict(batch))
        loss = torch.nn.functional.cross_entropy(output.logits.float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def timed(step: Callable[[], Any], settings: Settings, repeats: int, warm_up: int = 2) -> dict[str, Any]:
    """Median milliseconds of a call, and the peak of device memory in GiB."""
    import torch

    from softkv.profiling.host import wait

    answer = None
    for _ in range(warm_up):
        answer = step()
    wait(settings.device)
    if settings.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = step()
        wait(settings.device)
        samples.append(time.perf_counter() - start)
    record: dict[str, Any] = {"ms": 1e3 * statistics.median(samples)}
    if settings.on_gpu:
        record["gib"] = torch.cuda.max_memory_allocated() / 2**30
    if isinstance(answer, torch.Tensor) and answer.numel() == 1:
        record["loss"] = float(answer)
    return record
