"""Encoders with task heads: K/V prefixes against a truth that concatenates them, row by row."""

import pytest
import torch
import transformers

import softkv
from tests.hf.encoder_rows import ROWS, of_rows, padded
from tests.hf.encoders import TABLE, encoder, outputs_of, row_output
from tests.hf.naive import close


@pytest.mark.parametrize("method", ["p-tuning v2", "prefix-tuning"])
@pytest.mark.parametrize(("family", "head"), TABLE)
def test_prefixes(family: str, head: str, method: str) -> None:
    truth = encoder(family, head)
    config = {"p-tuning v2": softkv.PTuningV2(length=3), "prefix-tuning": softkv.PrefixTuning(length=3)}[method]
    model = softkv.attach(encoder(family, head), config).eval()
    with torch.no_grad():
        for parameter in model.soft.parameters():
            parameter.normal_()
    layers = 3 if method == "p-tuning v2" else 1
    width = truth.config.hidden_size if family != "EuroBert" else 16
    assert sum(parameter.numel() for parameter in model.soft.parameters()) == 2 * 3 * width * layers
    wanted = [outputs_of(row_output(truth, model.soft.prefix(), row)) for row in ROWS]
    for side in ("right", "left"):
        batch = padded(ROWS, side)
        for n, output in enumerate(outputs_of(model(**batch))):
            for row, got in enumerate(of_rows(output, batch, ROWS)):
                close(got, wanted[row][n][0])


def test_the_first_position_of_a_base_without_values() -> None:
    """RoBERTa's rows begin past the row for padding, also where no pass can tell."""
    config = transformers.RobertaConfig(
        vocab_size=61, max_position_embeddings=24, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, pad_token_id=3,
    )  # fmt: skip
    firsts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            base = transformers.RobertaForMaskedLM(config)
        firsts.append(softkv.attach(base, softkv.PTuningV2(length=4, init_std=0.1))._hooks.first)
    assert firsts == [4, 4]
