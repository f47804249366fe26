# ruff: noqa: E501
"""Mutation testing of the kernels: break one place at a time, and check that the tests fail: `python -m tools.mutate`.

Each mutant is one replacement in a copy of the package, run in a separate process on a few edge cases against the fp64
reference. Prints (and with --write stores) a table of what was broken and which output or gradient showed it first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    what: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant("score scale dropped", "softmax.py", "p = tl.exp2(s * scale.score - m", "p = tl.exp2(s - m"),
    Mutant("no rescaling of the output", "softmax.py", "v, acc * a[:, None]", "v, acc"),
    Mutant("no rescaling of the sum", "softmax.py", "l = l * a + tl.sum(p, 1)", "l = l + tl.sum(p, 1)"),
    Mutant("running maximum forgotten", "softmax.py", "tl.maximum(m, tl.max(s, 1) * scale.score)", "tl.max(s, 1) * scale.score"),
    Mutant("causal bound off by one", "keys.py", "j[None, :] <= keys.upper", "j[None, :] < keys.upper"),
    Mutant("window bound off by one", "keys.py", "j[None, :] >= keys.lower", "j[None, :] > keys.lower"),
    Mutant("key mask ignored", "keys.py", "exists = exists & (tl.load(mask", "exists = exists | (tl.load(mask"),
    Mutant("keys past the end are seen", "keys.py", "seen = exists[None, :] & (j[None, :] <= keys.upper[:, None])", "seen = j[None, :] <= keys.upper[:, None]"),
    Mutant("soft cap: sign", "softmax.py", "s = 1 - 2 * root", "s = 1 + 2 * root"),
    Mutant("sink added twice", "softmax.py", "tl.exp2(sink2 - top))", "2 * tl.exp2(sink2 - top))"),
    Mutant("sink left out of the output", "softmax.py", "weight * tl.exp2(lse - joint)", "weight"),
    Mutant("lse in base 2", "softmax.py", "lse * LN2", "lse"),
    Mutant("last whole tile skipped", "softmax.py", "range(full_lo, full_hi, BLOCK_N)", "range(full_lo, full_hi - BLOCK_N, BLOCK_N)"),
    Mutant("pointers do not advance", "softmax.py", "k_ptrs += k_step", "k_ptrs += 0 * k_step"),
    Mutant("one tile too many is whole", "geometry.py", "full_hi = ((upper_min + 1) // BLOCK) * BLOCK", "full_hi = tl.cdiv(upper_min + 1, BLOCK) * BLOCK"),
    Mutant("left edge counted as whole", "geometry.py", "full_lo = tl.cdiv(lower_max, BLOCK) * BLOCK", "full_lo = (lower_max // BLOCK) * BLOCK"),
    Mutant("first tile of the right edge lost", "geometry.py", "hi = upper_max + 1", "hi = upper_max"),
    Mutant("edge tiles left of the whole ones misplaced", "geometry.py", "lo + i * BLOCK >= full_lo, full_hi - full_lo, 0", "lo + i * BLOCK >= full_lo, full_hi - full_lo, BLOCK"),
    Mutant("parts overlap", "geometry.py", "first = lo + part * run", "first = lo + tl.maximum(part * run - BLOCK, 0)"),
    Mutant("key lengths ignored", "geometry.py", "return 0, T, 0, tl.minimum(tl.maximum(n, 0), S)", "return 0, T, 0, S + 0 * n"),
    Mutant("prefix lengths ignored", "geometry.py", "return tl.minimum(tl.maximum(length, 0), P)", "return P + 0 * length"),
    Mutant("index ignored", "geometry.py", "a = tl.load(ptr.prefix_index + row)", "a = tl.load(ptr.prefix_index + row) * 0"),
    Mutant("−1 reads prefix 0", "geometry.py", "known = (a >= 0) & (a < A)", "known = (a >= -1) & (a < A)"),
    Mutant("row's first key lost", "geometry.py", "k_start = tl.load(ptr.cu_seqlens_k + row)", "k_start = tl.load(ptr.cu_seqlens_q + row)"),
    Mutant("causal alignment top-left", "keys.py", "upper = n - T + t\n", "upper = t\n"),
    Mutant("queries of one head for all of a group", "geometry.py", "tl.cast(g, tl.int64) * GROUP + item % GROUP", "tl.cast(g, tl.int64) * GROUP + item * 0"),
    Mutant("head and query swapped", "geometry.py", "tl.cast(q_start, tl.int64) + item // GROUP", "tl.cast(q_start, tl.int64) + item % t_count"),
    Mutant("prefix's own stride forgotten", "keys.py", "ptr.prefix_k + a64 * stride.prefix_k.row", "ptr.prefix_k + a64 * 0"),
    Mutant("slots' window off by one", "keys.py", "position - window + 1 + length", "position - window + length"),
    Mutant("Δ: dlse dropped", "prepare.py", "total -= tl.load(ptr.grad_lse", "total -= 0 * tl.load(ptr.grad_lse"),
    Mutant("Δ: sign", "dq.py", "ds = p * (dp - delta", "ds = p * (dp + delta"),
    Mutant("soft cap's slope dropped", "softmax.py", "p = p * (1 - s * s)", "p = p * 1"),
    Mutant("dq not scaled", "dq.py", "dq * scale.dq, live", "dq, live"),
    Mutant("dk not scaled", "dkv.py", "dk * scale.dk", "dk"),
    Mutant("dq: hidden keys count", "dq.py", "ds = tl.where(seen, ds, 0.0)", "ds = tl.where(exists[None, :], ds, 0.0)"),
    Mutant("dv: hidden items count", "dkv.py", "p = tl.where(seen, p, 0.0)", "p = tl.where(seen, p, p)"),
    Mutant("dk: hidden items count", "dkv.py", "ds = tl.where(seen, ds, 0.0)", "ds = tl.where(seen, ds, 1.0)"),
    Mutant("dk, dv: first reader off by one", "dkv.py", "lower = tl.maximum(j - (n - T), 0) * GROUP", "lower = tl.maximum(j - (n - T) + 1, 0) * GROUP"),
    Mutant("dk, dv: last reader of a window off by one", "dkv.py", "else j + reach", "else j + reach - 1"),
    Mutant("dprefix: a group's first token forgotten", "dkv.py", "token = first + items // GROUP", "token = 0 * first + items // GROUP"),
    Mutant("dprefix: order ignored", "readers.py", "return place, order.to(torch.int32)", "return place, torch.arange(len(order), dtype=torch.int32)"),
    Mutant("dprefix: a part lost", "reduce.py", "for _ in range(parts)", "for _ in range(parts - 1)"),
    Mutant("dprefix: slots' window off by one", "readers.py", "- length + p.reach", "- length + p.reach - 1"),
    Mutant("dprefix: readers of a slot not by position", "readers.py", '* FAR + x["position"]', '* FAR + 0 * x["position"]'),
    Mutant("masked keys keep a gradient", "dkv.py", "tl.where(exists[:, None], dv, 0.0)", "dv"),
    Mutant("dsinks: sign", "__init__.py", "-(torch.exp2(sinks", "(torch.exp2(sinks"),
    Mutant("merge: parts not rescaled", "decode.py", "acc = acc * a[:, None] + p[:, None]", "acc = acc + p[:, None]"),
    Mutant("merge: a part lost", "decode.py", "for _ in range(parts)", "for _ in range(parts - 1)"),
    Mutant("decode: a group's tokens shifted", "decode.py", "item = tl.sum(tl.where(here, block - done + blocks, 0), 0)", "item = tl.sum(tl.where(here, block, 0), 0)"),
    Mutant("decode: token parts overwrite the prefix's", "decode.py", "tl.cast(first_part + part, tl.int64)", "tl.cast(part, tl.int64)"),
    Mutant("negative scale forgotten", "problem.py", 'x["q"] = -x["q"]', 'x["q"] = +x["q"]'),
    Mutant("chunk: first key off by one", "keys.py", "// reach * reach", "// reach * reach + 1"),
    Mutant("chunk: last reader off by one", "dkv.py", "(j // reach + 1) * reach", "(j // reach + 1) * reach - 1"),
    Mutant("values as wide as keys", "dkv.py", "grad_out, at_do, BLOCK_V), live, VALUE_DIM", "grad_out, at_do, BLOCK_V), live, HEAD_DIM"),
    Mutant("dkv: tokens start among the prefix's programs", "dkv.py", "program - prefix_programs, ptr", "program, ptr"),
)  # fmt: skip

CALLS = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import importlib.util
sys.path.insert(0, {root!r})
import torch, softkv
where = {package!r}
spec = importlib.util.spec_from_file_location("softkv.kernels", where + "/__init__.py", submodule_search_locations=[where])
kernels = sys.modules["softkv.kernels"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
from tests.attention_cases import dense, packed, index, mask
calls = [
    lambda: dense(B=1, H=2, G=1, T=20, S=150, window=90),
    lambda: dense(B=2, H=4, G=2, T=21, S=70, A=1, P=40, seed=1),
    lambda: dense(B=2, H=2, G=1, T=50, A=2, P=37, window=41, window_covers_prefix=True, softcap=1.5, sinks=True, scale=-0.3),
    lambda: packed([17, 3, 33], [20, 9, 33], H=6, G=2, A=3, P=21, prefix_index=index(2, 0, 2), prefix_lengths=index(21, 4, 18)),
    lambda: dense(B=4, H=2, G=1, T=3, S=70, A=2, P=70, prefix_index=index(1, -1, 0, 1), sinks=True, key_lengths=index(70, 5, 41, 60)),
    lambda: dense(B=1, H=2, G=1, T=40, S=45, D=24, Dv=16, P=5, A=1, chunk=7),
    lambda: dense(B=1, H=2, G=1, T=40, S=45, D=16, Dv=24, P=5, A=1, chunk=9),
    lambda: dense(B=2, H=2, G=1, T=20, S=40, P=5, A=1, window=9, key_mask=torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) > 0.4),
]
for call in calls:
    for most in (0, 1 << 30):
        kernels.MOST_QUERIES = most
        case = call()
        want, got = case.run("reference"), case.to(torch.float32).run("triton")
        for name in want:
            a, b = got[name].double(), want[name]
            if not torch.equal(a.isinf(), b.isinf()) or not torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=False):
                print("caught by", name)
                sys.exit(1)
print("alive")
"""


def run(mutant: Mutant | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "kernels"
        shutil.copytree(ROOT / "kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant:
            source = (package / mutant.file).read_text()
            if mutant.old not in source:
                return "STALE: nothing to replace"
            (package / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        code = CALLS.format(root=str(ROOT), package=str(package))
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    return last if done.stdout.strip() else f"caught by an error, {last[:80]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="FILE", help="keep the table as Markdown")
    options = parser.parse_args()
    untouched = run(None)
    if untouched != "alive":
        print(f"the kernels fail without any mutation: {untouched}")
        return 1
    lines = ["| broken | where | result |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    survivors = 0
    for mutant in MUTANTS:
        result = run(mutant)
        survivors += not result.startswith("caught")
        lines.append(f"| {mutant.what} | {mutant.file} | {result} |")
        print(lines[-1], flush=True)
    if options.write:
        intro = "Mutants of the kernels, one replacement each (`python -m tools.mutate`).\n\n"
        Path(options.write).write_text(intro + "\n".join(lines) + "\n")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
