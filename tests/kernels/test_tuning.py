"""Measured tiles: which is chosen, when it is used, what is kept; with a stand-in for the clock."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

import softkv.kernels
from softkv.kernels import tuning
from softkv.kernels.launch import target_of
from softkv.kernels.tiles import MEASURED, TABLE, Target, Tile, tile
from tests.attention_cases import Case, dense
from tests.kernels.device import DEVICE, on_device

HERE = target_of(torch.empty(0, device=DEVICE))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    MEASURED.clear()


class TileTimes:
    """Times a call by the tile in use: a short step is fast, the longest does not fit, the table's own is slow."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Tile]] = []

    def __call__(self, run: Callable[[], Any]) -> float:
        (name, *_), row = list(MEASURED.items())[-1]
        self.calls.append((name, row))
        if row.step == 128:
            raise OutOfResources(1, 0, "shared memory")
        return row.step if row.why == "measured" else 1000


def operands(T: int) -> tuple[Case, list[torch.Tensor]]:
    case = on_device(dense(B=1, H=2, G=1, T=T, S=40, P=20, A=1, D=16)).to(torch.float32)
    return case, [case.leaves[name].detach() for name in ("q", "k", "v", "prefix_k", "prefix_v")]


@pytest.mark.parametrize(("T", "first"), [(20, "forward"), (2, "decode")])
def test_the_fastest_is_used_and_kept(T: int, first: str, tmp_path: Path) -> None:
    case, tensors = operands(T)
    clock, file = TileTimes(), tmp_path / "deep" / "tiles.json"
    defaults = {name: tile(name, HERE, 16, torch.float32) for name in (first, *tuning.BACKWARD)}
    chosen = tuning.tune(*tensors, file=file, timer=clock)
    assert list(chosen) == [first, "dq", "dkv", "dkv_prefix"]
    for name, row in chosen.items():
        tried = [option for which, option in clock.calls if which == name]
        assert tried[0] == defaults[name]
        assert len(tried) == len({option[:4] for option in tried}) > 3
        assert row.step == min(option.step for option in tried[1:])
        assert tile(name, HERE, 16, torch.float32) is row
        assert tile(name, HERE, 16, torch.float16) != row
    for name, want in case.to(torch.float64).run("reference").items():
        torch.testing.assert_close(case.run("triton")[name].double(), want, rtol=1e-4, atol=1e-4)

    kept = json.loads(file.read_text())
    assert list(kept) == [tuning.device_of(tensors[0])]
    MEASURED.clear()
    again = tuning.tune(*tensors, file=file, timer=pytest.fail)
    assert again == {name: row._replace(why="measured") for name, row in chosen.items()}
    MEASURED.clear()
    assert tuning.load(file, tensors[0]) == 4
    assert {name for name, *_ in MEASURED} == set(chosen)


def test_another_device_keeps_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors = operands(20)
    tuning.tune(*tensors, file=tmp_path / "tiles.json", timer=TileTimes())
    MEASURED.clear()
    monkeypatch.setattr(tuning, "device_of", lambda x: "another")
    assert tuning.load(tmp_path / "tiles.json", tensors[0]) == 0
    assert tuning.load(tmp_path / "missing.json", tensors[0]) == 0
    assert not MEASURED


def test_every_candidate_is_a_row_for_that_head_dim() -> None:
    default = tile("forward", Target("sm_90", 132), 128, torch.bfloat16)
    options = list(tuning.candidates("forward", "sm_90", 80, torch.bfloat16, default))
    assert options[0] == default
    rows = {rows[128][:3] for (name, _), rows in TABLE.items() if name == "forward"}
    assert {option[:3] for option in options} == rows


def test_not_without_a_gpu_and_not_during_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors = operands(20)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="expected tensors on a GPU, got the interpreter"):
            tuning.tune(*tensors, file=tmp_path / "tiles.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="no CUDA graph being captured"):
        tuning.load(tmp_path / "x", tensors[0])
    with pytest.raises(RuntimeError, match="no CUDA graph being captured"):
        tuning.tune(*tensors, file=tmp_path / "x", timer=TileTimes())
    assert not MEASURED
    assert softkv.kernels.MOST_QUERIES == 16
