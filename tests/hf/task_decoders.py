"""Causal decoders with the head of a task."""

from typing import Any

import transformers

from tests.hf.encoders import PAD, shaken
from tests.hf.tiny import NAMES, config_of


def decoder(family: str, head: str = "SequenceClassification") -> Any:
    labels = {} if head == "QuestionAnswering" else {"num_labels": 3}
    config = config_of(next(name for name in NAMES if name.split(":")[0] == family), **labels)
    config.pad_token_id = PAD
    return shaken(getattr(transformers, f"{family}For{head}"), config)
