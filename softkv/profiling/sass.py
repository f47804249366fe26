"""Analyses a compiled kernel's machine code: registers, spills, memories, occupancy, and the cost of its loops.

Method (a *static bound*, not a measured time): take the innermost loops with matrix instructions, count the
instructions of each pipe, and convert counts to cycles of one multiprocessor for one pass of the loop by all warps of a
program:

    cycles(pipe) = instructions · warps · lanes of a warp / lanes a clock           (rates: `softkv.profiling.machines`)
    overlap bound = tensor / max over pipes          serial bound = tensor / (tensor + largest of mufu, fma, alu, issue)

The overlap bound assumes perfect hiding; the serial bound assumes that matrix work never overlaps with arithmetic.
Shared memory (loads, stores, shuffles, and the operands that HGMMA and UTCMMA read from it) counts in the overlap bound
only, because its traffic is asynchronous. Bank conflicts, waits and device memory are not modelled.

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

from softkv.profiling.instructions import ATOMIC, EXPONENTIAL, LOAD, MATRIX, PIPES, SELECT, SPILL
from softkv.profiling.loops import Loop, hot_loops
from softkv.profiling.machines import KIB, MACHINES, Machine


@dataclass
class Report:
    target: str
    warps: int
    registers: int
    stack: int
    shared: int
    occupancy: int  # programs per multiprocessor
    limit: str  # what limits it
    loops: list[Loop] = field(default_factory=list)
    opcodes: Counter[str] = field(default_factory=Counter)
    tensor_columns: int = 0  # used of the 512 columns of tensor memory
    partitions: dict[str, int] = field(default_factory=dict)  # of a warp-specialised kernel: their tasks → how many

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
        """The full-tile loops: those with the fewest selects. The others mask the edges."""
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
        """Cycles of one tile, by pipe."""
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
    """The integer that the pattern captures; the pattern must match."""
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found.group(1))


def _nvidia(compiled: Any, target: str) -> Report:
    cubin, machine = compiled.asm["cubin"], MACHINES[target]
    usage = _cuobjdump(cubin, "-res-usage")
    registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    text = re.sub(r"\s+[&?][^;/]*;", ";", _cuobjdump(cubin, "-sass"))  # some versions add scheduling annotations
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
    loops = hot_loops([(op, rest) for _, op, rest in code], jumps, target, warps, specialised=bool(groups))
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
    """The number of programs that fit one NVIDIA multiprocessor, by resource."""
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
    """Append UTCMMA's shape to its opcode. The shape is in the descriptor, if that is a constant moved into a uniform
    register (PTX, "Instruction descriptor": N/8 from bit 17, M/16 from bit 24)."""
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
    """The number of warps, including the additional ones of warp specialisation."""
    total = re.search(r'"ttg.total-num-warps" = (\d+)', compiled.asm["ttgir"])
    return int(total.group(1)) if total else compiled.metadata.num_warps


KINDS = {
    "matrix": r"tc_gen5_mma|warp_group_dot|tt\.dot",
    "softmax": r"math\.exp2",
    "loads": r"async_tma_copy_global_to_local|async_copy_global_to_local",
}


def _partitions(compiled: Any) -> dict[frozenset[str], list[int]]:
    """The tasks of the loops in a warp-specialised kernel's partitions → the number of warps of each partition with
    these tasks, from Triton's intermediate code. Partitions with the same tasks share the tile, and have the same
    number of warps."""
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
    # On CDNA3 accumulation registers share the register file with the others, and vgpr_count counts both.
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
        hot_loops(code, jumps, target, warps), Counter(op for op, _ in code),
    )  # fmt: skip


def analyse(compiled: Any, target: str) -> Report:
    """Analyse one compiled kernel (the result of `triton.compile`) for a target of MACHINES."""
    return _amd(compiled, target) if target.startswith("gfx") else _nvidia(compiled, target)
