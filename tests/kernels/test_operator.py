"""The kernels behind the `torch.library` operators, by the public op."""

import pytest
import torch

from tests.attention_cases import CASES, Case
from tests.kernels.device import DEVICE, on_device


def operator_calls(case: Case) -> dict[str, tuple[tuple, dict]]:
    """What forward and backward of a case hand to the two operators."""
    seen = {}

    class Capture(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.namespace == "softkv":
                seen[function.overloadpacket.__name__] = (arguments, keywords or {})
            return function(*arguments, **(keywords or {}))

    with Capture():
        out, lse = case.call(backend="triton")
        (out.float().sum() + lse.sum()).backward()
    return seen


@pytest.mark.parametrize("name", ["shared prefix", "packed, bank", "one query"])
def test_opcheck(name: str) -> None:
    """Schema, fake tensors, the registered autograd, and both under aot_autograd with symbolic shapes."""
    calls = operator_calls(on_device(CASES[name]()).to(torch.float32))
    arguments, keywords = calls["attention"]
    leaves = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert len(leaves) == 5
    differentiable = tuple(x.detach().requires_grad_() if i in leaves else x for i, x in enumerate(arguments))
    torch.library.opcheck(torch.ops.softkv.attention.default, differentiable, keywords)
    arguments, keywords = calls["attention_backward"]
    arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)  # differentiable once only
    torch.library.opcheck(torch.ops.softkv.attention_backward.default, arguments, keywords)


@pytest.mark.parametrize("name", ["shared prefix", "one query", "packed"])
def test_compiles_whole(name: str) -> None:
    case = on_device(CASES[name]()).to(torch.float32)
    compiled = torch.compile(lambda: case.call(backend="triton"), fullgraph=True, backend="aot_eager")
    leaves = list(case.leaves.values())
    for got, want in zip(compiled(), case.call(backend="triton"), strict=True):
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (got, want))
        for grad, expected in zip(*grads, strict=True):
            torch.testing.assert_close(grad, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", ["shared prefix", "one query, bank", "packed, bank"])
def test_cuda_graph(name: str) -> None:
    case = on_device(CASES[name]()).to(torch.float16)
    directions = case.directions("triton")
    want = case.run("triton", directions=directions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.run("triton", directions=directions)
    for x in got.values():
        x.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(got[n], want[n]) for n in want)
