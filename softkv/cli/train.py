"""`softkv train`."""

from __future__ import annotations

import json
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from softkv.cli.config import Config
from softkv.cli.console import err, fail, out
from softkv.cli.loading import check_base, load_base
from softkv.cli.method import method_of
from softkv.cli.options import (
    Answer,
    Data,
    Dtype,
    End,
    Fields,
    Limit,
    MethodName,
    Model,
    Prompt,
    Split,
    Verbalizers,
    check_above,
)
from softkv.cli.rate import WARM_UP, checked_rate, default_steps, propose
from softkv.cli.rows import columns_of, ending_of, examples_of
from softkv.cli.training_arguments import training_arguments
from softkv.train.data import read_filled, read_rows

EXAMPLES = """
Examples:

    softkv train -m HuggingFaceTB/SmolLM2-135M-Instruct --method p-tuning-v2 --data train.jsonl --output runs/a \\
        --template "Review: [text] Sentiment: [Y]" --answer label --length 32 --steps 200

    softkv train -m MODEL --method prompt-tuning --data train.csv --prompt question --answer reply --length 20 -o runs/b

    softkv train -m google-bert/bert-base-uncased --task seq-cls --data train.jsonl --answer label -o runs/c

    softkv train --config runs/a/train.json --resume

The options of each method: `softkv methods`. With more processes: `torchrun --nproc-per-node 2 -m softkv.cli train ...`
"""


_OF_ONE_CALL = ("config", "resume", "find_learning_rate")  # not kept for --config


class TaskName(str, Enum):
    SEQ_CLS = "seq-cls"
    TOKEN_CLS = "token-cls"
    QA = "qa"
    MLM = "mlm"


class Loss(str, Enum):
    ANSWER = "answer"
    ALL = "all"


