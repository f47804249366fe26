"""Rows of data as a command's options describe them, and the examples they become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softkv.cli.options import pairs
from softkv.train.data import Columns, FilledRow

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from softkv.io.soft_model import SoftModel


def columns_of(
    template: str, answer: str, field: list[str] | None, prompt: str | None, verbalizer: list[str] | None
) -> Columns:
    """The columns of fields and answers, from --answer, --field, --prompt and --verbalizer."""
    from softkv.methods import Template

    sources = pairs(field, "--field", parse=False)
    if prompt is not None:
        sources["X"] = prompt
    return Columns(Template.parse(template).fields, answer, sources, pairs(verbalizer, "--verbalizer", parse=False))


def ending_of(tokenizer: Any, end: bool) -> list[int]:
    """The ids at the end of each answer."""
    return [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []


def examples_of(
    soft_model: SoftModel, tokenizer: Any, rows: list[FilledRow], ending: list[int], *, whole_rows: bool = False
) -> list[dict[str, Any]]:
    """One example per right answer of each row; with `whole_rows`, all of its tokens are labels."""
    from softkv.train.batches import whole_row_labels

    examples = []
    for row in rows:
        for answer in row.answers:
            example: dict[str, Any] = soft_model.method.encode(tokenizer, answer=answer, **row.fields)
            example = {name: ids + ending for name, ids in example.items()}
            if whole_rows:
                example = whole_row_labels(example)
                if soft_model.soft.encodes_rows:  # it would read the tokens to predict
                    del example["prompt_lengths"]
            examples.append(example)
    return examples
