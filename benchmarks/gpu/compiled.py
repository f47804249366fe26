"""`torch.compile` of a training step: P-tuning v2, packed rows, four layers of the 1B shape; and of the op alone with
CUDA graphs. Differences from eager results are reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Settings, llamas

_LAYERS = 4


def jobs(settings: Settings) -> list[str]:
    return ["op, reduce-overhead", "training step"] if settings.on_gpu else ["op, aot_eager"]


def run(job: str, settings: Settings, seconds: float) -> dict[str, Any]:
    if job == "training step":
        return _step(settings)
    options = {"mode": "reduce-overhead"} if settings.on_gpu else {"backend": "aot_eager"}
    return _op(settings, options)


def lines(results: dict[str, Any]) -> list[str]:
    return [
        f"- {job}: eager {record['eager_ms']:.3f} ms, compiled {record['compiled_ms']:.3f} ms, differs by "
        f"{record['differs']:.1e}"
        for job, record in results.items()
    ]


def _op(settings: Settings, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from softkv import prefix_attention

    from ..providers import AttentionProblem
    from ..shapes import Shape

    shape = Shape(2, 8, 2, 64, 16, 64)
    problem = AttentionProblem.random(shape, "forward + backward", settings.device, getattr(torch, settings.dtype))
    direction = torch.randn_like(problem.q)

    def attend(*leaves: Any) -> Any:
        out: Any = prefix_attention(leaves[0] * 1.0, *leaves[1:], backend=None if settings.on_gpu else "torch")
        return out * 1.0

    fast = torch.compile(attend, fullgraph=True, **options)

    def step(call: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: [x.clone() for x in torch.autograd.grad(call(*problem.leaves), problem.leaves, direction)]

    return _compared(step(attend), step(fast), settings)


def _step(settings: Settings) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import softkv
    from softkv.train.label_logits import label_logits

    torch.manual_seed(0)
    shape = llamas.SHAPES["1B"] | {"num_hidden_layers": _LAYERS}
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**shape, pad_token_id=0),
            dtype=getattr(torch, settings.dtype),
            attn_implementation="sdpa",
        )
    soft = softkv.attach(model, softkv.PTuningV2(length=128)).train()
    batch = llamas.packed(llamas.rows(16, 64, 512, shape["vocab_size"]), settings.device)
    learned = [p for p in soft.parameters() if p.requires_grad]

    def step() -> Any:
        output, targets = label_logits(soft, dict(batch))
        loss = torch.nn.functional.cross_entropy(output.logits.float(), targets)
        return torch.autograd.grad(loss, learned)

    eager = llamas.timed(step, settings, repeats=5)
    want = [x.clone() for x in step()]
    model.model.compile()
    got = [x.clone() for x in step()]
    compiled = llamas.timed(step, settings, repeats=5)
    return _record(want, got, eager, compiled)


def _compared(eager: Callable[[], Any], fast: Callable[[], Any], settings: Settings) -> dict[str, Any]:
    want, got = eager(), fast()
    times = (llamas.timed(call, settings, repeats=20, warm_up=3) for call in (eager, fast))
    return _record(want, got, *times)


def _record(want: Any, got: Any, eager: dict[str, Any], compiled: dict[str, Any]) -> dict[str, Any]:
    differs = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(got, want, strict=True))
    said = f"eager {eager['ms']:.3f} ms, compiled {compiled['ms']:.3f} ms"
    return {"eager_ms": eager["ms"], "compiled_ms": compiled["ms"], "differs": differs, "said": said}
