"""The `softkv` command on a tiny saved model: every command, config files, one-line errors, Ctrl-C and resuming."""

import csv
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from softkv import attach
from softkv.cli import app
from softkv.cli.methods import explained, learned_values, shape_of
from softkv.io import checkpoint
from softkv.methods import METHODS
from softkv.train.data import Columns, read_filled, read_rows
from tests.hf.tiny import model_of, tokenizer

ROWS = [{"text": f"w{i} w{i + 1} w{i + 2}", "label": ("w50", "w51")[i % 2]} for i in range(2, 22)]
TEMPLATES = {"p-tuning": "[P1] [text] [P2] [Y]"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer and rows in three formats."""
    directory = tmp_path_factory.mktemp("cli")
    model_of("Llama", "sdpa").save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    (directory / "rows.json").write_text(json.dumps(ROWS))
    (directory / "rows.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS))
    return directory


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gc.freeze()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", out_of_reach)
    monkeypatch.setattr("softkv.train.trainer.draw_learning_curve", lambda *arguments: None)
    yield
    gc.unfreeze()


def out_of_reach(*arguments: Any, **options: Any) -> None:
    raise ConnectionError("Name or service not known\n(and more)")


def softkv(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def train(folder: Path, output: Path, *arguments: Any, method: str = "p-tuning-v2", code: int = 0) -> str:
    common = ["-m", folder / "model", "-d", folder / "rows.jsonl", "-o", output, "--answer", "label", "--cpu"]
    common += ["--template", TEMPLATES.get(method, "[text] [Y]"), "--steps", 4, "--batch-size", 4]
    return softkv("train", "--method", method, *common, *arguments, code=code)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert "4 steps, loss" in train(folder, output, "--length", 3, "--template", r"[text]\nw9 [Y]")
    assert checkpoint.read(output)[0]["config"]["template"] == "[text]\nw9 [Y]"
    return output


@pytest.mark.parametrize("layout", ["--packing", "--no-packing"])
def test_long_rows_are_refused_or_cut(layout: str, folder: Path, tmp_path: Path) -> None:
    """The model has 96 positions, 3 of them for the prefix."""
    rows = [{"text": "w5 " * words, "label": "w7"} for words in (120, 4)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--length", 3, "-d", tmp_path / "long.jsonl", layout]
    assert "the model was made for 96" in train(folder, tmp_path / "a", *options, code=2)
    assert "4 steps, loss" in train(folder, tmp_path / "b", *options, "--max-length", 93)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt-tuning", ["--length", 3, "-s", "position=before", "--no-head-once", "--loss", "all"]),
        ("p-tuning", ["-s", "encoder_size=8", "--max-tokens", 30, "--accumulate", 2]),
        ("prefix-tuning", ["--init-text", "w3 w4", "--no-packing", "--no-label-logits"]),
        ("p-tuning-v2", ["-s", "length=3", "-s", 'encoder="lstm"', "-s", "encoder_size=8", "--loss", "all", "--bf16"]),
        ("p-tuning-v2", ["--length", 4, "-s", "reparametrize=true", "--gradient-checkpointing", "--arg", "optim=sgd"]),
    ],
)
def test_train_then_use(method: str, options: list[Any], folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path, *options, method=method)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"softkv_config.json", "softkv.safetensors", "train.json", "checkpoint-4"} <= names
    data = ["--data", folder / "rows.jsonl", "--answer", "label"]
    measured = json.loads(softkv("eval", tmp_path, *data, "--classify", "--json"))
    assert measured["rows"] == 20
    low, high = measured["accuracy"]["interval"]
    assert 0 <= low <= measured["accuracy"]["value"] <= high <= 1
    assert set(measured) == {"accuracy", "macro-F1", "rows"}
    assert "perplexity" in softkv("eval", tmp_path, *data, "--limit", 5)
    assert softkv("generate", tmp_path, "w3 w4", "--max-new-tokens", 3).count("w") >= 1
    assert method in softkv("inspect", tmp_path)


def test_learning_shows_in_eval(folder: Path, tmp_path: Path) -> None:
    """Rows of one class: a prefix soon says that class whatever comes."""
    (tmp_path / "one.jsonl").write_text("\n".join(json.dumps(row | {"label": 0}) for row in ROWS))
    classes = ["-v", "0=w50", "-v", "1=w51"]
    data = ["--data", tmp_path / "one.jsonl", "--answer", "label", *classes]
    train(folder, tmp_path, *data, "--length", 8, "--steps", 60, "--learning-rate", 0.1)
    assert "accuracy 1.000 [0.84, 1.00]" in softkv("eval", tmp_path, *data)


@pytest.mark.parametrize("name", ["options.yaml", "options.json", "options.toml"])
def test_config_files(name: str, folder: Path, tmp_path: Path) -> None:
    options = {
        "model": str(folder / "model"),
        "data": str(folder / "rows.csv"),
        "output": str(tmp_path / "out"),
        "method": "p-tuning-v2",
        "template": "[X] [Y]",
        "prompt": "text",
        "answer": "label",
        "steps": 2,
        "learning-rate": 0.1,
        "cpu": True,
        "packing": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    texts = {
        "options.json": json.dumps(options | {"set": {"length": 5, "init_std": 0.2}}),
        "options.yaml": json.dumps(options | {"set": {"length": 5, "init_std": 0.2}}),  # JSON is YAML
        "options.toml": "\n".join([*lines, "[set]", "length = 5", "init_std = 0.2"]),
    }
    if name.endswith(".toml"):
        pytest.importorskip("tomllib")
    (tmp_path / name).write_text(texts[name])
    assert "3 steps" in softkv("train", "--config", tmp_path / name, "--steps", 3)  # flags win
    config, _ = checkpoint.read(tmp_path / "out")
    assert (config["config"]["length"], config["config"]["init_std"]) == (5, 0.2)
    kept = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (kept["learning_rate"], kept["packing"], kept["steps"]) == ("0.1", False, 3)


@pytest.fixture
def foreground() -> Iterator[None]:
    """Ctrl-C raises, as in a process in the foreground; a shell starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_saves_and_says_how_to_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softkv.train.callbacks import StopOnSignal

    def press(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    train(folder, tmp_path / "whole", "--length", 3)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_begin", press)
        said = train(folder, tmp_path / "cut", "--length", 3, code=130)
    assert signal.getsignal(signal.SIGINT) is before
    command = f"softkv train --config {tmp_path / 'cut' / 'train.json'} --resume"
    assert "stopped after 3 of 4 steps" in said
    assert command in said
    assert "add --resume to go on with it" in train(folder, tmp_path / "cut", "--length", 3, code=2)
    softkv(*command.split()[1:])
    whole, cut = (checkpoint.read(tmp_path / name)[1] for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


@pytest.mark.usefixtures("foreground")
def test_a_second_ctrl_c_ends_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softkv.train.callbacks import StopOnSignal

    def press(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            while not self.stopped:  # two that come together are one
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StopOnSignal, "on_step_begin", press)
    said = train(folder, tmp_path, "--length", 3, "--save-every", 2, code=130)
    assert f"{tmp_path / 'checkpoint-2'} is whole. Resume with: softkv train" in said


@pytest.mark.usefixtures("foreground")
def test_an_ignored_ctrl_c_stays_ignored(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softkv.train.callbacks import StopOnSignal

    def press(*arguments: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StopOnSignal, "on_step_begin", press)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert "4 steps" in train(folder, tmp_path, "--length", 3)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_inspect(trained: Path, folder: Path) -> None:
    said = softkv("inspect", trained)
    for part in ("p-tuning-v2", "length=3", str(folder / "model"), "llama", "192", "k [2, 1, 2, 3, 8]"):
        assert part in said
    described = json.loads(softkv("inspect", trained, "--json"))
    assert (described["method"], described["values"]) == ("p-tuning-v2", 192)
    assert described["shapes"]["k"] == [2, 1, 2, 3, 8]


def test_generate_options(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = softkv("generate", trained, "w3 w4", "--max-new-tokens", 4)
    assert softkv("generate", trained, "-f", "text=w3 w4", "--max-new-tokens", 4) == greedy
    assert softkv("generate", trained, "w3 w4", "--arg", "num_beams=2", "--arg", "max_new_tokens=4")
    sampled = {softkv("generate", trained, "w3 w4", "--temperature", 2, "--seed", seed) for seed in (0, 0, 1)}
    assert len(sampled) == 2
    result = CliRunner().invoke(app, ["generate", str(trained), "-", "--max-new-tokens", "4"], input="w3 w4\n")
    assert " ".join(result.output.split()) == greedy


def test_methods() -> None:
    said = softkv("methods")
    for part in ("prompt-tuning: k learned", "position='after'", "template='[X] [P1]", "share_encoder=True"):
        assert part in said
    assert "learns 2·n·G·D·L values: 368,640 for smollm2-135m and n = 32" in said
    said = softkv("methods", "prefix-tuning", "--model", "llama-3.1-8b", "--length", 2)
    assert "4,096 for llama-3.1-8b and n = 2" in said
    assert "prompt-tuning" not in said


@pytest.mark.parametrize("name", METHODS)
def test_methods_counts_what_is_learned(name: str) -> None:
    base = model_of("Llama")
    method = METHODS[name](template="[X] [P1][P2][P3] [Y]") if name == "p-tuning" else METHODS[name](length=3)
    learned = attach(base, method, tokenizer=tokenizer()).num_trainable()
    assert learned_values(METHODS[name], shape_of(base.config.to_dict()), 3) == learned


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods_explains_every_option(method: type) -> None:
    assert list(explained(method)) == [one.name for one in fields(method)]
    assert all(explained(method).values())


# The base is an empty folder: what is wrong must be found before it is loaded.
NO_MODEL = ["train", "-m", "empty", "-d", "rows.jsonl", "-o", "out", "--length", "3", "--prompt", "text"]
NO_MODEL += ["--answer", "label"]


# What is wrong → (arguments, what the one line says).
MISTAKES: dict[str, tuple[list[Any], str]] = {
    "no model": (["train", "-d", "rows.jsonl", "-o", "out"], "which base? Give --model"),
    "no data": (
        ["train", "-m", "model", "-d", "none.jsonl", "-o", "out", "--length", "3"],
        "there is no file none.jsonl",
    ),
    "odd data": (["train", "-m", "model", "-d", "odd.txt", "-o", "out", "--length", "3"], "odd.txt is none of .jsonl"),
    "bad line": (
        ["train", "-m", "model", "-d", "bad.jsonl", "-o", "out", "--length", "3"],
        "line 2 of bad.jsonl is not JSON",
    ),
    "empty data": (["train", "-m", "model", "-d", "empty.csv", "-o", "out", "--length", "3"], "empty.csv has no rows"),
    "no base": (
        ["train", "-m", "./no-model", "-d", "rows.jsonl", "-o", "out", "--prompt", "text", "--answer", "label"]
        + ["--length", "3"],
        "there is no folder ./no-model",
    ),
    "no column": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "--length", "3", "--prompt", "review"],
        "there is no column 'review' for [X] (the row has text, label): say which with --field or --answer",
    ),
    "no such field": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "--length", "3", "-f", "Z=text"],
        "the template has no field Z (it has X)",
    ),
    "no such option": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "-s", "rank=8"],
        "p-tuning-v2 has no option rank: it has length, init,",
    ),
    "a wrong template": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "--length", "3", "--template", "[text]"],
        "has no answer: write [Y] at its end",
    ),
    "no value": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "-s", "length"],
        "--set expects NAME=VALUE, got 'length'",
    ),
    "a length that the template says": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "--method", "p-tuning", "--length", "3"],
        "p-tuning takes no --length: its template determines",
    ),
    "an option of another type": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "--length", "3", "-s", "init_std=much"],
        "init_std expects a number above 0, got 'much'",
    ),
    "a null answer": (
        ["train", "-m", "model", "-d", "null.jsonl", "-o", "out", "--length", "3", "--prompt", "text"]
        + ["--answer", "label"],
        "null.jsonl, row 2: the column 'label' expects a text or a number, got null",
    ),
    "a null answer in the evaluation": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "--length", "3", "--prompt", "text"]
        + ["--answer", "label", "--eval-data", "null.jsonl"],
        "null.jsonl, row 2: the column 'label' expects a text or a number, got null",
    ),
    "a base that is nowhere": (
        ["train", "-m", "nobody/none-such", "-d", "rows.jsonl", "-o", "out", "--length", "3", "--prompt", "text"]
        + ["--answer", "label"],
        "nobody/none-such is no folder here, was never fetched, and the Hugging Face Hub is out of reach",
    ),
    "an adapter that is nowhere": (["inspect", "nobody/none-such"], "nobody/none-such is no folder here"),
    "a base of a soft prompt that is nowhere": (
        ["generate", "trained", "w3", "-m", "nobody/none-such"],
        "nobody/none-such is no folder here",
    ),
    "a reporter that is not installed": (
        [*NO_MODEL, "--report-to", "clearml"],
        "--report-to clearml expects the package clearml, which is not installed: pip install clearml",
    ),
    "a reporter that is none": ([*NO_MODEL, "--report-to", "paper"], "--report-to expects one of azure_ml, "),
    "no rate": ([*NO_MODEL, "--learning-rate", "0"], '--learning-rate expects a number above 0, "auto"'),
    "a rate that is no number": ([*NO_MODEL, "--learning-rate", "nan"], "--learning-rate expects a number above 0"),
    "endless epochs": ([*NO_MODEL, "--epochs", "inf"], "--epochs expects a finite number, got inf"),
    "a training argument that is no number": (
        [*NO_MODEL, "--arg", "weight_decay=much"],
        "--arg: argument --weight_decay/--weight-decay: invalid float value: 'much'",
    ),
    "a training argument that is not finite": (
        [*NO_MODEL, "--arg", "weight-decay=nan"],
        "--arg weight_decay expects a finite number, got nan",
    ),
    "a training argument out of range": ([*NO_MODEL, "--arg", "lr_scheduler_type=up"], "lr_scheduler_type"),
    "a temperature that is no number": (
        ["generate", "trained", "w3", "--temperature", "inf"],
        "--temperature expects a finite number, got inf",
    ),
    "no top p": (["generate", "trained", "w3", "--top-p", "0"], "--top-p expects a number above 0 and at most 1"),
    "a file for the output": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "odd.txt", "--length", "3"],
        "--output expects a folder, got the file odd.txt",
    ),
    "a verbalizer too few": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "--length", "3", "--prompt", "text"]
        + ["--answer", "label", "-v", "w50=good"],
        "the answer 'w51' has no verbalizer (they are for w50)",
    ),
    "an unknown training argument": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "--length", "3", "--prompt", "text"]
        + ["--answer", "label", "--arg", "speed=1"],
        "TrainingArguments have no speed",
    ),
    "nothing to resume": (
        ["train", "-m", "model", "-d", "rows.jsonl", "-o", "out", "--length", "3", "--prompt", "text"]
        + ["--answer", "label", "--resume"],
        "out holds no whole checkpoint to resume from",
    ),
    "no config": (["train", "--config", "none.yaml"], "none.yaml"),
    "a wrong config": (["train", "--config", "wrong.yaml"], "wrong.yaml sets 'lr', which is not an option"),
    "no adapter": (["inspect", "out"], "out contains no soft prompt"),
    "no adapter to evaluate": (["eval", "out", "-d", "rows.jsonl"], "out contains no soft prompt"),
    "no adapter to generate with": (["generate", "out", "w3"], "out contains no soft prompt"),
    "an unknown device": (["generate", "trained", "w3", "--device", "cudaa"], "use on this machine, got 'cudaa'"),
    "nothing to report": (["bench", "report"], "runs/bench contains no results"),
    "a wrong dtype": (["generate", "trained", "w3", "--dtype", "int3"], "--dtype expects auto"),
    "an argument of another kind": (
        ["generate", "trained", "w3", "--arg", "generation_config=3"],
        "transformers' generate can't use --arg generation_config=3",
    ),
    "no fields": (["generate", "trained", "-f", "review=w3"], "the template has the fields text, got review"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    name: str, folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    for file in ("model", "rows.jsonl"):
        Path(file).symlink_to(folder / file)
    Path("trained").symlink_to(trained)
    Path("empty").mkdir()
    Path("odd.txt").write_text("x")
    Path("null.jsonl").write_text('{"text": "w3", "label": "w4"}\n\n{"text": "w3", "label": null}\n')
    Path("bad.jsonl").write_text('{"text": "w3"}\n{"text"\n')
    Path("empty.csv").write_text("text,label\n")
    Path("wrong.yaml").write_text("lr: 0.1")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("steps: many", "'steps' to 'many': "),
        ("steps: [1, 2]", "'steps' to [1, 2]: expected one value"),
        ("steps: true", "'steps' to True: expected no true or false"),
        ("steps: 0", "'steps' to 0: "),
        ("steps: 1.5", "'steps' to 1.5: "),
        ("template: {a: b}", "'template' to {'a': 'b'}: expected one value"),
        ("method: lora", "'method' to 'lora': expected one of prompt-tuning, "),
        ("packing: maybe", "'packing' to 'maybe': "),
        ("loss: some", "'loss' to 'some': "),
        ("7: 3", "7, which is not an option"),
        ("config: other.yaml", "'config', which is not an option"),
    ],
)
def test_config_files_with_mistakes(line: str, sentence: str, tmp_path: Path) -> None:
    """One line that names the file and the key, before anything else is looked at."""
    (tmp_path / "odd.yaml").write_text(line)
    result = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "odd.yaml")])
    assert result.exit_code == 2, (result.output, result.exception)
    assert f"{tmp_path / 'odd.yaml'} sets {sentence}" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_json_of_one_row_has_no_infinity(folder: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0]))
    said = softkv("eval", trained, "-d", tmp_path / "one.jsonl", "--answer", "label", "--json")
    assert json.loads(said, parse_constant=pytest.fail)["perplexity"]["interval"][1] is None


