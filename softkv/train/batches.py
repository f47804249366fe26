"""Rows into batches: packed or padded, by a number of rows or by a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import DataCollatorWithFlattening

from softkv.hf.layout import IGNORED
from softkv.methods.initial import check_positive


class PackingCollator(DataCollatorWithFlattening):
    """Concatenates rows without padding: `input_ids`, `labels`, `position_ids` `[1, N]` and the
    cumulative lengths. Each row attends to the prefix and to itself.

    Beside its ids and labels a row may have `prompt_lengths` (an int: where its prompt ends when that is not its first
    label) and `adapter_names` (a name, or None: its adapter).

    Args:
        max_length: shorten rows of more tokens (`shortened`).

    Raises:
        ValueError: when max_length is not an integer of at least 1.

    Example:
        >>> rows = [{"input_ids": [1, 5], "labels": [-100, 5]}, {"input_ids": [1, 6, 7], "labels": [-100, 6, 7]}]
        >>> batch = softkv.PackingCollator()(rows)
        >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
        ([[1, 5, 1, 6, 7]], [[0, 1, 0, 1, 2]])
    """

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__(return_flash_attn_kwargs=True)
        self.max_length = _checked_length(max_length)

    def __call__(self, features: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        features = [shortened(row, self.max_length) for row in features]
        return super().__call__(features, *args, **kwargs) | _of_each_row(features)


class PaddingCollator:
    """Puts rows below each other, padded on the right with id 0 and a mask: slower than packing, the same results.

    Args:
        max_length: shorten rows of more tokens (`shortened`).

    Raises:
        ValueError: when max_length is not an integer of at least 1.

    Example:
        >>> rows = [{"input_ids": [1, 5], "labels": [-100, 5]}, {"input_ids": [1, 6, 7], "labels": [-100, 6, 7]}]
        >>> softkv.PaddingCollator()(rows)["attention_mask"].tolist()
        [[1, 1, 0], [1, 1, 1]]
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = _checked_length(max_length)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        features = [shortened(row, self.max_length) for row in features]
        ids, labels = ([torch.as_tensor(row[key]) for row in features] for key in ("input_ids", "labels"))
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        } | _of_each_row(features)


