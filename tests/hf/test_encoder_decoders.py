"""Encoder-decoders: every family against its naive truth, row by row."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.hf.encoder_decoder_rows import METHODS, WRITTEN, attached, labels_of, rows_of, sites_of
from tests.hf.encoder_decoders import NAMES, Naive, embedded, model_of, padded
from tests.hf.naive import close


def read_of(model: Any, bare: Any, row: list[int]) -> Tensor:
    """What the encoder reads of a row, with the method's soft tokens in it."""
    soft = model.soft.soft_tokens()
    embeds = embedded(bare, row, soft)
    if model.soft.placement == "before":
        return torch.cat([soft, embeds])
    return torch.cat([embeds, soft]) if model.soft.placement == "after" else embeds


def naive_logits(model: Any, name: str, rows: list[list[int]], covers: bool = False) -> list[Tensor]:
    bare = model_of(name, dtype=torch.float64)
    naive = Naive(bare, **sites_of(model), covers=covers)
    return [naive(read_of(model, bare, row), begun(bare, written)) for row, written in zip(rows, WRITTEN, strict=True)]


def begun(bare: Any, written: list[int]) -> list[int]:
    """What the decoder reads while it writes this."""
    shifted = getattr(bare, "prepare_decoder_input_ids_from_labels", None)  # MBart begins with a row's last token
    if shifted is None:
        return [bare.config.decoder_start_token_id, *written[:-1]]
    return shifted(torch.tensor([written]))[0].tolist()


# Every method where position biases, scales and the start of a decoder differ; elsewhere one of each kind.
WHOLE = ("T5", "Bart", "MBart: scaled embeddings", "Pegasus: sinusoids, scaled outside the table")
CASES = [(name, kind) for name in NAMES for kind in METHODS if name in WHOLE or kind in ("v2 everywhere", "p-tuning")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_equals_the_naive_truth(name: str, kind: str) -> None:
    """Logits, loss and gradients; padding on either side."""
    method = METHODS[kind]
    rows = rows_of(method)
    model = attached(name, method)
    learned = [each for each in model.parameters() if each.requires_grad]
    want = naive_logits(model, name, rows)
    losses = [F.cross_entropy(x, torch.tensor(y), reduction="sum") for x, y in zip(want, WRITTEN, strict=True)]
    loss = torch.stack(losses).sum() / sum(map(len, WRITTEN))
    gradients = torch.autograd.grad(loss, learned)
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        output = model(ids, attention_mask=mask, labels=labels_of(WRITTEN))
        for got, row in zip(output.logits, want, strict=True):
            close(got[: len(row)], row)
        close(output.loss, loss)
        for got, each in zip(torch.autograd.grad(output.loss, learned), gradients, strict=True):
            close(got, each)


@pytest.mark.parametrize("name", NAMES)
def test_generates_as_the_naive_truth(name: str) -> None:
    for kind in ("v2 everywhere", "p-tuning"):
        method = METHODS[kind]
        rows = rows_of(method)
        model, bare = attached(name, method), model_of(name, dtype=torch.float64)
        naive = Naive(bare, **sites_of(model))
        with torch.no_grad():
            want = [naive.generate(read_of(model, bare, row), bare.config.decoder_start_token_id, 6) for row in rows]
        for side in ("right", "left"):
            ids, mask = padded(rows, side)
            got = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()
            for row, answer in zip(want, got, strict=True):
                assert answer[: len(row)] == row, (kind, side)
