"""Read a compiled kernel's machine code: registers, spills, memories, occupancy, and what each loop costs.

Method (a *static bound*, no measured time): take the innermost loops that hold matrix instructions, count the
instructions of each pipe, and turn counts into cycles of one multiprocessor for one pass of the loop by all warps of a
program:

    cycles(pipe) = instructions · warps · lanes of a warp / lanes a clock           (rates: `softkv.profiling.machines`)
    overlap bound = tensor / max over pipes          serial bound = tensor / (tensor + largest of mufu, fma, alu, issue)

Overlap is what perfect hiding would reach, serial what a program reaches that never overlaps its matrix work with its
arithmetic. Shared memory (loads, stores, shuffles, and the operands that HGMMA and UTCMMA read from it) counts in the
overlap bound only: its traffic is asynchronous. Bank conflicts, waits and device memory are not seen.

A warp-specialised kernel has a loop in each partition; one tile passes through all of them, so their cycles are added.
NVIDIA cubins are disassembled with the cuobjdump inside the triton wheel; gfx942 is read from its assembly.
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

from softkv.profiling.machines import KIB, MACHINES, Machine

MATRIX = re.compile(r"^([HIQ]MMA|[HIQ]GMMA|UTC\w*MMA|v_s?mf[am]\w*_)")
FMA = re.compile(
    r"^((FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|FFMA2|FMUL2|FADD2|FSWZADD)(\.|$)|v_(pk_)?(fmac?|mac|mad|add|sub|mul)_(f32|f16))"
)
TWICE = re.compile(r"^F\w+2(\.|$)")  # Blackwell: two FP32 results a lane
MULTIPLY = re.compile(r"^(IMAD(\.|$)|v_mul_(lo|hi)_|v_mad_[iu]64)")
MUFU = re.compile(r"^(MUFU|F2F|F2I|I2F|FRND|POPC|FLO)(\.|$)|^v_(exp|rcp|log|rsq|sqrt|sin|cos|cvt)_")
EXPONENTIAL = re.compile(r"^(MUFU\.EX2|v_exp_)")
SHARED = re.compile(r"^(LDS|STS|LDSM|STSM|LDGSTS|ATOMS|SHFL)(\.|$)|^ds_")
SPILL = re.compile(r"^(LDL|STL)(\.|$)|^scratch_")
ATOMIC = re.compile(r"^(RED|ATOM|ATOMG)(\.|$)|_atomic_")
SELECT = re.compile(r"^(FSEL|FSETP|SEL)(\.|$)|^v_cmp_(?!o_)\w+_(f32|[iu]32)")  # cmp_o: a bf16 cast asks for NaN
LOAD = re.compile(r"^(LDG|LDGSTS|UTMALDG|UBLKCP)(\.|$)|^(global|buffer)_load")
OTHER = re.compile(
    r"^(BAR|BRA|BRX|SYNCS|WARPSYNC|DEPBAR|NOP|LDG|STG|LDL|STL|LDC|LDCU|UTMA\w+|UBLK\w+|WARPGROUP|LDGDEPBAR|BSSY|BSYNC|R2UR|S2R|CS2R"
    r"|MEMBAR|FENCE|ERRBAR|CCTL|CCTLL|LDTM|STTM|EXIT|RED|ATOMG?|ELECT|VOTE|VOTEU|ARRIVES|ACQBULK|PREEXIT|CALL|RET|U[A-Z]\w*)(\.|$)"
    r"|^(s_|global_|buffer_|flat_|scratch_)"
)
MATRIX_KIND = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA", "gfx942": "v_mfma"}
PIPES = ("tensor", "mufu", "fma", "alu", "shared", "issue")


def pipe_of(op: str) -> str:
    """The pipe an instruction occupies, beside its issue slot."""
    for pipe, pattern in (("tensor", MATRIX), ("mufu", MUFU), ("fma", FMA), ("fma", MULTIPLY), ("shared", SHARED)):
        if pattern.match(op):
            return pipe
    return "other" if OTHER.match(op) else "alu"


@dataclass
class Loop:
    instructions: list[tuple[str, str]]  # opcode, whole text
    target: str
    warps: int
    partition: str = ""  # of a warp-specialised kernel
    flops: float = 0  # from the tile sizes, where the binary doesn't tell

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(op)) for op, _ in self.instructions)

    @property
    def mix(self) -> dict[str, int]:
        """Instructions a warp issues a pass, by pipe."""
        return dict(Counter(pipe_of(op) for op, _ in self.instructions).most_common())

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(op.split(".")[0] for op, _ in self.instructions)

    @property
    def shapes(self) -> list[tuple[str, tuple[int, int, int], float]]:
        """(opcode, M×N×K, bf16 FLOP of all who issue it) of each matrix instruction that tells its shape."""
        found = []
        for op, _ in self.instructions:
            if MATRIX.match(op) and (shape := _matrix_shape(op)):
                m, n, k = shape
                found.append((op, shape, 2 * m * n * k * self._copies(op) * _weight(op)))
        return found

    def _copies(self, op: str) -> int:
        """How often a program issues a matrix instruction: once, a warp group each, or a warp each."""
        return 1 if op.startswith("UTC") else max(1, self.warps // 4) if "GMMA" in op else self.warps

    @property
    def matrix_flops(self) -> float:
        """In units of bf16 work: an 8-bit product counts half, TF32 double."""
        return sum(flops for *_, flops in self.shapes) or self.flops

    @property
    def derived(self) -> bool:
        """Whether the matrix work comes from tile sizes: the binary holds instructions that don't tell their shape."""
        return not self.shapes and self.flops > 0

    def cycles(self) -> dict[str, float]:
        machine = MACHINES[self.target]
        lanes = machine.lanes * self.warps
        count: Counter[str] = Counter()
        shared = self._operand_bytes()
        for op, _ in self.instructions:
            pipe = pipe_of(op)
            count[pipe] += 2 if pipe == "fma" and TWICE.match(op) else 1
            if pipe == "shared":
                shared += _width(op) * lanes
        multiplies = self.count(MULTIPLY)
        cycles = {
            "tensor": self.matrix_flops / machine.tensor,
            "mufu": count["mufu"] * lanes / machine.mufu,
            "fma": max(count["fma"] * lanes / machine.fma, multiplies * lanes / machine.multiply),
            "alu": count["alu"] * lanes / machine.alu,
            "shared": shared / machine.shared_bytes,
            "issue": len(self.instructions) * self.warps / machine.issue,
        }
        if machine.one_port:  # every vector instruction passes it, and it is held for as long as they take
            matrix = sum(bool(MATRIX.match(op)) for op, _ in self.instructions) * self.warps
            cycles["issue"] = cycles["mufu"] + cycles["fma"] + cycles["alu"] + matrix
        return cycles

    def _operand_bytes(self) -> float:
        """What HGMMA and UTCMMA read from shared memory: B always, A unless it is in registers or in tensor memory."""
        total = 0.0
        for op, text in self.instructions:
            if "GMMA" in op or op.startswith("UTC"):
                shape = _matrix_shape(op)
                if shape is None:
                    continue
                m, n, k = shape
                size = 1 if op[0] in "QI" or op.startswith(("UTCQ", "UTCI")) else 2
                operands = text.split(",")
                a = operands[0] if op.startswith("UTC") else operands[1]
                total += self._copies(op) * size * k * (n + (m if "gdesc" in a else 0))
        return total

    @property
    def overlap(self) -> float:
        return overlap(self.cycles())

    @property
    def serial(self) -> float:
        return serial(self.cycles())


