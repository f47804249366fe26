"""Bytes and FLOPs of a training step, from a model's config alone, for softkv and for concatenation.

The real model runs on the shapes of its tensors (`softkv.profiling.fakes`): every byte that autograd keeps is counted
(`softkv.profiling.ledger`), and every matrix product (`softkv.profiling.flops`). Two steps run over the same tokens:
softkv's, with packed rows, and one that concatenates: it pads rows to the longest, puts the soft slots in front of
every row's K/V (soft tokens in front of its embeddings) as PEFT does, with a fused attention, and computes logits for
every token as transformers does.

A frozen base has no weight gradients, so that a step costs about 2 times the forward instead of 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from softkv.hf.layout import IGNORED
from softkv.io.attach import attach
from softkv.io.soft_model import SoftModel
from softkv.methods import METHODS, PTuningV2
from softkv.methods.base import BaseShape, FrozenModel, Method, SoftPrompt, Widths
from softkv.methods.placeholder import Placeholder
from softkv.profiling.fakes import ShapesOnly
from softkv.profiling.flops import Flops
from softkv.profiling.ledger import Ledger
from softkv.profiling.presets import PRESETS
from softkv.train.batches import PackingCollator
from softkv.train.label_logits import label_logits

EncoderName = Literal["lstm", "attention"]
ADAM = 8  # bytes of optimizer state per trained value, fp32
META = torch.device("meta")
_TOKEN = 1  # the id of every token, on which no cost depends


@dataclass(frozen=True)
class PlannedStep:
    """A training step.

    Args:
        config: of the base, a transformers config.
        method: a name in `METHODS`. "prompt-tuning" is placed before the input, "p-tuning" inside the row.
        length: P, slots or soft tokens.
        batch: B, rows per step over all devices.
        tokens: T, prompt and answer of a row; or several lengths, which the rows of a device take in turn.
        answer: the number of labelled tokens per row.
        dtype: of the frozen base.
        devices: rows and frozen weights are split evenly over them.
        checkpointing: whether each layer is run again in backward.
        encoder: P-tuning v2's encoder, shared by all layers, which computes K and V of each row from its prompt.
        target: the device whose Triton kernels run, a name in `softkv.profiling.compile.TARGETS`.
    """

    config: Any
    method: str
    length: int
    batch: int
    tokens: int | tuple[int, ...]
    answer: int
    dtype: torch.dtype
    devices: int = 1
    checkpointing: bool = False
    encoder: EncoderName | None = None
    target: str = "sm_90"

    def __post_init__(self) -> None:
        for name in ("length", "batch", "answer", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} expects at least 1, got {getattr(self, name)}")
        shortest = min(self.taken_in_turn, default=0)
        if shortest < 1:
            raise ValueError(f"tokens expects at least 1 in every row, got {shortest}")
        if self.answer > shortest:
            raise ValueError(f"answer expects at most tokens = {shortest}, got {self.answer}")
        if self.batch % self.devices:
            raise ValueError(f"batch expects a multiple of devices = {self.devices}, got {self.batch}")
        if len(self.taken_in_turn) > self.rows:
            raise ValueError(
                f"tokens expects at most as many lengths as a device has rows, {self.rows}, got "
                f"{len(self.taken_in_turn)}: give fewer lengths, or a larger batch"
            )
        if self.method not in METHODS:
            raise ValueError(f"method expects one of {', '.join(METHODS)}, got {self.method!r}")
        if self.encoder is not None and self.method != "p-tuning-v2":
            raise ValueError(f"encoder is only read with method p-tuning-v2, got {self.method}: leave one of them out")

    @property
    def rows(self) -> int:
        """The number of rows per device."""
        return self.batch // self.devices

    @property
    def taken_in_turn(self) -> tuple[int, ...]:
        return (self.tokens,) if isinstance(self.tokens, int) else self.tokens

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row of one device."""
        return tuple(islice(cycle(self.taken_in_turn), self.rows))

    @property
    def longest(self) -> int:
        return max(self.taken_in_turn)


@dataclass(frozen=True)
class Cost:
    """The cost of a step on one device, in bytes or FLOPs.

    Attributes:
        parameters: the frozen base's share.
        trainable: learned values, their gradients and Adam's state, fp32.
        prefix: K/V of the slots alive after the forward, in the base's dtype: once, or once per row. With
            checkpointing, an encoder's are recomputed per layer in backward and not included.
        activations: everything else alive then.
        workspace: the most that the backward adds to these.
        kernels: what kernels allocate during attention's backward: log-sum-exps and Δ, and in softkv's Triton kernels
            partial sums of the prefix's gradient.
        kv_cache: for generation, not the step: K/V of the batch's padded rows and of their prefix.
        forward_flops, backward_flops: of all matrix products.
        attention_flops: the share of attention's, both passes.
    """

    parameters: int
    trainable: int
    prefix: int
    activations: int
    workspace: int
    kernels: int
    kv_cache: int
    forward_flops: int
    backward_flops: int
    attention_flops: int

    @property
    def total(self) -> int:
        """Peak bytes of a training step."""
        return self.parameters + self.trainable + self.prefix + self.activations + self.workspace + self.kernels


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


