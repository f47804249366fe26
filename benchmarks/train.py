"""`python -m benchmarks.train`: a training step on SmolLM2-135M-Instruct, beside PEFT and beside the floor.

16 movie snippets a step, fp32, AdamW. Providers:

  softkv        packed rows, head computed once, logits only where a label is
  - packing     the same with padded rows; and so on for each idea alone
  PEFT          the same job: same rows, same initial values where the method is the same, padded as PEFT needs
  floor         the same packed tokens without a prefix, backward to the input embeddings

Every provider is a process of its own (so its peak memory is its own), and all step in turn, so that a slow moment of
the machine hits all of them; ratios are taken round by round.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import movie_snippets, smollm2
from benchmarks.peft_peer import in_peft, without_soft_tokens
from benchmarks.timing import Spread, machine, speedup, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "train.json"
BATCH, SEED = 16, 0
TEMPLATE = "[text]\nSentiment: [Y]"
P_TUNING_TEMPLATE = "[text]\n[P1][P2][P3][P4][P5][P6] Sentiment: [P7][P8] [Y]"
IDEAS = {"- packing": "packing", "- head once": "head_once", "- label logits": "label_logits"}


@dataclass(frozen=True)
class Case:
    """A method at one size, PEFT's name of it, and the providers measured beside softkv."""

    title: str
    method: str
    settings: dict[str, Any]
    peft: str | None = None
    ideas: tuple[str, ...] = ("- packing", "- label logits")
    same_start: bool = True
    template: dict[str, str] = field(default_factory=lambda: {"template": TEMPLATE})

    @property
    def providers(self) -> list[str]:
        return ["softkv", *self.ideas, *(["PEFT"] if self.peft else []), "floor"]


CASES = {
    "v2-64": Case("P-tuning v2, P=64", "PTuningV2", {"length": 64}, "PREFIX_TUNING"),
    "before-100": Case(
        'Prompt-tuning "before", P=100',
        "PromptTuning",
        {"length": 100, "position": "before", "init": "random"},
        "PROMPT_TUNING",
        ("- packing", "- head once", "- label logits"),
    ),
    "v2-2048": Case("P-tuning v2, P=2048", "PTuningV2", {"length": 2048}, "PREFIX_TUNING"),
    "prefix-64": Case("Prefix-tuning, P=64", "PrefixTuning", {"length": 64}),
    "after-20": Case('Prompt-tuning "after", k=20', "PromptTuning", {"length": 20, "init": "random"}),
    "p-tuning": Case(
        "P-tuning, 8 soft tokens", "PTuning", {}, "P_TUNING", same_start=False, template={"template": P_TUNING_TEMPLATE}
    ),
    "encoder-16": Case('P-tuning v2, encoder="lstm", n=16', "PTuningV2", {"length": 16, "encoder": "lstm"}),
}


class Job:
    """One provider's training step; `step(i)` trains on batch i and gives its loss."""

    def __init__(self, case: Case, provider: str) -> None:
        import torch
        from transformers import DataCollatorForSeq2Seq

        import softkv

        torch.manual_seed(SEED)
        model, tokenizer = smollm2.load()
        tokenizer.padding_side = "right"
        off = IDEAS.get(provider)
        method = getattr(softkv, case.method)(**case.settings, **case.template)
        head_once: dict[str, Any] = {"head_once": False} if off == "head_once" else {}
        soft_model = softkv.attach(model, method, tokenizer=tokenizer, **head_once)
        soft_model.train()
        self.encode = lambda row: soft_model.method.encode(tokenizer, text=row["text"], answer=f" {row['label']}")
        pack, pad = softkv.PackingCollator(), DataCollatorForSeq2Seq(tokenizer)
        self.collate: Any = pad if off == "packing" or provider == "PEFT" else pack
        self.drop_soft_ids = provider in ("PEFT", "floor")
        self.model: Any = soft_model
        self.loss = self._full_loss if off == "label_logits" else self._label_loss
        if provider == "PEFT":
            self.model, self.loss = self._in_peft(case, soft_model), self._full_loss
        if provider == "floor":
            self.model, self.loss = soft_model.detach().requires_grad_(False), self._floor_loss
            self.model.set_attn_implementation("softkv")
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-3) if provider != "floor" else None
        self.rows = movie_snippets.read("train")

    @staticmethod
    def _in_peft(case: Case, soft_model: Any) -> Any:
        import torch

        soft, length = soft_model.soft, soft_model.method.length
        model = soft_model.detach()
        wrapped = in_peft(model, str(case.peft), length, encoder_size=128)
        with torch.no_grad():
            if case.peft == "PREFIX_TUNING":
                matrices = torch.stack([soft.k, soft.v], 1)  # [L, 2, 1, G, P, D]
                start = matrices.flatten(0, 2).permute(2, 0, 1, 3).flatten(1)  # [P, L·2·G·D], K before V in each layer
            elif case.peft == "PROMPT_TUNING":
                start = soft.embeddings
            if case.same_start:
                wrapped.prompt_encoder["default"].embedding.weight.copy_(start)
        return wrapped

    def batch(self, number: int) -> dict[str, Any]:
        first = number * BATCH % (len(self.rows) - BATCH)
        examples = [self.encode(row) for row in self.rows[first : first + BATCH]]
        if self.drop_soft_ids:
            examples = [without_soft_tokens(example) for example in examples]
        return dict(self.collate(examples))

    def step(self, number: int) -> tuple[float, float, int]:
        """Seconds, loss, and tokens in the batch."""
        batch = self.batch(number)
        tokens = batch["input_ids"].numel()
        start = time.perf_counter()
        loss = self.loss(batch)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - start, loss.item(), tokens

    def _full_loss(self, batch: dict[str, Any]) -> Any:
        return self.model(**batch).loss

    def _label_loss(self, batch: dict[str, Any]) -> Any:
        import torch.nn.functional as F

        from softkv.label_logits import label_logits

        output, targets = label_logits(self.model, batch)
        return F.cross_entropy(output.logits, targets)

    def _floor_loss(self, batch: dict[str, Any]) -> Any:
        import torch.nn.functional as F

        from softkv.hf.rows import IGNORED
        from softkv.label_logits import next_labels

        targets = next_labels(batch.pop("labels"))
        keep = targets != IGNORED
        embeds = self.model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
        logits = self.model(inputs_embeds=embeds, logits_to_keep=keep, use_cache=False, **batch).logits
        return F.cross_entropy(logits, targets[keep])


