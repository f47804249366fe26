"""What a training step takes, from a model's config alone: bytes and FLOPs, for softkv and the concatenating way.

The step is run on the meta device, where tensors have shapes and lifetimes but no values: every byte that autograd
keeps is counted (`softkv.profiling.ledger`), and every product (torch's FlopCounterMode). Two steps are run over the
same tokens: softkv's, whose rows are packed, and the concatenating way's, which pads rows to the longest, puts the soft
slots in front of every row's K/V (soft tokens in front of its embeddings) as PEFT does, with a fused attention, and
makes logits for every token as transformers does.

A frozen base keeps no gradient of its weights: a step costs its forward, and a backward to the inputs of about the
same, 2 times the forward and not 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from softkv.hf.attention import NAME
from softkv.hf.context import BlockInputs, BlockOrder, PackedRows, RowEncoder, RowPrompts, SoftContext
from softkv.hf.frozen import BaseState, FrozenBase
from softkv.hf.heads import HeadLine
from softkv.hf.hooks import DecoderHooks
from softkv.hf.masks import Pattern
from softkv.methods.base import BaseShape, Computed, FrozenModel
from softkv.methods.encoders import EncodedRows, LSTMEncoder
from softkv.methods.p_tuning import PTuning
from softkv.methods.p_tuning_v2 import PTuningV2
from softkv.ops.api import prefix_attention
from softkv.ops.engine import Call, Needs
from softkv.prefix import Prefix
from softkv.profiling.ledger import Ledger
from softkv.profiling.presets import PRESETS

MethodName = Literal["p-tuning-v2", "prefix-tuning", "prompt-tuning", "p-tuning"]
METHODS: tuple[MethodName, ...] = ("p-tuning-v2", "prefix-tuning", "prompt-tuning", "p-tuning")
EncoderName = Literal["lstm", "attention"]
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
        tokens: T of a row, prompt and answer; or of several, which the rows of a device take in turn.
        answer: tokens of a row that have a label.
        dtype: of the frozen base.
        devices: rows and frozen weights are split evenly over them.
        checkpointing: whether each layer is run again in backward.
        encoder: of P-tuning v2, one for all layers: makes K and V of each row from its prompt.
        target: whose Triton kernels run, by its name in `softkv.kernels.compile.TARGETS`.
    """

    config: Any
    method: MethodName
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
        """Of one device."""
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
    """Of one device, a step. Bytes, but for FLOPs.

    Attributes:
        parameters: the frozen base's share.
        trainable: learned values, their gradients and Adam's state, fp32.
        prefix: K/V of the slots that are alive when the forward is over, in the base's dtype: once, or once a row.
            Under checkpointing, those of an encoder are not: each layer's are made again in backward.
        activations: all else that is alive then.
        workspace: what the backward adds to these at most.
        kernels: what kernels allocate inside a backward of attention: log-sum-exps and Δ, and softkv's Triton kernels
            partial sums of the prefix's gradient.
        kv_cache: not of the step but of generation: K/V of the batch's rows, padded, and their prefix.
        forward_flops, backward_flops: of all products.
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
        """Bytes of a training step at its peak."""
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
    config = job.config
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"expected the config of a causal language model, got {config.model_type!r}")
    with META:
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=job.dtype, attn_implementation=NAME)
    base.requires_grad_(False)
    blocks = _blocks(base.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BaseState(base).silence_dropout(list(blocks.values()))
    base.train()
    if job.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if job.encoder is not None:
        hooks = DecoderHooks(base, None)
        hooks.order = BlockOrder(list(blocks.values()))
        hooks.hook_blocks()
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
    if job.encoder is not None:
        method = PTuningV2(length=job.length, encoder=job.encoder)
        learned = cast(EncodedRows, method.build(cast(FrozenModel, _Stub(shape))).to(META))
        for encoder in learned.encoders:
            if isinstance(encoder, LSTMEncoder):
                for name in ("forwards", "backwards"):
                    setattr(encoder, name, _AllSteps(getattr(encoder, name)))
        return learned
    if job.method == "p-tuning":
        marks = "".join(f"[P{i}]" for i in range(1, job.length + 1))
        return PTuning(template=f"{marks} [X] [Y]").build(cast(FrozenModel, _Stub(shape))).to(META)
    if job.method == "prompt-tuning":
        return _Matrices(embeddings=(job.length, shape.embedding_size))
    layers = shape.layers if job.method == "p-tuning-v2" else 1
    matrix = (layers, 1, shape.kv_heads, job.length)
    return _Matrices(k=(*matrix, shape.head_dim), v=(*matrix, shape.value_dim))


def shape_of(base: Any) -> BaseShape:
    """The sizes of a base that decide the shapes of learned tensors, as its attention shows them."""
    with META, torch.no_grad():
        return FrozenBase(base, [block.widths for block in _captured(base, _embeddings(base, 1, 1))]).shape


class _AllSteps(nn.Module):
    """An LSTM of one layer whose steps are taken as one: the products and tensors of all of them, without a loop."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """`[R, M, C]` → `[R, M, E / 2]`"""
        return cast(Tensor, _Steps.apply(x, *self.lstm.parameters())), None


class _Steps(torch.autograd.Function):
    """It keeps what torch's own steps keep: the four gates, the cell, its tanh and the state. The gates' gradients take
    the place of the gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, into: Tensor, within: Tensor, *biases: Tensor) -> Tensor:
        state, cell, activated = (torch.empty(*x.shape[:2], within.shape[1]) for _ in range(3))
        gates = F.linear(state, within) + F.linear(x, into)
        ctx.save_for_backward(x, into, within, state, cell, activated, gates)
        return state

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, into, within, state, _, _, gates = ctx.saved_tensors
        torch.matmul(gates, within)  # to the state of the step before
        rows = gates.flatten(0, 1)
        bias = gates.sum((0, 1))
        below = gates @ into if ctx.needs_input_grad[0] else None
        return below, rows.T @ x.flatten(0, 1), rows.T @ state.flatten(0, 1), bias, bias.clone()