def overlap(cycles: dict[str, float]) -> float:
    """Fraction of the tensor peak when everything hides behind the fullest pipe."""
    fullest = max(cycles.values())
    return cycles["tensor"] / fullest if fullest else 0.0


def serial(cycles: dict[str, float]) -> float:
    """Fraction of the tensor peak when matrix work and arithmetic take turns."""
    together = cycles["tensor"] + max(cycles[pipe] for pipe in ("mufu", "fma", "alu", "issue"))
    return cycles["tensor"] / together if together else 0.0


def _matrix_shape(op: str) -> tuple[int, int, int] | None:
    if written := re.search(r"(\d+)x(\d+)x(\d+)", op):
        m, n, k = map(int, written.groups())
        return m, n, k
    if packed := re.match(r"[HIQ]MMA\.(?:SP\.)?168(8|16|32)\b", op):
        return 16, 8, int(packed.group(1))
    return None


def _weight(op: str) -> float:
    if op.startswith(("IMMA", "QMMA", "IGMMA", "QGMMA", "UTCQ", "UTCI")) or re.search(r"_i8|_fp8|_bf8", op):
        return 0.5
    if "TF32" in op or "_xf32" in op:
        return 2.0
    return 8.0 if op.startswith("v_mfma") and op.endswith("_f32") else 1.0


