"""torch.profiler over real training steps or a generation, with softkv's named ranges (`softkv.ranges`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.profiler import ProfilerActivity, profile

from softkv.io.soft_model import SoftModel
from softkv.profiling.allocations import timeline
from softkv.profiling.files import whole
from softkv.train.batches import PackingCollator
from softkv.train.trainer import Trainer

RANGE = "softkv: "


@dataclass(frozen=True)
class Line:
    """One operation or named range. Milliseconds over all calls; `own` excludes the operations inside it."""

    name: str
    calls: int
    host: float
    own_host: float
    device: float
    own_device: float


def rows(model: SoftModel, count: int, tokens: int, answer: int) -> list[dict[str, Any]]:
    """Rows of random ids, after soft tokens if the method places any in rows. The cost of a step does not depend on the
    ids."""
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (count, tokens), generator=torch.Generator())
    labels = torch.where(torch.arange(tokens) < tokens - answer, -100, ids)
    if model.soft.placement == "inline":
        length = model.soft.config.length  # type: ignore[attr-defined]
        ids = torch.cat([-torch.arange(1, length + 1).expand(count, -1), ids], 1)
        labels = F.pad(labels, (length, 0), value=-100)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids.tolist(), labels.tolist(), strict=True)]


def train(model: SoftModel, data: list[dict[str, Any]], batch: int, steps: int, warmup: int = 1) -> profile:
    """Profile `steps` steps of `softkv.Trainer`, after `warmup` steps without the profiler."""
    device = model.device.type
    with TemporaryDirectory() as folder, _profiled(device) as found:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=warmup + steps,
            per_device_train_batch_size=batch,
            save_strategy="no",
            report_to=[],
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            logging_strategy="no",
        )
        window = _Window(found, warmup)
        trainer = Trainer(model, arguments, PackingCollator(), train_dataset=data, callbacks=[window])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return found.profile


def generate(model: SoftModel, data: list[dict[str, Any]], new_tokens: int) -> profile:
    """Profile one `generate` of all rows, after a short one without the profiler."""
    ids = torch.tensor([row["input_ids"] for row in data], device=model.device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    model.eval()
    with _profiled(model.device.type) as found:
        model.generate(ids, max_new_tokens=2, **options)
        found.begin()
        model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options)
    return found.profile


class _Found:
    """A profile that is started explicitly."""

    def __init__(self, device: str) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        self.device, self.profile, self.running = device, profile(activities=activities, profile_memory=True), False

    def begin(self) -> None:
        self._wait()
        self.profile.start()
        self.running = True

    def end(self) -> None:
        if self.running:
            self._wait()
            self.profile.stop()
            self.running = False

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def _profiled(device: str) -> Iterator[_Found]:
    found = _Found(device)
    try:
        yield found
    finally:
        found.end()


class _Window(transformers.TrainerCallback):
    def __init__(self, found: _Found, warmup: int) -> None:
        self.found, self.warmup = found, warmup

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warmup:
            self.found.begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.end()


def lines(found: profile) -> tuple[list[Line], list[Line]]:
    """(named ranges in the order of their time, operations in the order of their own time)."""
    all_lines = [
        Line(
            event.key.removeprefix(RANGE),
            event.count,
            event.cpu_time_total / 1e3,
            event.self_cpu_time_total / 1e3,
            event.device_time_total / 1e3,
            event.self_device_time_total / 1e3,
        )
        for event in found.key_averages()
        if event.key != "[memory]"
    ]
    named = {event.key.removeprefix(RANGE) for event in found.key_averages() if event.key.startswith(RANGE)}
    ranges = [line for line in all_lines if line.name in named]
    operations = [line for line in all_lines if line.name not in named]
    by_time = sorted(ranges, key=lambda line: -max(line.host, line.device))
    return by_time, sorted(operations, key=lambda line: -max(line.own_host, line.own_device))


def write(found: profile, folder: Path, device: str) -> dict[str, Any]:
    """Write `trace.json` (for chrome://tracing and ui.perfetto.dev) and `memory.png`; returns the output of
    `--json`."""
    with whole(folder / "trace.json") as path:
        found.export_chrome_trace(str(path))
    points = timeline(found, device)
    with whole(folder / "memory.png") as path:
        _draw(points, path)
    ranges, operations = lines(found)
    return {
        "device": device,
        "peak_bytes": max((held for _, held in points), default=0),
        "ranges": [asdict(line) for line in ranges],
        "operations": [asdict(line) for line in operations],
    }


def _draw(points: list[tuple[float, int]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seconds, held = [at for at, _ in points], [count / 2**20 for _, count in points]
    axes.fill_between(seconds, held, step="post", alpha=0.4)
    if points:
        top = max(range(len(held)), key=held.__getitem__)
        peak = f"{held[top]:,.0f}" if held[top] >= 10 else f"{held[top]:.2g}"
        axes.annotate(f"{peak} MiB", (seconds[top], held[top]), ha="center", va="bottom")
    axes.margins(y=0.15)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB allocated since the start")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")