def _soft_tokens(learned: nn.Module, base: Any) -> Tensor:
    """`[k, C]` in the base's dtype."""
    tokens = learned.compute() if isinstance(learned, Computed) else learned.embeddings
    return cast(Tensor, tokens).to(base.dtype)


def _embeddings(base: Any, *shape: int) -> Tensor:
    """`[B, T, C]` of real tokens."""
    return torch.empty(*shape, base.get_input_embeddings().weight.shape[1], dtype=base.dtype)


def _keys() -> Tensor:
    """A causal mask that is there already, a number of keys: transformers would look at the values of others."""
    return torch.empty(1, Pattern.CAUSAL, 1, 1, dtype=torch.int32)


def _loss(
    base: Any, embeddings: Tensor, keep: int | Tensor, prefix: SoftContext | None = None, cache: Any = None
) -> Tensor:
    """The cross-entropy of the last `keep` logits of each row, or of those at `keep`, in fp32 as transformers computes
    it."""
    B, T = embeddings.shape[:2]
    logits = base(
        inputs_embeds=embeddings,
        attention_mask=_keys(),
        position_ids=torch.empty(B, T, dtype=torch.long),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=keep,
        softkv_prefix=prefix or SoftContext(),
    ).logits
    logits = logits.float().flatten(0, 1)
    return F.cross_entropy(logits, torch.empty(len(logits), dtype=torch.long))


def _packed(job: Job) -> PackedRows:
    """The rows of the step as attention sees them."""
    lengths = _seen_lengths(job)
    return PackedRows(torch.empty(len(lengths) + 1, dtype=torch.int32), max(lengths))


def _seen_lengths(job: Job) -> tuple[int, ...]:
    """Tokens of each row, with the soft tokens that stand in it."""
    return tuple(length + job.length * (job.method == "p-tuning") for length in job.lengths)


def _softkv(job: Job, base: Any, learned: nn.Module) -> Tensor:
    tokens = _embeddings(base, 1, sum(job.lengths))
    labels = torch.empty(job.rows * job.answer, dtype=torch.long)
    context = SoftContext(rows=_packed(job))
    if job.method == "p-tuning":
        soft = _soft_tokens(learned, base).expand(job.rows, -1, -1).flatten(0, 1)
        return _loss(base, torch.cat([soft[None], tokens], 1), labels, context)
    if job.encoder is not None:
        longest = job.longest - job.answer
        prompts = RowPrompts(torch.empty(job.rows, longest, dtype=torch.long), torch.empty(job.rows, dtype=torch.long))
        return _loss(base, tokens, labels, replace(context, encoder=RowEncoder(_encode(learned), prompts, None)))
    if job.method == "prompt-tuning":
        head = _soft_tokens(learned, base)[None]
        line = HeadLine((1, job.length), (1, tokens.shape[1]), None, SoftContext())
        return _loss(base, torch.cat([head, tokens], 1), labels, replace(context, line=line))
    k, v = (cast(Tensor, getattr(learned, name)).to(base.dtype) for name in "kv")
    prefix = Prefix(k, v)
    layers = dict(enumerate(prefix.layers(base.config.get_text_config().num_hidden_layers)))
    return _loss(base, tokens, labels, replace(context, layers=layers))


