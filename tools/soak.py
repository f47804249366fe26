"""Soak test: threads generate and run forward passes with mixed adapters and lengths while others save, load, add and
delete adapters and compute text prefixes. Every result must equal that of a single thread, and memory must stay flat.

    python -m tools.soak --minutes 30
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import softkv
from tests.robustness.models import IDS, VOCAB, attached, llama, scatter

ADAPTERS = {
    "head": softkv.PromptTuning(length=3, position="before"),
    "after": softkv.PromptTuning(length=2),
    "shared": softkv.PrefixTuning(length=5),
    "encoder": softkv.PTuningV2(length=2, encoder="lstm", encoder_size=8),
}
WARM, GROWTH = 0.2, 64 << 20  # of the time; bytes that memory may grow by after it


def requests(number: int) -> list[dict[str, Any]]:
    draw, found = random.Random(0), []
    for _ in range(number):
        rows, width = draw.randint(1, 3), draw.randint(2, 12)
        ids = torch.tensor([[draw.randrange(2, VOCAB) for _ in range(width)] for _ in range(rows)])
        mask = torch.ones_like(ids)
        for row in mask:
            row[: draw.randrange(width)] = 0
        names = [draw.choice([*ADAPTERS, "default", None]) for _ in range(rows)]
        found.append({"input_ids": ids, "attention_mask": mask, "adapter_names": names})
    return found


def serve(model: softkv.SoftModel, request: dict[str, Any], writes: bool) -> list[Any]:
    if writes:
        return model.generate(**request, max_new_tokens=4).tolist()
    with torch.no_grad():
        return model(**request).logits[:, -1].argmax(-1).tolist()


def main(minutes: float) -> None:
    torch.set_num_threads(1)
    model = attached()
    for name, method in ADAPTERS.items():
        model.add_adapter(name, method)
    scatter(model)
    model.eval()
    asked = requests(40)
    want = [[serve(model, request, writes) for writes in (False, True)] for request in asked]
    folder, ends = Path(tempfile.mkdtemp()), time.monotonic() + 60 * minutes
    counts: dict[str, int] = {}
    errors: list[BaseException] = []

    def ask(draw: random.Random) -> None:
        number, writes = draw.randrange(len(asked)), draw.random() < 0.5
        found = serve(model, asked[number], writes)
        if found != want[number][writes]:
            raise AssertionError(f"request {number} was answered with {found}, alone with {want[number][writes]}")

    def save_and_load(draw: random.Random) -> None:
        name = draw.choice([*ADAPTERS])
        model.save_pretrained(folder / name, adapter_name=name)
        softkv.load(llama(), folder / name).detach()

    def adapters_come_and_go(draw: random.Random) -> None:
        model.add_adapter("guest", softkv.Prefix.from_ids(model, IDS[:, : draw.randint(1, 5)]))
        with model.using("guest"):
            model.generate(IDS, max_new_tokens=2)
        model.delete_adapter("guest")

    def work(task: Callable[[random.Random], None], seed: int) -> None:
        draw = random.Random(seed)
        try:
            while time.monotonic() < ends and not errors:
                task(draw)
                counts[task.__name__] = counts.get(task.__name__, 0) + 1
        except BaseException as error:
            errors.append(error)

    tasks = [ask, ask, ask, save_and_load, adapters_come_and_go]
    threads = [threading.Thread(target=work, args=(task, seed)) for seed, task in enumerate(tasks)]
    for thread in threads:
        thread.start()
    time.sleep(60 * minutes * WARM)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for thread in threads:
        thread.join()
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    if errors:
        raise errors[0]
    if grown > GROWTH:
        raise AssertionError(f"memory grew by {grown >> 20} MiB in {minutes * (1 - WARM):.1f} minutes")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    done = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    print(f"{minutes:g} minutes: {done}; every answer right; memory {grown / 2**20:+.1f} MiB, peak {peak:,} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    main(parser.parse_args().minutes)
