"""What a training step takes, from a model's config alone: bytes and FLOPs, for softkv and the concatenating way.

The step is run on the meta device, where tensors have shapes and lifetimes but no values: every byte that autograd
keeps is counted (`softkv.profiling.ledger`), and every product (torch's FlopCounterMode). Two steps are run over the
same tokens: softkv's, and the concatenating way's, which puts the soft slots in front of every row's K/V (soft tokens
in front of its embeddings) as PEFT does, with a fused attention, and makes logits for every token as transformers does.

A frozen base keeps no gradient of its weights: a step costs its forward, and a backward to the inputs of about the
same, 2 times the forward and not 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from softkv.hf.context import SoftContext
from softkv.hf.interface import NAME
from softkv.methods.base import BaseShape, Computed, FrozenModel
from softkv.methods.p_tuning import PTuning
from softkv.prefix import Prefix
from softkv.profiling.ledger import Ledger
from softkv.profiling.presets import PRESETS

MethodName = Literal["p-tuning-v2", "prefix-tuning", "prompt-tuning", "p-tuning"]
METHODS: tuple[MethodName, ...] = ("p-tuning-v2", "prefix-tuning", "prompt-tuning", "p-tuning")
ADAM = 8  # bytes of optimizer state a trained value, fp32
META = torch.device("meta")


@dataclass(frozen=True)
class Job:
    """A training step.

    Args:
        config: of the base, a transformers config.
        method: by its command-line name. "prompt-tuning" stands before the input; "p-tuning" inside the row.
        length: P, slots or soft tokens.
        batch: B, rows of a step over all devices.
        tokens: T of a row, prompt and answer.
        answer: tokens of a row that have a label.
        dtype: of the frozen base.
        devices: rows and frozen weights are split evenly over them.
        checkpointing: whether each layer is run again in backward.
    """

    config: Any
    method: MethodName
    length: int
    batch: int
    tokens: int
    answer: int
    dtype: torch.dtype
    devices: int = 1
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "batch", "tokens", "answer", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} expects at least 1, got {getattr(self, name)}")
        if self.answer > self.tokens:
            raise ValueError(f"answer expects at most tokens = {self.tokens}, got {self.answer}")
        if self.batch % self.devices:
            raise ValueError(f"batch expects a multiple of devices = {self.devices}, got {self.batch}")
        if self.method not in METHODS:
            raise ValueError(f"method expects one of {', '.join(METHODS)}, got {self.method!r}")

    @property
    def rows(self) -> int:
        """Of one device."""
        return self.batch // self.devices


@dataclass(frozen=True)
class Cost:
    """Of one device, a step. Bytes, but for FLOPs.

    Attributes:
        parameters: the frozen base's share.
        trainable: learned values, their gradients and Adam's state, fp32.
        prefix: K/V of the slots, in the base's dtype: once, or once a row.
        activations: all else that is alive when the forward is over.
        workspace: what the backward, and the attention kernels, add to these at most.
        kv_cache: not of the step but of generation: K/V of the batch's rows and their prefix.
        forward_flops, backward_flops: of all products.
        attention_flops: the share of attention's, both passes.
    """

    parameters: int
    trainable: int
    prefix: int
    activations: int
    workspace: int
    kv_cache: int
    forward_flops: int
    backward_flops: int
    attention_flops: int

    @property
    def total(self) -> int:
        """Bytes of a training step at its peak."""
        return self.parameters + self.trainable + self.prefix + self.activations + self.workspace


def config_of(model: str) -> Any:
    """A transformers config: of a preset, of a folder with a config.json, or of a repository on the Hub."""
    if model.lower() in PRESETS:
        return transformers.LlamaConfig(**PRESETS[model.lower()])
    path = Path(model).expanduser()
    ways = f"a folder with a config.json, an id on the Hub, or one of {', '.join(PRESETS)}"
    if model.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(f"there is no folder {model}: expected {ways}")
    try:
        return transformers.AutoConfig.from_pretrained(path if path.is_dir() else model)
    except OSError as error:
        raise ValueError(f"no config of {model} was found: expected {ways}") from error


def plan(job: Job) -> dict[str, Cost]:
    """The cost of "softkv" and of "concatenating"; not of the latter where it can't be: under checkpointing,
    transformers drops the cache that would carry a concatenated prefix."""
    base = _base(job)
    steps = dict(STEPS)
    if job.checkpointing and job.method in ("p-tuning-v2", "prefix-tuning"):
        del steps["concatenating"]
    return {name: _cost(job, base, _run(job, base, step), name) for name, step in steps.items()}


def report(job: Job, costs: dict[str, Cost]) -> dict[str, Any]:
    """What `--json` prints."""
    settings = {key: value for key, value in vars(job).items() if key != "config"}
    return {
        "settings": settings | {"dtype": str(job.dtype).removeprefix("torch."), "architecture": job.config.model_type},
        "costs": {name: asdict(cost) | {"total": cost.total} for name, cost in costs.items()},
    }


# The step on the meta device -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    kept: int  # bytes alive when the forward is over
    peak: int
    forward_flops: int
    backward_flops: int
    attention_flops: int
    learned: int  # trained values


def _base(job: Job) -> Any:
    with META:
        base = transformers.AutoModelForCausalLM.from_config(job.config, dtype=job.dtype, attn_implementation=NAME)
    base.requires_grad_(False).train()
    if job.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base


class _Matrices(nn.Module):
    """Learned tensors with the shapes that `softkv.methods` gives them, without values."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=META)))


