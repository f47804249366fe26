"""The models: transformers' mappings of model types to classes, one per task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .methods import METHODS, Subject
from .verdicts import outcome, sentence


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        title: of its table in docs/models.md.
        mapping: of transformers; None: classes that are listed.
        peft: the task's name in PEFT, or None where it has none.
    """

    title: str
    mapping: str | None
    peft: str | None


TASKS = {
    "causal": Task("Causal language models", "CAUSAL_LM", "CAUSAL_LM"),
    "masked": Task("Masked language models", "MASKED_LM", None),
    "rows": Task("Sequence classification", "SEQUENCE_CLASSIFICATION", "SEQ_CLS"),
    "tokens": Task("Token classification", "TOKEN_CLASSIFICATION", "TOKEN_CLS"),
    "spans": Task("Question answering", "QUESTION_ANSWERING", "QUESTION_ANS"),
    "pairs": Task("Encoder-decoders", "SEQ_TO_SEQ_CAUSAL_LM", None),
    "media": Task("Images and audio in rows", None, None),
}


def entries(task: str) -> dict[str, str]:
    """Model types of the mapping, and the class of each."""
    from transformers.models.auto import modeling_auto

    from .media import CLASSES

    if TASKS[task].mapping is None:
        return {name.removesuffix("ForConditionalGeneration"): name for name in CLASSES}
    names = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task].mapping}_MAPPING_NAMES").items()
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names}


def check(task: str, class_name: str, methods: Any = METHODS, *, peers: bool = True) -> dict[str, Any]:
    """The outcome of every check of every method on one model, and of PEFT's; or why it was not built."""
    import torch

    from . import peft
    from .causal import Causal, text_in_context
    from .configs import tiny_model
    from .heads import Heads
    from .media import Multimodal
    from .pairs import Pairs

    decodes = task in ("causal", "media")
    others = {"causal": Causal(), "media": Multimodal(class_name), "pairs": Pairs()}
    subject: Subject = others.get(task) or Heads(of_rows=task == "rows")
    try:
        bare, model = (tiny_model(class_name, decodes=decodes) for _ in range(2))
        if task == "pairs" and not bare.config.is_encoder_decoder:
            subject = Causal()  # of text alone
        with torch.no_grad():
            before = subject.bare(bare, torch.arange(5, 10)[None])
    except Exception as error:
        return {"not built": sentence(error)}
    if not before.isfinite().all():
        return {"not built": "its logits with random weights are not finite"}
    checks = {name: subject.check_method(bare, model, method) for name, method in methods.items()}
    record: dict[str, Any] = {"checks": checks}
    if task == "causal":
        checks["text"] = {"text in context": outcome(lambda: text_in_context(class_name))}
    if peers and TASKS[task].peft is not None:
        record["PEFT"] = peft.check(subject, bare, lambda: tiny_model(class_name, decodes=decodes), task)
    return record