def worker(case: Case, provider: str, pipe: Connection) -> None:
    """Steps when told to; answers with seconds and loss, at last with its peak memory."""
    job = Job(case, provider)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        pipe.send(job.step(number))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def measure(case: Case, steps: int, console: Console) -> dict[str, Any]:
    """Seconds and losses a step, peak memory, of every provider of a case."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for provider in case.providers:
        pipes[provider], theirs = context.Pipe()
        process = context.Process(target=worker, args=(case, provider, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    for pipe in pipes.values():
        pipe.recv()
    seconds: dict[str, list[float]] = {provider: [] for provider in pipes}
    losses: dict[str, list[float]] = {provider: [] for provider in pipes}
    tokens: list[int] = []
    for number in range(steps + 1):
        for provider, pipe in pipes.items():
            pipe.send(number)
            took, loss, count = pipe.recv()
            losses[provider].append(loss)
            if provider == "softkv":  # packed: no padding among them
                tokens.append(count)
            if number:  # the first step warms up
                seconds[provider].append(took)
        console.print(f"  round {number} of {steps}", end="\r")
    peaks = {}
    for provider, pipe in pipes.items():
        pipe.send(None)
        peaks[provider] = pipe.recv()
    for process in processes:
        process.join()
    return {
        "case": {key: value for key, value in asdict(case).items() if key != "ideas"},
        "steps": steps,
        "useful_tokens_a_step": statistics.fmean(tokens[1:]),
        "seconds": seconds,
        "first_loss": {provider: values[0] for provider, values in losses.items()},
        "peak_gib": peaks,
        "speedup_of_softkv": {
            provider: asdict(speedup(seconds, "softkv", provider)) for provider in pipes if provider != "softkv"
        },
    }


def report(result: dict[str, Any]) -> Table:
    table = Table(title=result["case"]["title"])
    for column in (
        "provider",
        "s / step [80%]",
        "rows / s",
        "tokens / s",
        "peak GiB",
        "first loss",
        "softkv is faster by",
    ):
        table.add_column(column, justify="left" if column == "provider" else "right")
    for provider, sample in result["seconds"].items():
        spread = Spread.of(sample)
        ratio = result["speedup_of_softkv"].get(provider)
        table.add_row(
            provider,
            f"{spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]",
            f"{BATCH / spread.median:.2f}",
            f"{result['useful_tokens_a_step'] / spread.median:.0f}",
            f"{result['peak_gib'][provider]:.2f}",
            f"{result['first_loss'][provider]:.4f}",
            "" if ratio is None else f"{ratio['median']:.2f}x",
        )
    return table


def draw(results: dict[str, Any], path: Path) -> None:
    """Seconds a step of softkv, PEFT and the floor, a bar each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.8 * len(results)), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds a step of 16 rows", xscale="log")
    colours = {"softkv": "#e8963e", "PEFT": "#4f83cc", "floor": "#c9d1d9"}
    for row, result in enumerate(results.values()):
        shown = [provider for provider in colours if provider in result["seconds"]]
        for place, provider in enumerate(shown):
            median = statistics.median(result["seconds"][provider])
            y = row + 0.27 * (place - (len(shown) - 1) / 2)
            axes.barh(y, median, height=0.25, color=colours[provider], label=provider if row == 0 else None)
            axes.annotate(f" {median:.2f}", (median, y), va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [result["case"]["title"] for result in results.values()])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(
    cases: list[str] = typer.Option(list(CASES), "--case", help="Which cases to run."),
    steps: int = typer.Option(5, help="Timed steps of each provider."),
    output: Path = typer.Option(RESULTS, help="Where the JSON goes; the plot lies beside it."),
) -> None:
    """Measure and print; write JSON and a plot."""
    console = Console(width=max(Console().width, 110))
    results = {}
    for name in cases:
        results[name] = measure(CASES[name], steps, console)
        console.print(report(results[name]))
        write_json(
            output, {"machine": machine() | _versions(), "command": "python -m benchmarks.train", "results": results}
        )
    draw(results, output.with_suffix(".png"))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "peft", "softkv")}


if __name__ == "__main__":
    typer.run(main)
