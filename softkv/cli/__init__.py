"""The `softkv` command. A new command is a function under `@app.command()`; `friendly` gives it one-line errors."""

from __future__ import annotations

import json
import math
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from softkv.cli import bake as baking_command
from softkv.cli import bench
from softkv.cli.console import err, fail, friendly, out
from softkv.cli.loading import load_adapter, load_base, read_adapter
from softkv.cli.profile import app as profile
from softkv.cli.profile import plan
from softkv.train.data import Columns, Row, read_rows

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from softkv.io.model import SoftModel

app = typer.Typer(
    help="Train, measure and use soft prompts on frozen language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(profile, name="profile")
app.add_typer(bench.app, name="bench")
app.command(epilog="Example:\n\n    softkv plan --model llama-3.1-405b --length 128 --batch 64 --devices 16")(plan)


class MethodName(str, Enum):
    PROMPT_TUNING = "prompt-tuning"
    P_TUNING = "p-tuning"
    PREFIX_TUNING = "prefix-tuning"
    P_TUNING_V2 = "p-tuning-v2"


class Loss(str, Enum):
    ANSWER = "answer"
    ALL = "all"


def _configured(context: typer.Context, path: Path | None) -> Path | None:
    """Takes a config file's values as the defaults of the command's options."""
    if path is None:
        return None
    names = {
        option.removeprefix("--").replace("-", "_"): parameter.name
        for parameter in context.command.params
        for option in (*parameter.opts, parameter.name or "")
    }
    names["set"] = "settings"
    try:
        values = _parse_config(path)
    except (OSError, ValueError, ImportError) as error:
        fail(error)
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(key.replace("-", "_"))
        if name is None:
            fail(f"{path} sets {key!r}, which is no option of this command: see softkv {context.info_name} --help")
        if isinstance(value, dict):
            value = [f"{key}={one if isinstance(one, str) else json.dumps(one)}" for key, one in value.items()]
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _parse_config(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        import tomllib

        values = tomllib.loads(text)
    elif path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    elif path.suffix == ".json":
        values = json.loads(text)
    else:
        raise ValueError(f"{path} is neither .yaml, .toml nor .json")
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no options: expected name: value")
    return values


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        callback=_configured,
        is_eager=True,
        help="YAML, TOML or JSON file of these options, by their long names; flags win.",
    ),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Base: a folder or an id on the Hugging Face Hub.")]
Adapter = Annotated[str, typer.Argument(help="Folder of a trained soft prompt, or an id on the Hugging Face Hub.")]
Split = Annotated[str, typer.Option(help="Split of a `datasets` data set: train, test\\[:100]...")]
Answer = Annotated[str, typer.Option(help="Column of the answer (a list in it: several right answers).")]
Fields = Annotated[
    list[str] | None, typer.Option("--field", "-f", help="FIELD=COLUMN, where a column isn't called as its field.")
]
Prompt = Annotated[str | None, typer.Option(help="Column of the prompt: short for --field X=COLUMN.")]
Verbalizers = Annotated[
    list[str] | None, typer.Option("--verbalizer", "-v", help="VALUE=TEXT: the text that stands for a class.")
]
End = Annotated[bool, typer.Option(help="Answers end with the model's end token, so that generation stops.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read at most this many rows.")]
Dtype = Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda...; by default the first accelerator there is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

TRAIN_EXAMPLES = """
Examples:

    softkv train -m HuggingFaceTB/SmolLM2-135M-Instruct --method p-tuning-v2 --data train.jsonl --output runs/a \\
        --template "Review: [text] Sentiment: [Y]" --answer label --set length=32 --steps 200

    softkv train -m MODEL --method prompt-tuning --data train.csv --prompt question --answer reply --length 20 -o runs/b

    softkv train --config runs/a/train.json --resume

The options of each method: `softkv methods`. With more processes: `torchrun --nproc-per-node 2 -m softkv.cli train ...`
"""


@app.command(epilog=TRAIN_EXAMPLES)
@friendly
def train(
    data: Annotated[str, typer.Option("--data", "-d", help=".jsonl, .json, .csv or .tsv file, or a data set's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the soft prompt and its checkpoints.")],
    method: Annotated[MethodName, typer.Option(help="What is learned.")] = MethodName.P_TUNING_V2,
    model: Model = None,
    config: Config = None,
    template: Annotated[
        str | None,
        typer.Option(help="How a row is written: text, \\[column], \\[P1] for soft tokens, \\[Y] at its end."),
    ] = None,
    prompt: Prompt = None,
    answer: Answer = "answer",
    field: Fields = None,
    verbalizer: Verbalizers = None,
    split: Split = "train",
    limit: Limit = None,
    end: End = True,
    length: Annotated[int | None, typer.Option(min=1, help="Soft tokens, or slots of the prefix.")] = None,
    init_text: Annotated[str | None, typer.Option(help="Start from this text.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="NAME=VALUE: any option of the method (softkv methods).")
    ] = None,
    loss: Annotated[Loss, typer.Option(help="On the answers, or on all tokens of a row.")] = Loss.ANSWER,
    eval_data: Annotated[str | None, typer.Option(help="Rows to evaluate the loss on.")] = None,
    eval_split: Annotated[str, typer.Option(help="Split of --eval-data.")] = "validation",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; by default as many as --epochs take.")] = None,
    epochs: Annotated[float, typer.Option(help="Times to go through the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step and process.")] = 16,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens a step and process, in place of rows.")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 5e-3,
    warmup_steps: Annotated[int, typer.Option(min=0)] = 0,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 100,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    seed: int = 0,
    dtype: Dtype = "auto",
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave accelerators alone.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory.")] = False,
    packing: Annotated[bool, typer.Option(help="Rows end to end, or padded.")] = True,
    head_once: Annotated[bool, typer.Option(help="Soft tokens before every row: run once a batch.")] = True,
    label_logits: Annotated[bool, typer.Option(help="Logits only where a label is.")] = True,
    report_to: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb...")] = None,
    arg: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: any of transformers' TrainingArguments.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
) -> None:
    """Train a soft prompt; the base stays as it is."""
    options = {name: value for name, value in locals().items() if name not in ("config", "resume")}
    if model is None:
        fail("which base? Give --model")
    chosen = _method_of(method.value, settings, length=length, init_text=init_text, template=template)
    columns = _columns(chosen.template, answer, field, prompt, verbalizer)
    rows = read_rows(data, split=split, limit=limit)
    eval_rows = read_rows(eval_data, split=eval_split) if eval_data else []
    for row in rows + eval_rows:  # before minutes are spent
        columns.prompt(row), columns.answers(row)
    given = _pairs(arg, "--arg")

    import torch
    import transformers

    import softkv
    from softkv.train.processes import leave_together
    from softkv.train.trainer import ProgressBar, StopOnSignal, last_checkpoint

    if resume and last_checkpoint(output) is None:
        fail(f"{output} holds no whole checkpoint to resume from: leave --resume out")
    if not resume and last_checkpoint(output) is not None:
        fail(f"{output} holds checkpoints of another run: add --resume to go on with it, or choose another --output")
    transformers.set_seed(seed)
    base, tokenizer = load_base(model, dtype)
    soft_model = softkv.attach(base, chosen, tokenizer=tokenizer, head_once=head_once)
    ending = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    values: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": steps if steps is not None else -1,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "eval_strategy": "steps" if eval_rows else "no",
        "eval_steps": eval_every,
        "save_steps": save_every,
        "save_total_limit": 2,
        "seed": seed,
        "bf16": bf16,
        "gradient_checkpointing": gradient_checkpointing,
        "report_to": report_to or [],
        "dataloader_pin_memory": torch.accelerator.is_available() and not cpu,
        "use_cpu": cpu,
        "log_level": "error",
        "disable_tqdm": False,
    }
    unknown = given.keys() - set(transformers.TrainingArguments.__dataclass_fields__)
    if unknown:
        fail(f"transformers' TrainingArguments have no {', '.join(sorted(unknown))}")
    stop = StopOnSignal()
    trainer = softkv.Trainer(
        soft_model,
        transformers.TrainingArguments(**(values | given)),
        None if packing else softkv.PaddingCollator(),
        max_tokens=max_tokens,
        label_logits_only=label_logits,
        train_dataset=_examples(soft_model, tokenizer, columns, rows, ending, loss),
        eval_dataset=_examples(soft_model, tokenizer, columns, eval_rows, ending, loss) or None,
        callbacks=[stop],
    )
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(transformers.ProgressCallback)
        trainer.add_callback(ProgressBar)
    first = trainer.is_world_process_zero()
    if first:
        output.mkdir(parents=True, exist_ok=True)
        kept = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()}
        kept = {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}
        text = json.dumps({name: value for name, value in kept.items() if value is not None}, indent=2)
        (output / "train.json").write_text(text + "\n", encoding="utf-8")
        err.print(f"{soft_model.num_trainable():,} values to learn, {len(rows):,} rows. Ctrl-C saves and stops.")
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
    if first:
        soft_model.save_pretrained(output)
        measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        evaluated = f", evaluation {measured[-1]:.4f}" if measured else ""
        out.print(f"{result.global_step} steps, loss {result.training_loss:.4f} on average{evaluated}")
        out.print(f"Soft prompt: {output}\nLearning curve: {output / 'learning_curve.png'}", soft_wrap=True)
    if trainer.args.world_size > 1:
        leave_together()


