"""Rows of named fields from JSONL, JSON and CSV files and from `datasets`, and how they become examples."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_LONGEST_CELL = 1 << 30  # characters; the csv module's own limit is 131,072


def read_rows(source: str, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """The rows of a `.jsonl`, `.json` (a list), `.csv` or `.tsv` file, or of a data set of `datasets`.

    Args:
        source: a file; or the name of a data set, "name" or "name:configuration".
        split: of a data set, as `datasets` writes it ("train", "test[:100]").
        limit: at most this many rows.

    Raises:
        FileNotFoundError: when there is neither such a file nor such a data set.
        ValueError: when the file can't be read as rows, or has none.
    """
    path = Path(source)
    if path.is_file():
        rows = _file_rows(path)
    elif path.suffix in _READERS:
        raise FileNotFoundError(f"there is no file {source}")
    else:
        rows = _data_set_rows(source, split)
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows[:limit]


def _file_rows(path: Path) -> list[Row]:
    if path.suffix not in _READERS:
        raise ValueError(f"{path} is none of {', '.join(_READERS)}: convert it, or give the name of a data set")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(_READERS[path.suffix](path, file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _jsonl(path: Path, file: Any) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f'line {number} of {path} is not a row: expected {{"column": ...}}')
            yield row


def _json(path: Path, file: Any) -> Iterator[Row]:
    try:
        rows = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path} is not a list of rows: expected [{{"column": ...}}, ...]')
    yield from rows


def _csv(path: Path, file: Any, delimiter: str = ",") -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        names = reader.fieldnames or []
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path} has several columns called {', '.join(map(repr, twice))}")
        for row in reader:
            if None in row or None in row.values():
                cells = len(row) - list(row.values()).count(None) + len(row.get(None) or ()) - (None in row)
                raise ValueError(
                    f"line {reader.line_num} of {path} has not as many cells as its header: {cells}, not {len(names)}"
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path} can't be read as CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


_READERS = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path, file: _csv(path, file, delimiter="\t"),
}


def _data_set_rows(source: str, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise FileNotFoundError(
            f"there is no file {source}; for a data set of that name: pip install datasets"
        ) from None
    name, _, configuration = source.partition(":")
    try:
        return list(datasets.load_dataset(name, configuration or None, split=split))
    except Exception as error:  # whatever the network, the Hub or the data set's own reader raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{source} is neither a file nor a data set with split {split!r}: {reason}") from error


@dataclass(frozen=True)
class Columns:
    """Which column fills which field of a template, and which one is the answer.

    Args:
        fields: the template's fields.
        answer: the answer's column. A list in it is several answers: an example each.
        sources: field → column, where a column has another name than its field.
        verbalizers: value of the answer's column → the text that stands for it.
    """

    fields: tuple[str, ...]
    answer: str
    sources: dict[str, str] = field(default_factory=dict)
    verbalizers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.sources) - set(self.fields)):
            raise ValueError(
                f"the template has no field {', '.join(unknown)} (it has {', '.join(self.fields) or 'none'})"
            )

    def prompt(self, row: Row) -> dict[str, str]:
        """The text of each field.

        Raises:
            ValueError: when a column is missing, or holds no text.
        """
        return {name: _text(*self._cell(row, self.sources.get(name, name), f"[{name}]")) for name in self.fields}

    def answers(self, row: Row) -> list[str]:
        """The row's right answers.

        Raises:
            ValueError: when the column is missing or holds no text, or a value has no verbalizer although others do.
        """
        column, value = self._cell(row, self.answer, "the answer")
        several = value if isinstance(value, list) else [value]
        if not several:
            raise ValueError(f"the column {column!r} expects an answer, or a list of them, got an empty list")
        return [self._verbalized(_text(column, one)) for one in several]

    def _verbalized(self, value: str) -> str:
        if self.verbalizers and value not in self.verbalizers:
            known = ", ".join(self.verbalizers)
            raise ValueError(f"the answer {value!r} has no verbalizer (they are for {known}): give --verbalizer too")
        return self.verbalizers.get(value, value)

    def _cell(self, row: Row, column: str, what: str) -> tuple[str, Any]:
        if column not in row:
            raise ValueError(
                f"there is no column {column!r} for {what} (the row has {', '.join(map(str, row))}): "
                "say which with --field or --answer"
            )
        return column, row[column]


def _text(column: str, value: Any) -> str:
    if value is None or value != value:
        raise ValueError(f"the column {column!r} expects a text or a number, got {'null' if value is None else 'NaN'}")
    if isinstance(value, dict | list | bytes):
        kind = {"dict": "an object", "list": "a list", "bytes": "bytes"}[type(value).__name__]
        raise ValueError(f"the column {column!r} expects a text or a number, got {kind}")
    return str(value)


@dataclass(frozen=True)
class FilledRow:
    """A row's texts: those of the template's fields, and its right answers. `where` names the row in messages."""

    where: str
    fields: dict[str, str]
    answers: list[str]


def read_filled(columns: Columns, source: str, *, split: str = "train", limit: int | None = None) -> list[FilledRow]:
    """The rows of `read_rows`, as texts.

    Raises:
        ValueError: also when a row doesn't fit the columns; names file and row.
    """
    rows = []
    for number, row in enumerate(read_rows(source, split=split, limit=limit), start=1):
        where = f"{source}, row {number}"
        try:
            rows.append(FilledRow(where, columns.prompt(row), columns.answers(row)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return rows
