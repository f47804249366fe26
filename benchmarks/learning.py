"""`python -m benchmarks.learning`: how well each method learns, beside PEFT's, LoRA and what needs no training.

Every contestant sees the same rows in the same order for the same number of steps, on SmolLM2-135M-Instruct. softkv's
run at their own learning rates, as `softkv train` does where none is given; the others at the best of those that
`benchmarks.learning_search` tried. A cell (data set, contestant, seed) is a process of its own, and its record is
written when it is done: a run goes on where an earlier one stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import typer

from . import smollm2
from .learning_sets import SETS, UNSEEN, DataSet
from .machine import machine
from .peft_peer import in_peft, without_soft_tokens
from .results import FOLDER, merge, read_json

ROWS, TEST_ROWS, SHOTS, FEATURE_ROWS = 8, 160, 8, 320
DEV_ROWS = 128  # out of the training rows: what rates are chosen on; the first of them measure a run as it goes on
LOOKED_AT, LOOKS = 48, (5, 10, 20, 40)  # rows, and after how many steps
LONGEST = 24  # tokens of a row
WARM_UP = 0.1
LENGTH, TOKENS = 32, 20  # slots of a prefix, soft tokens of a prompt
RESULTS = FOLDER / "learning.json"
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Contestant:
    """What learns.

    Attributes:
        kind: "softkv", "peft", "full" (fine-tuning of all weights), "few-shot" or "features".
        method: of softkv, or PEFT's name of it.
        options: of the method.
        rate: what `softkv.Trainer` takes for softkv's, or a number for each parameter; of others a number.
        variant: of a method: run at one seed only.
        trains: whether there are steps.
    """

    kind: str
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    rate: float | str | dict[str, float] = "auto"
    variant: bool = False

    @property
    def trains(self) -> bool:
        return self.kind in ("softkv", "peft", "full")


# The most telling ones first.
CONTESTANTS = {
    "P-tuning v2": Contestant("softkv", "PTuningV2", {"length": LENGTH}),
    "Prefix-tuning": Contestant("softkv", "PrefixTuning", {"length": LENGTH}),
    "Prompt-tuning": Contestant("softkv", "PromptTuning", {"length": TOKENS}),
    "P-tuning": Contestant("softkv", "PTuning"),
    "PEFT prefix tuning": Contestant("peft", "PREFIX_TUNING", {"length": LENGTH}, 1e-2),
    "PEFT prompt tuning": Contestant("peft", "PROMPT_TUNING", {"length": TOKENS}, 1e-1),
    "PEFT p-tuning": Contestant("peft", "P_TUNING", {"length": TOKENS}, 1e-3),
    "LoRA, r = 8": Contestant("peft", "LORA", {}, 1e-3),
    "full fine-tuning": Contestant("full", rate=3e-5),
    "few-shot in context": Contestant("few-shot"),
    "frozen features": Contestant("features"),
    "P-tuning v2, from a text": Contestant("softkv", "PTuningV2", {"init": "text"}, variant=True),
    "P-tuning v2, random": Contestant("softkv", "PTuningV2", {"length": LENGTH, "init": "random"}, variant=True),
    "P-tuning v2, reparametrised": Contestant(
        "softkv", "PTuningV2", {"length": LENGTH, "reparametrize": True}, variant=True
    ),
    "P-tuning v2, LSTM encoder": Contestant("softkv", "PTuningV2", {"length": LENGTH, "encoder": "lstm"}, variant=True),
    "P-tuning v2, attention encoder": Contestant(
        "softkv", "PTuningV2", {"length": LENGTH, "encoder": "attention"}, variant=True
    ),
    "Prefix-tuning, random": Contestant("softkv", "PrefixTuning", {"length": LENGTH, "init": "random"}, variant=True),
    "Prompt-tuning, before": Contestant(
        "softkv", "PromptTuning", {"length": TOKENS, "position": "before"}, variant=True
    ),
    "Prompt-tuning, from a text": Contestant("softkv", "PromptTuning", {"init": "text"}, variant=True),
}
OURS = ("P-tuning v2", "Prefix-tuning", "Prompt-tuning", "P-tuning")
QUICK = (*OURS, "PEFT prefix tuning", "PEFT prompt tuning")


@app.command()
def main(
    steps: int = typer.Option(40, help="Of each cell."),
    seeds: int = typer.Option(3, help="Of each contestant and data set; variants have one."),
    case: list[str] = typer.Option([], help="Cells to run, DATA/CONTESTANT/SEED; * stands for anything."),
    quick: bool = typer.Option(False, "--quick", help="Two data sets, the defaults and PEFT's, one seed: ten minutes."),
    output: Path = typer.Option(RESULTS, help="The file of results; cells in it are not run again."),
    minutes: float = typer.Option(0.0, help="Begin no cell after so many minutes (0: run all)."),
) -> None:
    """Run what has not run, and print each record."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    began, known = time.time(), list(cells(seeds, quick))
    done = read_json(output)["results"] if output.exists() else {}
    wanted = [name for name in known if name not in done and (not case or any(fnmatch(name, one) for one in case))]
    LOADED[:] = load()
    fork = multiprocessing.get_context("fork")  # cells find what is loaded
    for name in wanted:
        if minutes and time.time() - began > 60 * minutes:
            break
        with fork.Pool(1) as pool:
            record = pool.apply(run, (name, steps))
        merge(output, {name: record}, list(cells(99, False)))
        print(f"{name}: {record['correct']} of {record['rows']}, loss {record['loss']:.3f}", flush=True)


