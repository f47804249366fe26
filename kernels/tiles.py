"""Tile sizes, warps and pipeline stages: one table, one reason a row.

`M` counts items (query tokens × heads of a group), `N` keys. A pass asks `tile(pass, target, D, dtype)`.
"""

from typing import NamedTuple

import torch


class Target(NamedTuple):
    arch: str  # sm_80, sm_90, sm_100, sm_120, gfx942, or "interpreter"
    units: int  # multiprocessors, or compute units


class Tile(NamedTuple):
    own: int  # items a program owns; keys in "dkv"
    step: int  # keys it walks at a time; items in "dkv"
    warps: int
    stages: int
    why: str

    @property
    def edge(self) -> int:
        """The step where a mask is needed: half, so that compares and bounds find registers, and less is hidden."""
        return max(16, self.step // 2)


# (pass, arch) → rows by the largest padded head dim they serve.
TABLE: dict[tuple[str, str], dict[int, Tile]] = {}


def block_d(head_dim: int) -> int:
    """Head dims are padded to a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


INTERPRETER = {
    "forward": Tile(32, 32, 1, 1, "small and unequal: edges are met often, swapped axes are seen"),
    "decode": Tile(16, 32, 1, 1, "as forward"),
    "prepare": Tile(16, 0, 1, 1, "as forward"),
    "add_parts": Tile(64, 0, 1, 1, "as forward"),
    "decode_prefix": Tile(32, 32, 1, 1, "as forward"),
    "merge": Tile(16, 0, 1, 1, "as forward"),
    "dq": Tile(32, 32, 1, 1, "as forward"),
    "dkv": Tile(16, 64, 1, 1, "as forward"),
}


def tile(name: str, target: Target, head_dim: int, dtype: torch.dtype) -> Tile:
    if target.arch == "interpreter":
        return INTERPRETER[name]
    return Tile(64, 64, 4, 2, "placeholder")
