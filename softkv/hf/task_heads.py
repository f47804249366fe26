"""Task heads: newly initialised modules that a task class adds to its base, trained with the soft prompt.

Every adapter has its own copies in fp32 (`modules_to_save`, PEFT's term). The base keeps its modules: during a call of
a `SoftModel`, their `forward` runs the copies of the call's adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from softkv.hf import call_scope
from softkv.hf.hooks import DecoderHooks
from softkv.hf.prefixes import SoftRows
from softkv.hf.sharded import load_whole


def head_of(model: Any) -> tuple[str, ...]:
    """The paths of the modules that a task class adds to its base model; empty for language models, whose head is
    pretrained."""
    if model.base_model is model or model.get_output_embeddings() is not None:
        return ()
    return tuple(
        path
        for path, module in model.named_children()
        if module is not model.base_model and next(module.parameters(), None) is not None
    )


def paths_of(model: Any, names: Iterable[str] | None, blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """The paths of the modules to train and save, from full paths or their last parts; None: the head.

    Raises:
        ValueError: if there is no such module, or it can't be trained separately because it contains attention blocks
            or shares parameters with others.
    """
    if names is None:
        return head_of(model)
    if isinstance(names, str):
        raise ValueError(f"modules_to_save expects a list of names, got {names!r}")
    found: list[str] = []
    for name in names:
        paths = [path for path, _ in model.named_modules() if path and (path == name or path.endswith(f".{name}"))]
        if not paths:
            known = ", ".join(path for path, _ in model.named_children())
            raise ValueError(
                f"modules_to_save: {type(model).__name__} has no module {name!r:.300} (its top-level modules: {known})"
            )
        found += paths
    for path in found:
        module = model.get_submodule(path)
        if any(inner is block for inner in module.modules() for block in blocks):
            raise ValueError(
                f"modules_to_save: {path!r} contains attention blocks, which stay frozen: name parts of it"
            )
        mine = {id(parameter) for parameter in module.parameters()}
        for other, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in mine and not other.startswith(f"{path}."):
                raise ValueError(f"modules_to_save: {path!r} shares its parameters with {other}, which stays frozen")
    return tuple(dict.fromkeys(found))


class SavedModules(nn.ModuleDict):
    """The modules that an adapter trains with its soft prompt: trainable fp32 copies of the base's.

    Args:
        model: the base.
        paths: of the modules in the base.
        tensors: saved values by path and name; None: those of the base.

    Raises:
        ValueError: if the base has no such module, or values don't match.
    """

    def __init__(self, model: Any, paths: Iterable[str], tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.paths = tuple(paths)
        for path in self.paths:
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise ValueError(
                    f"the adapter has a head {path!r} that {type(model).__name__} doesn't have: load the base with "
                    "the task's class"
                ) from None
            self[_key(path)] = _copy(module).float().requires_grad_(True)
        # The modules of a complete head run in sequence, so that values between them may stay in fp32.
        self.wide = set(head_of(model)) if set(head_of(model)) <= set(self.paths) else set()
        if tensors is not None:
            self.put(tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The values, by path and name."""
        return {name.replace("/", "."): value for name, value in self.state_dict().items()}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise unless names and shapes of saved values match the modules."""
        mine = self.tensors()
        if odd := sorted(mine.keys() ^ tensors.keys()):
            raise ValueError(f"the adapter's heads differ from this model's: {', '.join(odd)}")
        for name, value in tensors.items():
            if value.shape != mine[name].shape:
                raise ValueError(
                    f"the adapter's {name!r} has shape {tuple(value.shape)}, this model's {tuple(mine[name].shape)}: "
                    "load the base with the num_labels that the adapter was trained with"
                )

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved values into the modules, all or none."""
        self.check(tensors)
        load_whole(self, {name: tensors[name.replace("/", ".")] for name in self.state_dict()})

    def run(self, path: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a module on the base's states, which may have another dtype."""
        module = self[_key(path)]
        own = next(module.parameters()).dtype
        given = next((x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()), own)
        if given == own:
            return module(*args, **kwargs)
        output = module(*(x.to(own) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args), **kwargs)
        return output if path in self.wide or not isinstance(output, Tensor) else output.to(given)


def modules_of(model: Any, adapter: str) -> SavedModules | None:
    """The modules that an adapter of a `PromptedModel` trains with its soft prompt."""
    return cast(SavedModules, model.modules_to_save[adapter]) if adapter in model.modules_to_save else None


class ModuleRedirects:
    """Redirects modules of the base to the copies of the running call's adapters.

    Args:
        base: the frozen model.
        saved: the modules of each adapter that has some, by name.
        hooks: of the soft model whose calls are redirected.
    """

    def __init__(self, base: Any, saved: nn.ModuleDict, hooks: DecoderHooks) -> None:
        self.base, self.saved, self.hooks = base, saved, hooks
        self._forwards: dict[str, _Forward] = {}

    def add(self, paths: Iterable[str]) -> None:
        for path in paths:
            if path not in self._forwards:
                module = self.base.get_submodule(path)
                forward = vars(module).get("forward")
                if not isinstance(forward, _Forward):
                    forward = module.forward = _Forward(module)
                forward.users.append((self, path))
                self._forwards[path] = forward

    def remove(self) -> None:
        for path, forward in self._forwards.items():
            forward.users.remove((self, path))
            if not forward.users:
                forward.restore()
        self._forwards = {}

    def run(self, soft: SoftRows, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run each row's module."""
        names = [self._saver(name, path) for name in soft.names]
        if len(set(names)) == 1:
            return self._run(names[0], path, args, kwargs)
        B = len(args[0])
        if B % len(names) or (soft.order is not None and len(soft.order) != B):
            raise ValueError(
                f"rows with heads of different adapters expect a padded batch of {len(names)} rows, got {B}"
            )
        of_rows = soft.of_rows(B, {name: self._saver(name, path) for name in soft.softs}, None)
        parts, places = [], []
        for name in dict.fromkeys(of_rows):
            at = torch.tensor([row for row, each in enumerate(of_rows) if each == name], device=args[0].device)
            given = tuple(x[at] if isinstance(x, Tensor) and len(x) == B else x for x in args)
            parts.append(self._run(name, path, given, kwargs))
            places.append(at)
        widest = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        return torch.cat([part.to(widest) for part in parts])[torch.cat(places).argsort()]

    def _saver(self, name: str | None, path: str) -> str | None:
        """The adapter whose module rows of this adapter run; None: the base's own."""
        if name is None:
            return None
        return name if name in self.saved and path in self._of(name).paths else None

    def _run(self, name: str | None, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name is None:
            return self._forwards[path].original(*args, **kwargs)
        return self._of(name).run(path, args, kwargs)

    def _of(self, name: str) -> SavedModules:
        return cast(SavedModules, self.saved[name])


class _Forward:
    """Replaces the `forward` of a module of the base while soft models have copies of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = module.forward
        self.own = "forward" in vars(module)  # set by accelerate, for example
        self.users: list[tuple[ModuleRedirects, str]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = call_scope.current()
        for redirects, path in self.users:
            if call is not None and call.soft is not None and call.hooks is redirects.hooks:
                return redirects.run(call.soft, path, args, kwargs)
        return self.original(*args, **kwargs)

    def restore(self) -> None:
        if self.own:
            self.module.forward = self.original
        else:
            del self.module.forward


def _copy(module: nn.Module) -> nn.Module:
    module = getattr(module, "original_module", module)  # of PEFT's wrapper
    redirected = {name: value for name, value in vars(module).items() if isinstance(value, _Forward)}
    for name in redirected:
        delattr(module, name)
    try:
        return copy.deepcopy(module)
    finally:
        vars(module).update(redirected)


def _key(path: str) -> str:
    return path.replace(".", "/")
