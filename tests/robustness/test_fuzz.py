"""Random calls of `SoftModel.forward` beside the independent truth: each row alone, in eager attention, soft prompts
really concatenated (`tests/hf/naive.py`)."""

import os
import random
from functools import cache
from itertools import chain
from typing import Any

import pytest
import torch
import transformers

import softkv
from softkv.methods.base import SoftPrompt
from tests.hf.naive import Row, close, row_logits
from tests.hf.tiny import METHODS, VOCAB, model_of, tokenizer

DRAWS = int(os.environ.get("SOFTKV_DRAWS", "60"))  # `make fuzz` takes 2,000
NAMES = ["Llama", "Mistral: a sliding window", "GPT2: learned positions", "Gemma2: softcap, alternating windows"]
SOFT_IDS = {"p-tuning": (-1, -2, -3)}


@cache
def models(name: str) -> tuple[Any, softkv.SoftModel]:
    """The eager base, and a soft model with every method on its twin."""
    model = softkv.attach(model_of(name), METHODS["prefix-tuning"], tokenizer=tokenizer()).eval()
    generator = torch.Generator().manual_seed(3)
    for method, config in METHODS.items():
        model.add_adapter(method, config)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model_of(name), model


class Draw:
    """One random call."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.name = draw.choice(NAMES)
        self.bare, self.model = models(self.name)
        self.ways = draw.choice(["padded", "padded", "packed", "cached", "cached"])
        rows = draw.randint(1, 4)
        several = draw.random() < 0.4
        known: list[str | None] = [*METHODS, None]
        if self.ways == "cached":
            known.remove("p-tuning v2 encoder")  # its own prompts alone, in generate's tests
        one = draw.choice(known)
        self.adapters = [draw.choice(known) if several else one for _ in range(rows)]
        self.prompts = [draw.randint(1, 5) for _ in range(rows)]
        self.more = draw.randint(1, 4)  # tokens behind each prompt
        self.ids = []
        for adapter, prompt in zip(self.adapters, self.prompts, strict=True):
            soft = list(SOFT_IDS.get(adapter or "", ()))
            words = [draw.randrange(2, VOCAB) for _ in range(prompt + self.more)]
            self.ids.append((soft + words[:prompt], words[prompt:]))
        self.side = draw.choice(["left", "right"])
        self.by_labels, self.positions, self.static = (draw.random() < 0.5 for _ in range(3))
        self.masked = draw.random() < 0.7
        self.keep = draw.choice([0, 0, 1, 2])
        self.embeds = draw.random() < 0.2 and "p-tuning" not in self.adapters

    def soft_of(self, row: int) -> SoftPrompt:
        adapter = self.adapters[row]
        return SoftPrompt(METHODS["p-tuning v2"]) if adapter is None else self.model.adapters[adapter]  # type: ignore[return-value]

    def truth(self) -> list[torch.Tensor]:
        return [
            row_logits(self.bare, self.soft_of(r), Row([*prompt, *answer], len(prompt)))
            for r, (prompt, answer) in enumerate(self.ids)
        ]

    def names(self) -> dict[str, Any]:
        return {"adapter_names": self.adapters}

    def given(self, ids: torch.Tensor) -> dict[str, Any]:
        if not self.embeds:
            return {"input_ids": ids}
        return {"inputs_embeds": self.model.base.get_input_embeddings()(ids)}

    def padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for r, row in enumerate(rows):
            at = slice(width - len(row), None) if self.side == "left" else slice(len(row))
            ids[r, at], mask[r, at] = torch.tensor(row), 1
        return ids, mask

    def check(self) -> None:
        getattr(self, f"check_{self.ways}")(self.truth())

    def ends(self, rows: list[list[int]], mask: torch.Tensor | None = None) -> dict[str, Any]:
        """Where prompts end, by lengths or by labels."""
        lengths = torch.tensor([len(prompt) for prompt, _ in self.ids])
        if not self.by_labels:
            return {"prompt_lengths": lengths}
        labelled = [[-100] * len(prompt) + answer for prompt, answer in self.ids]
        if mask is None:
            return {"labels": torch.tensor([[*chain(*labelled)]])}
        labels = torch.full(mask.shape, -100)
        for r, row in enumerate(labelled):
            labels[r, mask[r].bool()] = torch.tensor(row)
        return {"labels": labels}

    def check_loss(self, output: Any, truth: list[torch.Tensor]) -> None:
        if self.by_labels:
            predicted = [logits[len(prompt) - 1 : -1] for logits, (prompt, _) in zip(truth, self.ids, strict=True)]
            answers = torch.tensor([token for _, answer in self.ids for token in answer])
            close(output.loss, torch.nn.functional.cross_entropy(torch.cat(predicted), answers), 1e-4)

    def check_padded(self, truth: list[torch.Tensor]) -> None:
        rows = [[*prompt, *answer] for prompt, answer in self.ids]
        ids, mask = self.padded(rows)
        options = self.ends(rows, mask) | self.names() | self.given(ids)
        if not bool(mask.all()) or self.masked:
            options["attention_mask"] = mask
        if self.positions:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        keep = 0 if self.by_labels else self.keep
        output = self.model(**options, use_cache=False, logits_to_keep=keep)
        logits = output.logits
        self.check_loss(output, truth)
        wanted = torch.zeros(*mask.shape, logits.shape[-1])
        for r, want in enumerate(truth):
            wanted[r, mask[r].bool()] = want
        real = mask[:, -logits.shape[1] :].bool()
        close(logits[real], wanted[:, -logits.shape[1] :][real], 1e-4)

    def check_packed(self, truth: list[torch.Tensor]) -> None:
        rows = [[*prompt, *answer] for prompt, answer in self.ids]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([[*chain(*rows)]])
        options = self.ends(rows) | self.names() | self.given(ids)
        options["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        if self.static or len(rows) == 1:
            cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            longest = int(lengths.max())
            options |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
        output = self.model(**options, use_cache=False)
        self.check_loss(output, truth)
        close(output.logits[0], torch.cat(truth), 1e-4)

    def check_cached(self, truth: list[torch.Tensor]) -> None:
        """The prompts at once, what follows token by token or at once, in a cache."""
        ids, mask = self.padded([prompt for prompt, _ in self.ids])
        answers = torch.tensor([answer for _, answer in self.ids])
        cache: Any = transformers.DynamicCache(config=self.model.base.config)
        if self.static:
            cache = transformers.StaticCache(config=self.model.base.config, max_cache_len=32)
        unpadded = bool(mask.all()) and not self.masked
        first = {} if unpadded else {"attention_mask": mask}
        found = [self.model(**self.given(ids), **first, **self.names(), past_key_values=cache, use_cache=True).logits]
        for part in answers.split(1 if self.by_labels else self.more, 1):
            mask = torch.cat([mask, torch.ones_like(part)], 1)
            more = {} if unpadded else {"attention_mask": mask}
            found.append(self.model(**self.given(part), **more, past_key_values=cache, use_cache=True).logits)
        logits = torch.cat(found, 1)
        for r, want in enumerate(truth):
            close(logits[r][mask[r].bool()], want, 1e-4)


@pytest.mark.parametrize("part", range(4))
def test_forward(part: int) -> None:
    with torch.no_grad():
        for seed in range(part, DRAWS, 4):
            draw = Draw(seed)
            try:
                draw.check()
            except Exception as error:
                described = {key: value for key, value in vars(draw).items() if key not in ("bare", "model")}
                raise AssertionError(f"draw {seed}: {described}") from error
