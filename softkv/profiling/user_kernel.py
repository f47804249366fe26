"""The user's own kernels, for `softkv profile static path.py:kernel`."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from softkv.profiling.compile import TARGETS
from softkv.profiling.static import Candidate

NUMBER = r"(?:[iu](?:1|8|16|32|64)|bf16|fp16|fp32|fp64|fp8e4nv|fp8e5)"
TYPE = re.compile(rf"(?P<type>\*?{NUMBER})(?P<aligned>:16)?|(?P<descriptor>tensordesc<{NUMBER}\[\d+(?:, *\d+)*\]>)")


def load(place: str) -> JITFunction:
    """The `@triton.jit` function named by `path.py:kernel`. The file is executed, as on import."""
    path, _, name = place.rpartition(":")
    if not path:
        raise ValueError(f"expected path.py:kernel, got {place!r}: name the kernel in it, as in {place}:kernel")
    if not Path(path).is_file():
        raise ValueError(f"expected path.py:kernel, got {place!r}: there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file may raise anything
        hint = " (no GPU here: code that needs one must not run on import)" if isinstance(error, RuntimeError) else ""
        raise ValueError(f"{path} can't be imported: {type(error).__name__}: {error}{hint}") from error
    kernel: Any = getattr(module, name, None)
    if kernel is None:
        kernels = sorted(key for key, value in vars(module).items() if isinstance(innermost(value), JITFunction))
        raise ValueError(f"{path} has no {name!r}: its kernels are {', '.join(kernels) or 'none'}")
    kernel = innermost(kernel)
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{name} of {path} is not a @triton.jit function, but a {type(kernel).__name__}")
    return kernel


def innermost(kernel: Any) -> Any:
    """The function inside @triton.autotune and @triton.heuristics, whose choices must then be given."""
    while not isinstance(kernel, JITFunction) and hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel


def constants(text: str) -> dict[str, Any]:
    """`BLOCK_M=128,CAUSAL=True,window=None,DTYPE=tl.bfloat16`."""
    found = {}
    for one in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = (piece.strip() for piece in one.partition("="))
        if not sign or not name.isidentifier():
            raise ValueError(f"--constexprs expects NAME=VALUE,NAME=VALUE, got {one!r}")
        if value.startswith("tl."):
            found[name] = getattr(tl, value[3:])
            continue
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def source(kernel: JITFunction, signature: str, given: dict[str, Any]) -> ASTSource:
    """The source that Triton compiles: parameters that are not constants take the signature's types, in order.

    Pointers are assumed to be aligned to 16 bytes, as torch allocates them; integers are multiples of 16 if written
    `i32:16`."""
    names = [parameter.name for parameter in kernel.params]
    if unknown := given.keys() - set(names):
        raise ValueError(f"{kernel.__name__} has no parameter {', '.join(sorted(unknown))}: it has {', '.join(names)}")
    given = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default} | given
    free = [parameter for parameter in kernel.params if parameter.name not in given]
    if missing := [parameter.name for parameter in free if parameter.is_constexpr]:
        raise ValueError(f"--constexprs needs values for {', '.join(missing)}")
    types = [part.strip() for part in re.split(r",(?![^<]*>)", signature) if part.strip()]
    if len(types) != len(free):
        wanted = ", ".join(parameter.name for parameter in free)
        raise ValueError(f"--signature expects {len(free)} types, for {wanted}; got {len(types)}")
    written: dict[str, str] = dict.fromkeys(given, "constexpr")
    attributes = {}
    for parameter, text in zip(free, types, strict=True):
        parsed = TYPE.fullmatch(text)
        if parsed is None:
            raise ValueError(
                f"{text!r} is not a type: expected one like *bf16, *fp32, i32, i32:16, fp32 or tensordesc<bf16[128,64]>"
            )
        written[parameter.name] = parsed["type"] or parsed["descriptor"]
        if parsed["aligned"] or text.startswith("*"):
            attributes[(names.index(parameter.name),)] = [["tt.divisibility", 16]]
    ordered = {name: written[name] for name in names}
    return ASTSource(kernel, ordered, {(names.index(name),): value for name, value in given.items()}, attributes)


def subjects(
    place: str, signature: str, constexprs: str, targets: list[str], warps: int, stages: int, scores: int | None
) -> Iterator[Candidate]:
    kernel, given = load(place), constants(constexprs)
    for target in targets:
        made = source(kernel, signature, given)
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        yield Candidate(
            source=Path(place.rpartition(":")[0]).name,
            kernel=kernel.__name__,
            case="",
            target=target,
            head_dim=None,
            dtype="",
            tile=f"{warps}w {stages}s",
            compile=partial(triton.compile, made, target=TARGETS[target][0], options=options),
            scores=scores,
        )
