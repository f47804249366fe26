"""The kernels behind the `torch.library` operators, by the public op."""

import pytest
import torch

from tests.attention_cases import CASES
from tests.kernels.test_kernels import DEVICE, on_device


def test_opcheck() -> None:
    from softkv import attention

    assert attention  # registers the operators
    case = on_device(CASES["shared prefix"]()).to(torch.float32)
    seen = []

    class Capture(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function is torch.ops.softkv.attention.default:
                seen.append((arguments, keywords or {}))
            return function(*arguments, **(keywords or {}))

    with Capture():
        case.call(backend="triton")
    arguments, keywords = seen[0]
    torch.library.opcheck(torch.ops.softkv.attention.default, arguments, keywords)


@pytest.mark.parametrize("name", ["shared prefix", "one query", "packed"])
def test_compiles_whole(name: str) -> None:
    case = on_device(CASES[name]()).to(torch.float32)
    compiled = torch.compile(lambda: case.call(backend="triton"), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(), case.call(backend="triton"), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", ["shared prefix", "one query, bank", "packed, bank"])
def test_cuda_graph(name: str) -> None:
    case = on_device(CASES[name]()).to(torch.float16)
    want = case.run("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.run("triton")
    for x in got.values():
        x.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(got[n], want[n]) for n in want)