def _encode(learned: nn.Module) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return cast(EncodedRows, learned).row_prefix


def _blocks(base: Any) -> dict[int, nn.Module]:
    """The attention modules in the order in which they run."""
    try:
        with META, torch.no_grad():
            captured = _captured(base, _embeddings(base, 1, 1))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"softkv can't run a {type(base).__name__}, so there is nothing to plan: {error}") from error
    if not captured:
        raise ValueError(f"{type(base).__name__} does not pass softkv's prefix on to its attention: nothing to plan")
    return {number: one.block for number, one in enumerate(captured)}


def _captured(base: Any, embeddings: Tensor) -> list[BlockInputs]:
    """What reaches the attention blocks in a forward pass over one row."""
    capture: list[BlockInputs] = []
    base.get_decoder()(
        inputs_embeds=embeddings,
        attention_mask=_keys(),
        position_ids=torch.empty(embeddings.shape[:2], dtype=torch.long),
        use_cache=False,
        softkv_prefix=SoftContext(capture=capture),
    )
    return capture


def _concatenating(job: Job, base: Any, learned: nn.Module) -> Tensor:
    """The soft prompt in front of every row, rows padded to the longest, and logits for every token."""
    tokens = _embeddings(base, job.rows, job.longest)
    if job.method in ("p-tuning", "prompt-tuning"):
        soft_tokens = _soft_tokens(learned, base).expand(job.rows, -1, -1)
        rows = torch.cat([soft_tokens, tokens], 1)
        return _loss(base, rows, rows.shape[1])
    cache = transformers.DynamicCache()
    if job.encoder is not None:
        with _encoded_into(cache, job, base, learned):
            return _loss(base, tokens, job.longest, cache=cache)
    layers = base.config.get_text_config().num_hidden_layers
    k, v = (cast(Tensor, getattr(learned, name)).repeat_interleave(job.rows, 1).to(base.dtype) for name in "kv")
    for layer, (key, value) in enumerate(Prefix(k, v).layers(layers)):
        cache.update(key, value, layer)
    return _loss(base, tokens, job.longest, cache=cache)


