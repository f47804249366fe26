"""What waits for a device: values that the host reads. A decoding step reads no more than the bare model's, a packed
training step with its lengths known on the host reads nothing."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import softkv
from tests.robustness.models import IDS, attached, llama

# Operators whose result is a value on the host, or whose shape depends on values.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}


class Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        counts = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in READS or by_mask or counts:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU values are read for the sake of clear errors; here as elsewhere they are not."""
    monkeypatch.setattr("softkv.hf.checks.is_readable", lambda x: False)


METHODS = {
    "prefix": softkv.PTuningV2(length=3),
    "head": softkv.PromptTuning(length=3, position="before"),
    "after": softkv.PromptTuning(length=3),
    "template": softkv.PTuning(template="[P1][X][Y]", encoder_size=8),
}


def decoding(model: Any, steps: int, **options: Any) -> int:
    ids = IDS.expand(2, -1)
    with Reads() as reads:
        model.generate(ids, max_new_tokens=steps, do_sample=False, **options)
    return sum(reads.seen.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{}, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5])}], ids=["", "padded"]
)
def test_a_decoding_step_reads_no_more_than_the_bare_models(method: str, options: dict[str, Any]) -> None:
    model, bare = attached(METHODS[method]), llama()
    ours = decoding(model, 6, **options) - decoding(model, 3, **options)
    theirs = decoding(bare, 6, **options) - decoding(bare, 3, **options)
    assert ours <= theirs


def packed() -> dict[str, Any]:
    lengths = torch.tensor([4, 6])
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    ids = torch.arange(10)[None] + 3
    labels = ids.clone()
    labels[:, [0, 1, 4, 5]] = -100
    return {
        "input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["prefix", "head", "after"])
def test_packed_training_reads_nothing(method: str) -> None:
    model, batch = attached(METHODS[method]).train(), packed()
    with Reads() as reads:
        model(**batch).loss.backward()
    assert not reads.seen


def test_prefill_reads_at_most_once() -> None:
    model = attached()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    with torch.no_grad(), Reads() as reads:
        model(IDS.expand(2, -1), attention_mask=mask, past_key_values=transformers.DynamicCache())
    assert sum(reads.seen.values()) <= 1


def test_packed_rows_of_a_drop_in_are_found_once() -> None:
    """Position ids that restart are read once a forward pass, however many layers there are; rows are kept apart in
    every one, and a second pass looks again."""
    ids, counts = torch.arange(10)[None] + 3, []
    for layers in (1, 4):
        model = llama(layers)
        model.set_attn_implementation("softkv")
        positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
        with torch.no_grad():
            with Reads() as reads:
                packed = model(ids, position_ids=positions, use_cache=False).logits
            alone = [model(part, use_cache=False).logits for part in ids.split([4, 6], 1)]
            torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-5)
            positions[0, 4:] += 4  # in place: one row
            torch.testing.assert_close(
                model(ids, position_ids=positions, use_cache=False).logits, model(ids, use_cache=False).logits
            )
        counts.append(sum(reads.seen.values()))
    assert counts[0] == counts[1]
