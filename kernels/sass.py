"""Read a compiled kernel's machine code: registers, spills, shared memory, occupancy, and what its hot loop costs.

Method (a *static bound*, no measured time): take the innermost loops that hold matrix instructions, count the instructions of
each pipe, and turn counts into cycles of one multiprocessor for one pass of the loop by all warps of a program:

    cycles(pipe) = instructions · warps · 32 lanes / lanes a clock
    overlap bound = tensor / max over pipes          serial bound = tensor / (tensor + largest of mufu, fma, alu, issue)

Overlap is what perfect hiding would reach, serial what a program reaches that never overlaps its matrix work with its
arithmetic. Shared memory's cycles count in the overlap bound only: its traffic is asynchronous, and feeds the matrix unit. NVIDIA cubins are disassembled with the cuobjdump inside the triton wheel; gfx942 is read from its assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Machine:
    """Rates of one multiprocessor a clock, and its limits. Sources: NVIDIA's A100, H100, Blackwell and AMD's CDNA3 white
    papers (tensor rate = quoted dense bf16 FLOP/s ÷ units ÷ boost clock), CUDA's throughput and compute-capability tables."""

    tensor: int  # bf16 FLOP
    fma: int  # FP32 lanes
    alu: int  # integer, logic, compare, select, min/max, conversion lanes
    mufu: int  # exp2, reciprocal lanes
    shared_bytes: int
    issue: int  # warp instructions
    shared_limit: int  # bytes a program may ask for
    shared_total: int
    registers: int
    warps: int
    lanes: int = 32


KIB = 1024
MACHINES = {
    "sm_80": Machine(2048, 64, 64, 16, 128, 4, 163 * KIB, 164 * KIB, 65536, 64),
    "sm_90": Machine(4096, 128, 64, 16, 128, 4, 227 * KIB, 228 * KIB, 65536, 64),
    "sm_100": Machine(8192, 128, 64, 16, 128, 4, 227 * KIB, 228 * KIB, 65536, 64),
    "sm_120": Machine(1024, 128, 64, 16, 128, 4, 99 * KIB, 100 * KIB, 65536, 48),
    "gfx942": Machine(2048, 128, 64, 16, 128, 4, 64 * KIB, 64 * KIB, 4 * 512 * 64, 32, 64),
}

MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")
FMA = re.compile(r"(FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2|FFMA2|FMUL2|FADD2)(\.|$|2)")
MUFU = re.compile(r"MUFU|v_exp_|v_rcp_|v_log_")
SHARED = re.compile(r"LDS|STS|LDSM|STSM|ATOMS|ds_")
SPILL = re.compile(r"LDL|STL|scratch_")
ATOMIC = re.compile(r"^(RED|ATOM|ATOMG)(\.|$)|_atomic_")
SELECT = re.compile(r"^(FSEL|FSETP|SEL)(\.|$)|v_cndmask|v_cmp_\w+_f32")
OTHER = re.compile(
    r"BAR|BRA|SYNCS|WARPSYNC|DEPBAR|NOP|LDG|LDGSTS|STG|UTMALDG|WARPGROUP|LDGDEPBAR|BSSY|BSYNC|R2UR|S2R|S2UR|LDTM|STTM|UTC|^U[A-Z]"
)
MATRIX_KIND = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA", "gfx942": "v_mfma"}