@contextmanager
def _encoded_into(cache: Any, job: Job, base: Any, learned: nn.Module) -> Iterator[None]:
    """Each attention block finds K and V that the encoder made from what enters it in the cache."""

    def enter(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        prompts = hidden[:, : job.longest - job.answer]
        k, v = _encode(learned)(block.layer_idx, prompts, torch.empty(job.rows, dtype=torch.long))
        cache.update(k, v, block.layer_idx)

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in _blocks(base).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


STEPS = {"softkv": _softkv, "concatenating": _concatenating}


def _run(job: Job, base: Any, step: Callable[[Job, Any, nn.Module], Tensor]) -> Run:
    learned = _learned(job, base)
    for parameter in learned.parameters():
        parameter.grad = torch.empty_like(parameter)  # a step adds to it
    gradients = [cast(Tensor, parameter.grad) for parameter in learned.parameters()]
    known = [*base.parameters(), *base.buffers(), *learned.parameters(), *learned.buffers(), *gradients]
    with META, _fused_encoders(), Ledger(known) as ledger:
        loss = step(job, base, learned)
        kept = ledger.live
        loss.backward()
    # A run of its own: the counter's hooks keep tensors alive.
    formulas = {
        torch.ops.softkv.attention: partial(_attention_flops, _seen_lengths(job)),
        torch.ops.softkv.attention_backward: partial(_attention_backward_flops, _seen_lengths(job)),
    }
    with META, _fused_encoders(), FlopCounterMode(display=False, custom_mapping=formulas) as flops:
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


@contextmanager
def _fused_encoders() -> Iterator[None]:
    """Attention inside an encoder keeps no scores, as on a real device: on the meta device, torch's own would."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        return cast(Tensor, prefix_attention(q, k, v, is_causal=False, key_mask=attn_mask[:, 0, 0]))

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def _cost(job: Job, base: Any, run: Run, name: str) -> Cost:
    shape = shape_of(base)
    values = sum(p.numel() for p in base.parameters())
    token = shape.kv_width * base.dtype.itemsize  # K and V of a layer
    shared = name == "softkv" and job.method != "p-tuning" and job.encoder is None
    pairs = 1 if shared and job.method == "prefix-tuning" else shape.layers
    slots = token * pairs * job.length * (1 if shared else job.rows)
    prefix = 0 if job.encoder is not None and job.checkpointing else slots
    return Cost(
        parameters=values * base.dtype.itemsize // job.devices,
        trainable=run.learned * (4 + 4 + ADAM),
        prefix=prefix,
        activations=run.kept - prefix,
        workspace=run.peak - run.kept,
        kernels=_kernels(job, base, packed=name == "softkv"),
        kv_cache=slots + token * shape.layers * job.rows * job.longest,
        forward_flops=run.forward_flops,
        backward_flops=run.backward_flops,
        attention_flops=run.attention_flops,
    )


def _kernels(job: Job, base: Any, packed: bool) -> int:
    """Bytes that softkv's Triton launchers allocate for themselves in one layer's backward of attention."""
    shape = shape_of(base)
    H, G, D = base.config.get_text_config().num_attention_heads, shape.kv_heads, shape.head_dim
    widths = D, shape.value_dim
    lengths = _seen_lengths(job) if packed else (job.longest + job.length,) * job.rows
    statistics = 2 * 4 * H * sum(lengths)
    if not packed or job.method == "p-tuning" or find_spec("triton") is None:
        return statistics
    import softkv.kernels as engine
    from softkv.kernels.compile import TARGETS
    from softkv.kernels.launch import recording

    if max(widths) > engine.MOST_HEAD_DIM:
        return statistics

    rows = _packed(job)
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
            window_covers_prefix=False, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=rows.longest,
            max_seqlen_k=rows.longest, **options,
        )  # fmt: skip
    return ledger.peak - sum(gradient.nbytes for gradient in gradients if gradient is not None)


# FLOPs of softkv's operators -----------------------------------------------------------------------------------------


def _pairs(
    lengths: tuple[int, ...], q: Any, k: Any, prefix_k: Any, is_causal: bool, window: int | None
) -> tuple[int, int]:
    """(query, token) and (query, slot) pairs that are seen, of all rows and heads: of a dense call, or of a packed one
    with rows of these lengths."""

    def seen(T: int, S: int) -> int:
        return sum(min(S - T + t + 1, window or S) for t in range(T)) if is_causal else T * S

    if len(q) == 4:
        B, H, T, _ = q
        tokens, queries = B * seen(T, k[2]), B * T
    else:
        queries, H, _ = q
        tokens = sum(seen(length, length) for length in lengths)
    return H * tokens, H * queries * (prefix_k[2] if prefix_k is not None else 0)


def _attention_flops(lengths: tuple[int, ...], *operands: Any, **_: Any) -> int:
    call = dict(zip(Call.__annotations__, operands, strict=False))
    tokens, slots = _pairs(lengths, call["q"], call["k"], call["prefix_k"], call["is_causal"], call["window"])
    return 2 * (call["k"][-1] + call["v"][-1]) * (tokens + slots)


def _attention_backward_flops(lengths: tuple[int, ...], *operands: Any, **_: Any) -> int:
    """Scores again, and one product for each of dp, dq, dk, dv that is asked for."""
    _, _, _, _, *of_call, _, needs = operands
    call, needs = dict(zip(Call.__annotations__, of_call, strict=True)), Needs(*needs)
    tokens, slots = _pairs(lengths, call["q"], call["k"], call["prefix_k"], call["is_causal"], call["window"])
    D, Dv = call["k"][-1], call["v"][-1]

    def widths(need_key: bool, need_value: bool) -> int:
        scores = needs.q or need_key
        return (scores or need_value) * (D + Dv * scores + D * needs.q + D * need_key + Dv * need_value)

    return 2 * (tokens * widths(needs.k, needs.v) + slots * widths(needs.prefix_k, needs.prefix_v))