class TaskCollator:
    """Pads rows of a task head on the right. Values per token are padded (labels with -100); values per row (a
    class, the positions of a span) are stacked. Rows of several choices are lists of lists of tokens.

    Args:
        pad_id: the id of padding tokens.
        token_labels: whether there is a label per token.

    Example:
        >>> rows = [{"input_ids": [1, 5], "labels": 0}, {"input_ids": [1, 6, 7], "labels": 1}]
        >>> batch = softkv.TaskCollator(0, token_labels=False)(rows)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[1, 5, 0], [1, 6, 7]], [0, 1])
    """

    def __init__(self, pad_id: int, *, token_labels: bool) -> None:
        self.pad_id, self.token_labels = pad_id, token_labels

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if _nested(features[0]["input_ids"]):
            return self._of_choices(features)
        rows = [
            {"labels" if name in ("label", "label_ids") else name: x for name, x in row.items()} for row in features
        ]
        lengths = [len(row["input_ids"]) for row in rows]
        batch: dict[str, Any] = {
            "attention_mask": pad_sequence([torch.ones(T, dtype=torch.long) for T in lengths], True)
        }
        fillings = {"input_ids": self.pad_id, "labels": IGNORED}
        for name in rows[0].keys() - {"prompt_lengths", "adapter_names"}:
            values = [torch.as_tensor(row[name]) for row in rows]
            of_tokens = all(x.dim() == 1 and len(x) == T for x, T in zip(values, lengths, strict=True))
            if name == "labels" and self.token_labels and not of_tokens:
                raise ValueError("labels expects one for each token of a row (-100: none): align them with input_ids")
            if of_tokens and (name != "labels" or self.token_labels):
                batch[name] = pad_sequence(values, True, padding_value=fillings.get(name, 0))
            else:
                batch[name] = torch.stack(values)
        return batch | _of_each_row(features)

    def _of_choices(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """`[B, choices, T]` of rows with as many choices each."""
        counts = sorted({len(row["input_ids"]) for row in features})
        if len(counts) != 1:
            raise ValueError(f"the rows of a batch expect one number of choices, got {counts}")
        of_choices = [name for name, x in features[0].items() if _nested(x)]
        flat = [{name: row[name][n] for name in of_choices} for row in features for n in range(counts[0])]
        batch = {name: x.unflatten(0, (-1, counts[0])) for name, x in self(flat).items()}
        for name in features[0].keys() - {*of_choices, "adapter_names"}:
            name_given = "labels" if name in ("label", "label_ids") else name
            batch[name_given] = torch.stack([torch.as_tensor(row[name]) for row in features])
        return batch | {name: x for name, x in _of_each_row(features).items() if name == "adapter_names"}


def _checked_length(max_length: int | None) -> int | None:
    if max_length is not None:
        check_positive("max_length", max_length)
    return max_length


def _nested(values: Any) -> bool:
    """Whether values are those of choices, each of them a row of tokens."""
    if isinstance(values, str) or not hasattr(values, "__len__") or not len(values):
        return False
    return torch.as_tensor(values[0]).dim() > 0


class Seq2SeqCollator:
    """Pads rows of an encoder-decoder on the right: what is read (`input_ids`, with a mask), and what is written
    (`labels` with -100, `decoder_input_ids`). Values that are no tokens (sound features) are stacked.

    Args:
        pad_id: the id of padding tokens.

    Example:
        >>> rows = [{"input_ids": [5, 1], "labels": [7, 8, 1]}, {"input_ids": [5, 6, 1], "labels": [9, 1]}]
        >>> batch = softkv.Seq2SeqCollator(0)(rows)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 1, 0], [5, 6, 1]], [[7, 8, 1], [9, 1, -100]])
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        fillings = {"input_ids": self.pad_id, "labels": IGNORED, "decoder_input_ids": self.pad_id}
        for name in features[0].keys() - {"adapter_names", "attention_mask"}:
            values = [torch.as_tensor(row[name]) for row in features]
            if name in fillings:
                batch[name] = pad_sequence(values, True, padding_value=fillings[name])
            else:
                batch[name] = torch.stack(values)
        if "input_ids" in batch:
            lengths = [len(row["input_ids"]) for row in features]
            batch["attention_mask"] = pad_sequence([torch.ones(S, dtype=torch.long) for S in lengths], True)
        return batch | _of_each_row(features)


def _of_each_row(features: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "prompt_lengths" in features[0]:
        found["prompt_lengths"] = torch.tensor([int(row["prompt_lengths"]) for row in features])
    if "adapter_names" in features[0]:
        found["adapter_names"] = [row["adapter_names"] for row in features]
    return found


def shortened(row: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    """A row of at most `max_length` tokens.

    A prompt loses tokens from its front, but neither its first one nor soft ones, so the answer and what stands next to
    it are kept. A row of labels alone, as a text to be continued, loses its end.

    Raises:
        ValueError: when a row is still longer without its prompt.
    """
    ids, labels = list(row["input_ids"]), list(row["labels"])
    excess = 0 if max_length is None else len(ids) - max_length
    if excess <= 0:
        return row
    prompt = next((at for at, label in enumerate(labels) if label != IGNORED), len(ids))
    prompt = int(row.get("prompt_lengths", prompt))
    free = [at for at in range(1, prompt) if ids[at] >= 0] if prompt > 1 else list(range(len(ids)))[::-1]
    if len(free) < excess:
        raise ValueError(
            f"a row of {len(ids)} tokens can't be cut to max_length={max_length}: its prompt has only {len(free)} "
            "tokens that may go"
        )
    gone = set(free[:excess])
    stay = [at for at in range(len(ids)) if at not in gone]
    kept: dict[str, Any] = {"input_ids": [ids[at] for at in stay], "labels": [labels[at] for at in stay]}
    if "prompt_lengths" in row:
        kept["prompt_lengths"] = prompt - sum(at < prompt for at in gone)
    return {**row, **kept}


def whole_row_labels(example: dict[str, Any]) -> dict[str, Any]:
    """A row for the full language-model loss: every token is predicted but the first and soft ones, and the prompt
    still ends where it did."""
    ids, answer = example["input_ids"], example["labels"]
    prompt = next((at for at, label in enumerate(answer) if label != IGNORED), len(ids))
    return {
        "input_ids": ids,
        "labels": [token if token >= 0 else IGNORED for token in ids],
        "prompt_lengths": prompt,
    }


class TokenBatches(Sampler[list[int]]):
    """Batches of as many rows as `max_tokens` tokens hold. They are formed once and shuffled anew every epoch, so every
    epoch has the same number of steps.

    Args:
        lengths: tokens of each row of the data set.
        max_tokens: the most tokens of a batch, padding included.
        padded: whether a batch costs its longest row times its rows. Rows of like length then come together; packed
            rows are put together in random order.
        seed: decides everything.
        epoch: tells the number of the epoch that begins.
        rank, ranks: every process takes its turn of the batches; the first ones come again where turns don't work out.

    Raises:
        ValueError: when a row alone is longer.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        padded: bool,
        seed: int,
        epoch: Callable[[], int],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        check_positive("max_tokens", max_tokens)
        self.seed, self.epoch, self.rank, self.ranks = seed, epoch, rank, ranks
        order = self._shuffled(len(lengths), 0)
        if padded:
            order.sort(key=lengths.__getitem__)
        self.batches: list[list[int]] = []
        used = max_tokens
        for row in order:
            if lengths[row] > max_tokens:
                raise ValueError(
                    f"row {row} has {lengths[row]} tokens, more than max_tokens={max_tokens}: shorten or drop it"
                )
            used = lengths[row] * (len(self.batches[-1]) + 1 if self.batches else 1) if padded else used + lengths[row]
            if used > max_tokens or not self.batches:
                self.batches.append([])
                used = lengths[row]
            self.batches[-1].append(row)

    def __len__(self) -> int:
        return -(-len(self.batches) // self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._shuffled(len(self.batches), 1 + self.epoch())
        for turn in range(len(self)):
            yield self.batches[order[(turn * self.ranks + self.rank) % len(order)]]

    def _shuffled(self, count: int, stream: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * stream)
        return torch.randperm(count, generator=generator).tolist()
