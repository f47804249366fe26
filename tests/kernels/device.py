"""Where the kernels run: on the GPU, or in Triton's interpreter on the CPU."""

import torch

from tests.attention_cases import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(case: Case) -> Case:
    leaves = {name: x.detach().to(DEVICE).requires_grad_() for name, x in case.leaves.items()}
    return Case(leaves, {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in case.options.items()})
