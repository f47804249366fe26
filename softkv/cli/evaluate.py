"""`softkv eval`."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from rich.markup import escape

from softkv.cli.console import fail, out
from softkv.cli.loading import describe_adapter, load_adapter
from softkv.cli.options import (
    Adapter,
    Answer,
    AsJson,
    Data,
    Device,
    Dtype,
    End,
    Fields,
    Limit,
    Model,
    Prompt,
    Split,
    Verbalizers,
)
from softkv.cli.rows import columns_of, ending_of, examples_of
from softkv.train.data import read_filled

EXAMPLES = """
Examples:

    softkv eval runs/a --data test.jsonl --answer label --classify

    softkv eval runs/b --data test.csv --prompt question --answer reply
"""


def evaluate(
    adapter: Adapter,
    data: Data,
    model: Model = None,
    prompt: Prompt = None,
    answer: Answer = "answer",
    field: Fields = None,
    verbalizer: Verbalizers = None,
    classify: Annotated[
        bool, typer.Option("--classify", help="Accuracy and F1 among the answers that occur in the data.")
    ] = False,
    split: Split = "test",
    limit: Limit = None,
    end: End = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 32,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a soft prompt: perplexity of the answers, or accuracy and macro-F1 with verbalizers or --classify.

    Intervals are 95% confidence intervals.
    """
    columns = columns_of(describe_adapter(adapter)[0]["config"]["template"], answer, field, prompt, verbalizer)
    rows = read_filled(columns, data, split=split, limit=limit)
    classify = classify or bool(verbalizer)
    for row in rows:
        if classify and len(row.answers) != 1:
            fail(f"{row.where}: classification expects one right answer, got {len(row.answers)}")
    soft_model, tokenizer = load_adapter(adapter, model, dtype, device)

    from softkv.train.classification import accuracy, macro_f1, perplexity
    from softkv.train.classification import classify as scores_of

    results: dict[str, Any]
    if classify:
        texts = list(columns.verbalizers.values()) or sorted({row.answers[0] for row in rows})
        classes = [texts.index(row.answers[0]) for row in rows]
        scores = scores_of(soft_model, tokenizer, [row.fields for row in rows], texts, batch_size=batch_size)
        results = {"accuracy": accuracy(scores, classes), "macro-F1": macro_f1(scores, classes)}
    else:
        examples = examples_of(soft_model, tokenizer, rows, ending_of(tokenizer, end))
        results = {"perplexity": perplexity(soft_model, examples, batch_size=batch_size)}
    if as_json:
        measured = {
            name: {"value": each.value, "interval": [x if math.isfinite(x) else None for x in each.interval]}
            for name, each in results.items()
        }  # JSON knows no infinity
        print(json.dumps(measured | {"rows": len(rows)}))
    else:
        for name, each in results.items():
            out.print(f"{name} {escape(str(each))}")
        out.print(f"{len(rows)} rows; 95% confidence intervals")