def plan(job: PlannedStep, *ways: str) -> dict[str, Cost]:
    """The cost of "softkv" and of "concatenating", or of those given. "concatenating" is omitted if it is impossible:
    prefixes are concatenated in transformers' cache, which checkpointing drops, and which has no keys and values in
    multi-head latent attention."""
    soft, shapes = _model(job)
    steps = {name: STEPS[name] for name in ways or STEPS}
    latent = getattr(job.config.get_text_config(), "kv_lora_rank", None) is not None
    if soft.soft.placement is None and (job.checkpointing or latent):
        steps.pop("concatenating", None)
    return {name: _cost(job, soft, _run(job, soft, shapes, step), name) for name, step in steps.items()}


def report(job: PlannedStep, costs: dict[str, Cost]) -> dict[str, Any]:
    """The output of `--json`."""
    settings = {key: value for key, value in vars(job).items() if key != "config"}
    return {
        "settings": settings | {"dtype": str(job.dtype).removeprefix("torch."), "architecture": job.config.model_type},
        "costs": {name: asdict(cost) | {"total": cost.total} for name, cost in costs.items()},
    }


@dataclass(frozen=True)
class Counted:
    """The measurements of a step."""

    kept: int  # bytes alive after the forward
    peak: int
    forward_flops: int
    backward_flops: int
    attention_flops: int


@dataclass(frozen=True)
class _AnyStart(Method):
    """A method initialised without values of the base."""

    method: Method

    @property
    def in_rows(self) -> bool:  # type: ignore[override]
        return self.method.in_rows

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        return self.method.build(Placeholder(base.shape), folded=folded)


def learned_values(job: PlannedStep) -> int:
    """The number of values that the method trains."""
    return sum(parameter.numel() for parameter in _model(job)[0].soft.parameters())