class _Stub:
    """Stands for the frozen model where P-tuning's encoder is built."""

    def __init__(self, shape: BaseShape) -> None:
        self.shape = shape

    def embed(self, ids: Tensor) -> Tensor:
        return torch.randn(*ids.shape, self.shape.embedding_size)


def _learned(job: Job, base: Any) -> nn.Module:
    """What the method trains."""
    shape = shape_of(base)
    if job.method == "p-tuning":
        marks = "".join(f"[P{i}]" for i in range(1, job.length + 1))
        return PTuning(template=f"{marks} [X] [Y]").build(cast(FrozenModel, _Stub(shape))).to(META)
    if job.method == "prompt-tuning":
        return _Matrices(embeddings=(job.length, shape.embedding_size))
    layers = shape.layers if job.method == "p-tuning-v2" else 1
    matrix = (layers, 1, shape.kv_heads, job.length, shape.head_dim)
    return _Matrices(k=matrix, v=matrix)


def shape_of(base: Any) -> BaseShape:
    """The sizes of a base that decide the shapes of learned tensors, from its config."""
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows, width = base.get_input_embeddings().weight.shape
    return BaseShape(config.num_hidden_layers, kv_heads, head_dim, config.hidden_size, width, rows)


def _soft_tokens(learned: nn.Module, base: Any) -> Tensor:
    """`[k, C]` in the base's dtype."""
    tokens = learned.compute() if isinstance(learned, Computed) else learned.embeddings
    return cast(Tensor, tokens).to(base.dtype)


def _embeddings(job: Job, base: Any) -> Tensor:
    """`[B, T, C]` of real tokens."""
    width = base.get_input_embeddings().weight.shape[1]
    return torch.empty(job.rows, job.tokens, width, dtype=base.dtype)


def _loss(base: Any, embeddings: Tensor, keep: int, prefix: SoftContext | None = None, cache: Any = None) -> Tensor:
    """The cross-entropy of the last `keep` logits of each row, in fp32 as transformers computes it."""
    B, T = embeddings.shape[:2]
    # A mask that is there already, a number of keys for each row: transformers would look at the values of others.
    keys = torch.empty(1, 1, 1, 1, dtype=torch.int32)
    logits = base(
        inputs_embeds=embeddings,
        attention_mask=keys,
        position_ids=torch.empty(B, T, dtype=torch.long),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=keep,
        softkv_prefix=prefix or SoftContext(),
    ).logits
    return F.cross_entropy(logits.float().flatten(0, 1), torch.empty(B * keep, dtype=torch.long))


def _softkv(job: Job, base: Any, learned: nn.Module) -> Tensor:
    tokens = _embeddings(job, base)
    if job.method == "p-tuning":
        return _loss(base, _in_front(tokens, _soft_tokens(learned, base)), job.answer)
    if job.method == "prompt-tuning":
        prefix = _head_once(base, _soft_tokens(learned, base))
    else:
        k, v = (cast(Tensor, getattr(learned, name)).to(base.dtype) for name in "kv")
        prefix = Prefix(k, v)
    layers = dict(enumerate(prefix.layers(shape_of(base).layers)))
    return _loss(base, tokens, job.answer, SoftContext(layers))


def _head_once(base: Any, soft_tokens: Tensor) -> Prefix:
    context = SoftContext(capture={})
    base.get_decoder()(
        inputs_embeds=soft_tokens[None],
        attention_mask=torch.empty(1, 1, 1, 1, dtype=torch.int32),
        position_ids=torch.empty(1, len(soft_tokens), dtype=torch.long),
        use_cache=False,
        softkv_prefix=context,
    )
    blocks = [block for _, block in sorted((context.capture or {}).items())]
    return Prefix.from_layers([block.key for block in blocks], [block.value for block in blocks])


