"""The probe at attach time: running a few tokens through the decoder shows its attention blocks and its properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softkv.evaluation import in_evaluation
from softkv.hf import call_scope
from softkv.hf.behaviour import TOKENS, Behaviour, behaviour_of, nearly_embedded, same
from softkv.hf.context import BlockInputs, BlockOrder, SoftContext
from softkv.hf.frozen import UnsupportedAttention, decoder_of
from softkv.hf.model_call import ModelCall
from softkv.hf.own_attention import OwnAttention
from softkv.hf.past import InPast
from softkv.hf.placement import device_of
from softkv.hf.positions import Positions, learned_positions, takes_position_ids
from softkv.hf.relative_attention import InScores
from softkv.hf.tensor_parallel import TensorParallel, check_even
from softkv.hf.vocabulary import named_ids

# Errors of models that don't work with softkv's attention; softkv's own refusals are ValueErrors.
_MODEL_ERRORS = (AttributeError, AssertionError, LookupError, NotImplementedError, RuntimeError, TypeError)


class DecoderProbe:
    """A base's decoder and its measured properties.

    Attributes:
        base: the frozen model.
        order: its attention blocks; set by `probe`.
        behaviour: its properties; set by `probe`.
        own: of a base that keeps its own attention, else None.
        positions: the positions of its tokens.
        parallel: the processes over which the base is split; set by `probe`.
        word: if the base wraps a text model, the id of a word, used as placeholder for soft tokens; else None.
    """

    def __init__(self, base: Any, backend: str | None) -> None:
        self.base, self.backend = base, backend
        self.decoder = cast(nn.Module, decoder_of(base))
        self.order = BlockOrder()
        self.behaviour = Behaviour(packs=False, carries=False)
        self.own: OwnAttention | None = None
        self.parallel: TensorParallel | None = None
        self.positions = Positions.of_decoder(base, self.decoder)
        self._first_of_wrapper = 0
        self.word = None if base.config.get_text_config() is base.config else self._words()[0]

    @property
    def layers(self) -> int:
        """The number of attention blocks that can have a prefix."""
        return len(self.order) if self.own is None else len(self.own.widths)

    @property
    def carries(self) -> bool:
        """Whether the K/V of what is in front of a row represent it completely."""
        in_past = self.own is not None and self.own.causal and isinstance(self.own.carrier, InPast)
        return in_past or self.behaviour.carries

    @property
    def takes_restarts(self) -> bool:
        """Whether position ids that restart suffice to run packed rows."""
        return self.behaviour.packs and not self.positions.first

    def run(self, call: ModelCall, function: Callable[..., Any], **kwargs: Any) -> Any:
        """Run the base, or a part of it, as this call."""
        return call_scope.run(call, function, **kwargs)

    def capture(self, decoder: nn.Module | None = None, **inputs: Tensor) -> list[BlockInputs]:
        """The inputs of the attention blocks in a forward pass of the bare decoder, or of a view of it."""
        context = SoftContext(backend=self.backend, capture=[])
        tokens = next(iter(inputs.values()))
        self.positions.check(self.first + tokens.shape[1] - 1)
        if self._first_of_wrapper and "position_ids" not in inputs:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + self._first_of_wrapper
            inputs = inputs | {"position_ids": positions}
        self.run(ModelCall(self, context), decoder or self.decoder, **inputs, use_cache=False)
        assert context.capture is not None
        return context.capture

    @property
    def first(self) -> int:
        """The position id of a row's first token."""
        return self.positions.first + self._first_of_wrapper

    def _position_in_wrapper(self) -> int:
        """The position id that a wrapper gives a row's first token (1 in PaliGemma)."""
        if self.word is None or device_of(self.base).type == "meta":
            return 0
        read: list[Any] = []
        view = in_evaluation(self.base)
        handle = decoder_of(view).register_forward_pre_hook(
            lambda _, args, kwargs: read.append(kwargs.get("position_ids")), with_kwargs=True
        )
        try:
            with torch.no_grad():
                call_scope.run(None, view, input_ids=self._few_tokens())
        except (*_MODEL_ERRORS, ValueError):  # wrappers that need images
            return 0
        finally:
            handle.remove()
        return int(read[0].flatten()[0]) if read and isinstance(read[0], Tensor) else 0

    def probe(self) -> list[BlockInputs]:
        """Run a few tokens through the decoder, and return the inputs of its attention blocks.

        Raises:
            UnsupportedAttention: if softkv can't replace its attention.
        """
        name, device, view = type(self.base).__name__, device_of(self.base), in_evaluation(self.decoder)
        self._first_of_wrapper = self._position_in_wrapper()
        ids = self._few_tokens()
        context = SoftContext(backend=self.backend, capture=[])
        assert context.capture is not None
        try:
            # On "meta", transformers can't read position ids to detect packed rows; with a mask it does not try.
            masks = {"attention_mask": torch.ones_like(ids)} if device.type == "meta" else {}
            row = self._hidden(view, context, input_ids=ids, **masks)
        except TypeError as error:
            if "softkv_prefix" not in str(error):
                raise self._not_run(error) from error
            context.capture.clear()
        except (*_MODEL_ERRORS, ValueError) as error:
            if _raised_in("softkv.hf.", error):
                raise UnsupportedAttention(str(error).partition(": use attn_implementation")[0]) from error
            if _raised_in("softkv.", error):
                raise
            raise self._not_run(error) from error
        blocks = context.capture
        if not blocks:
            raise UnsupportedAttention(
                f"{name} does not pass keywords through to transformers' attention interface, so softkv can't reach "
                "its attention"
            )
        self._check_positions_are_taken(name)
        self.positions.first = self._first_position()
        of_view = {id(module): name for name, module in view.named_modules()}
        in_view = BlockOrder([each.block for each in blocks])
        blocks = [each._replace(block=self.decoder.get_submodule(of_view[id(each.block)])) for each in blocks]
        causal = all(each.causal for each in blocks)
        if causal and device.type != "meta":

            def run(context: SoftContext, at: Tensor, positions: Tensor) -> Tensor:
                return self._hidden(
                    view, replace(context, backend=self.backend), input_ids=ids[:, at], position_ids=positions
                )

            self.order = in_view
            try:
                self.behaviour = behaviour_of(run, row, blocks)
                if self.positions.columns is not None:
                    self.behaviour = replace(self.behaviour, packs=False)
                if not self.behaviour.packs:
                    self.behaviour = replace(self.behaviour, pads=self._pads(view, ids, row))
            except _MODEL_ERRORS as error:
                raise self._not_run(error) from error
        else:
            layers = self.base.config.get_text_config().num_hidden_layers
            alone = len(blocks) == layers  # no layers with other state, as far as shapes show
            self.behaviour = Behaviour(packs=alone, carries=alone and causal)
        if row.device.type != "meta":
            self.behaviour = replace(self.behaviour, embeds=self._embeds(view, ids, row))
        self.order = BlockOrder([each.block for each in blocks])
        self.parallel = TensorParallel.of(self.base, blocks)
        return blocks

    def keep_own_attention(self, reason: UnsupportedAttention) -> OwnAttention:
        """Probe a decoder that keeps its own attention.

        Raises:
            UnsupportedAttention: if its rows can't contain soft tokens either.
        """
        self._first_of_wrapper = self._position_in_wrapper()
        own = OwnAttention.of(self.decoder, self.base, self._few_tokens(), str(reason))
        if own is None:
            raise UnsupportedAttention(
                "softkv.attach expects attention that it can replace, or a model that takes inputs_embeds, caches in "
                f"past_key_values and ignores left padding, got {type(self.base).__name__} ({reason})"
            )
        self.own = own
        self.behaviour = Behaviour(packs=False, carries=False, embeds=own.embeds)
        if own.takes_positions:
            self.positions.first = self._first_position()
        for carrier in (InPast.of(self.decoder, own.causal), InScores.of(self.decoder)):
            if carrier is None:
                continue
            carrier.register(self)
            blocks = self._capture_with_carrier(replace(own, carrier=carrier))
            if blocks:
                self.own = own = replace(own, carrier=carrier, widths=tuple(block.widths for block in blocks))
                break
            carrier.remove(self)
            self.own = own
        return own

    def _capture_with_carrier(self, own: OwnAttention) -> list[BlockInputs]:
        """The inputs of the attention blocks of a base that keeps its own attention. Empty if the carrier does not
        work: if the second half of a row differs after the K/V of the first half."""
        self.own, view, ids = own, in_evaluation(self.decoder), self._few_tokens()
        context, half = SoftContext(backend=self.backend, capture=[]), TOKENS // 2
        assert context.capture is not None
        try:
            row = self._hidden(view, context, input_ids=ids)
            blocks = context.capture
            if not blocks or row.device.type == "meta":
                return blocks
            bare = call_scope.run(None, view, input_ids=ids)
            if not same(row[0], (bare if isinstance(bare, Tensor) else bare[0])[0]):
                return []
            if isinstance(own.carrier, InScores):  # slots without position terms can't be equivalent to tokens
                return blocks
            layers = {at: (block.key[:, :, :half], block.value[:, :, :half]) for at, block in enumerate(blocks)}
            pad = (1, 0) if own.causal else (0, 1)
            mask, behind = F.pad(torch.ones_like(ids[:, half:]), pad), F.pad(ids[:, half:], pad, value=int(ids[0, 0]))
            prefixed = SoftContext(layers, slots=half, backend=self.backend)
            got = self._hidden(view, prefixed, input_ids=behind, attention_mask=mask)
        except (*_MODEL_ERRORS, ValueError):
            return []
        return blocks if same(got[0][mask[0].bool()], row[0, half:]) else []

    def _words(self) -> list[int]:
        """Up to `TOKENS` ids without special meaning: padding has its own position in RoBERTa, and wrappers find images
        by ids."""
        table = self.base.get_input_embeddings()
        named = {*named_ids(self.base.config), getattr(table, "padding_idx", None)}  # MPNet's differs from its config's
        size = getattr(table, "num_embeddings", len(table.weight))
        return list(islice((token for token in range(1, size) if token not in named), TOKENS)) or [0]

    def _few_tokens(self) -> Tensor:
        """Ids `[1, TOKENS]` without special meaning."""
        return torch.tensor([self._words() * TOKENS], device=device_of(self.base))[:, :TOKENS]

    def _pads(self, decoder: nn.Module, ids: Tensor, row: Tensor) -> bool:
        """Whether left padding does not change a row: some models' states treat padding as tokens."""
        half = TOKENS // 2
        mask, positions = F.pad(torch.ones_like(ids), (half, 0)), torch.arange(TOKENS, device=ids.device)
        padded = {"input_ids": F.pad(ids, (half, 0), value=int(ids[0, 0])), "attention_mask": mask}
        padded["position_ids"] = F.pad(positions, (half, 0))[None]
        got = self._hidden(decoder, SoftContext(backend=self.backend), **padded)
        return same(got[0, half:], row[0])

    def check_pads(self) -> None:
        """Raise if left padding changes rows of this model."""
        if not self.behaviour.pads:
            raise ValueError(
                f"{type(self.base).__name__} treats left padding as tokens, in state outside its attention: expected "
                "rows of one length, or right padding and use_cache=False"
            )

    def _embeds(self, decoder: nn.Module, ids: Tensor, row: Tensor) -> bool:
        """Whether embeddings instead of ids give the same hidden states."""
        embeds = nearly_embedded(self.base, ids, row.dtype)
        if embeds is None:
            return False
        try:
            got = self._hidden(decoder, SoftContext(backend=self.backend, capture=[]), inputs_embeds=embeds)
        except (*_MODEL_ERRORS, ValueError):
            return False
        return same(got[0], row[0])

    @torch.no_grad()
    def _hidden(self, decoder: nn.Module, context: SoftContext, **inputs: Tensor) -> Tensor:
        output = self.run(ModelCall(self, context), decoder, **inputs, use_cache=False)
        return output if isinstance(output, Tensor) else output[0]

    def _not_run(self, error: Exception) -> UnsupportedAttention:
        check_even(self.base)
        return UnsupportedAttention(
            f"softkv.attach could not run {type(self.base).__name__} on token ids with softkv's attention: "
            f"{type(error).__name__}: {error}"
        )

    def _check_positions_are_taken(self, name: str) -> None:
        """Raise if the decoder neither takes position ids, which move tokens after a prefix, nor counts columns."""
        if not takes_position_ids(self.decoder) and self.positions.counting_table is None:
            raise UnsupportedAttention(f"{name} takes no position_ids, so softkv can't move its tokens after a prefix")

    def _first_position(self) -> int:
        """The position id of a row's first token (RoBERTa's positions start after the padding index)."""
        table = learned_positions(self.decoder)
        if table is None or self.positions.counting_table is not None:
            return 0
        if device_of(self.base).type == "meta":
            return 0 if table.padding_idx is None else table.padding_idx + 1
        read: list[int] = []

        def record(_: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                read.append(int(args[0].flatten()[0]))

        token = int(self._few_tokens()[0, 0])
        ids = torch.full((1, 1), token, device=device_of(self.base))
        handle = table.register_forward_pre_hook(record)
        try:
            view = in_evaluation(self.decoder)
            with torch.no_grad():
                call_scope.run(None, view, input_ids=ids)
                call_scope.run(None, view, input_ids=ids, position_ids=torch.zeros_like(ids))
        finally:
            handle.remove()
        return read[0] - read[1] if len(read) == 2 else 0


def _raised_in(package: str, error: Exception) -> bool:
    """Whether an error was raised in a module whose name starts with `package`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(package)
