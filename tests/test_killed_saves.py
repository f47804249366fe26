"""A process that is killed while it saves leaves the old adapter or the new one, whichever moment that is."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import softkv
from tests.hf.tiny import model_of

KILLS = 25
SLOTS = 10_000  # large enough that most kills come while values are written


def fill(model: softkv.SoftModel, value: float) -> None:
    with torch.no_grad():
        for parameter in model.soft.parameters():
            parameter.fill_(value)


def save_until_killed(model: softkv.SoftModel, folder: Path, format: Any, value: float) -> tuple[int, int]:
    """The id of a new process (a copy of this one, which imports nothing) that saves new values again and again, and a
    pipe in which it puts a byte before each save."""
    beginnings, begins = os.pipe()
    child = os.fork()
    if child:
        os.close(begins)
        return child, beginnings
    try:
        torch.set_num_threads(1)  # a copy has no other threads
        while True:
            value += 1
            fill(model, value)
            os.write(begins, b".")
            model.save_pretrained(folder, format=format)
    finally:
        os._exit(1)


@pytest.mark.parametrize("format", ["softkv", "peft"])
def test_a_killed_save_leaves_an_adapter(format: Literal["softkv", "peft"], tmp_path: Path) -> None:
    model = softkv.attach(model_of("Llama"), softkv.PTuningV2(length=SLOTS)).eval()
    target = softkv.attach(model_of("Llama"), softkv.PTuningV2(length=1))
    fill(model, 0)
    model.save_pretrained(tmp_path, format=format)
    generator, last = random.Random(0), 0.0
    for kill in range(KILLS):
        child, beginnings = save_until_killed(model, tmp_path, format, last)
        whole = kill % 3 // 2  # every third comes after a whole save
        for _ in range(whole + 1):
            assert os.read(beginnings, 1) == b"."
        time.sleep(generator.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.close(beginnings)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL  # not of an error of its own
        loaded = softkv.load(target.base, tmp_path)
        values = torch.cat([loaded.soft.k.flatten(), loaded.soft.v.flatten()]).unique().tolist()
        loaded.detach()
        assert len(values) == 1  # of one save
        assert values[0] >= last + whole
        last = values[0]


def test_what_killed_saves_left_is_removed(tmp_path: Path) -> None:
    names = [f".softkv.safetensors.{pid}.tmp" for pid in (1, 2)]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    an_hour_ago = time.time() - 3700
    os.utime(tmp_path / names[0], (an_hour_ago, an_hour_ago))
    softkv.attach(model_of("Llama"), softkv.PTuningV2(length=1)).save_pretrained(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {names[1], "softkv.safetensors", "softkv_config.json"}  # one may still be written
