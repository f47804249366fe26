"""Models of images and audio: text with an image or an audio clip in each row.

The reference is a run of the bare wrapper in which a hook on its text decoder replaces placeholder words by soft
embeddings, or in which the prefix is concatenated to the decoder's keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.methods.base import SoftPrompt

from . import truth
from .causal import STEPS, generation_options
from .configs import IMAGE, MELS, VOCAB
from .methods import Subject, Trials
from .rows import Batch, Row
from .verdicts import outcome, verdict

TEXTS = (([5, 6], [7, 8, 9]), ([11], [12, 13]), ([14, 15, 16], [17]))  # before and behind the image of each row
WORD = 20  # stands in for soft tokens
Media = dict[str, Tensor]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _image() -> Media:
    return {"pixel_values": _normal(1, 3, IMAGE, IMAGE)}


def _wide() -> Media:
    return {"pixel_values": _normal(1, 3, IMAGE, 2 * IMAGE), "image_sizes": torch.tensor([[IMAGE, 2 * IMAGE]])}


def _tiles(number: int) -> Media:
    return {"pixel_values": _normal(1, number, 3, IMAGE, IMAGE)}


def _sized_tiles() -> Media:
    return _tiles(2) | {"image_sizes": torch.tensor([[IMAGE, IMAGE]])}


def _patches(width: int) -> Media:
    return {"pixel_values": _normal(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _sound(frames: int) -> Media:
    return {"input_features": _normal(1, MELS, frames)}


def _masked_sound() -> Media:
    return _sound(256) | {"feature_attention_mask": torch.ones(1, 256, dtype=torch.long)}


# What an image or a sound is to a class.
CLASSES: dict[str, Callable[[], Media]] = {
    "AriaForConditionalGeneration": _image,
    "AyaVisionForConditionalGeneration": _image,
    "Cohere2VisionForConditionalGeneration": _image,
    "Gemma3ForConditionalGeneration": _image,
    "Idefics2ForConditionalGeneration": partial(_tiles, 1),
    "Idefics3ForConditionalGeneration": partial(_tiles, 1),
    "InternVLForConditionalGeneration": _image,
    "LlavaForConditionalGeneration": _image,
    "LlavaNextForConditionalGeneration": _sized_tiles,
    "LlavaOnevisionForConditionalGeneration": _sized_tiles,
    "Mistral3ForConditionalGeneration": _wide,
    "PaliGemmaForConditionalGeneration": _image,
    "Qwen2AudioForConditionalGeneration": _masked_sound,
    "Qwen2VLForConditionalGeneration": partial(_patches, 3 * 2 * 8 * 8),
    "Qwen2_5_VLForConditionalGeneration": partial(_patches, 3 * 2 * 8 * 8),
    "Qwen3VLForConditionalGeneration": partial(_patches, 3 * 2 * 8 * 8),
    "Qwen3_5ForConditionalGeneration": partial(_patches, 3 * 2 * 8 * 8),
    "SmolVLMForConditionalGeneration": partial(_tiles, 1),
    "VipLlavaForConditionalGeneration": _image,
    "VoxtralForConditionalGeneration": partial(_sound, 256),
}


@dataclass(frozen=True)
class MediaRow(Row):
    media: Media = field(default_factory=dict)


class Multimodal(Subject):
    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        self._places = self._placeholder = 0  # how many tokens an image takes, and their id; known with a model
        self._kinds: str | None = None  # the argument that tells them

    def rows(self, bare: Any, inline: bool) -> list[Row]:
        """Three rows of text around an image each."""
        media, place = CLASSES[self.class_name](), self._place(bare)
        self._places = self._places or self._fitting(bare, media)
        made: list[Row] = []
        for number, (before, behind) in enumerate(TEXTS):
            ids = [*before, *[place] * self._places, *behind]
            scaled = {name: x * (1 + number) if x.is_floating_point() else x for name, x in media.items()}
            prompt = len(ids) - 1
            if inline:
                ids, prompt = [-1, *ids[:prompt], -2, *ids[prompt:]], prompt + 2
            made.append(MediaRow(ids, prompt, scaled))
        return made

    def bare(self, model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits[0]

    def batch(self, given: list[Row], side: str) -> Batch:
        width = max(len(row.ids) for row in given)
        ids, mask, places = torch.zeros(len(given), width).long(), torch.zeros(len(given), width).long(), []
        for r, row in enumerate(given):
            at = 0 if side == "right" else width - len(row.ids)
            places.append(slice(at, at + len(row.ids)))
            ids[r, places[r]], mask[r, places[r]] = torch.tensor(row.ids), 1
        batch = {"input_ids": ids, "attention_mask": mask, "prompt_lengths": torch.tensor([r.prompt for r in given])}
        return batch | self._beside(given, ids), lambda x: [x[r, place] for r, place in enumerate(places)]

    def answers(self, output: Any) -> Tensor:
        return output.logits

    def trials(self, bare: Any, soft: Any, given: list[Row], wanted: list[Tensor]) -> Trials:
        return {"generate": lambda: self._generated(bare, soft, given)}

    # The truth --------------------------------------------------------------------------------------------------------

    def alone(self, bare: Any, soft: SoftPrompt, row: Row) -> Tensor:
        tokens = soft.soft_tokens()
        if tokens is None:
            return self._behind(bare, soft, row)
        at = 0 if soft.placement == "before" else row.prompt
        ids = (
            row.ids if soft.placement == "inline" else [*row.ids[:at], *range(-1, -len(tokens) - 1, -1), *row.ids[at:]]
        )
        places = {column: -i - 1 for column, i in enumerate(ids) if i < 0}
        words = replace(row, ids=[WORD if i < 0 else i for i in ids])

        def enter(decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            embeds = kwargs["inputs_embeds"].clone()
            for column, number in places.items():
                embeds[0, column] = tokens[number]
            return args, kwargs | {"inputs_embeds": embeds}

        with _hooked(bare, enter):
            logits = self._run(bare, words)
        if soft.placement == "inline":
            return logits
        return logits[[t + len(tokens) if t >= at - 1 else t for t in range(len(row.ids))]]

    def _behind(self, bare: Any, soft: SoftPrompt, row: Row) -> Tensor:
        prefix, turn = soft.prefix(), count(0)
        assert prefix is not None
        P, inner = prefix.length, {id(module) for module in bare.get_decoder().modules()}

        def attend(
            eager: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **options: Any
        ) -> Any:
            if id(module) not in inner:
                return eager(module, query, key, value, *mask, **options)
            at = next(turn) if len(prefix.k) > 1 else 0
            seen = mask[0] if mask else options.pop("attention_mask")
            seen = seen if seen is None else F.pad(seen, (P, 0))
            key, value = torch.cat([prefix.k[at], key], 2), torch.cat([prefix.v[at], value], 2)
            return eager(module, query, key, value, seen, **options)

        def enter(decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(kwargs["inputs_embeds"].shape[1])[None]
            return args, kwargs | {"position_ids": positions + P}

        with _hooked(bare, enter):
            return self._run(bare, row, partial(truth.with_attention, bare, attend))

    def _run(self, bare: Any, row: Row, run: Callable[..., Any] | None = None) -> Tensor:
        batch, _ = self.batch([row], "right")
        batch.pop("prompt_lengths")
        return (run or bare)(**batch).logits[0]

    # Rows -------------------------------------------------------------------------------------------------------------

    def _beside(self, given: list[Row], ids: Tensor) -> dict[str, Tensor]:
        """Images of rows, and the kinds of their tokens where the class reads them."""
        rows_media = [row.media for row in given if isinstance(row, MediaRow)]
        beside = {name: torch.cat([one[name] for one in rows_media]) for name in rows_media[0]}
        if self._kinds is not None:
            beside[self._kinds] = (ids == self._placeholder).long()
        return beside

    def _place(self, bare: Any) -> int:
        config = bare.config
        names = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
        self._placeholder = next(
            int(getattr(config, name)) for name in names if getattr(config, name, None) is not None
        )
        taken = inspect.signature(bare.forward).parameters
        self._kinds = "mm_token_type_ids" if "mm_token_type_ids" in taken else None
        if self.class_name == "Gemma3ForConditionalGeneration":
            self._kinds = "token_type_ids"
        return self._placeholder

    def _fitting(self, bare: Any, media: Media) -> int:
        """How many tokens an image takes: the first number that the bare model runs with."""
        said: Exception | None = None
        for number in range(1, 65):
            try:
                with torch.no_grad():
                    logits = self._run(bare, MediaRow([5, *[self._placeholder] * number, 6], 1, media))
            except Exception as error:
                said = error
                continue
            if len(logits) == number + 2:  # none that stand for several
                return number
        raise ValueError(f"no number of places fits its images: {said}")

    # Generation -------------------------------------------------------------------------------------------------------

    def _generated(self, bare: Any, soft: Any, given: list[Row]) -> str:
        said = outcome(lambda: self._generate(soft, partial(self.alone, bare, soft.soft), given))
        if not said.startswith(("crash", "wrong")):
            return said
        words = [replace(row, ids=[WORD if i < 0 else i for i in row.ids]) for row in given]
        if outcome(lambda: self._generate(bare, partial(self._run, bare), words)) != "ok":
            return "base: its own generate does not take padded prompts with images like this"
        return said

    @torch.no_grad()
    def _generate(self, model: Any, answer: Callable[[Row], Tensor], given: list[Row]) -> str:
        prompts = [replace(row, ids=row.ids[: row.prompt]) for row in given]
        batch, _ = self.batch(prompts, "left")
        batch.pop("prompt_lengths")
        out = model.generate(**batch, **generation_options(None, STEPS), suppress_tokens=list(range(VOCAB - 8, VOCAB)))
        got, new = torch.stack(out.logits, 1), out.sequences[:, -STEPS:].tolist()
        longer = [replace(row, ids=[*row.ids, *new[r]]) for r, row in enumerate(prompts)]
        return verdict(list(got), [answer(row)[row.prompt - 1 : -1] for row in longer])


@contextmanager
def _hooked(bare: Any, enter: Callable[..., Any]) -> Iterator[None]:
    handle = bare.get_decoder().register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
