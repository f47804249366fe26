"""Training of encoder-decoders, evaluated by generation."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from softkv.hf.layout import IGNORED
from softkv.train.trainer import Trainer


class Seq2SeqTrainer(Trainer, transformers.Seq2SeqTrainer):
    """`softkv.Trainer` with `predict_with_generate` and the other generation arguments of
    `transformers.Seq2SeqTrainingArguments`.

    Example:
        >>> sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
        >>> config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
        >>> t5 = transformers.T5ForConditionalGeneration(config)
        >>> model = softkv.attach(t5, softkv.PromptTuning(length=4, position="before"))
        >>> rows = [{"input_ids": [5, 6, 1], "labels": [7, 1]}]
        >>> options = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        >>> arguments = transformers.Seq2SeqTrainingArguments("run", predict_with_generate=True, **options)
        >>> trainer = softkv.Seq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        1
    """

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Seq2SeqTrainer.prediction_step`."""
        result = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        generated = getattr(self.args, "predict_with_generate", False) and not prediction_loss_only
        if generated and result[0] is not None:  # the batch's mean loss, which compute_loss did not compute
            count = (inputs["labels"] != IGNORED).sum()
            self._evaluated += torch.stack([result[0] * count, count]).to(self._evaluated)
        return result
