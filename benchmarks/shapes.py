"""The shapes for measuring attention, as data. Axes as in docs/design.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Mode = Literal["forward", "forward + backward", "decoding"]
BOTH: tuple[Mode, ...] = ("forward", "forward + backward")
_AXES = ("B", "H", "G", "T", "P", "D", "S", "A")
TRAIN: tuple[Mode, ...] = ("forward + backward",)
DECODE: tuple[Mode, ...] = ("decoding",)


@dataclass(frozen=True)
class Shape:
    B: int
    H: int
    G: int
    T: int
    P: int
    D: int
    S: int | None = None  # key tokens where they differ from T
    A: int = 1  # prefixes; with more than one, row b reads prefix b % A of a bank

    @property
    def keys(self) -> int:
        return self.T if self.S is None else self.S

    def without_prefix(self) -> Shape:
        return replace(self, P=0, A=1)

    def gflop(self, mode: Mode) -> float:
        """Useful work: two products of each visible pair forward, five backward."""
        pairs = self.T * (self.P + self.keys - self.T) + self.T * (self.T + 1) // 2
        return 1e-9 * 2 * self.D * self.B * self.H * pairs * (7 if mode == "forward + backward" else 2)

    def mbyte(self, mode: Mode, element: int) -> float:
        """Operands and results of `element` bytes a number, each once: q, out, k, v and the prefixes; backward also
        reads grad_out and writes five gradients."""
        line, keys = self.B * self.H * self.T * self.D, 2 * self.B * self.G * self.keys * self.D
        prefix = 2 * self.A * self.G * self.P * self.D
        backward = mode == "forward + backward"
        return 1e-6 * element * (2 * line + keys + prefix + (backward and 4 * line + 2 * keys + 2 * prefix))

    def __str__(self) -> str:
        return "-".join(f"{axis}{size}" for axis, size in asdict(self).items() if size is not None)


@dataclass(frozen=True)
class Sweep:
    """Shapes measured in the same modes; `axis` is what grows from one to the next, if one thing does."""

    title: str
    modes: tuple[Mode, ...]
    shapes: tuple[Shape, ...]
    axis: str | None = None


@dataclass(frozen=True)
class AttentionCase:
    sweep: str
    mode: Mode
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.sweep}/{self.mode.replace(' ', '')}/{self.shape}"


def parse(text: str) -> Shape:
    """B=8,H=32,G=8,T=2048,P=128,D=128, and S and A where they are not T and 1; ValueError for anything else."""
    example = "B=8,H=32,G=8,T=2048,P=128,D=128"
    sizes: dict[str, int] = {}
    for pair in text.replace(" ", "").split(","):
        axis, _, size = pair.partition("=")
        if axis not in _AXES or axis in sizes or not size.isdigit():
            raise ValueError(f"a shape is written {example} (axes {', '.join(_AXES)}), got {pair!r} in {text!r}")
        sizes[axis] = int(size)
    if missing := [axis for axis in _AXES[:6] if axis not in sizes]:
        raise ValueError(f"a shape is written {example}, got {text!r} without {', '.join(missing)}")
    shape = Shape(**sizes)
    if 0 in (value for axis, value in sizes.items() if axis != "P") or shape.H % shape.G:
        raise ValueError(f"expected sizes of at least 1 (P: 0) and H a multiple of G, got {text!r}")
    if shape.keys < shape.T:
        raise ValueError(f"expected as many keys as queries or more, got S = {shape.keys} and T = {shape.T}")
    return shape


def of_user(texts: list[str]) -> dict[str, Sweep]:
    """Shapes given on the command line, as sweeps: those of one query are decoding."""
    shapes = [parse(text) for text in texts]
    chosen = {
        "shapes": [shape for shape in shapes if shape.T > 1],
        "decoding-shapes": [shape for shape in shapes if shape.T == 1],
    }
    return {name: replace(GIVEN[name], shapes=tuple(some)) for name, some in chosen.items() if some}


def grow(title: str, modes: tuple[Mode, ...], start: Shape, axis: str, sizes: tuple[int, ...]) -> Sweep:
    changes: list[dict[str, Any]] = [{axis: size} for size in sizes]
    return Sweep(title, modes, tuple(replace(start, **change) for change in changes), axis)


_P = (16, 64, 256, 1024, 4096, 8192)

# Sized for two CPU cores; heads are SmolLM2-135M's where nothing else is said.
CPU = {
    "training": Sweep(
        "Training shapes",
        BOTH,
        (
            Shape(8, 12, 12, 256, 64, 64),
            Shape(8, 9, 3, 256, 128, 64),
            Shape(1, 16, 16, 2048, 128, 64),
            Shape(4, 8, 8, 512, 1024, 64),
            Shape(16, 9, 3, 64, 128, 64),
            Shape(4, 32, 8, 512, 128, 128),
        ),
    ),
    "decoding": Sweep(
        "Decoding one token", DECODE, tuple(Shape(B, 9, 3, 1, P, 64, S=128) for P in (512, 2048) for B in (1, 8, 32))
    ),
    "prefix": grow("Training as the prefix grows", TRAIN, Shape(4, 9, 3, 128, 0, 64), "P", _P),
    "batch": grow("Training as the batch grows", TRAIN, Shape(0, 9, 3, 64, 512, 64), "B", (1, 2, 4, 8, 16, 32)),
    "tokens": grow("Training as rows grow", TRAIN, Shape(2, 9, 3, 0, 512, 64), "T", (16, 64, 256, 1024)),
    "bank": grow("Training with a bank of prefixes", TRAIN, Shape(16, 9, 3, 64, 256, 64), "A", (1, 2, 4, 8, 16)),
    "decoding-prefix": grow(
        "Decoding as the shared prefix grows", DECODE, Shape(16, 9, 3, 1, 0, 64, S=128), "P", _P
    ),
    "decoding-batch": grow(
        "Decoding as the batch grows", DECODE, Shape(0, 9, 3, 1, 2048, 64, S=128), "B", (1, 2, 4, 8, 16, 32, 64)
    ),
    "decoding-bank": grow(
        "Decoding with a bank of prefixes", DECODE, Shape(32, 9, 3, 1, 1024, 64, S=128), "A", (1, 2, 4, 8, 16, 32)
    ),
}  # fmt: skip

# Sized for one large GPU: heads of an 8B model with grouped queries.
CUDA = {
    "training": Sweep(
        "Training shapes",
        BOTH,
        (
            Shape(8, 16, 16, 2048, 64, 64),
            Shape(8, 32, 8, 2048, 128, 128),
            Shape(1, 32, 8, 16384, 128, 128),
            Shape(4, 32, 8, 4096, 1024, 128),
            Shape(64, 32, 8, 256, 128, 128),
        ),
    ),
    "decoding": Sweep(
        "Decoding one token",
        DECODE,
        tuple(Shape(B, 32, 8, 1, P, 128, S=512) for P in (512, 2048, 8192) for B in (1, 16, 64, 256)),
    ),
    "prefix": grow("Training as the prefix grows", TRAIN, Shape(8, 32, 8, 1024, 0, 128), "P", _P),
    "batch": grow("Training as the batch grows", TRAIN, Shape(0, 32, 8, 512, 1024, 128), "B", (1, 4, 16, 64)),
    "tokens": grow("Training as rows grow", TRAIN, Shape(4, 32, 8, 0, 1024, 128), "T", (64, 256, 1024, 4096, 16384)),
    "bank": grow("Training with a bank of prefixes", TRAIN, Shape(64, 32, 8, 256, 512, 128), "A", (1, 4, 16, 64)),
    "decoding-prefix": grow(
        "Decoding as the shared prefix grows", DECODE, Shape(64, 32, 8, 1, 0, 128, S=512), "P", _P
    ),
    "decoding-batch": grow(
        "Decoding as the batch grows", DECODE, Shape(0, 32, 8, 1, 8192, 128, S=512), "B", (1, 4, 16, 64, 256)
    ),
    "decoding-bank": grow(
        "Decoding with a bank of prefixes", DECODE, Shape(64, 32, 8, 1, 2048, 128, S=512), "A", (1, 4, 16, 64)
    ),
}  # fmt: skip

# Small enough for a test: says nothing about speed.
QUICK = {
    "training": Sweep("Training shapes", BOTH, (Shape(2, 4, 2, 8, 5, 16),)),
    "decoding": Sweep("Decoding one token", DECODE, (Shape(2, 4, 2, 1, 5, 16, S=4),)),
    "prefix": grow("Training as the prefix grows", TRAIN, Shape(2, 4, 2, 8, 0, 16), "P", (2, 8)),
    "bank": grow("Training with a bank of prefixes", TRAIN, Shape(4, 4, 2, 8, 5, 16), "A", (1, 2)),
}


GIVEN = {
    "shapes": Sweep("Given shapes", BOTH, ()),
    "decoding-shapes": Sweep("Given shapes, one token", DECODE, ()),
}


def cases(sweeps: dict[str, Sweep]) -> list[AttentionCase]:
    return [
        AttentionCase(name, mode, shape)
        for name, sweep in sweeps.items()
        for shape in sweep.shapes
        for mode in sweep.modes
    ]
