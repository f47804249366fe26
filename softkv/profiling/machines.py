"""Rates per clock and capacities of one multiprocessor (a compute unit on AMD), as used by static bounds.

The tensor rate is derived: dense bf16 FLOP/s with fp32 accumulation, as quoted for `device`, ÷ units ÷ boost clock.

Sources: quoted FLOP/s and clocks: the data sheets and white papers of the devices named below. FP32, integer,
special-function rates and limits: CUDA programming guide, tables "Throughput of Native Arithmetic Instructions" and
"Compute Capabilities" (docs.nvidia.com/cuda/cuda-programming-guide). That exponentials and shared memory did not grow
from H100 to B200: FlashAttention-4 (arxiv.org/abs/2603.05451). gfx942: AMD's CDNA 3 white paper and instruction-set
guide; a wave of 64 holds a SIMD for 4 cycles, 16 for transcendentals, conversions and 32-bit multiplies (LLVM,
SISchedule.td).
"""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Machine:
    device: str
    teraflops: float  # quoted, dense bf16
    units: int  # multiprocessors, or compute units
    gigahertz: float  # boost
    tensor: int  # bf16 FLOP
    fma: int  # FP32 lanes
    multiply: int  # 32-bit integer multiply-add lanes, part of the FP32 ones
    alu: int  # integer, logic, compare, select, min/max, packing lanes
    mufu: int  # exp2, log2, reciprocal, conversion lanes
    shared_bytes: int
    issue: int  # warp instructions
    shared_limit: int  # maximum bytes per program
    shared_total: int
    registers: int  # 32-bit
    warps: int
    programs: int
    lanes: int = 32
    tensor_columns: int = 0  # of tensor memory, 128 lanes of 32 bits each
    one_port: bool = False  # FP32, integer and transcendental instructions share one unit


MACHINES = {
    "sm_80": Machine(
        "A100 SXM", 312, 108, 1.41, tensor=2048, fma=64, multiply=64, alu=64, mufu=16,
        shared_bytes=128, issue=4,
        shared_limit=163 * KIB, shared_total=164 * KIB, registers=65536, warps=64, programs=32,
    ),
    "sm_90": Machine(
        "H100 SXM", 989.4, 132, 1.83, tensor=4096, fma=128, multiply=64, alu=64, mufu=16,
        shared_bytes=128, issue=4,
        shared_limit=227 * KIB, shared_total=228 * KIB, registers=65536, warps=64, programs=32,
    ),
    "sm_100": Machine(
        "B200", 2250, 148, 1.85, tensor=8192, fma=128, multiply=64, alu=64, mufu=16,
        shared_bytes=128, issue=4,
        shared_limit=227 * KIB, shared_total=228 * KIB, registers=65536, warps=64, programs=32, tensor_columns=512,
    ),
    "sm_120": Machine(  # GeForce cards of this architecture accumulate in fp32 at half the rate
        "RTX PRO 6000 Blackwell", 503.8, 188, 2.617, tensor=1024, fma=128, multiply=64, alu=64, mufu=16,
        shared_bytes=128,
        issue=4, shared_limit=99 * KIB, shared_total=100 * KIB, registers=65536, warps=48, programs=24,
    ),
    "gfx942": Machine(
        "MI300X", 1307.4, 304, 2.1, tensor=2048, fma=64, multiply=16, alu=64, mufu=16, shared_bytes=128, issue=1,
        shared_limit=64 * KIB, shared_total=64 * KIB, registers=4 * 512 * 64, warps=32, programs=32, lanes=64,
        one_port=True,
    ),
}  # fmt: skip
