"""Instructions of machine code: the pipe each occupies, shapes of matrix products, bytes of shared-memory accesses."""

from __future__ import annotations

import re

MATRIX = re.compile(r"^([HIQ]MMA|[HIQ]GMMA|UTC\w*MMA|v_s?mf[am]\w*_)")
FMA = re.compile(
    r"^((FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|FFMA2|FMUL2|FADD2|FSWZADD)(\.|$)|v_(pk_)?(fmac?|mac|mad|add|sub|mul)_(f32|f16))"
)
TWICE = re.compile(r"^F\w+2(\.|$)")  # Blackwell: two FP32 results per lane
MULTIPLY = re.compile(r"^(IMAD(\.|$)|v_mul_(lo|hi)_|v_mad_[iu]64)")
MUFU = re.compile(r"^(MUFU|F2F|F2I|I2F|FRND|POPC|FLO)(\.|$)|^v_(exp|rcp|log|rsq|sqrt|sin|cos|cvt)_")
EXPONENTIAL = re.compile(r"^(MUFU\.EX2|v_exp_)")
SHARED = re.compile(r"^(LDS|STS|LDSM|STSM|LDGSTS|ATOMS|SHFL)(\.|$)|^ds_")
SPILL = re.compile(r"^(LDL|STL)(\.|$)|^scratch_")
ATOMIC = re.compile(r"^(RED|ATOM|ATOMG)(\.|$)|_atomic_")
SELECT = re.compile(r"^(FSEL|FSETP|SEL)(\.|$)|^v_cmp_(?!o_)\w+_(f32|[iu]32)")  # cmp_o: a bf16 cast tests for NaN
LOAD = re.compile(r"^(LDG|LDGSTS|UTMALDG|UBLKCP)(\.|$)|^(global|buffer)_load")
OTHER = re.compile(
    r"^(BAR|BRA|BRX|SYNCS|WARPSYNC|DEPBAR|NOP|LDG|STG|LDL|STL|LDC|LDCU|UTMA\w+|UBLK\w+|WARPGROUP|LDGDEPBAR|BSSY|BSYNC|R2UR|S2R|CS2R"
    r"|MEMBAR|FENCE|ERRBAR|CCTL|CCTLL|LDTM|STTM|EXIT|RED|ATOMG?|ELECT|VOTE|VOTEU|ARRIVES|ACQBULK|PREEXIT|CALL|RET|U[A-Z]\w*)(\.|$)"
    r"|^(s_|global_|buffer_|flat_|scratch_)"
)
MATRIX_KIND = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA", "gfx942": "v_mfma"}
PIPES = ("tensor", "mufu", "fma", "alu", "shared", "issue")


def pipe_of(op: str) -> str:
    """The pipe that an instruction occupies, in addition to its issue slot."""
    for pipe, pattern in (("tensor", MATRIX), ("mufu", MUFU), ("fma", FMA), ("fma", MULTIPLY), ("shared", SHARED)):
        if pattern.match(op):
            return pipe
    return "other" if OTHER.match(op) else "alu"


def matrix_shape(op: str) -> tuple[int, int, int] | None:
    if written := re.search(r"(\d+)x(\d+)x(\d+)", op):
        m, n, k = map(int, written.groups())
        return m, n, k
    if packed := re.match(r"[HIQ]MMA\.(?:SP\.)?168(8|16|32)\b", op):
        return 16, 8, int(packed.group(1))
    return None


def weight(op: str) -> float:
    if op.startswith(("IMMA", "QMMA", "IGMMA", "QGMMA", "UTCQ", "UTCI")) or re.search(r"_i8|_fp8|_bf8", op):
        return 0.5
    if "TF32" in op or "_xf32" in op:
        return 2.0
    return 8.0 if op.startswith("v_mfma") and op.endswith("_f32") else 1.0


def width(op: str) -> int:
    """The bytes that a lane moves between registers and shared memory."""
    if op.startswith("ds_"):
        bits = re.search(r"_[bui](\d+)", op)
        return (int(bits.group(1)) if bits else 32) // 8 * (2 if re.search("read2|write2", op) else 1)
    if op.startswith(("LDSM", "STSM")):
        return 16 if ".4" in op else 8 if ".2" in op else 4
    if small := re.search(r"\.[US](8|16)(\.|$)", op):
        return int(small.group(1)) // 8
    wide = re.search(r"\.(64|128)(\.|$)", op)
    return int(wide.group(1)) // 8 if wide else 4
