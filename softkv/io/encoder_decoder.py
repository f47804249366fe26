"""`SoftEncoderDecoder`: a soft prompt on a frozen encoder-decoder, with storage."""

from __future__ import annotations

from typing import Any

from softkv.hf.encoder_decoder.model import PromptedEncoderDecoder
from softkv.hf.frozen import FrozenBase
from softkv.io import peft
from softkv.io.checkpoint import Saved
from softkv.io.soft_model import SoftModel


class SoftEncoderDecoder(SoftModel, PromptedEncoderDecoder):
    """A `SoftModel` on an encoder-decoder: `forward` and `generate` are those of `PromptedEncoderDecoder`."""

    def _placed(self, adapter: Any, frozen: FrozenBase) -> tuple[Any, FrozenBase]:
        if isinstance(adapter, Saved) and adapter.is_peft and adapter.method.in_rows:
            peft.check_scale(self)
        return super()._placed(adapter, frozen)