def _width(op: str) -> int:
    """Bytes a lane moves between registers and shared memory."""
    if op.startswith("ds_"):
        bits = re.search(r"_[bui](\d+)", op)
        return (int(bits.group(1)) if bits else 32) // 8 * (2 if re.search("read2|write2", op) else 1)
    if op.startswith(("LDSM", "STSM")):
        return 16 if ".4" in op else 8 if ".2" in op else 4
    if small := re.search(r"\.[US](8|16)(\.|$)", op):
        return int(small.group(1)) // 8
    wide = re.search(r"\.(64|128)(\.|$)", op)
    return int(wide.group(1)) // 8 if wide else 4


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
    tensor_columns: int = 0  # of tensor memory, of 512
    partitions: dict[str, int] = field(default_factory=dict)  # of a warp-specialised kernel: what they do → how many

    @property
    def spills(self) -> int:
        return sum(n for op, n in self.opcodes.items() if SPILL.search(op))

    @property
    def spills_in_loops(self) -> int:
        return sum(loop.count(SPILL) for loop in self.loops)

    @property
    def atomics(self) -> int:
        return sum(n for op, n in self.opcodes.items() if ATOMIC.search(op))

    @property
    def full(self) -> list[Loop]:
        """The full-tile loops: those that select least. The others mask the edges."""
        loops = [loop for loop in self.loops if loop.count(MATRIX)] or self.loops
        least = min((loop.count(SELECT) for loop in loops), default=0)
        return [loop for loop in loops if loop.count(SELECT) <= least + 8]

    @property
    def hot(self) -> Loop | None:
        """The worst of the full-tile loops."""
        return min(self.full, key=lambda loop: loop.serial, default=None)

    @property
    def path(self) -> list[Loop]:
        """The loops that one tile passes through: the hot one, or the longest of each partition."""
        if not self.partitions:
            return [] if self.hot is None else [self.hot]
        path = []
        for name, copies in self.partitions.items():
            loops = [loop for loop in self.loops if loop.partition == name]
            path += sorted(loops, key=lambda loop: (loop.count(SELECT), -len(loop.instructions)))[:copies]
        return path

    @property
    def cycles(self) -> dict[str, float]:
        """Of one tile, by pipe."""
        parts = [loop.cycles() for loop in self.path]
        return {pipe: sum(part[pipe] for part in parts) for pipe in PIPES} if parts else {}


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


def _number(pattern: str, text: str) -> int:
    """The number that must be there."""
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found.group(1))


def _nvidia(compiled: Any, target: str) -> Report:
    cubin, machine = compiled.asm["cubin"], MACHINES[target]
    usage = _cuobjdump(cubin, "-res-usage")
    registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    text = re.sub(r"\s+[&?][^;/]*;", ";", _cuobjdump(cubin, "-sass"))  # some versions add scheduling notes
    lines = SASS_LINE.findall(text)
    code = _with_shapes([(int(address, 16), op, rest) for address, _, op, rest in lines])
    conditional = [bool(guard) or rest.strip().startswith(("P", "!P", "UP", "!UP")) for _, guard, _, rest in lines]
    place = {address: i for i, (address, _, _) in enumerate(code)}
    jumps: dict[int, tuple[int | None, bool]] = {}
    for i, (_, op, rest) in enumerate(code):
        if op.startswith(("BRA", "BRX", "EXIT", "RET")):
            to = re.search(r"0x([0-9a-f]+)\s*$", rest.strip())
            jumps[i] = (place.get(int(to.group(1), 16)) if to and op.startswith("BRA") else None, conditional[i])
    warps, groups = _warps(compiled), _partitions(compiled)
    loops = _hot_loops([(op, rest) for _, op, rest in code], jumps, target, warps, specialised=bool(groups))
    for loop in loops:
        if (does := _does(loop)) in groups:
            loop.partition, loop.warps = "+".join(sorted(does)), groups[does][0]
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    limits = occupancy_limits(machine, registers, compiled.metadata.shared, warps, columns)
    limit = min(limits, key=limits.__getitem__)
    return Report(
        target, warps, registers, stack, compiled.metadata.shared, limits[limit], limit, loops,
        Counter(op for _, op, _ in code), columns,
        {"+".join(sorted(does)): len(of) for does, of in groups.items() if does},
    )  # fmt: skip


