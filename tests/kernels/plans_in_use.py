"""Checks of launch plans that need Triton's JIT, so a process without TRITON_INTERPRET.

`python -m tests.kernels.plans_in_use` runs each check, a function that raises where it fails, and prints as JSON what
they said.
"""

import gc
import json
import sys
import traceback
import weakref
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from softkv.kernels import backward, forward, plans
from softkv.kernels.decode import decode_kernel, merge_kernel
from softkv.kernels.dkv import dkv_kernel
from softkv.kernels.dq import dq_kernel
from softkv.kernels.forward import forward_kernel
from softkv.kernels.geometry import Operands
from softkv.kernels.launch import Launch
from softkv.kernels.prepare import prepare_kernel
from softkv.kernels.reduce import add_parts_kernel
from softkv.kernels.tiles import MEASURED, Target, tile
from tests.kernels.stand_in import OPTIONS, Device, StartedLaunch, standing_in, tiny

NEEDS = (True,) * 5 + (False,)
HERE = Target("interpreter", 4)


def both_ways(x):
    out, lse = forward(*x, **OPTIONS)
    return (out, lse, *backward(out, None, out, lse, *x, needs=NEEDS, **OPTIONS)[:5])


def address_of(x: Any) -> int:
    """The JIT hands tensors on, a plan their addresses."""
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def through_the_jit() -> mock._patch:
    return mock.patch.object(Launch, "through_the_jit", autospec=True, side_effect=Launch.through_the_jit)


def later_calls_go_past_the_jit(device: Device, started: list[StartedLaunch]) -> None:
    with through_the_jit() as slow:
        both_ways(tiny())
        first = slow.call_count
        both_ways(tiny())
        assert slow.call_count == first == 5
    names = [one.kernel.source.name.removesuffix("_kernel") for one in started]
    assert names[:5] == names[5:] == ["forward", "prepare", "dq", "dkv", "add_parts"]
    for before, after in zip(started[:5], started[5:], strict=True):
        assert before.kernel is after.kernel
        assert before.grid == after.grid
        assert before.arguments[1:] == after.arguments[1:]  # all but the addresses


def addresses_are_those_of_each_call(device: Device, started: list[StartedLaunch]) -> None:
    for _ in range(3):
        x = tiny()
        out, lse, *gradients = both_ways(x)
        given = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), x, strict=True)) | {"out": out, "lse": lse}
        given |= dict(zip(("dq", "dk", "dv", "dprefix_k", "dprefix_v"), gradients, strict=True)) | {"grad_out": out}
        seen = set()
        for one in started[-5:]:
            for name, address in zip(Operands._fields, one.arguments[0], strict=True):
                if name in given and address is not None:
                    seen.add(name)
                    assert address_of(address) == given[name].data_ptr(), (one.kernel.source.name, name)
        assert seen == set(given)


def a_plan_keeps_no_tensor(device: Device, started: list[StartedLaunch]) -> None:
    for _ in range(2):
        x = tiny()
        made = [weakref.ref(tensor) for tensor in (*x, *both_ways(x))]
        started.clear()
        del x
        gc.collect()
        assert not any(ref() is not None for ref in made)


def what_a_graph_captures_is_its_own(device: Device, started: list[StartedLaunch]) -> None:
    """A call that is captured allocates all it writes to, and starts on the stream that is current then."""
    both_ways(tiny())
    plain, made = torch.Tensor.new_empty_strided, []
    captured = mock.patch.object(
        torch.Tensor, "new_empty_strided", lambda *a, **k: made.append(plain(*a, **k)) or made[-1]
    )
    started.clear()
    device.stream = 77
    x = tiny()
    with captured:
        both_ways(x)
    known = {tensor.data_ptr() for tensor in (*x, *made)}
    for one in started:
        assert one.stream == 77
        assert {address_of(x) for x in one.arguments[0] if x is not None} <= known


def the_stream_is_looked_up_at_each_launch(device: Device, started: list[StartedLaunch]) -> None:
    for stream in (0, 5, 6):
        device.stream = stream
        forward(*tiny(), **OPTIONS)
        assert started[-1].stream == stream


def another_device_has_kernels_of_its_own(device: Device, started: list[StartedLaunch]) -> None:
    for index in (0, 1, 0, 1):
        device.device = index
        forward(*tiny(), **OPTIONS)
    assert started[0].kernel is started[2].kernel
    assert started[1].kernel is started[3].kernel
    assert started[0].kernel is not started[1].kernel


