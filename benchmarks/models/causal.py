"""Causal language models: logits of next tokens, packed rows, `generate`, and a text as a prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import softkv
from softkv.methods.base import SoftPrompt

from . import truth
from .configs import tiny_model
from .methods import METHODS, Subject, Trials
from .rows import Batch, Row, packed, padded, prompt_lengths
from .verdicts import far, outcome, verdict

STEPS = 4  # tokens generated
SHORT_WINDOW = 6  # of windowed layers, where a text is in context


class Causal(Subject):
    def bare(self, model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits[0]

    def alone(self, bare: Any, soft: SoftPrompt, row: Row) -> Tensor:
        return truth.alone(bare, soft, row)

    def batch(self, given: list[Row], side: str) -> Batch:
        batch, split = padded(given, side)
        return batch | {"prompt_lengths": prompt_lengths(given)}, split

    def answers(self, output: Any) -> Tensor:
        return output.logits

    def trials(self, bare: Any, soft: Any, given: list[Row], wanted: list[Tensor]) -> Trials:
        def pack() -> str:
            batch, split = packed(given)
            return self.forward(soft, wanted, [(batch | {"prompt_lengths": prompt_lengths(given)}, split)])

        return {
            "packed": pack,
            "generate": lambda: generated(bare, soft, soft.soft, given),
            "generate, static cache": lambda: generated(bare, soft, soft.soft, given, "static"),
        }


def generated(bare: Any, model: Any, soft: SoftPrompt, given: list[Row], cache: str | None = None) -> str:
    """Whether prompts, padded in front, are continued as everything recomputed would be."""
    said = outcome(lambda: _generate(bare, model, soft, given, cache))
    if said.startswith(("crash", "wrong")) and not _base_generates(bare, cache):
        return "base: its own generate does not take padded prompts like this"
    return said


@torch.no_grad()
def _generate(bare: Any, model: Any, soft: SoftPrompt, given: list[Row], cache: str | None) -> str:
    prompts = [Row(row.ids[: row.prompt], row.prompt) for row in given]
    batch, _ = padded(prompts, "left")
    out = model.generate(**batch, **generation_options(cache, STEPS))
    got, new = torch.stack(out.logits, 1), out.sequences[:, -STEPS:].tolist()
    longer = [Row([*row.ids, *new[r]], row.prompt) for r, row in enumerate(prompts)]
    wanted = [truth.alone(bare, soft, row)[row.prompt - 1 : -1] for row in longer]
    return verdict(list(got), wanted)


@torch.no_grad()
def _base_generates(bare: Any, cache: str | None) -> bool:
    ids = torch.arange(5, 13).view(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    try:
        out = bare.generate(ids, attention_mask=mask, **generation_options(cache, 3))
        wanted = bare(input_ids=out.sequences[:1, 1:]).logits[0, 2:-1]
    except Exception:
        return False
    return verdict([torch.stack(out.logits, 1)[0]], [wanted]) == "ok"


def generation_options(cache: str | None, steps: int) -> dict[str, Any]:
    return {
        "max_new_tokens": steps, "do_sample": False, "cache_implementation": cache, "disable_compile": True,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip


@torch.no_grad()
def text_in_context(class_name: str) -> str:
    """A text as a prefix answers as the text in context, short windows included."""
    bare, model = (tiny_model(class_name, window=SHORT_WINDOW, decodes=True) for _ in range(2))
    soft = softkv.attach(model, METHODS["P-tuning v2"]).eval()
    text, row = list(range(11, 15)), [7, 8, 9, 20, 21, 22]
    soft.add_adapter("text", softkv.Prefix.from_ids(soft, torch.tensor([text])))
    soft.set_adapter("text")
    wanted = bare(input_ids=torch.tensor([text + row])).logits[:, len(text) :]
    if not far(wanted, bare(input_ids=torch.tensor([row])).logits):
        return "base: the text changes nothing"
    return verdict([soft(input_ids=torch.tensor([row])).logits], [wanted])
