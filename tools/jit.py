"""Compares what Triton's JIT would compile for every launch with what is compiled offline: `python -m tools.jit`.

A stand-in driver provides the target; the JIT binds and specialises the arguments of each launch as on a GPU, and is
stopped before it compiles. Prints each difference, then the number of launches.
"""

import sys
from typing import Any

import torch
from triton import knobs
from triton.runtime.driver import driver

from softkv.kernels.launch import Recorded
from softkv.profiling.compile import COMMON, OTHERS, TARGETS, TRAINER, label, record, specialise
from softkv.profiling.no_device import NoDevice


def asked_of_the_jit(launch: Recorded) -> dict[str, Any]:
    asked: list[dict[str, Any]] = []

    def note(*, compile: dict[str, Any], **_: Any) -> bool:
        asked.append(compile)
        return True  # stops before it compiles

    knobs.runtime.jit_cache_hook = note
    launch.kernel.device_caches.clear()
    launch.kernel.warmup(
        **launch.arguments, grid=(launch.grid,), num_warps=launch.tile.warps, num_stages=launch.tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    (request,) = asked
    attributes = {path: said for path, said in request["configs"][0].items() if said}
    return {"signature": request["signature"], "constants": request["constants"], "attributes": attributes}


def main() -> int:
    launches = differences = 0
    for target, (gpu, _) in TARGETS.items():
        driver.set_active(NoDevice(gpu))
        for case in (*COMMON, *TRAINER, *OTHERS):
            for launch in record(case, target, 64, torch.bfloat16):
                source = specialise(launch.kernel, launch.arguments, target)
                ours = {"signature": source.signature, "constants": source.constants, "attributes": source.attrs}
                theirs = asked_of_the_jit(launch)
                launches += 1
                for name in ours:
                    if ours[name] != theirs[name]:
                        differences += 1
                        print(f"{label(launch)}, {case.name}, {target}: {name} {ours[name]}, the JIT's {theirs[name]}")
    print(f"{launches} launches")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
