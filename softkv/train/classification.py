"""Classification by verbalizers: each class is an answer text, the likeliest answer wins; measures with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.hf.layout import IGNORED
from softkv.io.soft_model import SoftModel
from softkv.methods.initial import check_positive
from softkv.train.batches import PackingCollator
from softkv.train.label_logits import label_logits

_Z = 1.959964  # 95% of a normal distribution lie within this many deviations
_RESAMPLES = 2000


@dataclass(frozen=True)
class Accuracy:
    """Correct answers among n, with Wilson's 95% confidence interval (E. B. Wilson, JASA 1927)."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.total:
            return math.nan, math.nan
        z, n, p = _Z, self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95% confidence interval."""

    value: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.2f}, {high:.2f}]"


@torch.no_grad()
def classify(
    model: SoftModel,
    tokenizer: Any,
    rows: Sequence[dict[str, str]],
    answers: Sequence[str],
    *,
    batch_size: int = 32,
) -> Tensor:
    """The log-probability of each answer after each row's prompt.

    Args:
        model: in evaluation mode for repeatable answers.
        tokenizer: the model's.
        rows: the fields of the method's template, one dict a row.
        answers: the texts that stand for the classes (the verbalizers), at least one.
        batch_size: rows a forward pass, packed.

    Returns:
        fp32 `[rows, answers]`: the sum over an answer's tokens, of `log p(token | everything before)`.
    """
    if not answers:
        raise ValueError("classify expects at least one answer, got none")
    check_positive("batch_size", batch_size)
    pack = PackingCollator()
    scores = torch.empty(len(rows), len(answers))
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        examples = [model.method.encode(tokenizer, answer=answer, **fields) for fields in part for answer in answers]
        counts = [sum(label != IGNORED for label in example["labels"]) for example in examples]
        if max(counts) == 1:  # every answer is one token: all are read off the first one's forward pass
            output, _ = label_logits(model, _on(model.device, pack(examples[:: len(answers)])))
            tokens = [example["input_ids"][-1] for example in examples[: len(answers)]]
            scores[start : start + len(part)] = output.logits.float().log_softmax(-1)[:, tokens].cpu()
        else:
            surprise = _surprise(model, pack(examples))
            sums = torch.stack([answer.sum() for answer in surprise.split(counts)])
            scores[start : start + len(part)] = -sums.view(len(part), len(answers))
    return scores


def accuracy(scores: Tensor, classes: Sequence[int]) -> Accuracy:
    """How often the likeliest answer is the right one: `scores` `[rows, answers]`, the right answers' numbers."""
    return Accuracy(int((scores.argmax(-1) == torch.tensor(classes)).sum()), len(classes))


def macro_f1(scores: Tensor, classes: Sequence[int], *, seed: int = 0) -> Estimate:
    """F1 of each class, averaged over the classes that occur among the right answers or the chosen ones.

    The interval is a percentile bootstrap over rows: F1 is no mean of independent trials, so there is no Wilson
    interval of it.
    """
    if not len(classes):
        return Estimate(math.nan, (math.nan, math.nan))
    count = scores.shape[1]
    cells = torch.tensor(classes) * count + scores.argmax(-1)  # [rows]: (right, chosen)
    generator = torch.Generator().manual_seed(seed)
    # Drawing rows with replacement draws cells of the confusion matrix by how often they occur.
    frequencies = torch.bincount(cells, minlength=count * count).double()
    draws = torch.multinomial(frequencies.expand(_RESAMPLES, -1), len(cells), replacement=True, generator=generator)
    resampled = torch.zeros(_RESAMPLES, count * count, dtype=torch.double).scatter_add_(
        1, draws, torch.ones_like(draws, dtype=torch.double)
    )
    low, high = _f1(resampled.unflatten(1, (count, count))).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Estimate(_f1(frequencies.view(1, count, count)).item(), (low, high))


def _f1(confusion: Tensor) -> Tensor:
    """Macro-F1 `[n]` of confusion matrices `[n, right, chosen]`."""
    hits = confusion.diagonal(dim1=1, dim2=2)
    either = confusion.sum(1) + confusion.sum(2)
    scores = 2 * hits / either.clamp(min=1)
    return scores.sum(1) / (either > 0).sum(1)


@torch.no_grad()
def perplexity(model: SoftModel, rows: Sequence[dict[str, Any]], *, batch_size: int = 32) -> Estimate:
    """exp of the mean surprise of a label, over all labels.

    The interval takes rows, not their tokens, as the independent draws (the ratio estimator's: G. Cochran, Sampling
    Techniques, ch. 6), on the scale of the mean.

    Args:
        model: in evaluation mode for repeatable answers.
        rows: `{"input_ids", "labels"}` each, as `method.encode` gives them.
        batch_size: rows a forward pass, packed.
    """
    check_positive("batch_size", batch_size)
    pack = PackingCollator()
    sums, counts = [], []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        labels = [sum(label != IGNORED for label in row["labels"][1:]) for row in part]  # nothing predicts the first
        counts += labels
        sums += [row.sum() for row in _surprise(model, pack(list(part))).split(labels)]
    total, surprise, number = sum(counts), torch.tensor(sums).double(), torch.tensor(counts).double()
    if not total:
        return Estimate(math.nan, (math.nan, math.nan))
    mean = surprise.sum().item() / total
    n = len(rows)
    spread = (surprise - mean * number).square().sum().item() * n / max(n - 1, 1)
    half = _Z * math.sqrt(spread) / total if n > 1 else math.inf
    return Estimate(_exp(mean), (_exp(mean - half), _exp(mean + half)))


def _surprise(model: SoftModel, batch: dict[str, Any]) -> Tensor:
    """`-log p` of each label of a batch, on the CPU."""
    output, targets = label_logits(model, _on(model.device, batch))
    return F.cross_entropy(output.logits.float(), targets, reduction="none").cpu()


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700 else math.inf


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
