"""Logits of chosen positions, with an older transformers (a hook on the head) as with a newer one."""

import pytest
import torch

import softkv
from softkv.hf import kept_logits
from tests.hf.tiny import METHODS, model_of, tokenizer

BATCH = {"input_ids": torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])}
LABELS = torch.tensor([[-100, -100, -100, 6, 7], [-100, -100, 10, 11, 12]])
KEPT = {"a mask": LABELS != -100, "positions": torch.tensor([[4, 0], [1, 2]]), "columns": torch.tensor([0, 3])}


@pytest.mark.parametrize("name", ["p-tuning v2", "prompt-tuning after", "prompt-tuning before"])
@pytest.mark.parametrize("kept", KEPT)
def test_by_a_hook_on_the_head(name: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_logits, "BY_TRANSFORMERS", False)
    base = model_of("Llama")
    other = softkv.attach(base, softkv.PTuningV2(length=2))  # hooks the same head
    model = softkv.attach(base, METHODS[name], tokenizer=tokenizer()).eval()
    widths: list[int] = []
    head = base.get_output_embeddings()
    counting = head.register_forward_hook(lambda module, inputs, output: widths.append(output[..., 0].numel()))
    with torch.no_grad():
        whole = model(**BATCH, labels=LABELS)
        wanted = {
            "a mask": whole.logits[KEPT["a mask"]],
            "positions": whole.logits.take_along_dim(KEPT["positions"][..., None], 1),
            "columns": whole.logits[:, KEPT["columns"]],
        }[kept]
        found = model(**BATCH, logits_to_keep=KEPT[kept], prompt_lengths=torch.tensor([3, 2])).logits
    torch.testing.assert_close(found, wanted)
    assert widths == [10, wanted[..., 0].numel()]
    counting.remove()
    model.detach()
    assert other.detach() is base
    assert not head._forward_pre_hooks
