"""Classification by verbalizers: each class is an answer text, the likeliest answer wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.batches import PackingCollator
from softkv.hf.model import SoftModel
from softkv.hf.rows import IGNORED
from softkv.label_logits import label_logits


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
        z, n, p = 1.959964, self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

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
            output, targets = label_logits(model, _on(model.device, pack(examples)))
            surprise = F.cross_entropy(output.logits.float(), targets, reduction="none").cpu()
            sums = torch.stack([answer.sum() for answer in surprise.split(counts)])
            scores[start : start + len(part)] = -sums.view(len(part), len(answers))
    return scores


def accuracy(scores: Tensor, classes: Sequence[int]) -> Accuracy:
    """How often the likeliest answer is the right one: `scores` `[rows, answers]`, the right answers' numbers."""
    return Accuracy(int((scores.argmax(-1) == torch.tensor(classes)).sum()), len(classes))


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
