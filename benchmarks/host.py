"""Host time of the wrapper: what a `SoftModel` adds to the bare model if arithmetic takes almost no time.

A Llama of 8 layers, hidden size 32, two rows, one thread, process time: decoding steps compared with the bare model's,
training steps (padded and packed) compared with the floor, the same tokens with backward to the input embeddings and
without a prompt. Rounds are interleaved; the lower quartile of the steps of all rounds is printed.

    python -m benchmarks.host
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import softkv

from .machine import machine
from .results import FOLDER, write_json

LAYERS, ROUNDS, STEPS = 8, 15, 20
RESULTS = FOLDER / "host.json"


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def decoding(model: Any) -> Callable[[], None]:
    """One token of each of two rows behind 12, again and again."""
    ids = torch.arange(24).view(2, 12) + 2
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

    @torch.no_grad()
    def step() -> None:
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def training(model: Any, packed: bool, embeds: bool) -> Callable[[], None]:
    ids = torch.arange(64).view(4, 16) + 2
    cu = torch.arange(0, 65, 16, dtype=torch.int32)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if packed:
        packing = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 16, "max_length_k": 16}
        batch = {name: x.view(1, -1) for name, x in batch.items()} | packing
        batch["position_ids"] = torch.arange(16).repeat(4)[None]
    if embeds:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
    model.train()

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()

    return step


def measured(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Milliseconds of each."""
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            for _ in range(STEPS):
                start = time.process_time()
                step()
                seen[name].append(1e3 * (time.process_time() - start))
    return {name: sorted(times)[len(times) // 4] for name, times in seen.items()}


def main() -> None:
    torch.set_num_threads(1)

    def attached() -> Any:
        return softkv.attach(llama(), softkv.PTuningV2(length=8)).eval()

    times = measured({"decoding, bare": decoding(llama()), "decoding, softkv": decoding(attached())}) | measured(
        {
            "training, floor": training(llama(), packed=False, embeds=True),
            "training, softkv": training(attached(), packed=False, embeds=False),
            "training, softkv packed": training(attached(), packed=True, embeds=False),
        }
    )
    added = 1e3 * (times["decoding, softkv"] - times["decoding, bare"]) / LAYERS
    ratios = {
        "decoding, added us a layer": added,
        "decoding, softkv / bare": times["decoding, softkv"] / times["decoding, bare"],
        "training, softkv / floor": times["training, softkv"] / times["training, floor"],
        "training packed, softkv / floor": times["training, softkv packed"] / times["training, floor"],
    }
    for name, value in (times | ratios).items():
        print(f"{name:32} {value:8.2f}")
    write_json(RESULTS, {"machine": machine(), "ms": times, "ratios": ratios})


if __name__ == "__main__":
    main()