def _concatenating(job: Job, base: Any, learned: nn.Module) -> Tensor:
    """The soft prompt in front of every row, and logits for every token."""
    tokens = _embeddings(job, base)
    if job.method in ("p-tuning", "prompt-tuning"):
        rows = _in_front(tokens, _soft_tokens(learned, base))
        return _loss(base, rows, rows.shape[1])
    cache = transformers.DynamicCache()
    layers = shape_of(base).layers
    k, v = (cast(Tensor, getattr(learned, name)).repeat_interleave(job.rows, 1).to(base.dtype) for name in "kv")
    for layer, (key, value) in enumerate(Prefix(k, v).layers(layers)):
        cache.update(key, value, layer)
    return _loss(base, tokens, job.tokens, cache=cache)


def _in_front(tokens: Tensor, soft_tokens: Tensor) -> Tensor:
    return torch.cat([soft_tokens.expand(len(tokens), -1, -1), tokens], 1)


STEPS = {"softkv": _softkv, "concatenating": _concatenating}


def _run(job: Job, base: Any, step: Callable[[Job, Any, nn.Module], Tensor]) -> Run:
    learned = _learned(job, base)
    for parameter in learned.parameters():
        parameter.grad = torch.empty_like(parameter)  # a step adds to it
    gradients = [cast(Tensor, parameter.grad) for parameter in learned.parameters()]
    known = [*base.parameters(), *base.buffers(), *learned.parameters(), *learned.buffers(), *gradients]
    with META, Ledger(known) as ledger:
        loss = step(job, base, learned)
        kept = ledger.live
        loss.backward()
    # A run of its own: the counter's hooks keep tensors alive.
    with META, FlopCounterMode(display=False) as flops:
        loss = step(job, base, learned)
        forward = flops.get_total_flops()
        loss.backward()
    attention = sum(count for op, count in flops.flop_counts["Global"].items() if "softkv" in str(op))
    return Run(
        kept=kept,
        peak=ledger.peak,
        forward_flops=forward,
        backward_flops=flops.get_total_flops() - forward,
        attention_flops=attention,
        learned=sum(p.numel() for p in learned.parameters()),
    )


def _cost(job: Job, base: Any, run: Run, name: str) -> Cost:
    shape = shape_of(base)
    values = sum(p.numel() for p in base.parameters())
    token = 2 * shape.kv_heads * shape.head_dim * base.dtype.itemsize  # K and V of a layer
    shared = name == "softkv" and job.method != "p-tuning"
    pairs = 1 if shared and job.method == "prefix-tuning" else shape.layers
    prefix = token * pairs * job.length * (1 if shared else job.rows)
    statistics = (
        8 * job.rows * job.tokens * base.config.get_text_config().num_attention_heads
    )  # lse and Δ of a backward
    return Cost(
        parameters=values * base.dtype.itemsize // job.devices,
        trainable=run.learned * (4 + 4 + ADAM),
        prefix=prefix,
        activations=run.kept - prefix,
        workspace=run.peak - run.kept + statistics,
        kv_cache=prefix + token * shape.layers * job.rows * job.tokens,
        forward_flops=run.forward_flops,
        backward_flops=run.backward_flops,
        attention_flops=run.attention_flops,
    )


# FLOPs of softkv's operators -----------------------------------------------------------------------------------------


def _pairs(q: Any, k: Any, prefix_k: Any, is_causal: bool, window: int | None) -> tuple[int, int]:
    """(query, token) and (query, slot) pairs that are seen, of all rows and heads of a dense call."""
    B, H, T, _ = q
    S = k[2]
    seen = (min(S - T + t + 1, window or S) for t in range(T)) if is_causal else (S for _ in range(T))
    return B * H * sum(seen), B * H * T * (prefix_k[2] if prefix_k is not None else 0)


@register_flop_formula(torch.ops.softkv.attention)
def _attention_forward_flops(q: Any, k: Any, v: Any, prefix_k: Any, *rest: Any, **_: Any) -> int:
    tokens, slots = _pairs(q, k, prefix_k, rest[11], rest[12])
    return 4 * q[-1] * (tokens + slots)


@register_flop_formula(torch.ops.softkv.attention_backward)
def _attention_backward_flops(*operands: Any, **_: Any) -> int:
    """Scores again, and one product for each of dp, dq, dk, dv that is asked for."""
    q, k, _, prefix_k, *rest = operands[4:]
    need_q, need_k, need_v, need_prefix_k, need_prefix_v, _ = rest[-1]
    tokens, slots = _pairs(q, k, prefix_k, rest[11], rest[12])

    def products(need_key: bool, need_value: bool) -> int:
        return (1 + (need_q or need_key) + need_q + need_key + need_value) * (need_q or need_key or need_value)

    return 2 * q[-1] * (tokens * products(need_k, need_v) + slots * products(need_prefix_k, need_prefix_v))
