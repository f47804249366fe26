"""Losses of bases that compare each logit with the label of its own column."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import softkv
from softkv.hf.column_losses import has_column_loss
from tests.hf.tiny import METHODS

SIZES = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "hidden_size": 32}
STACK = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
DECODER = {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
DECODER |= {"is_decoder": True, "is_encoder_decoder": False, "decoder_start_token_id": 1}
KINDS = {
    "Llama": STACK, "GPTNeoX": STACK, "Bloom": {"n_layer": 1, "n_head": 4}, "XGLM": DECODER | {"num_layers": 1},
    "Bart": DECODER, "Marian": DECODER | {"decoder_vocab_size": 61}, "Pegasus": DECODER, "Blenderbot": DECODER,
    "Whisper": DECODER,
}  # fmt: skip


def base_of(kind: str) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(**SIZES | KINDS[kind])
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_loss_compares(kind: str) -> None:
    base, ids = base_of(kind), torch.tensor([[5, 9]])
    output = base(input_ids=ids, labels=torch.tensor([[-100, 9]]))
    of_columns = [F.cross_entropy(output.logits[0, at], torch.tensor(9)).item() for at in (0, 1)]
    assert output.loss.item() == pytest.approx(of_columns[has_column_loss(base)], rel=1e-5)
    assert abs(of_columns[0] - of_columns[1]) > 1e-3


@pytest.mark.parametrize("kind", ["Bart", "Llama", "Whisper"])
@pytest.mark.parametrize("method", ["prompt-tuning before", "prompt-tuning after"])
def test_loss_of_next_tokens(kind: str, method: str) -> None:
    model = softkv.attach(base_of(kind), METHODS[method])
    ids, labels = torch.randint(2, 61, (2, 6)), torch.full((2, 6), -100)
    labels[0, 2:], labels[1, 4:] = ids[0, 2:], ids[1, 4:]
    output = model(ids, labels=labels)
    want = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, want)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(12)).loss, want * 6 / 12)
    assert model(ids, labels=labels, return_dict=False)[0].shape == ()
