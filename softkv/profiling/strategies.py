"""Memory and traffic per device of a training step shared by several devices, with DDP, FSDP2 and tensor parallelism,
from a model's config alone.

A device under tensor parallelism runs a narrower model, whose step is run on the meta device (`softkv.profiling.plan`);
weights gathered by FSDP2, and collectives, are counted by these rules (n devices; ring algorithms):

    DDP      all-reduce of the learned gradients                        2·(n − 1)/n of their bytes
    FSDP2    all-gather of each block in forward and in backward,
             of the rest once; reduce-scatter of learned gradients      (n − 1)/n of their bytes
    tensor   all-reduce behind each row-wise product (and the
             embedding), in backward in front of each column-wise one;
             all-gather of the logits                                   2·(n − 1)/n, (n − 1)/n
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from softkv.profiling.plan import PlannedStep, learned_values, on_meta, plan

FP32 = 4


@dataclass(frozen=True)
class Layout:
    """How devices share a step.

    Attributes:
        tensor: devices that split heads and matrix products of the same rows.
        data: the number of such groups, each with its own rows.
        sharded: whether FSDP2 shards the base over the groups, or each group holds it (DDP).
    """

    tensor: int = 1
    data: int = 1
    sharded: bool = False

    @property
    def name(self) -> str:
        parts = [f"TP×{self.tensor}"] if self.tensor > 1 else []
        parts += [f"{'FSDP2' if self.sharded else 'DDP'}×{self.data}"] if self.data > 1 else []
        return " ".join(parts) or "one device"


@dataclass(frozen=True)
class Share:
    """Bytes of one device.

    Attributes:
        parameters: the device's share of the frozen base.
        gathered: the most weights that FSDP2 gathers at a time: one block, and the weights outside blocks.
        trainable: learned values, their gradients and Adam's state, fp32.
        step: prefix, activations and workspace.
        received: from other devices, per step.
    """

    parameters: int
    gathered: int
    trainable: int
    step: int
    received: int

    @property
    def total(self) -> int:
        """Peak bytes of a step."""
        return self.parameters + self.gathered + self.trainable + self.step


def layouts(job: PlannedStep, devices: int) -> list[Layout]:
    """The ways in which `devices` devices can share the rows of a job and the heads of its model.

    Raises:
        ValueError: if there is none.
    """
    config = job.config.get_text_config()
    found = []
    for tensor in (number for number in range(1, devices + 1) if devices % number == 0):
        data = devices // tensor
        if job.batch % data or (tensor > 1 and not _splits(config, tensor)):
            continue
        ways = [False] if data == 1 else [True] if tensor > 1 else [False, True]
        found += [Layout(tensor, data, sharded) for sharded in ways]
    if not found:
        raise ValueError(
            f"{devices} devices can share neither {job.batch} rows nor {_heads(config)[1]} key/value heads: give more "
            "rows, or fewer devices"
        )
    return found


def share(job: PlannedStep, layout: Layout) -> Share:
    """The share of one device; `job` is the step of all devices together."""
    if job.encoder is not None and layout.sharded:
        raise ValueError("encoders under FSDP2 are not planned: leave the encoder out")
    t, n = layout.tensor, layout.data
    mine = replace(job, config=_narrow(job.config, t), devices=n)
    values = FP32 * learned_values(mine)  # or as many gradients
    if layout.sharded and job.method == "prompt-tuning":  # soft tokens in front are then part of the rows
        mine = replace(mine, length=1, tokens=tuple(length + job.length for length in job.taken_in_turn))
    cost = plan(mine, "softkv")["softkv"]
    block, blocks, rest = _weights(mine, t)
    exchanged = 2 * blocks + rest + 2 * values if layout.sharded else 2 * values
    return Share(
        parameters=(blocks + rest) // (n if layout.sharded else 1),
        gathered=(block + rest + 2 * values) * layout.sharded,
        trainable=4 * values // (n if layout.sharded else 1),
        step=cost.total - cost.parameters - cost.trainable,
        received=int((n - 1) / n * exchanged + _between_heads(mine, t)),
    )


def _between_heads(job: PlannedStep, devices: int) -> float:
    """Bytes per step that a device receives from those with which it splits heads."""
    config = job.config.get_text_config()
    layers, state = config.num_hidden_layers, config.hidden_size * job.dtype.itemsize
    labels, read = job.rows * job.answer, sum(job.lengths) + job.rows * job.length * (job.method == "p-tuning")
    tokens = read + job.length * (job.method == "prompt-tuning")  # in front of all rows, in the same pass
    again = layers * job.checkpointing  # a block's first row-wise product; after the second, nothing needs it
    in_rows = job.method in ("p-tuning", "prompt-tuning")
    backward = 5 * layers - (0 if in_rows else 3)  # the first block's q, k and v need no gradient of a prefix alone
    reduced = (read + tokens * (2 * layers + again + backward) + labels) * state
    logits = labels * config.vocab_size * job.dtype.itemsize
    return (devices - 1) / devices * (2 * reduced + logits)


def _weights(job: PlannedStep, devices: int) -> tuple[int, int, int]:
    """Bytes of the largest block, of all blocks, and of the weights outside blocks, with the vocabulary split."""
    base = on_meta(job.config, job.dtype)
    blocks = [_bytes(each.parameters()) for each in base.get_decoder().layers]
    vocabulary = _bytes({each.weight for each in (base.get_input_embeddings(), base.get_output_embeddings())})
    rest = _bytes(base.parameters()) - sum(blocks) - vocabulary
    return max(blocks), sum(blocks), rest + vocabulary // devices


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _heads(config: Any) -> tuple[int, int]:
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _splits(config: Any, devices: int) -> bool:
    """Whether this many devices can split a Llama-like model, the only kind that is planned."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    column_wise = [name for name, style in plan.items() if style == "colwise"]
    sizes = (*_heads(config), config.intermediate_size)
    return len(column_wise) == 5 and not any(size % devices for size in sizes)


def _narrow(config: Any, devices: int) -> Any:
    """The model that each device runs."""
    if devices == 1:
        return config
    heads, kv_heads = _heads(config)
    fields = config.to_dict() | {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "num_attention_heads": heads // devices,
        "num_key_value_heads": kv_heads // devices,
        "intermediate_size": config.intermediate_size // devices,
    }
    return type(config).from_dict(fields)