EVAL_EXAMPLES = """
Examples:

    softkv eval runs/a --data test.jsonl --answer label --classify

    softkv eval runs/b --data test.csv --prompt question --answer reply
"""


@app.command("eval", epilog=EVAL_EXAMPLES)
@friendly
def evaluate(
    adapter: Adapter,
    data: Annotated[str, typer.Option("--data", "-d", help=".jsonl, .json, .csv or .tsv file, or a data set's name.")],
    model: Model = None,
    prompt: Prompt = None,
    answer: Answer = "answer",
    field: Fields = None,
    verbalizer: Verbalizers = None,
    classify: Annotated[
        bool, typer.Option("--classify", help="Accuracy and F1 among the answers that occur in the data.")
    ] = False,
    split: Split = "test",
    limit: Limit = None,
    end: End = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a forward pass.")] = 32,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a soft prompt: perplexity of the answers, or accuracy and macro-F1 with verbalizers or --classify.

    Intervals are 95% confidence intervals.
    """
    columns = _columns(read_adapter(adapter)[0]["config"]["template"], answer, field, prompt, verbalizer)
    rows = read_rows(data, split=split, limit=limit)
    prompts, answers = [columns.prompt(row) for row in rows], [columns.answers(row) for row in rows]
    soft_model, tokenizer = load_adapter(adapter, model, dtype, device)

    from softkv.train.classification import accuracy, macro_f1, perplexity
    from softkv.train.classification import classify as scores_of

    results: dict[str, Any]
    if classify or verbalizer:
        if any(len(right) != 1 for right in answers):
            fail("classification expects one right answer a row")
        texts = list(columns.verbalizers.values()) or sorted({right[0] for right in answers})
        classes = [texts.index(right[0]) for right in answers]
        scores = scores_of(soft_model, tokenizer, prompts, texts, batch_size=batch_size)
        results = {"accuracy": accuracy(scores, classes), "macro-F1": macro_f1(scores, classes)}
    else:
        ending = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
        examples = _examples(soft_model, tokenizer, columns, rows, ending, Loss.ANSWER)
        results = {"perplexity": perplexity(soft_model, examples, batch_size=batch_size)}
    if as_json:
        measured = {
            name: {"value": each.value, "interval": [x if math.isfinite(x) else None for x in each.interval]}
            for name, each in results.items()
        }  # JSON knows no infinity
        print(json.dumps(measured | {"rows": len(rows)}))
    else:
        for name, each in results.items():
            out.print(f"{name} {escape(str(each))}")
        out.print(f"{len(rows)} rows; 95% confidence intervals")


GENERATE_EXAMPLES = """
Examples:

    softkv generate runs/b "How do I read a CSV file?"

    softkv generate runs/a --field text="A joy from start to end." --max-new-tokens 2
"""


@app.command(epilog=GENERATE_EXAMPLES)
@friendly
def generate(
    adapter: Adapter,
    text: Annotated[
        str | None, typer.Argument(help="The template's only field; - reads it from standard input.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", "-f", help="FIELD=TEXT, for templates of several.")
    ] = None,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: int = 0,
    arg: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: any option of transformers' generate.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Answer a prompt; the answer streams as it is made."""
    fields = _prompt_fields(read_adapter(adapter)[0]["config"]["template"], text, _pairs(field, "--field", parse=False))
    given = _pairs(arg, "--arg")
    soft_model, tokenizer = load_adapter(adapter, model, dtype, device)

    import torch
    import transformers

    ids = torch.tensor([soft_model.method.encode(tokenizer, **fields)["input_ids"]], device=soft_model.device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        transformers.set_seed(seed)
        options |= {"temperature": temperature, "top_p": top_p}
    options |= given
    streams = options.get("num_beams", 1) == 1
    if streams:
        options["streamer"] = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        output = soft_model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    except (TypeError, AttributeError) as error:
        if not given:
            raise
        raise ValueError(f"transformers' generate can't use --arg {' --arg '.join(arg or [])}: {error}") from error
    if not streams:
        print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@app.command(epilog="Example:\n\n    softkv inspect runs/a")
@friendly
def inspect(adapter: Adapter, as_json: AsJson = False) -> None:
    """Show what a soft prompt is: method, settings, shapes, number of values, base. The base isn't loaded."""
    config, tensors = read_adapter(adapter)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    values = sum(tensor.numel() for tensor in tensors.values())
    if as_json:
        print(json.dumps(config | {"shapes": shapes, "values": values}))
        return
    settings = {name: value for name, value in config["config"].items() if value is not None}
    base = config["base"]
    table = Table(show_header=False, box=None)
    table.add_row("method", config["method"])
    table.add_row("settings", escape(", ".join(f"{name}={value!r}" for name, value in settings.items())))
    known = [base.get("model_type"), f"{base['layers']} layers" if "layers" in base else None]
    table.add_row("base", escape(f"{base['name'] or '?'} ({', '.join(filter(None, known)) or 'of any kind'})"))
    table.add_row("values", f"{values:,}")
    for name, shape in shapes.items():
        table.add_row("", f"{name} {escape(str(shape))}")
    kept = "for inference" if config["folded"] else "to train on: networks are kept"
    table.add_row("format", f"{config['format']}, {kept}")
    out.print(table)


app.command(epilog=baking_command.EXAMPLES)(friendly(baking_command.bake))


@app.command()
@friendly
def methods() -> None:
    """List the methods and their options, for --set."""
    from dataclasses import MISSING, fields

    from softkv.methods import METHODS

    for name, method in METHODS.items():
        out.print(f"[bold]{name}[/]: {escape((method.__doc__ or '').splitlines()[0])}")
        for one in fields(method):  # type: ignore[arg-type]
            default = "needed" if one.default is MISSING else repr(one.default)
            out.print(f"    {one.name}={escape(default)}", soft_wrap=True)


def _pairs(given: list[str] | None, option: str, *, parse: bool = True) -> dict[str, Any]:
    """NAME=VALUE options; values that are JSON are what they say."""
    pairs: dict[str, Any] = {}
    for one in given or []:
        name, sign, value = one.partition("=")
        if not sign or not name:
            fail(f"{option} expects NAME=VALUE, got {one!r}")
        pairs[name.strip().replace("-", "_") if parse else name] = value
        if parse:
            try:
                pairs[name.strip().replace("-", "_")] = json.loads(value)
            except ValueError:
                if value in ("True", "False", "None"):
                    pairs[name.strip().replace("-", "_")] = {"True": True, "False": False, "None": None}[value]
    return pairs


def _method_of(name: str, settings: list[str] | None, **common: Any) -> Any:
    """The method with its options, from --set and from flags of their own."""
    from dataclasses import fields

    from softkv.methods import METHODS

    options = _pairs(settings, "--set")
    options |= {key: value for key, value in common.items() if value is not None}
    for key in {"template", "init_text"} & options.keys():
        options[key] = str(options[key]).replace("\\n", "\n")  # a shell has no easy way to write a new line
    if "init_text" in options:
        options.setdefault("init", "text")
    known = [one.name for one in fields(METHODS[name])]  # type: ignore[arg-type]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        fail(f"{name} has no option {', '.join(unknown)}: it has {', '.join(known)}")
    if "template" in known and "template" not in options and name == "p-tuning":
        fail("p-tuning expects a template that says where its soft tokens go: --template '[P1][P2] [X] [P3] [Y]'")
    return METHODS[name](**options)


def _columns(
    template: str, answer: str, field: list[str] | None, prompt: str | None, verbalizer: list[str] | None
) -> Columns:
    from softkv.methods import Template

    sources = _pairs(field, "--field", parse=False)
    if prompt is not None:
        sources["X"] = prompt
    return Columns(Template.parse(template).fields, answer, sources, _pairs(verbalizer, "--verbalizer", parse=False))


def _prompt_fields(template: str, text: str | None, fields: dict[str, str]) -> dict[str, str]:
    from softkv.methods import Template

    names = Template.parse(template).fields
    if text is not None:
        left = [name for name in names if name not in fields]
        if len(left) != 1:
            fail(f"the template has the fields {', '.join(names) or 'none'}: give each with --field NAME=TEXT")
        fields[left[0]] = sys.stdin.read().strip() if text == "-" else text
    if set(fields) != set(names):
        fail(f"the template has the fields {', '.join(names) or 'none'}, got {', '.join(fields) or 'none'}")
    return fields


def _examples(
    soft_model: SoftModel, tokenizer: Any, columns: Columns, rows: list[Row], ending: list[int], loss: Loss
) -> list[dict[str, Any]]:
    """An example for each right answer of each row."""
    from softkv.train.batches import whole_row_labels

    examples = []
    for row in rows:
        fields = columns.prompt(row)
        for answer in columns.answers(row):
            example: dict[str, Any] = soft_model.method.encode(tokenizer, answer=answer, **fields)
            example = {name: ids + ending for name, ids in example.items()}
            if loss is Loss.ALL:
                example = whole_row_labels(example)
                if soft_model.soft.encodes_rows:  # would read what it is to predict
                    del example["prompt_lengths"]
            examples.append(example)
    return examples