def tiles_that_change_make_a_new_plan(device: Device, started: list[StartedLaunch]) -> None:
    forward(*tiny(), **OPTIONS)
    key = ("forward", HERE.arch, 16, torch.float32)
    MEASURED[key] = tile("forward", HERE, 16, torch.float32)._replace(own=16, warps=2)
    forward(*tiny(), **OPTIONS)
    del MEASURED[key]
    forward(*tiny(), **OPTIONS)
    assert [one.kernel.options["num_warps"] for one in started] == [1, 2, 1]
    assert [one.grid[0] for one in started] == [2, 4, 2]


def launch_hooks_are_called_while_there_are_any(device: Device, started: list[StartedLaunch]) -> None:
    def hook(*_):
        pass

    forward(*tiny(), **OPTIONS)
    knobs.runtime.launch_enter_hook.add(hook)
    forward(*tiny(), **OPTIONS)
    knobs.runtime.launch_enter_hook.remove(hook)
    forward(*tiny(), **OPTIONS)
    _, with_hook, without = started
    assert with_hook.hooks[0] is knobs.runtime.launch_enter_hook
    assert with_hook.about["name"] == "forward_kernel"
    assert without.hooks == (None, None)
    assert without.about is None


def a_kernels_own_hooks_are_run(device: Device, started: list[StartedLaunch]) -> None:
    seen = []
    forward(*tiny(), **OPTIONS)
    forward_kernel.add_pre_run_hook(lambda *a, **k: seen.append(k["ptr"]))
    try:
        x = tiny()
        forward(*x, **OPTIONS)
    finally:
        forward_kernel.pre_run_hooks.clear()
    assert seen[0].q is x[0]


def another_alignment_is_another_plan(device: Device, started: list[StartedLaunch]) -> None:
    x = tiny()
    odd = torch.randn(x[0].numel() + 1)[1:].view(x[0].shape)
    for q in (x[0], odd, x[0], odd):
        forward(q, *x[1:], **OPTIONS)
    assert started[0].kernel is started[2].kernel
    assert started[1].kernel is started[3].kernel
    assert started[0].kernel is not started[1].kernel
    aligned = [bool(one.kernel.source.attrs.get((0, Operands._fields.index("q")))) for one in started[:2]]
    assert aligned == [True, False]


def tf32_is_a_matter_of_the_moment(device: Device, started: list[StartedLaunch]) -> None:
    with mock.patch("softkv.kernels.problem.target_of", return_value=HERE._replace(arch="sm_90")):
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            forward(*tiny(), **OPTIONS)
    assert [one.arguments[-1] for one in started] == ["ieee", "tf32", "ieee"]


def no_more_plans_are_kept_than_so_many(device: Device, started: list[StartedLaunch]) -> None:
    with mock.patch.object(plans, "MOST_PLANS", 3), through_the_jit() as slow:
        for T in (17, 18, 19, 20, 20, 19, 17):
            forward(*tiny(T), **OPTIONS)
            assert len(plans._kept) <= 3
        assert slow.call_count == 5  # the first is forgotten


KERNELS: tuple[JITFunction, ...] = (
    forward_kernel, decode_kernel, merge_kernel, prepare_kernel, dq_kernel, dkv_kernel, add_parts_kernel
)  # fmt: skip
CHECKS = {
    check.__name__: check
    for check in (
        later_calls_go_past_the_jit, addresses_are_those_of_each_call, a_plan_keeps_no_tensor,
        what_a_graph_captures_is_its_own, the_stream_is_looked_up_at_each_launch, another_device_has_kernels_of_its_own,
        tiles_that_change_make_a_new_plan, launch_hooks_are_called_while_there_are_any, a_kernels_own_hooks_are_run,
        another_alignment_is_another_plan, tf32_is_a_matter_of_the_moment, no_more_plans_are_kept_than_so_many,
    )
}  # fmt: skip


def main() -> None:
    said = {}
    for name, check in CHECKS.items():
        plans._kept.clear()
        for kernel in KERNELS:
            kernel.device_caches.clear()
        try:
            with standing_in() as (device, started):
                check(device, started)
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
    print(json.dumps(said))


if __name__ == "__main__":
    sys.exit(main())
