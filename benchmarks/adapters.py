"""One batch of 16 rows with 1 to 16 different adapters.  P-tuning v2 prefixes of 64 slots, movie snippets as prompts,
  SmolLM2-135M-Instruct. Providers:  softkv             all rows in one batch, with one of `adapter_names` per row one
  by one         softkv's `set_adapter` for each adapter, then its rows PEFT one by one    the same in PEFT: prefix
  tuning with the same values

If an adapter's rows run alone, they are padded only to the longest of them. Providers that give other tokens than
softkv are listed but not timed; the others are interleaved, and ratios are computed per round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import softkv

from . import movie_snippets
from .machine import machine
from .model_jobs import ModelJob, ModelSettings
from .peft_peer import in_peft, rows_of_matrices
from .timing import clock_of, interleaved, summary

TEMPLATE = "[text]\nSentiment: [Y]"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class AdapterCase:
    """A batch whose row r has adapter r modulo `adapters`."""

    mode: str
    adapters: int
    rows: int = 16
    P: int = 64
    new_tokens: int = 8

    @property
    def names(self) -> list[str]:
        return [f"a{row % self.adapters}" for row in range(self.rows)]


MODES = ("generation", "forward")
CASES = {f"{mode}-{count}": AdapterCase(mode, count) for mode in MODES for count in (1, 2, 4, 8, 16)}
QUICK = {f"{mode}-{count}": AdapterCase(mode, count, rows=3, P=3, new_tokens=2) for mode in MODES for count in (1, 2)}


def cases(quick: bool) -> dict[str, AdapterCase]:
    return QUICK if quick else CASES


class AdaptersJob(ModelJob):
    """One base with as many adapters as rows in softkv, another in PEFT with the same values, and the prompts."""

    def __init__(self, case: AdapterCase, settings: ModelSettings) -> None:
        super().__init__(settings)
        model, tokenizer = self.load()
        method = softkv.PTuningV2(length=case.P, init="vocabulary", template=TEMPLATE)
        self.ours = softkv.attach(model, method).eval()
        names = list(dict.fromkeys(AdapterCase(case.mode, case.rows, case.rows).names))
        for name in names:
            self.ours.add_adapter(name, method)
        self.absent: dict[str, str] = {}
        try:
            self.theirs = in_peft(self.load()[0], "PREFIX_TUNING", case.P, encoder_size=1).eval()
        except ImportError as error:
            self.absent["PEFT one by one"] = str(error)
        for name in [] if self.absent else names:
            self.theirs.add_adapter(name, self.theirs.peft_config["default"])
            prefix: Any = self.ours.adapters[name].prefix()  # type: ignore[operator]
            self.theirs.prompt_encoder[name].embedding.weight.data.copy_(rows_of_matrices(prefix.k, prefix.v))
        texts = [row["text"] for row in movie_snippets.read("test")[: case.rows]]
        prompts = {"input_ids": [method.encode(tokenizer, text=text)["input_ids"] for text in texts]}
        self.batch: Batch = self.on_device(dict(tokenizer.pad(prompts, return_tensors="pt", padding_side="left")))

    def providers(self, case: AdapterCase) -> dict[str, Callable[[], Tensor]]:
        """What answers the batch: the tokens `[rows, new_tokens]` generated, or the logits `[rows, V]` of a forward."""
        together = {"softkv": lambda: self.answer(self.ours, case, self.batch, adapter_names=case.names)}
        apart = {"one by one": self.ours} | ({} if self.absent else {"PEFT one by one": self.theirs})
        return together | {name: lambda model=model: self.one_by_one(model, case) for name, model in apart.items()}

    def one_by_one(self, model: Any, case: AdapterCase) -> Tensor:
        answers: dict[int, Tensor] = {}
        for name in dict.fromkeys(case.names):
            rows = [row for row in range(case.rows) if case.names[row] == name]
            first = int(self.batch["attention_mask"][rows].argmax(1).min())
            model.set_adapter(name)
            found = self.answer(model, case, {key: value[rows, first:] for key, value in self.batch.items()})
            answers |= dict(zip(rows, found, strict=True))
        return torch.stack([answers[row] for row in range(case.rows)])

    @torch.no_grad()
    def answer(self, model: Any, case: AdapterCase, batch: Batch, **options: Any) -> Tensor:
        if case.mode == "generation":
            length = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens, "do_sample": False}
            return model.generate(**batch, **length, **options)[:, -case.new_tokens :]
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # without them, PEFT's depend on padding
        return model(**batch, **options, position_ids=positions, logits_to_keep=1).logits[:, -1]


def run(
    chosen: dict[str, AdapterCase], seconds: float, settings: ModelSettings, command: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, record) of each case."""
    job = AdaptersJob(next(iter(chosen.values())), settings)
    about = {"machine": machine(settings.device), "command": command, "settings": asdict(settings)}
    for name, case in chosen.items():
        yield name, measure(job, case, seconds) | about


def measure(job: AdaptersJob, case: AdapterCase, seconds: float) -> dict[str, Any]:
    """Seconds of every provider whose tokens are softkv's."""
    providers = job.providers(case)
    tokens = {name: run() if case.mode == "generation" else run().argmax(-1) for name, run in providers.items()}
    absent = dict(job.absent)
    for name, found in tokens.items():
        differ = int((found != tokens["softkv"]).view(case.rows, -1).any(1).sum())
        if differ:
            absent[name] = f"its tokens differ from softkv's in {differ} of {case.rows} rows"
            del providers[name]
    times = interleaved(providers, seconds, at_least=3, hot=False, clock=clock_of(job.settings.device))
    return {
        "case": asdict(case),
        "seconds": {name: [1e-3 * one for one in sample] for name, sample in times.items()},
        "speedup_of_softkv": {
            name: of["speedup_of_ours"] for name, of in summary(times, "softkv").items() if name != "softkv"
        },
        "absent": absent,
    }
