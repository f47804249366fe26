"""P-tuning: soft tokens inside a template, computed by a prompt encoder (Liu et al. 2021, "GPT understands, too",
arXiv:2103.10385)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from softkv.methods import initial
from softkv.methods.base import Computed, FrozenModel, Method, SoftPrompt, SoftTokens
from softkv.methods.template import Template

ENCODER_RATE = 3e-3  # measured to work (docs/learning.md); networks that compute keys and values need a lower rate
SOFT_TOKENS = "".join(f"[P{number}]" for number in range(1, 9))  # of the default template


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Soft tokens where the template puts them, produced by a prompt encoder.

    The encoder reads k vectors of the embeddings' width C and gives k soft embeddings, initially about as large as the
    base's own. At inference it runs once, and `folded` drops it, which leaves k·C values.

    Trainable, with E = `encoder_size`: the k·C pseudo-token embeddings (none with `prompt_text`), and

    - "lstm": a bidirectional LSTM of two layers with E/2 units per direction, then an MLP E → E → C:
      `2·(4·E/2·(C + E/2 + 2) + 4·E/2·(E + E/2 + 2)) + E·(E + 1) + C·(E + 1)`;
    - "mlp": an MLP C → E → E → C: `E·(C + 1) + E·(E + 1) + C·(E + 1)`.

    Args:
        template: fields, literal text, soft tokens `[P1]`, `[P2]`... and the answer: `"[X] is [P1] and [P2] [Y]"`; by
            default a field `[X]`, eight soft tokens and the answer.
        encoder: "lstm" (the paper's) or "mlp".
        encoder_size: E, an even number.
        prompt_text: encode the frozen embeddings of this text, adaptively average-pooled to k, instead of learned
            pseudo-token embeddings.

    Raises:
        ValueError: if the template is invalid or has no soft token, or fields are inconsistent.

    Examples:
        >>> method = softkv.PTuning(template="[P1] [X] is [P2] [Y]", encoder_size=16)
        >>> softkv.attach(base, method).soft.soft_tokens().shape  # [k, C]
        torch.Size([2, 32])
    """

    template: str = f"[X] {SOFT_TOKENS} [Y]"
    encoder: Literal["lstm", "mlp"] = "lstm"
    encoder_size: int = 256
    prompt_text: str | None = None
    in_rows: ClassVar[bool] = True
    suits: ClassVar[str] = (
        "soft tokens at given places of a template; trained through an encoder that is dropped afterwards, leaving n·C"
    )
    learns: ClassVar[str] = "n·C and the encoder's"

    @classmethod
    def of_length(cls, length: int) -> Self:
        return cls(template="".join(f"[P{i}]" for i in range(1, length + 1)) + " [X] [Y]")

    def __post_init__(self) -> None:
        if not self.length:
            raise ValueError(
                f"PTuning expects soft tokens in its template, got {self.template!r:.300}: write [P1], [P2]..."
            )
        initial.check_choice("encoder", self.encoder, ("lstm", "mlp"))
        initial.check_positive("encoder_size", self.encoder_size)
        if self.encoder_size % 2:
            raise ValueError(f"encoder_size expects an even number, half for each direction, got {self.encoder_size}")
        if self.prompt_text == "":
            raise ValueError("prompt_text expects a text, got '': leave it out to learn the encoder's input")

    @cached_property
    def length(self) -> int:
        """k, the number of soft tokens."""
        return Template.parse(self.template).soft_tokens

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        """A soft prompt of `[k, embedding_size]`: the encoder with its input or, if `folded`, its output."""
        if folded:
            return SoftTokens(self, torch.zeros(self.length, base.shape.embedding_size), "inline")
        return EncodedTokens(self, base)


class EncodedTokens(Computed):
    """Soft embeddings that a prompt encoder computes."""

    placement = "inline"

    def __init__(self, config: PTuning, base: FrozenModel) -> None:
        super().__init__(config)
        width, size = base.shape.embedding_size, config.encoder_size
        std = initial.embedding_std(base)
        if config.prompt_text is None:
            self.inputs = nn.Parameter(torch.randn(config.length, width))
        else:
            # Scaled to about 1, because values as small as those of embedding tables hardly affect an encoder.
            self.register_buffer("inputs", pooled_text(base, config.prompt_text, config.length) / std)
        last = nn.Linear(size, width)
        self.lstm: nn.LSTM | None = None
        if config.encoder == "lstm":
            self.lstm = nn.LSTM(width, size // 2, num_layers=2, bidirectional=True)
            self.mlp = nn.Sequential(nn.Linear(size, size), nn.ReLU(), last)
        else:
            self.mlp = nn.Sequential(nn.Linear(width, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), last)
        initial.scale_outputs(last, self.compute(), std)

    def compute(self) -> Tensor:
        states = self.inputs if self.lstm is None else self.lstm(self.inputs)[0]
        return self.mlp(states)  # [k, embedding_size]

    def soft_tokens(self) -> Tensor:
        return self.computed()

    def learning_rates(self) -> dict[str, float]:
        return {name: ENCODER_RATE for name, _ in self.named_parameters()}

    @torch.no_grad()
    def folded(self) -> SoftTokens:
        return SoftTokens(self.config, self.computed().clone(), "inline")


def pooled_text(base: FrozenModel, text: str, length: int) -> Tensor:
    """The frozen embeddings of a text, adaptively average-pooled to `[length, embedding_size]`."""
    ids = base.tokenize(text)
    if not ids:
        raise ValueError(f"prompt_text expects a text of at least one token, got {text!r}")
    embeddings = initial.embeddings(base, torch.tensor(ids))
    return F.adaptive_avg_pool1d(embeddings.T, length).T.contiguous()