def test_a_damaged_base_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    data = ["--data", folder / "rows.jsonl", "--prompt", "text", "--answer", "label", "--length", 2]
    said = softkv("train", "--model", tmp_path / "base", *data, "--output", tmp_path / "out", code=2)
    assert "base are damaged: " in said
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_one_line(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "softkv.safetensors").write_bytes((trained / "softkv.safetensors").read_bytes()[:50])
    assert "is damaged" in softkv("inspect", tmp_path, code=2)


@pytest.mark.parametrize("command", [["--help"], ["inspect", "TRAINED"], ["inspect", "nobody/none-such"]])
def test_commands_that_load_no_base_are_quick(command: list[str], trained: Path) -> None:
    code = """if True:
        import sys
        from softkv.cli import app
        try:
            app(sys.argv[1:])
        finally:
            print(sorted({"torch", "transformers", "matplotlib", "pandas"} & set(sys.modules)))"""
    arguments = [str(trained) if one == "TRAINED" else one for one in command]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_every_command_has_help() -> None:
    for name in ("train", "eval", "generate", "inspect", "methods"):
        said = softkv(name, "--help")
        assert name == "methods" or f"softkv {name}" in said


class TestData:
    def test_formats_agree(self, folder: Path) -> None:
        assert read_rows(str(folder / "rows.jsonl")) == ROWS
        assert read_rows(str(folder / "rows.json")) == ROWS
        assert read_rows(str(folder / "rows.csv"), limit=3) == ROWS[:3]

    def test_data_sets_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        asked = []

        def load(*arguments: Any, **options: Any) -> Any:
            asked.append((arguments, options))
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert read_rows("glue:sst2", split="test[:20]") == ROWS
        assert asked == [(("glue", "sst2"), {"split": "test[:20]"})]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.jsonl", "[1]\n", "line 1 of .* is not a row"),
            ("a.json", "{}", "is not a list of rows"),
            ("a.json", "{", "is not JSON"),
            ("a.csv", "a,b\n1\n", "not as many cells as its header"),
            ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3 of .* has not as many cells as its header: 3, not 2"),
            ("a.csv", "a,b\n1,2\n1\n", "line 3 of .* has not as many cells as its header: 1, not 2"),
            ("a.csv", "a,a\n1,2\n", "several columns called 'a'"),
            ("a.csv", 'a,b\n1,"2\n', "line . of .* can't be read as CSV"),
        ],
    )
    def test_broken_files(self, name: str, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(str(tmp_path / name))

    def test_a_cell_may_be_longer_than_the_csv_modules_limit(self, tmp_path: Path) -> None:
        limit = csv.field_size_limit()
        (tmp_path / "a.csv").write_text(f"text,label\n{'w' * (2 * limit)},x\n")
        assert len(read_rows(str(tmp_path / "a.csv"))[0]["text"]) == 2 * limit
        assert csv.field_size_limit() == limit

    @pytest.mark.parametrize(
        ("label", "message"),
        [
            (None, "got null"),
            (float("nan"), "got NaN"),
            ({"a": 1}, "got an object"),
            ([["w3"]], "got a list"),
            ([], "got an empty list"),
            (["w3", None], "got null"),
        ],
    )
    def test_what_is_no_text_is_named_by_file_and_row(self, label: Any, message: str, tmp_path: Path) -> None:
        rows = [{"X": "w1", "label": "w2"}, {"X": "w1", "label": label}]
        (tmp_path / "a.json").write_text(json.dumps(rows))
        with pytest.raises(ValueError, match=rf"a\.json, row 2: the column 'label' expects .*, {message}$"):
            read_filled(Columns(("X",), "label"), str(tmp_path / "a.json"))
        with pytest.raises(ValueError, match=r"a\.json, row 1: there is no column 'Z'"):
            read_filled(Columns(("X",), "Z"), str(tmp_path / "a.json"))

    def test_columns(self) -> None:
        columns = Columns(("X",), "label", {"X": "text"}, {"0": "bad", "1": "good"})
        row = {"text": "w3", "label": 1, "other": None}
        assert columns.prompt(row) == {"X": "w3"}
        assert columns.answers(row) == ["good"]
        assert columns.answers({"label": [0, 1]}) == ["bad", "good"]  # several right answers
