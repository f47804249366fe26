"""What a model's logits refer to, and how labels and logits follow tokens that were moved by inserted soft tokens or
shifted padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from softkv.evaluation import in_evaluation
from softkv.hf import call_scope
from softkv.hf.layout import IGNORED

# What logits predict: the next token, the token's own label, a target token of an encoder-decoder, a span of tokens, a
# label of the row, or the right one of several choices (one row each).
Answers = Literal["next token", "target", "token", "span", "row", "choice", "other"]


@torch.no_grad()
def answers_of(model: Any) -> Answers:
    """What the logits of a model predict; "other" if it has none, or they have another shape.

    Raises:
        ValueError: for heads whose answers softkv can't align with tokens: those of pretraining, which answer for
            tokens and rows at once (BERT), or with one number per token (ELECTRA).
    """
    if model.can_generate():
        return "target" if model.config.is_encoder_decoder else "next token"
    output = _probed(model, 1, 2)
    if output is None:
        choices = (_probed(model, 1, 3, 2) or {}).get("logits")
        return "choice" if choices is not None and choices.shape == (1, 3) else "other"
    if "start_logits" in output and output.start_logits.shape == (1, 2):
        return "span"
    logits = output.get("logits")
    if "prediction_logits" in output or (logits is not None and logits.shape == (1, 2) and _counts_tokens(model)):
        raise ValueError(
            f"{type(model).__name__} has a head for pretraining, whose answers softkv can't align with tokens: "
            "expected a head for masked language modelling or classification (AutoModelForMaskedLM, ...)"
        )
    if logits is None or logits.dim() not in (2, 3) or len(logits) != 1:
        return "other"
    return "row" if logits.dim() == 2 else "token" if logits.shape[1] == 2 else "other"


def _counts_tokens(model: Any) -> bool:
    """Whether a head that gave two numbers for two tokens gives three for three."""
    output = _probed(model, 1, 3)
    return output is not None and output.logits.shape == (1, 3)


def _probed(model: Any, *shape: int) -> Any:
    """The output for ids of a shape, None for a head that takes other inputs."""
    ids = torch.zeros(shape, dtype=torch.long, device=model.device)
    try:
        return call_scope.run(None, in_evaluation(model), input_ids=ids, return_dict=True)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # per token: its segment, or whether it belongs to an image


@dataclass(frozen=True)
class MovedTokens:
    """Tokens `[B, T]` that became columns of a batch `[B, T']`.

    Attributes:
        columns: `[B, T]`, the new column of each token.
        width: T'.
        answers: what the logits predict.
    """

    columns: Tensor
    width: int
    answers: Answers

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with labels and token types moved with their tokens.

        Raises:
            ValueError: if the position of labels is not known.
        """
        moved = dict(batch)
        moved |= self.types(batch)
        if self.answers == "other" and batch.get("labels") is not None:
            raise ValueError("soft tokens inside rows expect a head whose labels softkv can move with their tokens")
        if self.answers == "token" and batch.get("labels") is not None:
            moved["labels"] = self._scattered(batch["labels"], IGNORED)
        if self.answers == "span":
            for name in ("start_positions", "end_positions"):
                if batch.get(name) is not None:
                    moved[name] = self._position(batch[name])
        return moved

    def types(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The batch's token types, moved with the tokens. Soft tokens and padding have type 0."""
        return {name: self._scattered(batch[name], 0) for name in TOKEN_TYPES if batch.get(name) is not None}

    def output(self, output: Any) -> Any:
        """The output with per-token values in the original order of tokens."""
        names = {"token": ("logits",), "span": ("start_logits", "end_logits")}.get(self.answers, ())
        for name in ("last_hidden_state", *names):
            if output.get(name) is not None:
                output[name] = self._given(output[name])
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(self._given(states) for states in output["hidden_states"])
        return output

    def _given(self, states: Tensor) -> Tensor:
        return states.take_along_dim(self.columns if states.dim() == 2 else self.columns[:, :, None], 1)

    def _scattered(self, values: Tensor, filling: int) -> Tensor:
        new = values.new_full((len(self.columns), self.width), filling)
        return new.scatter(1, self.columns, values.expand(self.columns.shape))

    def _position(self, positions: Tensor) -> Tensor:
        """Move a position; one past the row, which losses ignore, stays past it."""
        T = self.columns.shape[1]
        new = self.columns.gather(1, positions.view(-1, 1).clamp(0, T - 1)).view_as(positions)
        return new.masked_fill(positions >= T, self.width)


def row_ids(ids: Tensor, source: Tensor | None, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """Ids `[B, T']` from which a head finds the last column of a row: the padding id at padding only.

    Args:
        ids: `[B, T]`; negative if the token is unknown.
        source: of the new columns in the old ones (`Insertion.source`), or None where they are the same.
        attention_mask: `[B, T']` or None.
        pad: the padding id, None if the model has none.
    """
    other = int(pad == 0)
    found = ids.masked_fill(ids < 0, other)
    if source is not None:
        flat = found.flatten()
        found = flat[source.clamp(0, len(flat) - 1)].masked_fill((source < 0) | (source >= len(flat)), other)
    if pad is None or attention_mask is None:
        return found
    return found.masked_fill(attention_mask == 0, pad)
