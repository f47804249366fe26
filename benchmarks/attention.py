"""The op on CPU against concatenation: `python -m benchmarks.attention`.

Training shapes, forward and forward + backward to q, k, v and the shared prefix (its gradient summed over the batch):
  softkv       prefix_attention
  cat          the prefix expanded and concatenated, then SDPA: the fastest of float or bool mask, grouped or repeated
               heads
  no prefix    SDPA on the tokens alone, causal: what a prefix costs at all
Decoding, one query a row, 128 cached tokens:
  softkv       prefix_attention
  cat a step   concatenation in every step, then SDPA
  cat cached   SDPA on a cache in which the prefix already stands, once for each row
The providers' results are compared before anything is timed. Tensors lie in memory as transformers leaves them.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.timing import Spread, fastest, interleaved, machine, speedup, write_json
from softkv.attention import prefix_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
RESULTS = Path(__file__).parent / "results" / "attention.json"


@dataclass(frozen=True)
class Shape:
    B: int
    H: int
    G: int
    T: int
    P: int
    D: int
    S: int | None = None  # key tokens where they differ from T

    def gflop(self, backward: bool) -> float:
        """Useful work: two products of each visible pair forward, five backward."""
        S = self.S or self.T
        pairs = self.T * (self.P + S - self.T) + self.T * (self.T + 1) // 2
        return 1e-9 * 2 * self.D * self.B * self.H * pairs * (7 if backward else 2)

    def mbyte(self, backward: bool) -> float:
        """Operands and results in float32, each once: q, out, k, v and the prefix; backward also reads grad_out and
        writes five gradients."""
        line, keys = self.B * self.H * self.T * self.D, 2 * self.B * self.G * (self.S or self.T) * self.D
        prefix = 2 * self.G * self.P * self.D
        return 4e-6 * (2 * line + keys + prefix + (backward and 4 * line + 2 * keys + 2 * prefix))


TRAINING = (
    Shape(8, 12, 12, 256, 64, 64),
    Shape(8, 9, 3, 256, 128, 64),
    Shape(1, 16, 16, 2048, 128, 64),
    Shape(4, 8, 8, 512, 1024, 64),
    Shape(16, 9, 3, 64, 128, 64),
    Shape(4, 32, 8, 512, 128, 128),
)
DECODING = tuple(Shape(B, 9, 3, 1, P, 64, S=128) for P in (512, 2048) for B in (1, 8, 32))


def tokens(B: int, heads: int, T: int, D: int) -> Tensor:
    return torch.randn(B, T, heads, D).transpose(1, 2)


def repeat(x: Tensor, H: int) -> Tensor:
    B, G, S, D = x.shape
    return x[:, :, None].expand(B, G, H // G, S, D).reshape(B, H, S, D)


def behind(prefix: Tensor, x: Tensor) -> Tensor:
    return torch.cat([prefix.expand(x.shape[0], -1, -1, -1), x], dim=2)


def heads_of(shape: Shape) -> dict[str, Attend]:
    """SDPA with grouped heads, the two ways there are."""
    if shape.H == shape.G:
        return {"": lambda q, k, v, mask: sdpa(q, k, v, attn_mask=mask)}
    return {
        " gqa": lambda q, k, v, mask: sdpa(q, k, v, attn_mask=mask, enable_gqa=True),
        " repeat": lambda q, k, v, mask: sdpa(q, repeat(k, shape.H), repeat(v, shape.H), attn_mask=mask),
    }


def concatenated(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor | None
) -> Tensor:
    return attend(q, behind(prefix_k, k), behind(prefix_v, v), mask)


def training_providers(shape: Shape) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    B, H, G, T, P, D = shape.B, shape.H, shape.G, shape.T, shape.P, shape.D
    q, k, v = tokens(B, H, T, D), tokens(B, G, T, D), tokens(B, G, T, D)
    prefix_k, prefix_v = torch.randn(1, G, P, D), torch.randn(1, G, P, D)
    leaves = [x.requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
    seen = torch.ones(T, P + T, dtype=torch.bool).tril(P)
    masks = {"float": torch.zeros(T, P + T).masked_fill(~seen, float("-inf")), "bool": seen}

    providers: dict[str, Callable[[], Any]] = {"softkv": lambda: prefix_attention(*leaves)}
    for heads, attend in heads_of(shape).items():
        for kind, mask in masks.items():
            providers[f"cat {kind}{heads}"] = partial(concatenated, attend, q, k, v, prefix_k, prefix_v, mask)
    if shape.H == shape.G:
        providers["no prefix"] = lambda: sdpa(q, k, v, is_causal=True)
    else:
        providers["no prefix gqa"] = lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)
        providers["no prefix repeat"] = lambda: sdpa(q, repeat(k, H), repeat(v, H), is_causal=True)
    return providers, leaves


def decoding_providers(shape: Shape) -> dict[str, Callable[[], Tensor]]:
    B, H, G, P, D, S = shape.B, shape.H, shape.G, shape.P, shape.D, shape.S or 0
    q = tokens(B, H, 1, D)
    k, v, prefix_k, prefix_v = (torch.randn(n, G, s, D) for n, s in ((B, S), (B, S), (1, P), (1, P)))
    cached_k, cached_v = behind(prefix_k, k), behind(prefix_v, v)
    providers: dict[str, Callable[[], Any]] = {"softkv": lambda: prefix_attention(q, k, v, prefix_k, prefix_v)}
    for heads, attend in heads_of(shape).items():
        providers[f"cat a step{heads}"] = partial(concatenated, attend, q, k, v, prefix_k, prefix_v, None)
        providers[f"cat cached{heads}"] = partial(attend, q, cached_k, cached_v, None)
    return providers


def forward_backward(forward: Callable[[], Tensor], leaves: list[Tensor], direction: Tensor) -> list[Tensor]:
    out = forward()
    return [out.detach(), *torch.autograd.grad(out, leaves, direction, allow_unused=True)]


def check(results: dict[str, list[Tensor]]) -> None:
    ours = results["softkv"]
    for name, theirs in results.items():
        if not name.startswith("no prefix"):
            for got, want in zip(ours, theirs, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def measure(
    shape: Shape, providers: Mapping[str, Callable[[], Any]], rivals: tuple[str, ...], mode: str, seconds: float
) -> dict[str, Any]:
    times = interleaved(providers, seconds)
    best = {rival: fastest(times, rival) for rival in rivals}
    backward = mode == "forward + backward"
    return {
        "mode": mode,
        "shape": asdict(shape),
        "gflop": shape.gflop(backward),
        "mbyte": shape.mbyte(backward),
        "rounds": len(times["softkv"]),
        "ms": {name: asdict(Spread.of(sample)) for name, sample in times.items()},
        "best": best,
        "speedup": {rival: asdict(speedup(times, "softkv", name)) for rival, name in best.items()},
    }


def report(result: dict[str, Any]) -> None:
    shape = result["shape"]
    axes = " ".join(f"{name}{shape[name]}" for name in "BHGTPD")
    ours = result["ms"]["softkv"]
    print(
        f"{axes:32} {result['mode']:19} {result['gflop']:8.3f} GFLOP {result['mbyte']:7.1f} MB"
        f"  softkv {ours['median']:8.3f} ms ({ours['low']:.3f}–{ours['high']:.3f})",
        end="",
    )
    for rival, name in result["best"].items():
        ratio = result["speedup"][rival]
        print(
            f" | {name} {result['ms'][name]['median']:.3f} ms: {ratio['median']:.2f}×"
            f" ({ratio['low']:.2f}–{ratio['high']:.2f})",
            end="",
        )
    print(flush=True)


def run(seconds: float) -> list[dict[str, Any]]:
    results = []
    for shape in TRAINING:
        providers, leaves = training_providers(shape)
        direction = tokens(shape.B, shape.H, shape.T, shape.D)

        both = {name: partial(forward_backward, forward, leaves, direction) for name, forward in providers.items()}
        check({name: step() for name, step in both.items()})
        with torch.no_grad():
            results.append(measure(shape, providers, ("cat", "no prefix"), "forward", seconds))
        report(results[-1])
        results.append(measure(shape, both, ("cat", "no prefix"), "forward + backward", seconds))
        report(results[-1])
    for shape in DECODING:
        providers = decoding_providers(shape)
        with torch.no_grad():
            check({name: [step()] for name, step in providers.items()})
            results.append(measure(shape, providers, ("cat a step", "cat cached"), "decoding", seconds))
        report(results[-1])
    return results


def geometric_mean(results: list[dict[str, Any]], mode: str) -> float:
    return statistics.geometric_mean(r["speedup"]["cat"]["median"] for r in results if r["mode"] == mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each line, at least 7 rounds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results = run(options.seconds)
    means = {mode: geometric_mean(results, mode) for mode in ("forward", "forward + backward")}
    for mode, mean in means.items():
        print(f"geometric mean over the training shapes, {mode}: {mean:.2f}× cat")
    settings = {"dtype": "float32", "seconds": options.seconds}
    write_json(
        options.output, {"machine": about, "settings": settings, "geometric_mean_vs_cat": means, "results": results}
    )


if __name__ == "__main__":
    main()