def on_meta(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a config, on the meta device."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"expected the config of a causal language model, got {config.model_type!r}")
    with META:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _model(job: PlannedStep) -> tuple[SoftModel, ShapesOnly]:
    """The planned model, on the meta device."""
    base = on_meta(job.config, job.dtype)
    method = METHODS[job.method].of_length(job.length)
    if job.encoder is not None:
        method = PTuningV2(length=job.length, encoder=job.encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            soft = attach(base, _AnyStart(method)).train()
        except ValueError as error:
            raise ValueError(
                f"softkv can't run a {type(base).__name__}, so there is nothing to plan: {error}"
            ) from error
        if job.checkpointing:
            soft.gradient_checkpointing_enable()
    shapes = ShapesOnly()
    shapes.strip(soft)
    return soft, shapes


def _run(
    job: PlannedStep, soft: SoftModel, shapes: ShapesOnly, step: Callable[[PlannedStep, SoftModel], Tensor]
) -> Counted:
    gradients = [parameter.grad for parameter in soft.parameters() if parameter.grad is not None]
    known = [*soft.parameters(), *soft.buffers(), *gradients]
    with shapes, Flops() as flops, Ledger(known) as ledger:
        loss = step(job, soft)
        kept, forward = ledger.live, flops.total
        loss.backward()
    return Counted(kept, ledger.peak, forward, flops.total - forward, flops.attention)


def _softkv(job: PlannedStep, soft: SoftModel) -> Tensor:
    """A step of `softkv.Trainer`: packed rows, logits at labelled positions."""
    inline = range(-1, -_inline(soft) - 1, -1)
    rows = [
        {
            "input_ids": [*inline, *[_TOKEN] * length],
            "labels": [IGNORED] * (len(inline) + length - job.answer) + [_TOKEN] * job.answer,
        }
        for length in job.lengths
    ]
    output, targets = label_logits(soft, PackingCollator()(rows))
    return F.cross_entropy(output.logits.float(), targets)


def _concatenating(job: PlannedStep, soft: SoftModel) -> Tensor:
    """The soft prompt in front of every row, rows padded to the longest, and logits for every token."""
    base, prompt, rows = soft.base, soft.soft, job.rows
    embeds = base.get_input_embeddings()(torch.full((rows, job.longest), _TOKEN))
    tokens, cache, slots = prompt.soft_tokens(), None, 0
    if tokens is not None:
        embeds = torch.cat([tokens.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    else:
        cache, slots = transformers.DynamicCache(), job.length
    if (prefix := prompt.prefix()) is not None and cache is not None:
        prefix = prefix.to(dtype=embeds.dtype)
        for layer, kv in enumerate(prefix.layers(soft.base_shape.layers)):
            cache.update(*(x.repeat_interleave(rows, 0) for x in kv), layer)
    columns = embeds.shape[1]
    with _encoding_into(cache, job, soft):
        return base(
            inputs_embeds=embeds,
            attention_mask=torch.ones(rows, slots + columns, dtype=torch.long),
            position_ids=torch.arange(slots, slots + columns)[None],
            past_key_values=cache,
            use_cache=cache is not None,
            labels=torch.full((rows, columns), _TOKEN),
        ).loss


@contextmanager
def _encoding_into(cache: Any, job: PlannedStep, soft: SoftModel) -> Iterator[None]:
    """Make each attention block find in the cache the K and V that an encoder computes from its input."""
    prompts = torch.tensor([length - job.answer for length in job.lengths])

    def enter(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        encoded = soft.soft.row_prefix(block.layer_idx, hidden[:, : int(prompts.max())], prompts)
        cache.update(*encoded, block.layer_idx)

    blocks = soft._hooks.order.modules if soft.soft.encodes_rows else []
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


STEPS = {"softkv": _softkv, "concatenating": _concatenating}


def _inline(soft: SoftModel) -> int:
    """Soft tokens inside every row, by their ids."""
    return int(soft.soft.config.length) if soft.soft.placement == "inline" else 0  # type: ignore[attr-defined]


def _cost(job: PlannedStep, soft: SoftModel, counted: Counted, name: str) -> Cost:
    shape, size = soft.base_shape, job.dtype.itemsize
    prompt, token = soft.soft, size * sum(each.of_slot for each in shape.by_layer)  # K and V in all layers
    shared = name == "softkv" and not _inline(soft) and not prompt.encodes_rows
    learned = prompt.prefix()
    one_pair = shared and learned is not None and len(learned.k) == 1
    slots = (token // shape.layers if one_pair else token) * job.length * (1 if shared else job.rows)
    prefix = 0 if prompt.encodes_rows and job.checkpointing else slots
    return Cost(
        parameters=sum(p.numel() for p in soft.base.parameters()) * size // job.devices,
        trainable=soft.num_trainable() * (4 + 4 + ADAM),
        prefix=prefix,
        activations=counted.kept - prefix,
        workspace=counted.peak - counted.kept,
        kernels=_kernels(job, soft.base_shape, packed=name == "softkv", inline=_inline(soft)),
        kv_cache=slots + token * job.rows * job.longest,
        forward_flops=counted.forward_flops,
        backward_flops=counted.backward_flops,
        attention_flops=counted.attention_flops,
    )


def _kernels(job: PlannedStep, shape: BaseShape, *, packed: bool, inline: int = 0) -> int:
    """Bytes that softkv's Triton launchers allocate for themselves in one layer's backward of attention, the largest
    one; 0 where the base keeps its own attention."""
    return max((_kernels_of(job, each, packed, inline) for each in set(shape.by_layer)), default=0)


def _kernels_of(job: PlannedStep, layer: Widths, packed: bool, inline: int) -> int:
    H, (G, *widths) = job.config.get_text_config().num_attention_heads, layer
    lengths = [length + inline for length in job.lengths] if packed else [job.longest + job.length] * job.rows
    statistics = 2 * 4 * H * sum(lengths)
    if not packed or inline or find_spec("triton") is None:
        return statistics
    import softkv.kernels as engine
    from softkv.kernels.launch import recording
    from softkv.profiling.compile import TARGETS

    if max(widths) > engine.MOST_HEAD_DIM:
        return statistics

    with META:
        q, out = (torch.empty(sum(lengths), H, width, dtype=job.dtype) for width in widths)
        k, v = (torch.empty(sum(lengths), G, width, dtype=job.dtype) for width in widths)
        prefixes = 1 if job.encoder is None else job.rows
        prefix = [torch.empty(prefixes, G, job.length, width, dtype=job.dtype) for width in widths]
        lse, cu_seqlens = torch.empty(H, sum(lengths)), torch.empty(job.rows + 1, dtype=torch.int32)
    options: dict[str, Any] = dict.fromkeys(
        ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "sinks", "window", "softcap")
    )
    known = [q, out, k, v, *prefix, lse, cu_seqlens]
    with META, recording(TARGETS[job.target][1]), Ledger(known) as ledger:
        gradients = engine.backward(
            out, None, out, lse, q, k, v, *prefix, needs=(True,) * 5 + (False,), scale=1.0, is_causal=True,
            window_covers_prefix=False, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max(lengths),
            max_seqlen_k=max(lengths), **options,
        )  # fmt: skip
    return ledger.peak - sum(gradient.nbytes for gradient in gradients if gradient is not None)
