"""Host time of the wrapper: what a `SoftModel` adds to the bare model if arithmetic takes almost no time.

A Llama of 8 layers, hidden size 32, two rows, one thread, process time: decoding steps and `generate` compared with the
bare model's, training steps (padded and packed) compared with the floor, the same tokens with backward to the input
embeddings and without a prompt, and with PEFT's prefix tuning. Rounds are interleaved; the lower quartile of the steps
of all rounds is printed.

    python -m benchmarks.host
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .machine import machine
from .peft_peer import in_peft
from .results import FOLDER, read_json, write_json

LAYERS, SLOTS, ROUNDS, STEPS, NEW_TOKENS = 8, 8, 15, 20, 24
RESULTS = FOLDER / "host.json"
TABLE = """\
`python -m benchmarks.host`: a Llama of {layers} layers and hidden size 32, whose arithmetic takes almost no time;
P-tuning v2 and PEFT's prefix tuning with {slots} slots. Milliseconds of process time on one thread, lower quartile.
{device}.

| | bare | softkv | PEFT | softkv / bare | PEFT / bare |
|---|---:|---:|---:|---:|---:|
{body}
"""


def llama() -> Any:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def decoding(model: Any) -> Callable[[], None]:
    """One token of each of two rows behind 12, again and again."""
    import torch

    ids = torch.arange(24).view(2, 12) + 2
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

    @torch.no_grad()
    def step() -> None:
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def generating(model: Any) -> Callable[[], None]:
    """Greedy generation of `NEW_TOKENS` tokens after 12, in two rows."""
    import torch

    ids = torch.arange(24).view(2, 12) + 2
    mask = torch.ones_like(ids)

    def step() -> None:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)

    return step


def training(model: Any, packed: bool, embeds: bool) -> Callable[[], None]:
    import torch

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


def measured(runs: dict[str, Callable[[], None]], steps: int = STEPS) -> dict[str, float]:
    """Milliseconds of each."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, step in runs.items():
            for _ in range(steps):
                start = time.process_time()
                step()
                seen[name].append(1e3 * (time.process_time() - start))
    return {name: sorted(times)[len(times) // 4] for name, times in seen.items()}


def main() -> None:
    import torch

    import softkv

    torch.set_num_threads(1)

    def attached() -> Any:
        return softkv.attach(llama(), softkv.PTuningV2(length=SLOTS)).eval()

    def in_peer() -> Any:
        return in_peft(llama(), "PREFIX_TUNING", SLOTS, 0).eval()

    generate = {
        "generate, bare": generating(llama()),
        "generate, softkv": generating(attached()),
        "generate, PEFT": generating(in_peer()),
    }
    times = measured({"decoding, bare": decoding(llama()), "decoding, softkv": decoding(attached())})
    times |= {name: time / NEW_TOKENS for name, time in measured(generate, steps=2).items()}
    times |= measured(
        {
            "training, floor": training(llama(), packed=False, embeds=True),
            "training, softkv": training(attached(), packed=False, embeds=False),
            "training, softkv packed": training(attached(), packed=True, embeds=False),
            "training, PEFT": training(in_peer(), packed=False, embeds=False),
        }
    )
    added = 1e3 * (times["decoding, softkv"] - times["decoding, bare"]) / LAYERS
    ratios = {
        "decoding, added us a layer": added,
        "decoding, softkv / bare": times["decoding, softkv"] / times["decoding, bare"],
        "generate, softkv / bare": times["generate, softkv"] / times["generate, bare"],
        "training, softkv / floor": times["training, softkv"] / times["training, floor"],
        "training packed, softkv / floor": times["training, softkv packed"] / times["training, floor"],
    }
    for name, value in (times | ratios).items():
        print(f"{name:32} {value:8.2f}")
    write_json(RESULTS, {"machine": machine(), "ms": times, "ratios": ratios})


def table() -> str:
    """For docs/benchmarks.md."""
    record = read_json(RESULTS)
    ms, machine = record["ms"], record["machine"]
    rows = {
        "decoding step": ("decoding, bare", "decoding, softkv", None),
        "`generate`, a token": ("generate, bare", "generate, softkv", "generate, PEFT"),
        "training step, padded rows": ("training, floor", "training, softkv", "training, PEFT"),
        "training step, packed rows": ("training, floor", "training, softkv packed", None),
    }
    body = []
    for title, (bare, ours, peer) in rows.items():
        cells = [f"{ms[bare]:.2f}", f"{ms[ours]:.2f}", f"{ms[peer]:.2f}" if peer else "—"]
        cells += [f"{ms[ours] / ms[bare]:.2f}", f"{ms[peer] / ms[bare]:.2f}" if peer else "—"]
        body.append(f"| {title} | {' | '.join(cells)} |")
    device = f"{machine['cpu']}, torch {machine['torch']}, {machine['date'][:10]}"
    return TABLE.format(layers=LAYERS, slots=SLOTS, device=device, body="\n".join(body))


if __name__ == "__main__":
    main()
