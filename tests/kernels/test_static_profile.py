"""The static profile reads the binaries right: what it counts is what the tile needs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction
from typer.testing import CliRunner

from softkv.cli import app
from softkv.profiling import peers
from softkv.profiling.compile import TARGETS
from softkv.profiling.instructions import pipe_of
from softkv.profiling.machines import MACHINES


def static(*arguments: str, **terminal: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | terminal
    command = [sys.executable, "-m", "softkv.cli", "profile", "static", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def rows(*arguments: str) -> list[dict[str, Any]]:
    done = static("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_matrix_work_and_exponentials_read_from_the_binary() -> None:
    found = {row["target"]: row for row in rows("--dim", "64", "--only", "forward")}
    assert found.keys() == TARGETS.keys()
    for row in found.values():
        assert row["work"] == 1, row
        assert not row["derived"]
        assert 1 < row["exponentials_per_score"] < 1.15
        assert 0 < row["serial"] < row["overlap"] <= 1
        assert row["cycles"]["tensor"] == 4 * 64 * row["scores"] / MACHINES[row["target"]].tensor
    assert found["sm_100"]["tensor_columns"] > 0
    assert found["sm_90"]["tensor_columns"] == 0


KERNEL = str(Path(__file__).with_name("specialised.py")) + ":attention"
TYPES = ("--signature", "*bf16,*bf16,*bf16,*bf16,i32,fp32", "--constexprs", "BLOCK_M=128,BLOCK_N=64,D=64")


def test_a_users_warp_specialised_kernel_by_partition() -> None:
    hopper, blackwell = rows(KERNEL, *TYPES, "--scores", str(128 * 64), "--target", "sm_90", "--target", "sm_100")
    assert hopper["partitions"] == {"loads": 1, "matrix+softmax": 2}
    assert blackwell["partitions"]["matrix"] == 1
    assert blackwell["warps"] > 4
    for row in (hopper, blackwell):
        assert row["cycles"]["tensor"] == 4 * 64 * 128 * 64 / MACHINES[row["target"]].tensor
        assert 1 < row["exponentials_per_score"] < 1.15


FOREIGN = str(Path(__file__).with_name("styles.py")) + ":plain"


def test_kernels_of_other_styles() -> None:
    """Tuned, with heuristics, without annotations, by pointers; and by descriptors made on the host."""
    tuned = ("--signature", "*bf16,*bf16,*fp32,i32:16", "--constexprs", "BM=64", "--target", "sm_80")
    made = ("--signature", "tensordesc<bf16[64,64]>,tensordesc<bf16[64,64]>,*fp32,i32", "--constexprs", "BM=64")
    (by_pointers,) = rows(FOREIGN, *tuned)
    (by_descriptors,) = rows(FOREIGN.replace(":plain", ":described"), *made, "--target", "sm_90")
    for row in (by_pointers, by_descriptors):
        assert row["cycles"]["tensor"] == 2 * 64**3 / MACHINES[row["target"]].tensor
        assert row["spills"] == 0


@pytest.mark.parametrize(("columns", "lines"), [("80", ("tile 4w 2s; registers", "overlap ")), ("", ("│ 4w 2s │",))])
def test_a_narrow_terminal_gets_no_table(columns: str, lines: tuple[str, ...]) -> None:
    arguments = (FOREIGN, "--signature", "*bf16,*bf16,*fp32,i32:16", "--constexprs", "BM=64", "--target", "sm_80")
    terminal = {"FORCE_COLOR": "1", "COLUMNS": columns, "TERM": "dumb"} if columns else {}
    said = static(*arguments, **terminal).stdout
    for line in lines:
        assert line in said
    if columns:
        assert "│" not in said


WRONG = {
    (KERNEL, "--constexprs", "BLOCK_M=128"): "needs values for BLOCK_N, D",
    (KERNEL, *TYPES[2:], "--signature", "*bf16"): "expects 6 types, for q, k, v, out, n, scale; got 1",
    (KERNEL, *TYPES[2:], "--signature", "*bf16,*bf16,*bf16,*bf16,int,fp32"): "'int' is not a type",
    (KERNEL, *TYPES, "--constexprs", "WIDTH=1"): "has no parameter WIDTH",
    (KERNEL, *TYPES, "--num-warps", "3"): "--num-warps expects a power of 2, got 3",
    (KERNEL.replace(":attention", ":nothing"),): "its kernels are attention",
    ("nowhere.py:kernel",): "there is no file 'nowhere.py'",
    ("nowhere.py",): "name the kernel in it, as in nowhere.py:kernel",
    (FOREIGN.replace("styles.py", "needs_a_gpu.py"),): "can't be imported: RuntimeError: 0 active drivers",
    (FOREIGN, "--signature", "*bf16,*bf16,*fp32,i32", "--constexprs", "BM=100", "--target", "sm_80"): (
        "plain does not compile for sm_80: arange's range must be a power of 2 (line "
    ),
    (
        FOREIGN,
        "--signature",
        "*bf16,tensordesc<bf16>,*fp32,i32",
        "--constexprs",
        "BM=64",
    ): "'tensordesc<bf16>' is not a type",
    (
        "--only",
        "nothing",
        "--target",
        "sm_80",
        "--no-peers",
        "--dim",
        "64",
    ): "a part of a kernel's name (add_parts, decode, ",
    ("--signature", "*bf16"): "give path.py:kernel",
}
ASK = """
import json, sys
from softkv.cli import app
from softkv.profiling import peers
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction
from typer.testing import CliRunner
said = [CliRunner().invoke(app, ["profile", "static", *arguments]) for arguments in json.loads(sys.argv[1])]
print(json.dumps([[one.exit_code, " ".join(one.stderr.split())] for one in said]))
"""


def test_what_is_wrong_is_said_in_a_line() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ASK, json.dumps(list(WRONG))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    for (code, said), message in zip(json.loads(done.stdout), WRONG.values(), strict=True):
        assert code == 2
        assert message in said


def test_the_interpreter_is_refused() -> None:
    said = CliRunner().invoke(app, ["profile", "static"], env={"TRITON_INTERPRET": "1"})
    assert said.exit_code == 2
    assert "TRITON_INTERPRET" in said.stderr


def test_absent_peers_are_named_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "available", lambda peer: None)
    assert "fla-core is not installed: pip install fla-core" in peers.missing()
    assert list(peers.subjects(["sm_90"], [64], "bf16")) == []


def doubled(x, n, SIZE):  # the body of a kernel that is only recorded
    pass


def test_launches_are_recorded_as_their_launcher_asks_for_them() -> None:
    config = triton.Config({"SIZE": 64}, num_warps=8, num_stages=4)
    small = triton.Config({"SIZE": 32}, num_warps=8)
    plain = JITFunction(doubled)
    tuned = Autotuner(plain, plain.arg_names, [small, config], ["n"], None, None)
    x = torch.empty(64, device="meta")
    with peers.recording() as launches:
        plain[(1,)](x, 3, SIZE=16, num_warps=2)
        tuned[(1,)](x, n=3)
    assert [(one.arguments, one.warps, one.stages) for one in launches] == [
        ({"x": x, "n": 3, "SIZE": 16}, 2, 3),
        ({"x": x, "n": 3, "SIZE": 64}, 8, 4),
    ]


def test_rates_follow_from_quoted_figures() -> None:
    for machine in MACHINES.values():
        quoted = machine.teraflops * 1e3 / machine.units / machine.gigahertz
        assert machine.tensor == pytest.approx(quoted, rel=0.01), machine.device


@pytest.mark.parametrize(
    ("op", "pipe"),
    [
        ("MUFU.EX2", "mufu"),
        ("F2F.BF16.F32", "mufu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("FFMA2", "fma"),
        ("IMAD.WIDE", "fma"),
        ("LDGSTS.E.BYPASS.128", "shared"),
        ("LDG.E.128", "other"),
        ("UIADD3", "other"),
        ("UTCHMMA.128x128x16", "tensor"),
        ("v_pk_mul_f32", "fma"),
        ("v_exp_f32_e32", "mufu"),
        ("v_perm_b32", "alu"),
        ("ds_read_b128", "shared"),
        ("s_waitcnt", "other"),
    ],
)
def test_pipes(op: str, pipe: str) -> None:
    assert pipe_of(op) == pipe
