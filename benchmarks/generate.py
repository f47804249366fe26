"""Generation after a long shared prefix, compared with PEFT and with no prefix.  The prefix is the keys and values of P
  tokens of labelled film reviews (examples in context, cached once); the prompts are other reviews, of different
  lengths, padded on the left. Greedy, always the full number of new tokens. Providers:  softkv        the prefix as a
  separate operand of attention, read once for the batch PEFT          prefix tuning with the same values, copied into
  each row's cache no prefix     the bare model with torch's SDPA: the floor

PEFT is timed only if it gives the same tokens as softkv.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from . import movie_snippets
from .machine import machine
from .model_jobs import ModelJob, ModelSettings, fetch
from .peft_peer import in_peft, rows_of_matrices
from .processes import take_turns
from .timing import summary

PROVIDERS = ("softkv", "PEFT", "no prefix")


@dataclass(frozen=True)
class GenerationCase:
    P: int
    rows: int = 16
    new_tokens: int = 32

    @property
    def title(self) -> str:
        return f"{self.rows} prompts behind P={self.P}, {self.new_tokens} new tokens"


CPU = {f"P{P}": GenerationCase(P) for P in (64, 256, 1024, 2048)}
CUDA = {f"P{P}": GenerationCase(P, rows=128, new_tokens=128) for P in (64, 1024, 4096, 8192)}
QUICK = {"P5": GenerationCase(5, rows=3, new_tokens=4)}


def cases(device: str, quick: bool) -> dict[str, GenerationCase]:
    return QUICK if quick else {"cpu": CPU, "cuda": CUDA}[device]


class GenerationJob(ModelJob):
    """One provider's `generate`; `step(i)` answers batch i and gives the new tokens."""

    def __init__(self, case: GenerationCase, provider: str, settings: ModelSettings) -> None:
        import torch

        import softkv

        super().__init__(settings)
        self.case = case
        self.model: Any
        self.model, self.tokenizer = self.load()
        if provider != "no prefix":
            examples = "".join(f"{row['text']}\nSentiment: {row['label']}\n\n" for row in movie_snippets.read("train"))
            method = softkv.PTuningV2(length=case.P, init="text", init_text=examples[: 40 * case.P])
            self.model = softkv.attach(self.model, method, tokenizer=self.tokenizer)
        if provider == "PEFT":
            soft, base = self.model.soft, self.model.detach()
            self.model = in_peft(base, "PREFIX_TUNING", case.P, encoder_size=128)
            with torch.no_grad():
                self.model.prompt_encoder["default"].embedding.weight.copy_(rows_of_matrices(soft.k, soft.v))
        self.model.eval()

    def step(self, number: int) -> tuple[float, Any]:
        rows = movie_snippets.read("test")[number * self.case.rows :][: self.case.rows]
        prompts = [f"{row['text']}\nSentiment:" for row in rows]
        batch = self.on_device(dict(self.tokenizer(prompts, return_tensors="pt", padding=True)))
        options = {"max_new_tokens": self.case.new_tokens, "min_new_tokens": self.case.new_tokens, "do_sample": False}
        self.wait()
        start = time.perf_counter()
        tokens = self.model.generate(**batch, **options)
        self.wait()
        return time.perf_counter() - start, tokens[:, batch["input_ids"].shape[1] :].tolist()


def run(
    chosen: dict[str, GenerationCase],
    rounds: int,
    settings: ModelSettings,
    command: str,
    progress: Callable[[int], None],
) -> Iterator[tuple[str, Any]]:
    """(name, record) of each case."""
    fetch(settings)
    about = {"machine": machine(settings.device), "command": command, "settings": asdict(settings)}
    for name, case in chosen.items():
        yield name, measure(case, rounds, settings, progress) | about


def measure(
    case: GenerationCase, rounds: int, settings: ModelSettings, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Seconds, tokens and peak memory of every provider of a case."""
    makers = {provider: partial(GenerationJob, case, provider, settings) for provider in PROVIDERS}
    turns = take_turns(makers, rounds, accept=same_tokens, progress=progress)
    if "softkv" in turns.absent:
        raise RuntimeError(f"softkv failed at {case.title}: {turns.absent['softkv']}")
    return {
        "case": asdict(case) | {"title": case.title},
        "rounds": rounds,
        "seconds": turns.seconds,
        "peak_gib": turns.peak_gib,
        "speedup_of_softkv": {
            name: of["speedup_of_ours"] for name, of in summary(turns.seconds, "softkv").items() if name != "softkv"
        },
        "absent": turns.absent,
    }


def same_tokens(first: dict[str, Any]) -> dict[str, str]:
    """Why PEFT is not to be timed, if it gave other tokens than softkv."""
    if not {"softkv", "PEFT"} <= first.keys() or first["PEFT"] == first["softkv"]:
        return {}
    pairs = zip(first["softkv"], first["PEFT"], strict=True)
    differ = sum(a != b for a, b in pairs)
    return {"PEFT": f"its tokens differ from softkv's in {differ} of {len(first['softkv'])} rows"}
