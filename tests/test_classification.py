"""Classification by verbalizers, and intervals that hold what they promise."""

import math
from typing import Any

import pytest
import torch

import softkv
from softkv.train.classification import Accuracy, accuracy, classify, macro_f1, perplexity
from tests.hf.tiny import METHODS, attach, tokenizer

FIELDS = [{"X": "w3 w4 w5"}, {"X": "w6"}, {"X": "w9 w3 w12 w40 w7"}]


def alone(soft_model: softkv.SoftModel, fields: dict[str, str], answer: str) -> float:
    """The log-probability of an answer, from one unpadded row and all its logits."""
    row = soft_model.method.encode(tokenizer(), answer=answer, **fields)
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with torch.no_grad():
        logits = soft_model(input_ids=ids, labels=labels).logits[0].log_softmax(-1)
    at = (labels[0, 1:] != -100).nonzero().flatten()
    return logits[at, labels[0, 1:][at]].sum().item()


@pytest.mark.parametrize("answers", [("w20", "w21", "w22"), ("w20", "w21 w22 w23"), ("w20 w5", "w21 w5")], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_log_probabilities(method: str, answers: tuple[str, ...]) -> None:
    soft_model = attach("Llama", method)
    scores = classify(soft_model, tokenizer(), FIELDS, answers, batch_size=2)
    expected = torch.tensor([[alone(soft_model, fields, answer) for answer in answers] for fields in FIELDS])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


def test_no_answers_and_no_rows() -> None:
    soft_model = attach("Llama", "p-tuning v2")
    with pytest.raises(ValueError, match="at least one answer"):
        classify(soft_model, tokenizer(), FIELDS, ())
    assert classify(soft_model, tokenizer(), [], ("w2", "w3")).shape == (0, 2)
    for estimate in (accuracy(torch.zeros(0, 2), []), macro_f1(torch.zeros(0, 2), []), perplexity(soft_model, [])):
        assert math.isnan(estimate.value)
        assert all(math.isnan(bound) for bound in estimate.interval)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (81, 263), (1, 1)])
def test_wilson(correct: int, total: int) -> None:
    """Its ends are the probabilities p whose deviation from the share seen is z·sqrt(p(1 - p)/n)."""
    for end in Accuracy(correct, total).interval:
        deviation = 1.959964 * math.sqrt(end * (1 - end) / total)
        assert abs(correct / total - end) == pytest.approx(deviation, abs=1e-7)


def scores_of(chosen: list[int], classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(chosen), classes).float()


def test_macro_f1_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    right, chosen = (torch.randint(0, 4, (60,), generator=generator).tolist() for _ in range(2))
    chosen = [a if i % 2 else b for i, (a, b) in enumerate(zip(right, chosen, strict=True))]
    estimate = macro_f1(scores_of(chosen, 5), right)  # a fifth class that nobody chose
    assert estimate.value == pytest.approx(metrics.f1_score(right, chosen, average="macro"))
    assert estimate.interval[0] < estimate.value < estimate.interval[1]
    assert macro_f1(scores_of(chosen, 5), right) == estimate  # the same every time
    assert macro_f1(scores_of([0, 1], 2), [0, 1]).value == 1
    assert macro_f1(scores_of([1, 0], 2), [0, 1]).value == 0


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """A classifier that is right with probability 0.7: 95% of the intervals of many samples hold that."""
    generator = torch.Generator().manual_seed(1)
    held = {"accuracy": 0, "f1": 0}
    for _ in range(200):
        right = torch.randint(0, 2, (80,), generator=generator)
        wrong = torch.rand(80, generator=generator) > 0.7
        chosen = torch.where(wrong, 1 - right, right).tolist()
        for name, estimate in (
            ("accuracy", accuracy(scores_of(chosen, 2), right.tolist())),
            ("f1", macro_f1(scores_of(chosen, 2), right.tolist())),
        ):
            held[name] += estimate.interval[0] <= 0.7 <= estimate.interval[1]
    assert all(180 <= count <= 199 for count in held.values()), held


@pytest.mark.parametrize("method", ["prompt-tuning after", "p-tuning", "p-tuning v2 encoder"])
def test_perplexity(method: str) -> None:
    soft_model = attach("Llama", method)
    rows: list[dict[str, Any]] = []
    surprise, labels = [], []
    for fields, answer in zip(FIELDS, ("w20", "w21 w22", "w30 w31 w32"), strict=True):
        rows.append(soft_model.method.encode(tokenizer(), answer=answer, **fields))
        surprise.append(-alone(soft_model, fields, answer))
        labels.append(len(answer.split()))
    estimate = perplexity(soft_model, rows, batch_size=2)
    assert estimate.value == pytest.approx(math.exp(sum(surprise) / 6), rel=1e-4)
    assert estimate.interval[0] < estimate.value < estimate.interval[1]
    assert perplexity(soft_model, rows[:1]).interval[1] == math.inf  # one row tells nothing about the others


def test_perplexitys_interval_is_that_of_row_means_where_rows_are_of_one_length() -> None:
    soft_model = attach("Llama", "p-tuning v2")
    rows = [soft_model.method.encode(tokenizer(), X=f"w{i}", answer=f"w{i + 1} w{i + 2}") for i in range(2, 12)]
    estimate = perplexity(soft_model, rows)
    means = torch.tensor([-alone(soft_model, {"X": f"w{i}"}, f"w{i + 1} w{i + 2}") / 2 for i in range(2, 12)])
    half = 1.959964 * means.std().item() / math.sqrt(10)
    expected = math.exp(means.mean().item() - half), math.exp(means.mean().item() + half)
    assert estimate.interval == pytest.approx(expected, rel=1e-3)
