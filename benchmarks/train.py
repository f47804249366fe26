"""A training step compared with PEFT and with the floor.  Movie snippets on SmolLM2-135M-Instruct, AdamW. Providers:
softkv        packed rows, head computed once, logits only at labelled positions
- packing     the same with padded rows; and so on for each idea alone
PEFT          the same job: same rows, same initial values where the method is the same, padded as PEFT needs
floor         the same packed tokens without a prefix, backward to the input embeddings
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from . import movie_snippets
from .machine import machine
from .model_jobs import ModelJob, ModelSettings, fetch
from .peft_peer import in_peft, rows_of_matrices, without_soft_tokens
from .processes import take_turns
from .timing import summary

TEMPLATE = "[text]\nSentiment: [Y]"
P_TUNING_TEMPLATE = "[text]\n[P1][P2][P3][P4][P5][P6] Sentiment: [P7][P8] [Y]"
IDEAS = {"- packing": "packing", "- head once": "head_once", "- label logits": "label_logits"}


@dataclass(frozen=True)
class TrainingCase:
    """A method at one size, PEFT's name of it, and the providers measured beside softkv."""

    title: str
    method: str
    settings: dict[str, Any]
    peft: str | None = None
    ideas: tuple[str, ...] = ("- packing", "- label logits")
    same_start: bool = True
    template: dict[str, str] = field(default_factory=lambda: {"template": TEMPLATE})
    rows: int = 16  # a step
    grows: bool = False  # one of those that differ in P only

    @property
    def providers(self) -> list[str]:
        return ["softkv", *self.ideas, *(["PEFT"] if self.peft else []), "floor"]


def _of_length(P: int, ideas: tuple[str, ...] = ()) -> TrainingCase:
    return TrainingCase(f"P-tuning v2, P={P}", "PTuningV2", {"length": P}, "PREFIX_TUNING", ideas, grows=True)


CPU = {
    "v2-64": _of_length(64, ("- packing", "- label logits")),
    "before-100": TrainingCase(
        'Prompt-tuning "before", P=100',
        "PromptTuning",
        {"length": 100, "position": "before", "init": "random"},
        "PROMPT_TUNING",
        ("- packing", "- head once", "- label logits"),
    ),
    "v2-512": _of_length(512),
    "v2-2048": _of_length(2048),
    "v2-4096": _of_length(4096),
    "prefix-64": TrainingCase("Prefix-tuning, P=64", "PrefixTuning", {"length": 64}),
    "after-20": TrainingCase('Prompt-tuning "after", k=20', "PromptTuning", {"length": 20, "init": "random"}),
    "p-tuning": TrainingCase(
        "P-tuning, 8 soft tokens", "PTuning", {}, "P_TUNING", same_start=False, template={"template": P_TUNING_TEMPLATE}
    ),
    "encoder-16": TrainingCase('P-tuning v2, encoder="lstm", n=16', "PTuningV2", {"length": 16, "encoder": "lstm"}),
}
CUDA = {name: replace(case, rows=128) for name, case in CPU.items()}
QUICK = {
    name: replace(CPU[name], settings=CPU[name].settings | {"length": 3}, rows=4) for name in ("v2-64", "before-100")
}


def cases(device: str, quick: bool) -> dict[str, TrainingCase]:
    return QUICK if quick else {"cpu": CPU, "cuda": CUDA}[device]


class TrainingJob(ModelJob):
    """One provider's training step; `step(i)` trains on batch i and gives its loss and the tokens in the batch."""

    def __init__(self, case: TrainingCase, provider: str, settings: ModelSettings) -> None:
        import torch
        from transformers import DataCollatorForSeq2Seq

        import softkv

        super().__init__(settings)
        model, tokenizer = self.load()
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
        self.rows, self.rows_a_step = movie_snippets.read("train"), case.rows

    @staticmethod
    def _in_peft(case: TrainingCase, soft_model: Any) -> Any:
        import torch

        soft, length = soft_model.soft, soft_model.method.length
        model = soft_model.detach()
        wrapped = in_peft(model, str(case.peft), length, encoder_size=128)
        with torch.no_grad():
            if case.peft == "PREFIX_TUNING":
                start = rows_of_matrices(soft.k, soft.v)
            elif case.peft == "PROMPT_TUNING":
                start = soft.embeddings
            if case.same_start:
                wrapped.prompt_encoder["default"].embedding.weight.copy_(start)
        return wrapped

    def batch(self, number: int) -> dict[str, Any]:
        first = number * self.rows_a_step % (len(self.rows) - self.rows_a_step)
        examples = [self.encode(row) for row in self.rows[first : first + self.rows_a_step]]
        if self.drop_soft_ids:
            examples = [without_soft_tokens(example) for example in examples]
        return self.on_device(dict(self.collate(examples)))

    def step(self, number: int) -> tuple[float, tuple[float, int]]:
        batch = self.batch(number)
        tokens = batch["input_ids"].numel()
        self.wait()
        start = time.perf_counter()
        loss = self.loss(batch)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.wait()
        return time.perf_counter() - start, (loss.item(), tokens)

    def _full_loss(self, batch: dict[str, Any]) -> Any:
        return self.model(**batch).loss

    def _label_loss(self, batch: dict[str, Any]) -> Any:
        import torch.nn.functional as F

        from softkv.train.label_logits import label_logits

        output, targets = label_logits(self.model, batch)
        return F.cross_entropy(output.logits, targets)

    def _floor_loss(self, batch: dict[str, Any]) -> Any:
        import torch.nn.functional as F

        from softkv.hf.layout import IGNORED
        from softkv.train.label_logits import next_labels

        targets = next_labels(batch.pop("labels"))
        keep = targets != IGNORED
        embeds = self.model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
        logits = self.model(inputs_embeds=embeds, logits_to_keep=keep, use_cache=False, **batch).logits
        return F.cross_entropy(logits, targets[keep])


def run(
    chosen: dict[str, TrainingCase], steps: int, settings: ModelSettings, command: str, progress: Callable[[int], None]
) -> Iterator[tuple[str, Any]]:
    """(name, record) of each case."""
    fetch(settings)
    about = {"machine": machine(settings.device), "command": command, "settings": asdict(settings)}
    for name, case in chosen.items():
        yield name, measure(case, steps, settings, progress) | about


def measure(case: TrainingCase, steps: int, settings: ModelSettings, progress: Callable[[int], None]) -> dict[str, Any]:
    """Seconds and losses a step, peak memory, of every provider of a case."""
    makers = {provider: partial(TrainingJob, case, provider, settings) for provider in case.providers}
    turns = take_turns(makers, steps, progress=progress)
    if "softkv" in turns.absent:
        raise RuntimeError(f"softkv failed at {case.title}: {turns.absent['softkv']}")
    ratios = summary(turns.seconds, "softkv")
    return {
        "case": {key: value for key, value in asdict(case).items() if key != "ideas"},
        "steps": steps,
        "useful_tokens_a_step": statistics.fmean(count for _, count in turns.answers["softkv"][1:]),  # packed
        "seconds": turns.seconds,
        "first_loss": {provider: answers[0][0] for provider, answers in turns.answers.items()},
        "peak_gib": turns.peak_gib,
        "speedup_of_softkv": {name: of["speedup_of_ours"] for name, of in ratios.items() if name != "softkv"},
        "absent": turns.absent,
    }