def train(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the soft prompt and its checkpoints.")],
    method: MethodName = "p-tuning-v2",
    model: Model = None,
    config: Config = None,
    template: Annotated[
        str | None,
        typer.Option(help="Layout of a row: text, \\[column], \\[P1] for soft tokens, \\[Y] at its end."),
    ] = None,
    prompt: Prompt = None,
    answer: Answer = "answer",
    field: Fields = None,
    verbalizer: Verbalizers = None,
    split: Split = "train",
    limit: Limit = None,
    end: End = True,
    length: Annotated[int | None, typer.Option(min=1, help="Soft tokens, or slots of the prefix.")] = None,
    init_text: Annotated[str | None, typer.Option(help="Initialize from this text.")] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="NAME=VALUE: any option of the method (softkv methods).")
    ] = None,
    task: Annotated[
        TaskName | None,
        typer.Option(help="Train a task head too: row or word classes, spans (--prompt: the question), masked tokens."),
    ] = None,
    loss: Annotated[Loss, typer.Option(help="Loss on the answers, or on all tokens of a row.")] = Loss.ANSWER,
    eval_data: Annotated[str | None, typer.Option(help="Rows to evaluate the loss on.")] = None,
    eval_split: Annotated[str, typer.Option(help="Split of --eval-data.")] = "validation",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: as many as --epochs need.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data; default: one, or as many as make 200 steps.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step and process.")] = 16,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per step and process, instead of rows.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Truncate the prompts of longer rows; with --task, rows (256).")
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step (gradient accumulation).")] = 1,
    learning_rate: Annotated[
        str, typer.Option(help="Peak learning rate; auto: the method's own rates; 2x: so many times these.")
    ] = "auto",
    find_learning_rate: Annotated[
        bool, typer.Option("--find-learning-rate", help="Only try rates, in a short run, and propose one.")
    ] = False,
    warmup_steps: Annotated[int | None, typer.Option(min=0, help="Default: a tenth of the steps.")] = None,
    early_stopping: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many evaluations without a better one; keep the best.")
    ] = None,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 100,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    dtype: Dtype = "auto",
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations in backward: less memory.")
    ] = False,
    packing: Annotated[bool, typer.Option(help="Pack rows end to end, or pad them.")] = True,
    head_once: Annotated[bool, typer.Option(help="Run soft tokens before every row once per batch.")] = True,
    label_logits: Annotated[bool, typer.Option(help="Compute logits only where a label is.")] = True,
    report_to: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb...")] = None,
    arg: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: any of transformers' TrainingArguments.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in --output.")] = False,
) -> None:
    """Train a soft prompt on a frozen base."""
    options = {name: value for name, value in locals().items() if name not in _OF_ONE_CALL}
    if model is None:
        fail("which base? Give --model")
    check_above(epochs=1.0 if epochs is None else epochs)
    rate = checked_rate(learning_rate, arg)
    if early_stopping is not None and eval_data is None:
        fail("--early-stopping expects rows to evaluate on: give --eval-data")
    if not Path(output).is_dir() and Path(output).exists():
        fail(f"--output expects a folder, got the file {output}")
    # What may be wrong is looked for before seconds are spent on imports, and minutes on a base.
    online = check_base(model, dtype)
    chosen = method_of(method, set, length=length, init_text=init_text, template=template)
    reader: Any = read_rows
    if task is None:
        columns = columns_of(chosen.template, answer, field, prompt, verbalizer)
        reader = partial(read_filled, columns)
    elif template is not None or verbalizer or field:
        fail("--task has rows without a template: leave --template, --field and --verbalizer out")
    rows = reader(data, split=split, limit=limit)
    eval_rows = reader(eval_data, split=eval_split) if eval_data else []
    values = {
        "output_dir": str(output),
        "max_steps": steps if steps is not None else -1,
        "num_train_epochs": 1.0 if epochs is None else epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "warmup_steps": WARM_UP if warmup_steps is None else warmup_steps,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "eval_strategy": "steps" if eval_rows else "no",
        "eval_steps": eval_every,
        # The best of the evaluated states is kept, so each of them is saved.
        "save_steps": save_every if early_stopping is None else eval_every,
        "load_best_model_at_end": early_stopping is not None,
        "save_total_limit": 2,
        "seed": seed,
        "bf16": bf16,
        "gradient_checkpointing": gradient_checkpointing,
        "report_to": report_to or [],
        "use_cpu": cpu,
        "log_level": "error",
        "disable_tqdm": False,
    }
    arguments = training_arguments(values, arg)
    check_above(learning_rate=arguments.learning_rate)  # also where --arg says it

    import transformers

    import softkv
    from softkv.train.callbacks import ProgressBar, StopOnSignal
    from softkv.train.checkpoints import last_checkpoint
    from softkv.train.tasks import classes_of, examples

    if resume and last_checkpoint(output) is None:
        fail(f"{output} holds no whole checkpoint to resume from: leave --resume out")
    if not resume and last_checkpoint(output) is not None:
        fail(f"{output} holds checkpoints of another run: add --resume to go on with it, or choose another --output")
    transformers.set_seed(seed)
    text, collator = prompt or "text", None if packing else softkv.PaddingCollator(max_length)
    classes = classes_of(task.value, rows, answer) if task is not None else []
    base, tokenizer = load_base(model, dtype, online=online, task=task and task.value, classes=classes)
    soft_model = softkv.attach(base, chosen, tokenizer=tokenizer, head_once=head_once)
    if task is None:
        ending = ending_of(tokenizer, end)
        make = partial(examples_of, soft_model, tokenizer, ending=ending, whole_rows=loss is Loss.ALL)
    else:
        collator = transformers.DataCollatorForLanguageModeling(tokenizer) if task is TaskName.MLM else None
        make = partial(
            examples, task.value, tokenizer, text=text, answer=answer, classes=classes, max_length=max_length or 256
        )
    examples_made = make(rows)
    counted = arguments.max_steps > 0 or arguments.num_train_epochs != values["num_train_epochs"]
    if steps is None and epochs is None and max_tokens is None and not counted:
        arguments.max_steps = default_steps(len(examples_made), batch_size * accumulate * arguments.world_size)
    stop = StopOnSignal()
    callbacks: list[Any] = [stop]
    if early_stopping is not None:
        callbacks.append(transformers.EarlyStoppingCallback(early_stopping))
    trainer = softkv.Trainer(
        soft_model,
        arguments,
        collator,
        max_length=max_length if task is None and packing else None,
        max_tokens=max_tokens,
        label_logits_only=label_logits,
        learning_rate=rate,
        train_dataset=examples_made,
        eval_dataset=make(eval_rows) or None,
        callbacks=callbacks,
    )
    if find_learning_rate:
        propose(trainer, rate, output)
        return
    if not arguments.disable_tqdm:
        trainer.remove_callback(transformers.ProgressCallback)
        trainer.add_callback(ProgressBar)
    if trainer.is_world_process_zero():
        _keep(options, output)
        if classes:
            err.print("Classes: " + ", ".join(f"{number} {name}" for number, name in enumerate(classes)))
        err.print(f"{soft_model.num_trainable():,} values to learn, {len(rows):,} rows. Ctrl-C saves and stops.")
    _run(trainer, stop, output, resume=resume)


def _keep(options: dict[str, Any], output: Path) -> None:
    """Leaves the options of a run in its folder, for --config."""
    output.mkdir(parents=True, exist_ok=True)
    kept = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()}
    kept = {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}
    text = json.dumps({name: value for name, value in kept.items() if value is not None}, indent=2)
    (output / "train.json").write_text(text + "\n", encoding="utf-8")


def _run(trainer: Any, stop: Any, output: Path, *, resume: bool) -> None:
    """Trains, saves and reports the outcome."""
    from softkv.train.checkpoints import last_checkpoint
    from softkv.train.processes import leave_together

    again = f"softkv train --config {output / 'train.json'} --resume"
    try:
        result = trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        whole = last_checkpoint(output)
        saved = f"{whole} is whole. Resume with: {again}" if whole else "no checkpoint was saved yet"
        err.print(f"softkv: interrupted; {saved}", soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        stop.release()
    if stop.stopped:
        done = f"{result.global_step} of {trainer.state.max_steps} steps"
        err.print(f"softkv: stopped after {done}, and saved them. Resume with: {again}", soft_wrap=True)
        raise typer.Exit(130)
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(output)
        measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        evaluated = f", evaluation {measured[-1]:.4f}" if measured else ""
        out.print(f"{result.global_step} steps, loss {result.training_loss:.4f} on average{evaluated}")
        curve = output / "learning_curve.png"
        out.print(f"Soft prompt: {output}", soft_wrap=True)
        if curve.is_file():
            out.print(f"Learning curve: {curve}", soft_wrap=True)
    if trainer.args.world_size > 1:
        leave_together()