def occupancy_limits(machine: Machine, registers: int, shared: int, warps: int, columns: int) -> dict[str, int]:
    """Programs that fit one NVIDIA multiprocessor, by what they need."""
    per_warp = -(-registers * 32 // 256) * 256
    limits = {
        "registers": machine.registers // (per_warp * warps),
        "shared": machine.shared_total // (shared + KIB),
        "warps": machine.warps // warps,
        "programs": machine.programs,
    }
    if columns:
        limits["tensor memory"] = machine.tensor_columns // columns
    return limits


def _with_shapes(code: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """UTCMMA's opcode does not tell its shape; its descriptor does, where it is a constant moved into a uniform
    register (PTX, "Instruction descriptor": N/8 from bit 17, M/16 from bit 24). It is written into the opcode."""
    constants: dict[str, int] = {}
    told = []
    for address, op, rest in code:
        if move := re.match(r"\s*(UR\d+), 0x([0-9a-f]+)", rest) if op == "UMOV" else None:
            constants[move.group(1)] = int(move.group(2), 16)
        elif op.startswith("UTC") and (register := re.search(r"idesc\[(UR\d+)\]", rest)):
            descriptor = constants.get(register.group(1), 0)
            n, m = (descriptor >> 17 & 63) * 8, (descriptor >> 24 & 31) * 16
            k = {"UTCHMMA": 8 if descriptor >> 7 & 7 == 2 else 16}.get(op.split(".")[0], 32)
            if m in (64, 128, 256) and n:
                m = m // 2 if ".2CTA" in op else m
                op = f"{op}.{m}x{n}x{k}" + (".TF32" if k == 8 else "")
        elif written := re.match(r"\s*(UR\d+),", rest):
            constants.pop(written.group(1), None)
        told.append((address, op, rest))
    return told


def _warps(compiled: Any) -> int:
    """Warps that run, the extra ones of warp specialisation too."""
    total = re.search(r'"ttg.total-num-warps" = (\d+)', compiled.asm["ttgir"])
    return int(total.group(1)) if total else compiled.metadata.num_warps


KINDS = {
    "matrix": r"tc_gen5_mma|warp_group_dot|tt\.dot",
    "softmax": r"math\.exp2",
    "loads": r"async_tma_copy_global_to_local|async_copy_global_to_local",
}


def _partitions(compiled: Any) -> dict[frozenset[str], list[int]]:
    """What the loops of a warp-specialised kernel's partitions do → warps of each partition that does it, from Triton's
    own intermediate code. Partitions that do the same take a share of the tile each, and have the same number of
    warps."""
    text = compiled.asm["ttgir"]
    if "ttg.warp_specialize(" not in text:
        return {}
    default = _number(r'"ttg.num-warps" = (\d+)', text)
    found: dict[frozenset[str], list[int]] = {}
    for region in re.split(r"\n\s*(?=default \{|partition\d+\()", text.split("ttg.warp_specialize(", 1)[1])[1:]:
        warps = re.search(r"num_warps\((\d+)\)", region.split("\n", 1)[0])
        does = frozenset(kind for kind, pattern in KINDS.items() if re.search(pattern, region))
        found.setdefault(does, []).append(int(warps.group(1) if warps else default))
    return found


def _does(loop: Loop) -> frozenset[str]:
    signs = {"matrix": MATRIX, "softmax": EXPONENTIAL, "loads": LOAD}
    return frozenset(name for name, pattern in signs.items() if loop.count(pattern))


def _hot_loops(
    code: list[tuple[str, str]],
    jumps: dict[int, tuple[int | None, bool]],
    target: str,
    warps: int,
    specialised: bool = False,
) -> list[Loop]:
    """Natural loops with matrix instructions that hold no other such loop; of a warp-specialised kernel, those with
    exponentials or loads, too; of a kernel that has none, its innermost loops with loads.

    `jumps`: instruction → (where to, or None at an exit; whether it may fall through). Cold blocks that only jump back
    into a loop are not mistaken for one."""
    starts = sorted(
        {0, *(to for to, _ in jumps.values() if to is not None), *(i + 1 for i in jumps if i + 1 < len(code))}
    )
    ends = [*starts[1:], len(code)]
    bodies = _natural_loops(starts, ends, jumps).values()

    def innermost(pattern: re.Pattern[str]) -> list[set[int]]:
        blocks = {b for b, s in enumerate(starts) if any(pattern.search(op) for op, _ in code[s : ends[b]])}
        hot = [body for body in bodies if body & blocks]
        return [body for body in hot if not any(other < body for other in hot)]

    found = innermost(MATRIX)
    if specialised:
        found += [body for body in innermost(EXPONENTIAL) + innermost(LOAD) if not any(body & one for one in found)]
    found = found or innermost(LOAD)
    unique = {frozenset(body): body for body in found}.values()
    return [Loop([x for b in sorted(body) for x in code[starts[b] : ends[b]]], target, warps) for body in unique]


def _natural_loops(
    starts: list[int], ends: list[int], jumps: dict[int, tuple[int | None, bool]]
) -> dict[int, set[int]]:
    """Head block → blocks, by dominators."""
    block_of = {s: b for b, s in enumerate(starts)}
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
    return bodies


def _amd(compiled: Any, target: str) -> Report:
    text, machine, warps = compiled.asm["amdgcn"], MACHINES[target], compiled.metadata.num_warps
    read = lambda name: _number(rf"\.{name}:\s+(\d+)", text)  # noqa: E731
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
        "programs": machine.programs,
    }
    limit = min(limits, key=limits.__getitem__)
    return Report(
        target, warps, registers, read("private_segment_fixed_size"), shared, limits[limit], limit,
        _hot_loops(code, jumps, target, warps), Counter(op for op, _ in code),
    )  # fmt: skip


def analyse(compiled: Any, target: str) -> Report:
    """Read one compiled kernel (`triton.compile`'s result) for a target of MACHINES."""
    return _amd(compiled, target) if target.startswith("gfx") else _nvidia(compiled, target)
