"""Loops of machine code: the hot ones, and the cycles that one pass takes on each pipe (method:
`softkv.profiling.sass`)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from softkv.profiling.instructions import (
    EXPONENTIAL,
    LOAD,
    MATRIX,
    MULTIPLY,
    TWICE,
    matrix_shape,
    pipe_of,
    weight,
    width,
)
from softkv.profiling.machines import MACHINES


@dataclass
class Loop:
    instructions: list[tuple[str, str]]  # opcode, full text
    target: str
    warps: int
    partition: str = ""  # of a warp-specialised kernel
    flops: float = 0  # from the tile sizes, if the binary does not contain the shape

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(op)) for op, _ in self.instructions)

    @property
    def mix(self) -> dict[str, int]:
        """The instructions that a warp issues per pass of the loop, by pipe."""
        return dict(Counter(pipe_of(op) for op, _ in self.instructions).most_common())

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(op.split(".")[0] for op, _ in self.instructions)

    @property
    def shapes(self) -> list[tuple[str, tuple[int, int, int], float]]:
        """(opcode, M×N×K, bf16 FLOP over all warps that issue it) of each matrix instruction with a known shape."""
        found = []
        for op, _ in self.instructions:
            if MATRIX.match(op) and (shape := matrix_shape(op)):
                m, n, k = shape
                found.append((op, shape, 2 * m * n * k * self._copies(op) * weight(op)))
        return found

    def _copies(self, op: str) -> int:
        """How often a program issues a matrix instruction: once, once per warp group, or once per warp."""
        return 1 if op.startswith("UTC") else max(1, self.warps // 4) if "GMMA" in op else self.warps

    @property
    def matrix_flops(self) -> float:
        """In units of bf16 work: an 8-bit product counts half, TF32 double."""
        return sum(flops for *_, flops in self.shapes) or self.flops

    @property
    def derived(self) -> bool:
        """Whether the matrix work is derived from tile sizes, because the binary does not contain the instructions'
        shapes."""
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
                shared += width(op) * lanes
        multiplies = self.count(MULTIPLY)
        cycles = {
            "tensor": self.matrix_flops / machine.tensor,
            "mufu": count["mufu"] * lanes / machine.mufu,
            "fma": max(count["fma"] * lanes / machine.fma, multiplies * lanes / machine.multiply),
            "alu": count["alu"] * lanes / machine.alu,
            "shared": shared / machine.shared_bytes,
            "issue": len(self.instructions) * self.warps / machine.issue,
        }
        if machine.one_port:  # every vector instruction occupies it for its whole duration
            matrix = sum(bool(MATRIX.match(op)) for op, _ in self.instructions) * self.warps
            cycles["issue"] = cycles["mufu"] + cycles["fma"] + cycles["alu"] + matrix
        return cycles

    def _operand_bytes(self) -> float:
        """The bytes that HGMMA and UTCMMA read from shared memory: always B, and A unless it is in registers or tensor
        memory."""
        total = 0.0
        for op, text in self.instructions:
            if "GMMA" in op or op.startswith("UTC"):
                shape = matrix_shape(op)
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
    """Fraction of the tensor peak if everything is hidden behind the busiest pipe."""
    fullest = max(cycles.values())
    return cycles["tensor"] / fullest if fullest else 0.0


def serial(cycles: dict[str, float]) -> float:
    """Fraction of the tensor peak if matrix work and arithmetic alternate."""
    together = cycles["tensor"] + max(cycles[pipe] for pipe in ("mufu", "fma", "alu", "issue"))
    return cycles["tensor"] / together if together else 0.0


def hot_loops(
    code: list[tuple[str, str]],
    jumps: dict[int, tuple[int | None, bool]],
    target: str,
    warps: int,
    specialised: bool = False,
) -> list[Loop]:
    """Innermost natural loops with matrix instructions; for a warp-specialised kernel also those with exponentials or
    loads; for a kernel without matrix instructions, the innermost loops with loads.

    `jumps`: instruction → (its target, or None at an exit; whether it may fall through). Cold blocks that only jump
    back into a loop are not mistaken for one."""
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
