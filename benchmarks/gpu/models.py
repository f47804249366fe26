"""Training steps and generation on random Llamas in the shapes of 1B and 8B models, softkv compared with PEFT and with
the bare model (padded rows, backward to the input embeddings; for generation the model alone)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from . import Settings, llamas

_FULL = {"rows": 16, "low": 64, "high": 512, "P": 128}
_BATCHES: dict[str, dict[str, int]] = {
    "1B": _FULL,
    "8B": _FULL | {"rows": 8},
    "tiny": {"rows": 2, "low": 5, "high": 9, "P": 3},
}
_PACKED = ("v2 packed", "prefix packed", "prompt before packed", "p-tuning packed")
_SOFTKV = (*_PACKED, "v2 padded", "v2 packed, checkpointing")
_PEERS = ("bare, padded", "PEFT prefix", "PEFT prompt", "PEFT p-tuning")
_REPEATS = {"1B": 6, "8B": 4, "tiny": 1}
# P, T, new tokens
_PROMPTS = {"1B": (2048, 128, 24), "8B": (2048, 128, 24), "tiny": (5, 4, 2)}
_GENERATE = ("bare", "softkv", "PEFT")


def jobs(settings: Settings) -> list[str]:
    if settings.quick:
        return ["train tiny: v2 packed", "train tiny: PEFT prefix", "generate tiny B=2: softkv"]
    found = [f"train 1B: {way}" for way in (*_SOFTKV, *_PEERS)]
    found += [f"generate 1B B={B}: {way}" for B in (32, 1) for way in _GENERATE]
    found += [f"train 8B: {way}" for way in ("v2 packed", "prompt before packed", *_PEERS[:3])]
    found += [f"generate 8B B={B}: {way}" for B in (32, 1) for way in _GENERATE]
    found += ["train 8B: prefix packed", "train 8B: v2 packed, checkpointing"]
    return [*found, *(f"generate {name} B=32: {way} static" for name in ("1B", "8B") for way in ("softkv", "bare"))]


def warm(settings: Settings) -> list[Callable[[], Any]]:
    """The kernels of packed rows and of decoding at both head dims."""
    from . import correctness

    calls: list[Callable[[], Any]] = []
    for D in (64, 128):
        packed = {"lengths": (200, 77, 130), "P": 128, "D": D, "H": 8}
        one = {"T": 1, "S": 200, "P": 2048, "D": D, "H": 8}
        many = {"T": 128, "P": 2048, "D": D, "H": 8}
        calls += [partial(correctness.compare, "triton", axes, settings) for axes in (packed, one, many)]
    return calls


def run(job: str, settings: Settings, seconds: float) -> dict[str, Any]:
    head, way = job.split(": ")
    what, name, *size = head.split()
    try:
        if what == "train":
            record = _train(name, way, settings)
            record["said"] = f"{record['ms']:.1f} ms"
        else:
            record = _generate(name, int(size[0].removeprefix("B=")), way, settings)
            record["said"] = f"{record['tokens_per_s']:.0f} tokens/s"
        return record
    finally:
        llamas.free(settings)


def lines(results: dict[str, Any]) -> list[str]:
    said = []
    for head in dict.fromkeys(job.split(": ")[0] for job in results):
        cells = []
        for job, record in results.items():
            if job.split(": ")[0] != head:
                continue
            speed = f"{record['tokens_per_s']:.0f} tok/s" if "tokens_per_s" in record else f"{record['ms']:.1f} ms"
            gib = f", {record['gib']:.2f} GiB" if "gib" in record else ""
            first = f", first call {record['first_s']:.0f} s" if record.get("first_s", 0) > 5 else ""
            cells.append(f"{job.split(': ')[1]} {speed}{gib}{first}")
        said.append(f"- {head}: {'; '.join(cells)}")
    return said


def _train(name: str, way: str, settings: Settings) -> dict[str, Any]:
    axes, model = _BATCHES[name], llamas.base(name, settings)
    P, vocabulary = axes["P"], llamas.SHAPES[name]["vocab_size"]
    soft = P if way == "p-tuning packed" else 0
    batch = llamas.rows(axes["rows"], axes["low"], axes["high"], vocabulary, soft)
    tokens = sum(len(row["input_ids"]) - soft for row in batch)
    if way == "bare, padded":
        step = _bare(model, llamas.padded(batch, settings.device))
        record = llamas.timed(step, settings, _REPEATS[name])
    elif way.startswith("PEFT"):
        record = _peft_training(model, way, P, llamas.padded(batch, settings.device), settings, _REPEATS[name])
    else:
        record = _softkv_training(model, way, P, batch, settings, _REPEATS[name])
    return record | {"tokens": tokens, "batch": axes}


def _softkv_training(
    model: Any, way: str, P: int, batch: list[dict[str, Any]], settings: Settings, repeats: int
) -> dict[str, Any]:
    import softkv
    from softkv.hf import checkpointing

    marks = "".join(f"[P{i}]" for i in range(1, P + 1))
    kind = way.split(" p")[0].split(",")[0] if not way.startswith("p") else way.removesuffix(" packed")
    methods: dict[str, Callable[[], Any]] = {
        "v2": lambda: softkv.PTuningV2(length=P),
        "prefix": lambda: softkv.PrefixTuning(length=P),
        "prompt before": lambda: softkv.PromptTuning(length=P, position="before", init="random"),
        "p-tuning": lambda: softkv.PTuning(template=f"{marks} [X] [Y]"),
    }
    soft = softkv.attach(model, methods[kind](), backend=None if settings.on_gpu else "torch")
    try:
        soft.train()
        if "checkpointing" in way:
            soft.gradient_checkpointing_enable()
        rows = (llamas.packed if "packed" in way else llamas.padded)(batch, settings.device)
        return llamas.timed(llamas.training_step(soft, rows), settings, repeats)
    finally:
        if "checkpointing" in way:
            checkpointing.disable(model)
        soft.detach()


def _bare(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    def step() -> Any:
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        mask, labels = batch["attention_mask"], batch["labels"]
        loss = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def _peft_training(
    model: Any, way: str, P: int, batch: dict[str, Any], settings: Settings, repeats: int
) -> dict[str, Any]:
    import torch
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    kinds = {"PEFT prefix": PrefixTuningConfig, "PEFT prompt": PromptTuningConfig, "PEFT p-tuning": PromptEncoderConfig}
    peer = get_peft_model(model, kinds[way](task_type="CAUSAL_LM", num_virtual_tokens=P)).train()
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], 1e-3)

    def step() -> Any:
        loss = peer(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return llamas.timed(step, settings, repeats)


def _generate(name: str, B: int, way: str, settings: Settings) -> dict[str, Any]:
    import time

    import torch

    import softkv

    P, T, new = _PROMPTS[name]
    model = llamas.base(name, settings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, llamas.SHAPES[name]["vocab_size"], (B, T), generator=generator).to(settings.device)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": new, "min_new_tokens": new}
    options |= {"do_sample": False} | ({"cache_implementation": "static"} if way.endswith("static") else {})
    soft = None
    if way.startswith("softkv"):
        soft = softkv.attach(model, softkv.PTuningV2(length=P), backend=None if settings.on_gpu else "torch").eval()
        target: Any = soft
    elif way == "PEFT":
        from peft import PrefixTuningConfig, get_peft_model

        target = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    else:
        target = model
    try:
        with torch.no_grad():
            start = time.perf_counter()
            target.generate(**options)
            first = time.perf_counter() - start
            record = llamas.timed(lambda: target.generate(**options), settings, repeats=2, warm_up=1)
    finally:
        if soft is not None:
            soft.detach()
    return record | {"first_s": first, "tokens_per_s": 1e3 * B * new / record["ms"], "B": B, "P": P, "T": T, "new": new}