def cells(seeds: int, quick: bool) -> Iterator[str]:
    """Names of the cells, in the order in which they are worth running: variants last, at one seed."""
    first = QUICK if quick else [title for title, one in CONTESTANTS.items() if not one.variant]
    variants = [] if quick else [title for title, one in CONTESTANTS.items() if one.variant]
    for seed, titles in [*((seed, first) for seed in range(1 if quick else seeds)), (0, variants)]:
        for title in titles:
            for data in ("glosses", "sources") if quick else SETS:
                yield f"{data}/{title}/{seed}"
    if not quick:
        yield from (f"{data}/{title}/0" for title in OURS for data in UNSEEN)


def load() -> tuple[Any, Any]:
    """The base and its tokenizer; in bf16 where the processor multiplies it natively, which halves a cell's time."""
    import torch

    base, tokenizer = smollm2.load()
    native = "bf16" in torch.backends.cpu.get_cpu_capability().lower() or _flag("avx512_bf16") or _flag("amx_bf16")
    return base.to(torch.bfloat16 if native else torch.float32), tokenizer


def _flag(name: str) -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and name in info.read_text(encoding="utf-8", errors="replace")


LOADED: list[Any] = []  # the base and its tokenizer


def run(name: str, steps: int) -> dict[str, Any]:
    """The record of one cell."""
    import torch

    base, tokenizer = LOADED
    data_name, title, seed = name.split("/")
    data, contestant = (SETS | UNSEEN)[data_name], CONTESTANTS[title]
    torch.manual_seed(int(seed))
    began = time.process_time()
    if contestant.kind == "features":
        record = features(data, base, tokenizer, int(seed))
    else:
        record = Learner(contestant, data, base, tokenizer, int(seed)).record(steps)
    about = {"dtype": str(base.dtype).removeprefix("torch."), "cpu_seconds": time.process_time() - began}
    return (
        record | about | {"machine": machine(), "command": " ".join(["python -m benchmarks.learning", *sys.argv[1:]])}
    )


