"""Converts rows of a task to examples for its head: a class per row, a class per word, or an answer span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softkv.hf.layout import IGNORED
from softkv.train.data import Row

# Task → the class of transformers that has its head.
CLASSES = {
    "seq-cls": "AutoModelForSequenceClassification",
    "token-cls": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "mlm": "AutoModelForMaskedLM",
}


def classes_of(task: str, rows: Sequence[Row], answer: str) -> list[str]:
    """The sorted names of the classes that occur in the rows; empty for tasks without classes.

    Raises:
        ValueError: if a row has no answer, or one of a wrong type.
    """
    if task not in ("seq-cls", "token-cls"):
        return []
    found: set[str] = set()
    for row in rows:
        value = _cell(row, answer)
        if isinstance(value, list) != (task == "token-cls"):
            wanted = "a list with one class per word" if task == "token-cls" else "one class per row"
            raise ValueError(f"--task {task} expects {wanted} in the column {answer!r}, got {value!r:.80}")
        found |= set(map(str, value)) if isinstance(value, list) else {str(value)}
    return sorted(found)


def examples(
    task: str, tokenizer: Any, rows: Sequence[Row], *, text: str, answer: str, classes: list[str], max_length: int
) -> list[dict[str, Any]]:
    """Convert each row to an example for the head of a task.

    Args:
        task: one of `CLASSES`.
        text: the column of the text; for "token-cls" of a list of words, for "qa" of the question about the column
            "context".
        answer: the column of the class, of the words' classes, or of the answer's text (or SQuAD's "answers").
        classes: as returned by `classes_of`.
        max_length: maximum number of tokens per row; longer rows are truncated.

    Raises:
        ValueError: if a row lacks what its task needs.
    """
    made = {"seq-cls": _of_row, "token-cls": _of_words, "qa": _of_span, "mlm": _of_text}[task]
    return [made(tokenizer, row, text, answer, classes, max_length) for row in rows]


def _of_row(tokenizer: Any, row: Row, text: str, answer: str, classes: list[str], longest: int) -> dict[str, Any]:
    encoded = tokenizer(str(_cell(row, text)), truncation=True, max_length=longest)
    return {**encoded, "labels": _number(str(_cell(row, answer)), classes)}


def _of_words(tokenizer: Any, row: Row, text: str, answer: str, classes: list[str], longest: int) -> dict[str, Any]:
    """Label the first token of each word with the word's class."""
    words, named = _cell(row, text), _cell(row, answer)
    if not isinstance(words, list) or len(words) != len(named):
        raise ValueError(f"--task token-cls expects as many words as classes, got {words!r:.80} and {named!r:.80}")
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=longest)
    of_tokens, labels = encoded.word_ids(), []
    for at, word in enumerate(of_tokens):
        begins = word is not None and (at == 0 or of_tokens[at - 1] != word)
        labels.append(_number(str(named[word]), classes) if begins else IGNORED)
    return {**encoded, "labels": labels}


def _of_span(tokenizer: Any, row: Row, text: str, answer: str, classes: list[str], longest: int) -> dict[str, Any]:
    """The first and last token of the answer in the context; the row's first token if the answer was truncated."""
    context, given = str(_cell(row, "context")), _cell(row, answer)
    if isinstance(given, dict):  # SQuAD's
        given, start = given["text"][0], int(given["answer_start"][0])
    else:
        given, start = str(given), context.find(str(given))
    if start < 0 or context[start : start + len(given)] != given:
        raise ValueError(f"--task qa expects an answer contained in the context, got {given!r:.80}")
    encoded = tokenizer(str(_cell(row, text)), context, truncation="only_second", max_length=longest)
    # In sequence 1, the context. A token may span several characters, and white space belongs to none.
    inside = [encoded.char_to_token(at, sequence_index=1) for at in range(start, start + len(given))]
    tokens = [at for at in inside if at is not None]
    whole = bool(tokens) and inside[-1] is not None
    return {**encoded, "start_positions": tokens[0] if whole else 0, "end_positions": tokens[-1] if whole else 0}


def _of_text(tokenizer: Any, row: Row, text: str, answer: str, classes: list[str], longest: int) -> dict[str, Any]:
    return dict(tokenizer(str(_cell(row, text)), truncation=True, max_length=longest))


def _number(name: str, classes: list[str]) -> int:
    if name not in classes:
        raise ValueError(f"the class {name!r} does not occur in the training rows, which have {', '.join(classes)}")
    return classes.index(name)


def _cell(row: Row, column: str) -> Any:
    if row.get(column) is None:
        raise ValueError(f"a row has no column {column!r} (it has {', '.join(map(str, row))})")
    return row[column]
