"""`python -m benchmarks.adapters`: one batch of 16 rows that name 1 to 16 different adapters.

P-tuning v2 prefixes of 64 slots, movie snippets as prompts, SmolLM2-135M-Instruct. Providers:

  softkv             all rows in one batch, `adapter_names` a row
  one by one         softkv's `set_adapter` for each adapter, and its rows
  PEFT one by one    the same in PEFT: prefix tuning with the same values

Where an adapter's rows come alone, their padding is cut to their own longest. All must give the same tokens before
anything is timed; they run in turn, and ratios are taken round by round. A run of some cases replaces these in the
results and leaves the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

import softkv

from . import movie_snippets, plots
from .machine import machine
from .model_jobs import ModelJob, ModelSettings
from .peft_peer import in_peft, rows_of_matrices
from .results import FOLDER, merge
from .timing import interleaved, summary

PROVIDERS = ("softkv", "one by one", "PEFT one by one")
TEMPLATE = "[text]\nSentiment: [Y]"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A batch whose row r has adapter r modulo `adapters`."""

    mode: str
    adapters: int
    rows: int = 16
    P: int = 64
    new_tokens: int = 8

    @property
    def names(self) -> list[str]:
        return [f"a{row % self.adapters}" for row in range(self.rows)]


CASES = {f"{mode}-{count}": Case(mode, count) for mode in ("generation", "forward") for count in (1, 2, 4, 8, 16)}
QUICK = {f"{mode}-2": Case(mode, 2, rows=3, P=3, new_tokens=2) for mode in ("generation", "forward")}


class Job(ModelJob):
    """One base with as many adapters as rows in softkv, another in PEFT with the same values, and the prompts."""

    def __init__(self, case: Case, settings: ModelSettings) -> None:
        super().__init__(settings)
        model, tokenizer = self.load()
        method = softkv.PTuningV2(length=case.P, init="vocabulary", template=TEMPLATE)
        self.ours = softkv.attach(model, method).eval()
        self.theirs = in_peft(self.load()[0], "PREFIX_TUNING", case.P, encoder_size=1).eval()
        for name in dict.fromkeys(Case(case.mode, case.rows, case.rows).names):
            self.ours.add_adapter(name, method)
            self.theirs.add_adapter(name, self.theirs.peft_config["default"])
            prefix: Any = self.ours.adapters[name].prefix()  # type: ignore[operator]
            self.theirs.prompt_encoder[name].embedding.weight.data.copy_(rows_of_matrices(prefix.k, prefix.v))
        texts = [row["text"] for row in movie_snippets.read("test")[: case.rows]]
        prompts = {"input_ids": [method.encode(tokenizer, text=text)["input_ids"] for text in texts]}
        self.batch: Batch = self.on_device(dict(tokenizer.pad(prompts, return_tensors="pt", padding_side="left")))

    def providers(self, case: Case) -> dict[str, Callable[[], Tensor]]:
        """What answers the batch: the tokens `[rows, new_tokens]` generated, or the logits `[rows, V]` of a forward."""
        together = {"softkv": lambda: self.answer(self.ours, case, self.batch, adapter_names=case.names)}
        apart = {"one by one": self.ours, "PEFT one by one": self.theirs}
        return together | {name: lambda model=model: self.one_by_one(model, case) for name, model in apart.items()}

    def one_by_one(self, model: Any, case: Case) -> Tensor:
        answers: dict[int, Tensor] = {}
        for name in dict.fromkeys(case.names):
            rows = [row for row in range(case.rows) if case.names[row] == name]
            first = int(self.batch["attention_mask"][rows].argmax(1).min())
            model.set_adapter(name)
            found = self.answer(model, case, {key: value[rows, first:] for key, value in self.batch.items()})
            answers |= dict(zip(rows, found, strict=True))
        return torch.stack([answers[row] for row in range(case.rows)])

    @torch.no_grad()
    def answer(self, model: Any, case: Case, batch: Batch, **options: Any) -> Tensor:
        if case.mode == "generation":
            length = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens, "do_sample": False}
            return model.generate(**batch, **length, **options)[:, -case.new_tokens :]
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # without them, PEFT's depend on padding
        return model(**batch, **options, position_ids=positions, logits_to_keep=1).logits[:, -1]


def measure(job: Job, case: Case, seconds: float) -> dict[str, Any]:
    """Seconds of every provider, once their tokens were found to be the same."""
    providers = job.providers(case)
    tokens = {name: run() if case.mode == "generation" else run().argmax(-1) for name, run in providers.items()}
    for name, found in tokens.items():
        if not torch.equal(found, tokens["softkv"]):
            raise RuntimeError(f"{case}: the tokens of {name!r} differ from softkv's")
    times = interleaved(providers, seconds, at_least=3, hot=False)
    return {
        "case": asdict(case),
        "seconds": {name: [1e-3 * one for one in sample] for name, sample in times.items()},
        "speedup_of_softkv": {
            name: of["speedup_of_ours"] for name, of in summary(times, "softkv").items() if name != "softkv"
        },
    }


def rows_a_second(record: dict[str, Any], provider: str) -> float:
    sample = sorted(record["seconds"][provider])
    return float(record["case"]["rows"] / sample[len(sample) // 2])


def draw(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Rows a second over the number of adapters in a batch."""
    panels: dict[str, plots.Lines] = {}
    for record in records:
        case, lines = record["case"], panels.setdefault(f"{record['case']['mode']}: rows / s", {})
        for provider in PROVIDERS:
            lines.setdefault(provider, []).append((case["adapters"], rows_a_second(record, provider)))
    figure = plots.growth("A batch of 16 rows", "different adapters in the batch", panels)
    for axes in figure.axes:
        axes.set_yscale("linear")
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def main(
    case: list[str] = typer.Option([], help="Which cases to run; all of them without."),
    seconds: float = typer.Option(4.0, help="Timed seconds of each case; three rounds at least."),
    quick: bool = typer.Option(False, help="A tiny model, to see that it runs."),
    output: Path = typer.Option(FOLDER / "adapters.json", help="Where the JSON goes; the plot lies beside it."),
) -> None:
    """Measure and print; write JSON and a plot."""
    known = QUICK if quick else CASES
    chosen = {name: known[name] for name in case or known}
    settings = ModelSettings.of("cpu", quick)
    job = Job(next(iter(known.values())), settings)
    command = " ".join(["python -m benchmarks.adapters", *sys.argv[1:]])
    about = {"machine": machine(), "command": command, "settings": asdict(settings)}
    for name, one in chosen.items():
        record = measure(job, one, seconds) | about
        content = merge(output, {name: record}, list(known))
        rates = (f"{provider} {rows_a_second(record, provider):.1f}" for provider in PROVIDERS)
        print(f"{name}: rows / s: {', '.join(rates)}", flush=True)
    draw(content["results"].values(), output.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
