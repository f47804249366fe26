"""The adapters of a soft model: adding, deleting, activating, disabling and detaching."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from torch import nn
from typing_extensions import Self

from softkv.hf import call_scope, checks
from softkv.hf.frozen import BaseState, FrozenBase
from softkv.hf.placement import device_of
from softkv.hf.prefixes import check_known
from softkv.hf.surface import ModelInterfaceMixin
from softkv.hf.task_heads import ModuleRedirects, SavedModules, paths_of
from softkv.hf.task_rows import Answers
from softkv.methods.base import BaseShape, Method, SoftPrompt
from softkv.methods.p_tuning_v2 import matrices_of
from softkv.methods.where import where_of
from softkv.prefix import Prefix

_LONGEST_NAME = 255  # bytes: checkpoints store each adapter in a folder with its name


class AdapterMixin(ModelInterfaceMixin):
    """A frozen model and the learned parameters of its adapters.

    Attributes:
        base: the frozen model.
        adapters: the learned parameters (`SoftPrompt`) of each adapter by name; the one of `attach` is "default".
        modules_to_save: other modules trained by adapters (`SavedModules`), by adapter name.
        answers: what the base's logits predict.
        is_causal: whether tokens see only earlier ones.
    """

    adapters: nn.ModuleDict
    modules_to_save: nn.ModuleDict
    answers: Answers
    is_causal: bool
    _hooks: Any
    _redirects: ModuleRedirects
    _frozen: FrozenBase
    _default_adapter: str
    _attached: bool

    @property
    def active_adapter(self) -> str:
        """The adapter of calls without `adapter_names`: from the innermost `using` of this context, else from
        `set_adapter`."""
        return call_scope.adapter_in_scope(self) or self._default_adapter

    @property
    def soft(self) -> SoftPrompt:
        """The learned parameters of the active adapter."""
        return cast(SoftPrompt, self.adapters[self.active_adapter])

    @property
    def method(self) -> Method:
        """The config that built the active adapter, with its length resolved."""
        return self.soft.config

    @property
    def base_shape(self) -> BaseShape:
        """The sizes of the base that determine the shapes of learned parameters."""
        return self._frozen.shape

    def add_adapter(
        self,
        name: str,
        adapter: Method | Prefix,
        *,
        tokenizer: Any = None,
        modules_to_save: Sequence[str] | None = None,
    ) -> None:
        """Add a soft prompt. The active adapter stays active.

        Args:
            name: a new name, of letters, digits, spaces, "_" and "-", at most 255 bytes long.
            adapter: a method, which is built; or a prefix of one row (A = 1), which is trained further as `PTuningV2`.
            tokenizer: of the base, to initialise from a text; None: the one passed to `attach`.
            modules_to_save: names of modules of the base to train copies of; None: the head of a task class.

        Raises:
            ValueError: if the name is taken or invalid, or the adapter does not match the base. Nothing is added then.
            TypeError: if the adapter is none of these.
        """
        self._check_attached()
        checks.check_in_one_piece(self.base)
        self._check_new_name(name)
        self._check_reached(adapter)
        frozen = self._frozen if tokenizer is None else self._frozen.with_tokenizer(tokenizer)
        adapter, frozen = self._placed(adapter, frozen)
        if isinstance(adapter, Prefix):
            soft: SoftPrompt = matrices_of(adapter, frozen.shape)
        elif isinstance(adapter, Method):
            parallel = self._hooks.parallel
            with nullcontext() if parallel is None else parallel.drawing_alike():
                soft = adapter.build(frozen)
        else:
            raise TypeError(
                f"an adapter expects a method such as PTuningV2(length=16), a prefix or a folder, got {adapter!r}"
            )
        if not self.is_causal and soft.encodes_rows:
            raise ValueError(
                f"{type(self.base).__name__} is bidirectional, so no prompt in its rows precedes an answer: "
                "leave the encoder out"
            )
        if self.is_causal and soft.placement == "after" and self.answers in ("token", "span"):
            raise ValueError(
                f"{type(self.base).__name__} answers for each token, and no token sees soft tokens after its row: "
                'expected PromptTuning(position="before"), got "after"'
            )
        saved = self._modules_of(adapter, modules_to_save)
        if soft.encodes_rows:
            self._hooks.hook_blocks()
        device = device_of(self.base)
        # With a base on the meta device, learned parameters stay where they were created.
        soft = soft if device.type == "meta" else soft.to(device)
        if self._hooks.parallel is not None:
            self._hooks.parallel.share(soft)
        self.adapters[name] = soft.train(self.training)
        if saved.paths:
            self.modules_to_save[name] = (saved if device.type == "meta" else saved.to(device)).train(self.training)
            self._redirects.add(saved.paths)

    def _check_reached(self, adapter: Any) -> None:
        """Refuse methods that need softkv's attention if the base keeps its own, and soft tokens if it reads ids."""
        own, method = self._hooks.own, getattr(adapter, "method", adapter)  # of a saved adapter
        name, in_rows = type(self.base).__name__, getattr(method, "in_rows", False)
        if in_rows and not self._hooks.behaviour.embeds:
            raise ValueError(
                f"{name} reads the ids of tokens beside their embeddings (per-layer embeddings), "
                f"which soft tokens do not have: expected PrefixTuning or PTuningV2, got {type(method).__name__}"
                + ("" if own is None else f" (softkv does not reach its attention: {own.reason})")
            )
        if own is None or in_rows or not isinstance(method, Method | Prefix):
            return
        if own.carrier is None:
            raise ValueError(
                f"{name} keeps its own attention, which only soft tokens inside rows can steer: "
                f"expected PromptTuning or PTuning, got {type(method).__name__} ({own.reason})"
            )
        if getattr(method, "encoder", None) is not None:
            raise ValueError(
                f"{name} keeps its own attention, of which softkv does not see what enters it: leave the encoder out"
            )
        if isinstance(adapter, Method) and getattr(adapter, "window_covers", None) is False and own.causal:
            raise ValueError(
                f"{name} keeps its own attention, to which slots are tokens in front of the row: leave "
                "window_covers=False out"
            )

    def _modules_of(self, adapter: Any, names: Sequence[str] | None) -> SavedModules:
        tensors = getattr(adapter, "modules", None)  # of a saved adapter
        if tensors is None:
            return SavedModules(self.base, paths_of(self.base, names, self._hooks.order.modules))
        if names is not None:
            raise ValueError("a saved adapter has its own modules_to_save: leave the argument out")
        return SavedModules(self.base, adapter.modules_to_save, tensors)

    @property
    def _carries(self) -> bool:
        """Whether a prefix can replace soft tokens in front: their K/V carry all their state, and are those of a head
        that runs alone."""
        return self._hooks.behaviour.carries and not self._hooks.positions.follow_length

    def _check_new_name(self, name: Any) -> None:
        if name in self.adapters:
            raise ValueError(f"this model already has an adapter {name!r}: delete it first, or choose another name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w -]*", name) or hasattr(self.adapters, name):
            raise ValueError(
                'the name of an adapter expects letters, digits, spaces, "_" and "-", and must be no attribute of '
                f"nn.ModuleDict, got {name!r:.300}"
            )
        if len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"the name of an adapter expects at most {_LONGEST_NAME} bytes, got {len(name.encode())}")

    def set_adapter(self, name: str) -> None:
        """Set the adapter of calls without `adapter_names`, in every thread."""
        check_known(name, self.adapters)
        self._default_adapter = name

    @contextmanager
    def using(self, name: str) -> Iterator[Self]:
        """Activate an adapter within this context. Other threads and tasks keep theirs.

        Example:
            >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
            >>> model.add_adapter("terse", softkv.PromptTuning(length=2))
            >>> with model.using("terse"):
            ...     print(model.active_adapter)
            terse
            >>> model.active_adapter
            'default'
        """
        check_known(name, self.adapters)
        with call_scope.scope(call_scope.Scope(self, adapter=name)):
            yield self

    def delete_adapter(self, name: str) -> None:
        """Delete an adapter.

        Raises:
            ValueError: if it is the active one, or there is none of that name.
        """
        check_known(name, self.adapters)
        if name in (self.active_adapter, self._default_adapter):
            raise ValueError(f"adapter {name!r} is the active one: set_adapter(...) another before it is deleted")
        del self.adapters[name]
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def _placed(self, adapter: Any, frozen: FrozenBase) -> tuple[Any, FrozenBase]:
        """The adapter with its location resolved, and the base as it sees it."""
        if where_of(adapter) is not None:
            raise ValueError(
                f"where={where_of(adapter)} is for encoder-decoders, {type(self.base).__name__} has one stack: leave "
                "it out"
            )
        return adapter, frozen

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Disable soft prompts within this context. Other threads and tasks are unaffected.

        Example:
            >>> ids = torch.tensor([[1, 5, 6]])
            >>> expected = base(ids).logits
            >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
            >>> with model.disabled():
            ...     torch.allclose(model(ids).logits, expected, atol=1e-5)
            True
        """
        with call_scope.scope(call_scope.Scope(self, disabled=True)):
            yield self

    def detach(self) -> Any:
        """Detach the soft prompt and return the base. Detaching the last one restores the base exactly: requires_grad,
        attention implementation, dropout, and training mode of every module."""
        try:
            self._take_off()
        except BaseException:  # also after an interrupt, so that nothing is left half done
            self._take_off()
            raise
        return self.base

    def _take_off(self) -> None:
        if self._attached:
            self._hooks.remove()
            self._redirects.remove()
            BaseState.release(self.base, self._hooks)
            self._attached = False

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("this soft prompt was detached from its model: attach it again")