class Learner:
    """One contestant on one data set: a model and the rows that it learns from and is tested on."""

    def __init__(self, contestant: Contestant, data: DataSet, base: Any, tokenizer: Any, seed: int) -> None:
        self.contestant, self.data, self.tokenizer = contestant, data, tokenizer
        self.order = random.Random(seed)
        train, test = (short_rows(data, split, tokenizer) for split in ("train", "test"))
        options = dict(contestant.options)
        if contestant.kind == "few-shot":
            shots = random.Random(seed).sample(train[:-DEV_ROWS], SHOTS)
            text = "\n\n".join(data.template.replace("[text]", s["text"]).replace("[Y]", s["label"]) for s in shots)
            options = {"init": "text", "init_text": text + "\n\n"}
        elif options.get("init") == "text":
            options["init_text"] = data.instruction
        self.encode: Callable[..., dict[str, list[int]]]
        self.groups: list[dict[str, Any]]
        if contestant.kind in ("peft", "full"):
            self._in_peft(base, options)
        else:
            self._in_softkv(base, options)
        self.train = train[:-DEV_ROWS]
        self.dev, self.test = self._encoded(train[-DEV_ROWS:]), self._encoded(test[:TEST_ROWS])

    def _in_softkv(self, base: Any, options: dict[str, Any]) -> None:
        import softkv
        from softkv.methods.p_tuning import SOFT_TOKENS
        from softkv.train.factors import factor_of
        from softkv.train.rates import own_rates

        template = self.data.template
        if self.contestant.method == "PTuning":
            template = template.replace(" [Y]", f" {SOFT_TOKENS} [Y]")
        method = getattr(softkv, self.contestant.method or "PTuningV2")(template=template, **options)
        self.model: Any = softkv.attach(base, method, tokenizer=self.tokenizer)
        self.encode = lambda **fields: self.model.method.encode(self.tokenizer, **fields)
        rates, rate = own_rates(self.model), self.contestant.rate
        if isinstance(rate, dict):
            rates = {id(p): rate[name] for name, p in self.model.soft.named_parameters()}
        else:
            factor = factor_of(rate)
            rates = {each: own * factor if factor else float(rate) for each, own in rates.items()}
        self.groups = [{"params": [p], "lr": rates[id(p)]} for p in self.model.parameters() if p.requires_grad]

    def _in_peft(self, base: Any, options: dict[str, Any]) -> None:
        import peft
        import torch

        import softkv

        name = self.contestant.method
        self.half = base.dtype == torch.bfloat16
        base.requires_grad_(self.contestant.kind == "full")
        if self.contestant.kind == "full":
            self.model = base.train()
        elif name == "LORA":
            self.model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)).train()
        else:
            self.model = in_peft(base, name, options["length"], encoder_size=256)
        method = softkv.PTuningV2(length=1, template=self.data.template)
        self.encode = lambda **fields: without_soft_tokens(method.encode(self.tokenizer, **fields))
        learned = [p for p in self.model.parameters() if p.requires_grad]
        for p in learned:
            p.data = p.data.float()
        self.groups = [{"params": learned, "lr": self.contestant.rate}]

    def _encoded(self, rows: list[dict[str, str]]) -> list[dict[str, list[int]]]:
        return [self.encode(text=row["text"], answer=f" {row['label']}") for row in rows]

    def logits(self, rows: list[dict[str, list[int]]]) -> tuple[Any, Any]:
        """fp32 logits `[n, V]` where an answer's tokens are predicted, and these tokens `[n]`."""
        import torch

        from softkv.train.batches import PackingCollator, PaddingCollator
        from softkv.train.label_logits import label_logits, next_labels

        if self.contestant.kind not in ("peft", "full"):
            output, targets = label_logits(self.model, PackingCollator()(rows))
            return output.logits.float(), targets
        batch = PaddingCollator()(rows)
        targets = next_labels(batch.pop("labels"))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            logits = self.model(**batch).logits[:, -targets.shape[1] :]
        return logits[targets >= 0].float(), targets[targets >= 0]

    def record(self, steps: int) -> dict[str, Any]:
        """Trains and tests."""
        self.learn(steps)
        hits, loss = self.measure(self.test)
        learned = sum(p.numel() for group in self.groups for p in group["params"]) if self.contestant.trains else 0
        used = sorted({group["lr"] for group in self.groups}) if self.contestant.trains else []
        return {
            "steps": len(self.losses), "rows_a_step": ROWS, "rates": used, "trainable": learned,
            "losses": [round(one, 4) for one in self.losses], "looks": self.looks, "looked_at": LOOKED_AT,
            **scored(hits, loss),
        }  # fmt: skip

    def learn(self, steps: int, looks: Collection[int] = LOOKS) -> None:
        """AdamW, a warm-up of a tenth and a linear decay, gradients clipped to 1. Keeps the loss of each step, and
        what looks at held-out rows found: steps, CPU seconds of training so far, right answers and loss."""
        import torch
        import torch.nn.functional as F

        self.losses: list[float] = []
        self.looks: list[tuple[int, float, int, float]] = []
        if not self.contestant.trains:
            return
        optimizer = torch.optim.AdamW([dict(group) for group in self.groups], weight_decay=0.0)
        warm = max(1, int(WARM_UP * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        )
        learned = [p for group in self.groups for p in group["params"]]
        seconds = 0.0
        for step in range(steps + 1):
            if step in looks:
                hits, held_out = self.measure(self.dev[:LOOKED_AT])
                self.looks.append((step, round(seconds, 3), sum(hits), round(held_out, 4)))
            if step == steps:
                return
            began = time.process_time()
            self.model.train()
            loss = F.cross_entropy(*self.logits(self._encoded(self.order.sample(self.train, ROWS))))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            self.losses.append(loss.item())
            seconds += time.process_time() - began

    def measure(self, data: list[dict[str, list[int]]]) -> tuple[list[bool], float]:
        """Which rows are right (the likeliest class, or the whole answer word for word), and the mean loss of an
        answer's token."""
        import torch
        import torch.nn.functional as F

        self.model.eval()
        first = [self.tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in self.data.classes]
        hits: list[bool] = []
        total, count = 0.0, 0
        for start in range(0, len(data), 32):
            rows = data[start : start + 32]
            with torch.no_grad():
                logits, targets = self.logits([dict(row) for row in rows])
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
            lengths = [sum(label >= 0 for label in row["labels"]) for row in rows]
            for scores, answer in zip(logits.split(lengths), targets.split(lengths), strict=True):
                chosen = first[int(scores[0, first].argmax())] if first else None
                right = chosen == int(answer[0]) if first else bool((scores.argmax(-1) == answer).all())
                hits.append(bool(right))
        return hits, total / count


def scored(hits: list[bool], loss: float) -> dict[str, Any]:
    """Of a record; hits are a character a row, 1 for right."""
    return {"correct": sum(hits), "rows": len(hits), "hits": "".join(str(int(hit)) for hit in hits), "loss": loss}


def short_rows(data: DataSet, split: str, tokenizer: Any) -> list[dict[str, str]]:
    """The rows that are taken: the same ones for all contestants."""
    rows = data.read(split)
    texts = [data.template.replace("[text]", row["text"]).replace("[Y]", row["label"]) for row in rows]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [row for row, one in zip(rows, ids, strict=True) if len(one) <= LONGEST]


def features(data: DataSet, base: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """A logistic regression on the frozen model's last hidden state, learned from as many rows as the others see."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    import softkv

    method = softkv.PTuningV2(length=1, template=data.template)

    def read(rows: list[dict[str, str]]) -> tuple[list[Any], list[str]]:
        vectors, labels = [], []
        for row in rows:
            ids = method.encode(tokenizer, text=row["text"])["input_ids"]
            with torch.no_grad():
                vectors.append(base.model(torch.tensor([ids])).last_hidden_state[0, -1].float().numpy())
            labels.append(row["label"])
        return vectors, labels

    train, test = (short_rows(data, split, tokenizer) for split in ("train", "test"))
    vectors, labels = read(random.Random(seed).sample(train[:-DEV_ROWS], FEATURE_ROWS))
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, C=0.01)).fit(vectors, labels)
    vectors, labels = read(test[:TEST_ROWS])
    hits = [bool(hit) for hit in fitted.predict(vectors) == labels]
    classes = list(fitted.classes_)
    chances = fitted.predict_proba(vectors)
    known = [chances[row, classes.index(label)] for row, label in enumerate(labels) if label in classes]
    loss = -sum(torch.tensor(known).clamp(min=1e-9).log().tolist()) / len(known)
    return {
        "steps": 0, "rows_a_step": FEATURE_ROWS, "rates": [], "trainable": len(classes) * (len(vectors[0]) + 1),
        "losses": [], "looks": [], **scored(hits, loss),
    }  # fmt: skip


if __name__ == "__main__":
    app()
