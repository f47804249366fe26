"""Training: transformers' `Trainer` with packed rows and logits only where a label is.

The third optimisation, the head computed once, is in `SoftModel`.
"""

from __future__ import annotations

import inspect
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from softkv.hf.layout import with_prompt_lengths
from softkv.io.config import CONFIG, WEIGHTS
from softkv.io.soft_model import SoftModel
from softkv.methods.initial import check_positive
from softkv.ranges import named
from softkv.train import checkpoints
from softkv.train.batches import PackingCollator, Seq2SeqCollator, TaskCollator, TokenBatches
from softkv.train.callbacks import NoLearningWarning, PrefixAttentionWarning
from softkv.train.curve import draw_learning_curve
from softkv.train.factors import factor_of
from softkv.train.label_logits import label_logits, next_labels, with_decoder_inputs
from softkv.train.rates import DEFAULT_OF_TRANSFORMERS, own_rates, prompt_names, split_by_rate

_LOGGER = logging.getLogger(__name__)


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for a `SoftModel`, with these differences:

    - rows are packed, unless another `data_collator` is given (`PaddingCollator`, transformers' own: the same loss);
    - task heads (row or token classes, spans, masked tokens) use padded rows and the model's own loss;
    - encoder-decoders use padded rows (`Seq2SeqCollator`); `Seq2SeqTrainer` evaluates them by what they generate;
    - logits are computed only where they predict a label;
    - checkpoints hold what all adapters have learned, not the base; `resume_from_checkpoint=True` takes the last one
      that is whole;
    - the evaluation loss is the mean over all labels (where several processes evaluate, accelerate repeats rows until
      all have as many, and those count again);
    - the learning curve is drawn to `learning_curve.png` in the output directory at the end.

    Args:
        model: a `SoftModel`, unless `model_init` makes one.
        args: transformers' `TrainingArguments`.
        data_collator: packs by default.
        max_length: shorten rows of more tokens (`softkv.train.batches.shortened`). Rows that need more positions than
            the model has are an error.
        max_tokens: train on batches of as many rows as this number of tokens holds, instead of
            `per_device_train_batch_size` rows.
        label_logits_only: whether to skip the logits that no label looks at.
        learning_rate: "auto" for the rates that the method was measured to learn with, one for each of its parameters
            (`SoftPrompt.learning_rates`); "2x" and the like for so many times these; a number. None takes that of
            `args`, or "auto" where it is transformers' default of 5e-5, at which no soft prompt learns.
        **kwargs: as in `transformers.Trainer`. A data set's rows hold `input_ids` and `labels`, as `method.encode`
            gives them, `prompt_lengths` where a prompt doesn't end at the first label, and `adapter_names` (a row's one
            name) where rows train different adapters.

    Raises:
        TypeError: when the model is no `SoftModel`.
        ValueError: when `max_tokens` is not a positive number, or `learning_rate` no rate; when `max_length` comes with
            a collator of one's own, or `dispatch_batches=True` with packed rows.

    Example:
        >>> model = softkv.attach(base, softkv.PTuningV2(length=4))
        >>> rows = [model.method.encode(tokenizer, X="w5 w6", answer="w7")]
        >>> options = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        >>> trainer = softkv.Trainer(model, transformers.TrainingArguments("run", **options), train_dataset=rows)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        1
    """

    def __init__(
        self,
        model: SoftModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        *remaining: Any,
        max_length: int | None = None,
        max_tokens: int | None = None,
        label_logits_only: bool = True,
        learning_rate: float | str | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None and not isinstance(model, SoftModel):
            raise TypeError(f"softkv.Trainer expects a SoftModel (softkv.attach), got {type(model).__name__}")
        if max_tokens is not None:
            check_positive("max_tokens", max_tokens)
        if learning_rate is not None:
            factor_of(learning_rate)
        if args is not None and args.ddp_find_unused_parameters is None:
            # Whatever a method learns, it uses; a batch may not name every adapter.
            args.ddp_find_unused_parameters = model is not None and len(model.adapters) > 1
        self.max_tokens, self.label_logits_only = max_tokens, label_logits_only
        self._logits_wanted = False
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # sum of the losses and number of labels
        config = {} if model is None else model.config.__dict__
        uses_cache = {name: config[name] for name in ("use_cache",) if name in config}
        if max_length is not None and data_collator is not None:
            raise ValueError("max_length is of the default collator: give it to a collator of your own")
        collator = data_collator if data_collator is not None else _collator(model, max_length)
        if args is not None:
            _keep_batches_whole(args, collator)
        super().__init__(model, args, collator, *remaining, **kwargs)
        self.learning_rate = learning_rate
        if learning_rate is not None and factor_of(learning_rate) is None:
            self.args.learning_rate = float(learning_rate)
        self._rows_of_a_step = checkpoints.RowsOfAStep.of(self.args, max_tokens)
        for callback in (NoLearningWarning(), PrefixAttentionWarning(), self._rows_of_a_step):
            self.add_callback(callback)
        config.pop("use_cache", None)  # the base keeps its config
        config |= uses_cache
        self.model_accepts_loss_kwargs = self._sums_losses
        if self._answers != "next token":
            if isinstance(collator, transformers.DataCollatorWithFlattening):
                raise ValueError(
                    f"{type(self.accelerator.unwrap_model(self.model).base).__name__} expects padded rows, got "
                    f"{type(collator).__name__}: leave it out"
                )
            if self._answers == "span" and self.args.label_names is None:
                self.label_names = ["start_positions", "end_positions"]

    @property
    def _answers(self) -> str:
        """What the logits of the base answer."""
        return str(self.accelerator.unwrap_model(self.model).answers)

    @property
    def _sums_losses(self) -> bool:
        """Whether the loss is a sum over labels, divided by the number of those of a step; else a batch's mean."""
        return self._answers in ("next token", "target")

    def _set_signature_columns_if_needed(self) -> None:
        """Columns of a data set that the base takes are kept."""
        if getattr(self, "_signature_columns", None) is None:
            super()._set_signature_columns_if_needed()
            base = self.accelerator.unwrap_model(self.model).base
            taken = [name for name in inspect.signature(base.forward).parameters if name not in ("args", "kwargs")]
            self._signature_columns = list(dict.fromkeys([*(getattr(self, "_signature_columns", None) or []), *taken]))

    # Optimizer -------------------------------------------------------------------------------------------------------

    @property
    def rate_factor(self) -> float | None:
        """Of the method's own learning rates; None where one number is the rate of all."""
        if self.learning_rate is None:
            return 1.0 if self.args.learning_rate == DEFAULT_OF_TRANSFORMERS else None
        return factor_of(self.learning_rate)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As `transformers.Trainer.get_decay_parameter_names`, without soft prompts: they stand for tokens."""
        prompts = prompt_names(self.accelerator.unwrap_model(model))
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name.removeprefix("module.") not in prompts]

    def create_optimizer(self, model: Any = None) -> Any:
        """As `transformers.Trainer.create_optimizer`, with the method's own rates unless others are given."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.rate_factor is not None and not given:
            own = own_rates(self.accelerator.unwrap_model(self.model if model is None else model))
            split_by_rate(optimizer, {each: self.rate_factor * rate for each, rate in own.items()})
        return optimizer

    # Batches ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As `transformers.Trainer.get_train_dataloader`, by tokens with `max_tokens`."""
        if self.max_tokens is None or self.train_dataset is None:
            return super().get_train_dataloader()
        data: Any = self.train_dataset
        if not hasattr(data, "__len__"):
            raise ValueError("max_tokens expects a data set with a length: its rows are put into batches beforehand")
        columns = getattr(data, "column_names", None)
        ids = data["input_ids"] if columns is not None else (row["input_ids"] for row in data)
        arguments = self.args
        lengths = [min(len(row), getattr(self.data_collator, "max_length", None) or len(row)) for row in ids]
        if self._answers == "target":  # tokens that are written cost as those that are read
            written = data["labels"] if columns is not None else (row["labels"] for row in data)
            lengths = [length + len(row) for length, row in zip(lengths, written, strict=True)]
        batches = TokenBatches(
            lengths,
            self.max_tokens,
            padded=not isinstance(self.data_collator, transformers.DataCollatorWithFlattening),
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            # Counted by the state, which a resumed run finds again; at an epoch's end it is that epoch's number.
            epoch=lambda: int(self.state.epoch or 0),
            rank=arguments.process_index,
            ranks=arguments.world_size,
        )
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        return DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory and arguments.device.type == "cuda",
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self._answers != "next token":
            return super()._get_num_items_in_batch(batch_samples, device)
        labelled = [with_prompt_lengths(batch) if "labels" in batch else batch for batch in batch_samples]
        return super()._get_num_items_in_batch(labelled, device)

    # Loss ------------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean cross-entropy over the batch's labels (over `num_items_in_batch` labels where given); of a task,
        the model's own loss.

        Raises:
            ValueError: when an encoder would read tokens that are to be predicted.
        """
        if "labels" not in inputs or not self._sums_losses:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._answers == "next token":
            self._check_prompt_lengths(inputs)
        if self.compute_loss_func is not None:
            inputs = with_prompt_lengths(inputs) if self._answers == "next token" else inputs
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._answers == "target":
            targets = inputs["labels"].flatten()
            outputs = model(
                **with_decoder_inputs(self.accelerator.unwrap_model(self.model).base, inputs), use_cache=False
            )
            logits = outputs.logits.flatten(0, 1)
        elif self.label_logits_only and not (return_outputs and self._logits_wanted):
            outputs, targets = label_logits(model, inputs)
            logits = outputs.logits
        else:
            inputs = with_prompt_lengths(inputs)
            targets = next_labels(inputs.pop("labels")).flatten()
            outputs = model(**inputs, use_cache=False)
            logits = outputs.logits.flatten(0, 1)
        with named("loss"):
            total = F.cross_entropy(
                logits.float(), targets, reduction="sum", label_smoothing=self.args.label_smoothing_factor
            )
        count = (targets >= 0).sum()
        if not model.training:
            self._evaluated += torch.stack([total.detach(), count]).to(self._evaluated)
        loss = total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # processes are averaged afterwards
        return (loss, outputs) if return_outputs else loss

    def _check_prompt_lengths(self, inputs: dict[str, Any]) -> None:
        adapters = self.accelerator.unwrap_model(self.model).adapters
        if inputs.get("prompt_lengths") is None or not any(soft.encodes_rows for soft in adapters.values()):
            return
        ends = with_prompt_lengths(inputs | {"prompt_lengths": None})["prompt_lengths"]
        if bool((inputs["prompt_lengths"] > ends).any()):
            raise ValueError(
                "an encoder reads whole prompts, so it can't learn from labels inside them (it would see what it is to "
                "predict): leave prompt_lengths out, or labels before a prompt's end"
            )

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.prediction_step`; all logits are computed only where they are asked for."""
        self._logits_wanted = not prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As `transformers.Trainer.evaluation_loop`, with the loss of a label of the whole data set."""
        self._evaluated.zero_()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        evaluated = self.accelerator.reduce(self._evaluated.to(self.args.device, torch.float32), "sum")
        total, count = evaluated.tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; draws the learning curve afterwards, where matplotlib is installed.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last whole one in the output directory.
            *args, **kwargs: as in `transformers.Trainer.train`.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when the checkpoint is of another method or another base, or of another number of processes
                whose steps read other rows.
        """
        if resume_from_checkpoint is True:
            last = checkpoints.last_checkpoint(self.args.output_dir)
            if last is None:
                raise FileNotFoundError(f"{self.args.output_dir} holds no whole checkpoint to resume from")
            resume_from_checkpoint = str(last)
        if resume_from_checkpoint:
            self._rows_of_a_step.check(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.is_world_process_zero():
            try:
                draw_learning_curve(self.state.log_history, Path(self.args.output_dir) / "learning_curve.png")
            except ModuleNotFoundError:
                _LOGGER.warning("no learning curve is drawn without matplotlib: pip install 'softkv[plots]'")
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir if output_dir is not None else self.args.output_dir)
        soft_model = self.accelerator.unwrap_model(self.model)
        checkpoints.save(soft_model, directory, writes=self.args.should_save)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        soft_model = self.accelerator.unwrap_model(model if model is not None else self.model)
        checkpoints.restore(soft_model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        for name in (CONFIG, WEIGHTS):
            if self.is_world_process_zero():
                shutil.copy(Path(checkpoint_folder) / name, Path(self.args.output_dir) / name)
        super()._push_from_checkpoint(checkpoint_folder)


def _collator(model: SoftModel | None, max_length: int | None) -> Any:
    """The default one of a model's answers."""
    if model is None or model.answers == "next token":
        return PackingCollator(max_length)
    if max_length is not None:
        raise ValueError("max_length is for next tokens: cut other rows when they are tokenised (truncation=True)")
    pad = model.config.get_text_config().pad_token_id
    if model.answers == "target":
        return Seq2SeqCollator(pad or 0)
    return TaskCollator(pad or 0, token_labels=model.answers == "token")


def _keep_batches_whole(args: TrainingArguments, collator: Any) -> None:
    """Has each process read its own share of streamed data: accelerate's default, one that reads for all, cuts every
    tensor of a batch by rows, and packed rows are one."""
    config: Any = args.accelerator_config
    if config.dispatch_batches and isinstance(collator, transformers.DataCollatorWithFlattening):
        raise ValueError(
            "dispatch_batches=True cuts batches by rows, which packed rows have one of: leave it out, or give "
            "data_collator=softkv.PaddingCollator()"
        )
    if config.dispatch_batches is None:
        config.dispatch_batches = False