@dataclass
class Loop:
    instructions: list[tuple[str, str]]  # opcode, whole text
    target: str
    warps: int
    scores: int = 0  # query × key pairs a pass, where known
    flops: int = 0  # where the binary doesn't tell (UTCHMMA)

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(op)) for op, _ in self.instructions)

    @property
    def matrix_flops(self) -> int:
        total = 0
        for op, _ in self.instructions:
            if "HGMMA" in op:
                m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", op).groups())
                total += 2 * m * n * k * max(1, self.warps // 4)
            elif op.startswith("HMMA"):
                total += 2 * 16 * 8 * (16 if ".16816" in op else 8) * self.warps
            elif op.startswith("v_mfma"):
                m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", op).groups())
                total += 2 * m * n * k * self.warps
        return total or self.flops

    def cycles(self) -> dict[str, float]:
        machine = MACHINES[self.target]
        lanes = machine.lanes * self.warps
        plain = [op for op, _ in self.instructions if not MATRIX.search(op)]
        fma = sum(bool(FMA.match(op)) * (2 if re.match(r"F\w+2(\.|$)", op) else 1) for op in plain)
        mufu = sum(bool(MUFU.search(op)) for op in plain)
        shared = sum(bool(SHARED.search(op)) for op in plain)
        shared_bytes = sum(_width(op) * lanes for op in plain if SHARED.search(op))
        alu = len(plain) - fma - mufu - shared - sum(bool(OTHER.search(op)) for op in plain)
        return {
            "tensor": self.matrix_flops / machine.tensor,
            "mufu": mufu * lanes / machine.mufu,
            "fma": fma * lanes / machine.fma,
            "alu": alu * lanes / machine.alu,
            "shared": shared_bytes / machine.shared_bytes,
            "issue": len(self.instructions) * self.warps / machine.issue,
        }

    @property
    def overlap(self) -> float:
        cycles = self.cycles()
        return cycles["tensor"] / max(cycles.values())

    @property
    def serial(self) -> float:
        cycles = self.cycles()
        return cycles["tensor"] / (cycles["tensor"] + max(cycles[pipe] for pipe in ("mufu", "fma", "alu", "issue")))


def _width(op: str) -> int:
    """Bytes a lane moves between registers and shared memory."""
    if "LDSM" in op or "STSM" in op:
        return 16 if ".4" in op else 8 if ".2" in op else 4
    wide = re.search(r"\.(\d+)$|\.(\d+)\.|_b(\d+)", op)
    bits = int(next(g for g in wide.groups() if g)) if wide else 32
    return max(bits, 8) // 8


@dataclass
class Report:
    target: str
    warps: int
    registers: int
    stack: int
    shared: int
    occupancy: int  # programs a multiprocessor
    limit: str  # what limits it
    loops: list[Loop] = field(default_factory=list)
    opcodes: Counter[str] = field(default_factory=Counter)

    @property
    def spills_in_loops(self) -> int:
        return sum(loop.count(SPILL) for loop in self.loops)

    @property
    def atomics(self) -> int:
        return sum(n for op, n in self.opcodes.items() if ATOMIC.search(op))

    @property
    def full(self) -> list[Loop]:
        """The full-tile loops: those that select least. The others mask the edges."""
        least = min((loop.count(SELECT) for loop in self.loops), default=0)
        return [loop for loop in self.loops if loop.count(SELECT) <= least + 8]

    @property
    def hot(self) -> Loop | None:
        """The worst of the full-tile loops."""
        return min(self.full, key=lambda loop: loop.serial, default=None)


@cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cuobjdump(cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_tool("cuobjdump"), *flags, file.name], check=True, capture_output=True, text=True
        ).stdout


SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def _nvidia(compiled: Any, target: str) -> Report:
    cubin, machine = compiled.asm["cubin"], MACHINES[target]
    usage = _cuobjdump(cubin, "-res-usage")
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    stack = int(re.search(r"STACK:(\d+)", usage).group(1))
    text = re.sub(r"\s+[&?][^;/]*;", ";", _cuobjdump(cubin, "-sass"))  # some versions add scheduling notes
    lines = SASS_LINE.findall(text)
    code = [(int(address, 16), op, rest) for address, _, op, rest in lines]
    conditional = [bool(guard) or rest.strip().startswith(("P", "!P", "UP", "!UP")) for _, guard, _, rest in lines]
    place = {address: i for i, (address, _, _) in enumerate(code)}
    jumps: dict[int, tuple[int | None, bool]] = {}
    for i, (_, op, rest) in enumerate(code):
        if op.startswith(("BRA", "EXIT", "RET")):
            to = re.search(r"0x([0-9a-f]+)\s*$", rest.strip())
            jumps[i] = (place.get(int(to.group(1), 16)) if to and op.startswith("BRA") else None, conditional[i])
    warps = _warps(compiled)
    loops = _hot_loops([(op, rest) for _, op, rest in code], jumps, target, warps)
    shared = compiled.metadata.shared
    per_warp = -(-registers * 32 // 256) * 256
    limits = {
        "registers": machine.registers // (per_warp * warps),
        "shared": machine.shared_total // (shared + KIB),
        "warps": machine.warps // warps,
    }
    limit = min(limits, key=limits.__getitem__)
    return Report(
        target, warps, registers, stack, shared, limits[limit], limit, loops, Counter(op for _, op, _ in code)
    )


def _warps(compiled: Any) -> int:
    """Warps that run, the extra ones of warp specialisation too."""
    total = re.search(r'"ttg.total-num-warps" = (\d+)', compiled.asm["ttgir"])
    return int(total.group(1)) if total else compiled.metadata.num_warps


def _hot_loops(
    code: list[tuple[str, str]], jumps: dict[int, tuple[int | None, bool]], target: str, warps: int
) -> list[Loop]:
    """Natural loops with matrix instructions that hold no other such loop. `jumps`: instruction → (where to, or None at an
    exit; whether it may fall through). Cold blocks that only jump back into a loop are not mistaken for one."""
    starts = sorted(
        {0, *(to for to, _ in jumps.values() if to is not None), *(i + 1 for i in jumps if i + 1 < len(code))}
    )
    block_of = {s: b for b, s in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    after: list[set[int]] = []
    for b, end in enumerate(ends):
        to, falls = jumps.get(end - 1, (None, True))
        after.append({block_of[to]} if to is not None else set())
        if falls and b + 1 < len(ends):
            after[b].add(b + 1)
    before: list[set[int]] = [set() for _ in starts]
    for b, successors in enumerate(after):
        for s in successors:
            before[s].add(b)
    everything = (1 << len(starts)) - 1
    dominators = [1] + [everything] * (len(starts) - 1)
    changed = True
    while changed:
        changed = False
        for b in range(1, len(starts)):
            new = everything
            for p in before[b]:
                new &= dominators[p]
            new = (new if before[b] else 0) | 1 << b
            changed |= new != dominators[b]
            dominators[b] = new
    bodies: dict[int, set[int]] = {}
    for b, successors in enumerate(after):
        for head in successors:
            if dominators[b] >> head & 1:
                body = bodies.setdefault(head, {head})
                queue = [b]
                while queue:
                    x = queue.pop()
                    if x not in body:
                        body.add(x)
                        queue.extend(before[x])
    matrix = {b for b, s in enumerate(starts) if any(MATRIX.search(op) for op, _ in code[s : ends[b]])}
    hot = [body for body in bodies.values() if body & matrix]
    inner = [body for body in hot if not any(other < body for other in hot)]
    return [Loop([x for b in sorted(body) for x in code[starts[b] : ends[b]]], target, warps) for body in inner]


def _amd(compiled: Any, target: str) -> Report:
    text, machine, warps = compiled.asm["amdgcn"], MACHINES[target], compiled.metadata.num_warps
    read = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
    lines = [line.split(";")[0].strip() for line in text.splitlines()]
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in lines:
        if re.fullmatch(r"\.LBB\w+:", line):
            labels[line[:-1]] = len(code)
        elif re.match(r"[sv]_|ds_|global_|buffer_|scratch_|flat_", line):
            code.append((line.split()[0], line))
    jumps: dict[int, tuple[int | None, bool]] = {}
    for i, (op, line) in enumerate(code):
        if op.startswith(("s_branch", "s_cbranch", "s_endpgm")):
            jumps[i] = (labels.get(line.split()[-1]), op.startswith("s_cbranch"))
    # On CDNA3 accumulation registers share the file with the others, and vgpr_count counts both.
    registers, shared = read("vgpr_count"), compiled.metadata.shared
    limits = {
        "registers": 512 // max(-(-registers // 8) * 8, 1) * 4 // warps,
        "shared": machine.shared_total // max(shared, 1),
        "warps": machine.warps // warps,
    }
    limit = min(limits, key=limits.__getitem__)
    return Report(
        target, warps, registers, read("private_segment_fixed_size"), shared, limits[limit], limit,
        _hot_loops(code, jumps, target, warps), Counter(op for op, _ in code),
    )  # fmt: skip


def analyse(compiled: Any, target: str) -> Report:
    """Read one compiled kernel (`triton.compile`'s result) for a target of MACHINES."""
    return _amd(compiled, target) if target.startswith("gfx") else _nvidia(compiled, target)
