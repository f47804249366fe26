"""What is tried on one model: every method beside a run in which nothing is ours.

The truth is the bare model with transformers' eager attention, each row alone and without padding: soft tokens as
embeddings in the row, a prefix in the cache, at positions 0..P-1, before the row is run.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import softkv
from softkv.methods.base import Method, SoftPrompt

from .model_configs import VOCAB, tiny_model

METHODS: dict[str, Method] = {
    "P-tuning v2": softkv.PTuningV2(length=5),
    "Prefix-tuning": softkv.PrefixTuning(length=5),
    "Prompt-tuning, after": softkv.PromptTuning(length=3),
    "Prompt-tuning, before": softkv.PromptTuning(length=3, position="before"),
    "P-tuning": softkv.PTuning(template="[P1] [X] [P2] [Y]", encoder_size=8),
}
TOLERANCE = 2e-3  # of the standard deviation of the logits wanted; fp32 leaves about 1e-5
STEPS = 4  # tokens generated
SHAPES = ((5, 3), (9, 4), (3, 2))  # tokens and prompt of each row
SHORT_WINDOW = 6  # of windowed layers, where a text is in context


@dataclass(frozen=True)
class Row:
    ids: list[int]
    prompt: int


def check_model(class_name: str, methods: dict[str, Method] = METHODS) -> dict[str, Any]:
    """The outcome of every check: "ok", "refused: …" (a sentence of softkv's), "base: …" (the bare model can't
    either), "wrong: …" or "crash: …"."""
    try:
        bare, model = tiny_model(class_name), tiny_model(class_name)
        with torch.no_grad():
            before = bare(input_ids=torch.arange(5, 10)[None]).logits
    except Exception as error:
        return {"not built": _sentence(error)}
    if not before.isfinite().all():
        return {"not built": "its logits with random weights are not finite"}
    checks: dict[str, Any] = {}
    for name, method in methods.items():
        checks[name] = _check_method(name, bare, model, method)
    checks["text"] = {"text in context": _outcome(partial(_text_in_context, class_name))}
    return {"checks": checks}


def _check_method(name: str, bare: Any, model: Any, method: Method) -> dict[str, str]:
    state = _state(model)
    torch.manual_seed(1)
    try:
        soft = softkv.attach(model, method).eval()
    except Exception as error:
        outcome = _failure(error)
        return {"attach": outcome if _state(model) == state else f"wrong: a failed attach changed the base; {outcome}"}
    done = {"attach": "ok"}
    with torch.no_grad():
        for parameter in soft.soft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    rows = _rows(inline=soft.soft.placement == "inline")
    try:
        parameters = dict(soft.soft.named_parameters())
        wanted = [_alone(bare, soft.soft, row) for row in rows]
        loss = torch.stack([(one * _direction(one)).sum() for one in wanted]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    except Exception as error:
        soft.detach()
        return done | {"truth": f"base: {_sentence(error)}"}
    wanted = [one.detach() for one in wanted]
    with torch.no_grad():
        without = bare(input_ids=torch.tensor([rows[0].ids]).clamp(min=0)).logits[0]
    if not _far(wanted[0], without):
        done["effect"] = "base: the prompt changes nothing"
    forward = partial(_forward, soft, wanted)
    trials: dict[str, Callable[[], str]] = {
        "rows alone": lambda: forward([_padded([row], "right") for row in rows]),
        "padded right": lambda: forward([_padded(rows, "right")]),
        "padded left": lambda: forward([_padded(rows, "left")]),
        "packed": lambda: forward([_packed(rows)]),
        "gradients": lambda: _gradients(soft, rows, list(gradients)),
        "generate": lambda: _generate(bare, soft, rows),
        "generate, static cache": lambda: _generate(bare, soft, rows, cache_implementation="static"),
        "save and load": lambda: _reload(soft, rows),
    }
    for check, trial in trials.items():
        if check == "save and load":  # it ends the soft prompt
            done["disabled"] = _outcome(partial(_disabled, bare, soft))
        done[check] = _outcome(trial)
    for check, cache in (("generate", None), ("generate, static cache", "static")):
        if done[check].startswith(("crash", "wrong")) and not _base_generates(bare, cache):
            done[check] = "base: its own generate does not take padded prompts like this"
    soft.detach()
    done["detach"] = "ok" if _state(model) == state else "wrong: the base is not as it was"
    return done


# The truth ------------------------------------------------------------------------------------------------------------


def _alone(bare: Any, soft: SoftPrompt, row: Row) -> Tensor:
    """Logits `[T, V]` of one row, aligned with its ids."""
    words = bare.get_input_embeddings()(torch.tensor(row.ids).clamp(min=0))
    tokens = soft.soft_tokens()
    if tokens is None:
        return _behind(bare, soft, torch.tensor([row.ids]))
    if soft.placement == "inline":
        words = torch.stack([tokens[-i - 1] if i < 0 else words[at] for at, i in enumerate(row.ids)])
        return bare(inputs_embeds=words[None]).logits[0]
    at = 0 if soft.placement == "before" else row.prompt
    logits = bare(inputs_embeds=torch.cat([words[:at], tokens, words[at:]])[None]).logits[0]
    return logits[[t + len(tokens) if t >= at - 1 else t for t in range(len(row.ids))]]


def _behind(bare: Any, soft: SoftPrompt, ids: Tensor) -> Tensor:
    """Logits of ids behind a cache that holds the prefix."""
    from transformers import DynamicCache

    prefix = soft.prefix()
    assert prefix is not None
    with torch.no_grad():
        filled = bare(input_ids=ids, use_cache=True).get("past_key_values")
    cache = DynamicCache(config=bare.config)
    held = getattr(filled, "layers", [])
    layers = [number for number, layer in enumerate(held) if isinstance(getattr(layer, "keys", None), Tensor)]
    layers = [number for number in layers if filled.layers[number].keys.dim() == 4]
    P, T = prefix.length, ids.shape[1]
    usual = type(filled) is DynamicCache and _runs(bare, ids) == len(layers)
    if not usual or filled.layers[layers[0]].keys.shape[1::2] != prefix.k.shape[2::2]:
        return _concatenated(bare, prefix, ids)
    for number, (k, v) in zip(layers, prefix.layers(len(layers)), strict=True):
        cache.update(k, v[..., : filled.layers[number].values.shape[-1]], number)
    inputs = {
        "attention_mask": torch.ones(1, P + T, dtype=torch.long),
        "position_ids": _first(bare) + P + torch.arange(T)[None],
    }
    inputs = {name: value for name, value in inputs.items() if name in signature(bare.forward).parameters}
    return bare(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits[0]


def _first(bare: Any) -> int:
    """The position of a row's first token: RoBERTa's stands behind its padding's."""
    tables = [module for name, module in bare.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return padding[0] + 1 if padding else 0


@torch.no_grad()
def _runs(bare: Any, ids: Tensor) -> int:
    """How many times a pass runs attention."""
    turns: list[int] = []

    def attend(eager: Any, module: Any, *args: Any, **options: Any) -> Any:
        turns.append(len(turns))
        return eager(module, *args, **options)

    _with_attention(bare, attend, input_ids=ids)
    return len(turns)


def _concatenated(bare: Any, prefix: softkv.Prefix, ids: Tensor) -> Tensor:
    """Logits of ids where each block's keys and values really stand behind the prefix's: of models whose caches hold
    something else (latents, keys that blocks share)."""
    turn = count(0)

    def attend(eager: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        at = next(turn) if prefix.k.shape[0] > 1 else 0
        k, v = prefix.k[at], prefix.v[at][..., : value.shape[-1]]
        mask = F.pad(mask, (k.shape[2], 0))
        return eager(module, query, torch.cat([k, key], 2), torch.cat([v, value], 2), mask, **options)

    positions = _first(bare) + prefix.length + torch.arange(ids.shape[1])[None]
    return _with_attention(bare, attend, input_ids=ids, position_ids=positions)


def _with_attention(bare: Any, attend: Callable[..., Any], **inputs: Tensor) -> Tensor:
    """Logits of a model whose blocks call `attend` with transformers' eager attention of theirs."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def with_eager(module: Any, *args: Any, **options: Any) -> Any:
        return attend(type(module).forward.__globals__["eager_attention_forward"], module, *args, **options)

    AttentionInterface.register("concatenated", with_eager)
    AttentionMaskInterface.register("concatenated", eager_mask)
    bare.set_attn_implementation("concatenated")
    try:
        return bare(**inputs, use_cache=False).logits[0]
    finally:
        bare.set_attn_implementation("eager")


# softkv's side --------------------------------------------------------------------------------------------------------


def _rows(inline: bool) -> list[Row]:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length, prompt in SHAPES:
        ids = torch.randint(5, VOCAB - 8, (length,), generator=generator).tolist()
        if inline:
            ids = [-1, *ids[:prompt], -2, *ids[prompt:]]
            prompt += 2
        rows.append(Row(ids, prompt))
    return rows


Batch = tuple[dict[str, Tensor], Callable[[Tensor], list[Tensor]]]


def _padded(rows: list[Row], side: str) -> Batch:
    width = max(len(row.ids) for row in rows)
    shape, places = (len(rows), width), []
    ids, mask = torch.zeros(shape).long(), torch.zeros(shape).long()
    for r, row in enumerate(rows):
        at = 0 if side == "right" else width - len(row.ids)
        places.append(slice(at, at + len(row.ids)))
        ids[r, places[r]], mask[r, places[r]] = torch.tensor(row.ids), 1
    batch = {"input_ids": ids, "attention_mask": mask, "prompt_lengths": _prompts(rows)}
    return batch, lambda x: [x[r, place] for r, place in enumerate(places)]


def _prompts(rows: list[Row]) -> Tensor:
    return torch.tensor([row.prompt for row in rows])


def _packed(rows: list[Row]) -> Batch:
    lengths = [len(row.ids) for row in rows]
    batch = {
        "input_ids": torch.tensor([[i for row in rows for i in row.ids]]),
        "prompt_lengths": _prompts(rows),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    return batch, lambda x: list(x[0].split(lengths))


@torch.no_grad()
def _forward(soft: Any, wanted: list[Tensor], batches: list[Batch]) -> str:
    got = [one for batch, split in batches for one in split(soft(**batch).logits)]
    return _verdict(got, wanted)


def _gradients(soft: Any, rows: list[Row], wanted: list[Tensor]) -> str:
    batch, split = _padded(rows, "right")
    loss = torch.stack([(one * _direction(one)).sum() for one in split(soft(**batch).logits)]).sum()
    return _verdict(list(torch.autograd.grad(loss, list(soft.soft.parameters()))), wanted)


@torch.no_grad()
def _generate(bare: Any, soft: Any, rows: list[Row], **options: Any) -> str:
    rows = [Row(row.ids[: row.prompt], row.prompt) for row in rows]
    batch, _ = _padded(rows, "left")
    options |= {"max_new_tokens": STEPS, "do_sample": False, "disable_compile": True}
    out = soft.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], output_logits=True, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    got, new = torch.stack(out.logits, 1), out.sequences[:, -STEPS:].tolist()
    longer = [Row([*row.ids, *new[r]], row.prompt) for r, row in enumerate(rows)]
    wanted = [_alone(bare, soft.soft, row)[row.prompt - 1 : -1] for row in longer]
    return _verdict(list(got), wanted)


@torch.no_grad()
def _reload(soft: Any, rows: list[Row]) -> str:
    batch, _ = _padded(rows, "right")
    wanted = soft(**batch).logits
    with tempfile.TemporaryDirectory() as folder:
        soft.save_pretrained(folder)
        again = softkv.load(soft.detach(), folder)
    got = again(**batch).logits
    again.detach()
    return _verdict([got], [wanted])


@torch.no_grad()
def _disabled(bare: Any, soft: Any) -> str:
    ids = torch.arange(5, 12)[None]
    with soft.disabled():
        return _verdict([soft(input_ids=ids).logits], [bare(input_ids=ids).logits])


@torch.no_grad()
def _text_in_context(class_name: str) -> str:
    """A text as a prefix answers as the text in context, short windows included."""
    bare, model = (tiny_model(class_name, window=SHORT_WINDOW) for _ in range(2))
    soft = softkv.attach(model, METHODS["P-tuning v2"]).eval()
    text, row = list(range(11, 15)), [7, 8, 9, 20, 21, 22]
    soft.add_adapter("text", softkv.Prefix.from_ids(soft, torch.tensor([text])))
    soft.set_adapter("text")
    wanted = bare(input_ids=torch.tensor([text + row])).logits[:, len(text) :]
    if not _far(wanted, bare(input_ids=torch.tensor([row])).logits):
        return "base: the text changes nothing"
    return _verdict([soft(input_ids=torch.tensor([row])).logits], [wanted])


@torch.no_grad()
def _base_generates(bare: Any, cache: str | None) -> bool:
    ids = torch.arange(5, 13).view(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    try:
        out = bare.generate(
            ids, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation=cache,
            disable_compile=True, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        wanted = bare(input_ids=out.sequences[:1, 1:]).logits[0, 2:-1]
    except Exception:
        return False
    return _verdict([torch.stack(out.logits, 1)[0]], [wanted]) == "ok"


# Verdicts -------------------------------------------------------------------------------------------------------------


def _direction(logits: Tensor) -> Tensor:
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(logits)))


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    error = ((got - want).abs().max() / want.std().clamp_min(1e-6)).item()
    return error if error == error else float("inf")


def _far(got: Tensor, want: Tensor) -> bool:
    return _error(got, want) > 10 * TOLERANCE


def _verdict(got: list[Tensor], wanted: list[Tensor]) -> str:
    worst = max(_error(one, want) for one, want in zip(got, wanted, strict=True))
    return "ok" if worst < TOLERANCE else f"wrong: {worst:.2g}"


def _outcome(trial: Callable[[], str]) -> str:
    try:
        return trial()
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> str:
    """A refusal is a `ValueError` or the like that softkv itself raises."""
    frames = traceback.extract_tb(error.__traceback__)
    own = "/softkv/" in frames[-1].filename or "/kernels/" in frames[-1].filename
    refused = (
        own
        and isinstance(error, (ValueError, NotImplementedError))
        and not _OBSCURE.intersection(str(error).split(": "))
    )
    return f"{'refused' if refused else 'crash'}: {_sentence(error, refused)}"


_OBSCURE = {"TypeError", "AttributeError", "IndexError", "KeyError", "RuntimeError", "AssertionError"}


def _sentence(error: Exception, refused: bool = False) -> str:
    text = " ".join(str(error).split())
    return text[:300] if refused else f"{type(error).__name__}: {text}"[:200]


def _state(model: Any) -> tuple[Any, ...]:
    with torch.no_grad():
        answer = model(input_ids=torch.arange(5, 10)[None]).logits
    flags = tuple(parameter.requires_grad for parameter in model.parameters())
    modes = tuple(module.training for module in model.modules())
    return answer.sum().item(), answer.abs().sum().item(), flags, modes, model.config._attn_implementation
