"""Methods learn with nothing said but their length; what watches a run; the attention that goes to a prefix."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import softkv
from softkv.hf.attention_mass import attention_mass
from softkv.train.factors import factor_of
from softkv.train.range_test import range_test
from softkv.train.rates import HEAD_RATE, OTHERS_RATE, own_rates
from tests.hf.encoders import encoder
from tests.hf.tiny import NAMES, TEXT, model_of, tokenizer
from tests.training_runs import METHODS, arguments, attach, losses, rows, trainer

DEFAULTS: dict[str, Any] = {
    "prompt-tuning": softkv.PromptTuning(),
    "p-tuning": softkv.PTuning(),
    "prefix-tuning": softkv.PrefixTuning(),
    "p-tuning v2": softkv.PTuningV2(),
}
UNTOLD = 5e-5  # transformers' learning rate where none is given


@pytest.fixture(autouse=True)
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softkv.train.trainer.draw_learning_curve", lambda *arguments: None)


# Learning -------------------------------------------------------------------------------------------------------------


def toy(method: Any) -> list[dict[str, Any]]:
    """One answer whatever comes: what any soft prompt can learn."""
    texts = [f"w{2 + n} w{3 + n} w{4 + n}" for n in range(24)]
    return [method.encode(tokenizer(), X=text, answer="w50") for text in texts]


def run(method: Any, folder: Path, learning_rate: float | None = None) -> list[float]:
    model = attach(method, tokenizer=tokenizer())
    made = arguments(folder, max_steps=80, learning_rate=UNTOLD, seed=0)
    one = softkv.Trainer(model, made, train_dataset=toy(model.method), learning_rate=learning_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one.train()
    return losses(one)


@pytest.mark.parametrize("method", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_a_method_learns_with_nothing_said(method: Any, tmp_path: Path) -> None:
    found = run(method, tmp_path)
    assert sum(found[-4:]) / 4 < 0.75 * found[0]


def test_what_is_learned_at_transformers_rate_is_next_to_nothing(tmp_path: Path) -> None:
    """So the test above tells the method's own rates from those."""
    found = run(DEFAULTS["p-tuning v2"], tmp_path, UNTOLD)
    assert sum(found[-4:]) / 4 > 0.9 * found[0]


# Learning rates -------------------------------------------------------------------------------------------------------


def rates_of(one: Any) -> dict[int, tuple[float, float]]:
    """(rate, weight decay) of each parameter, by its id."""
    groups = one.create_optimizer().param_groups
    return {id(each): (group["lr"], group["weight_decay"]) for group in groups for each in group["params"]}


@pytest.mark.parametrize("name", METHODS)
def test_each_parameter_has_the_methods_own_rate(name: str, tmp_path: Path) -> None:
    model = attach(name)
    one = trainer(name, tmp_path, soft_model=model, learning_rate=UNTOLD, weight_decay=0.1)
    found = rates_of(one)
    own = model.soft.learning_rates()
    assert own.keys() == {parameter for parameter, _ in model.soft.named_parameters()}
    assert len(found) == len(own)
    for parameter, value in model.soft.named_parameters():
        rate, decay = found[id(value)]
        assert rate == own[parameter] > 0
        # Networks may decay; what stands for tokens may not.
        assert decay == (0.1 if "." in parameter and "bias" not in parameter and "norm" not in parameter else 0.0)


def test_rates_are_numbers_and_factors_too(tmp_path: Path) -> None:
    model = attach("p-tuning v2")
    auto = own_rates(model)

    def found(rate: Any, of_arguments: float = 1e-2) -> set[float]:
        one = trainer("p-tuning v2", tmp_path, soft_model=model, learning_rate=of_arguments)
        one = softkv.Trainer(model, one.args, train_dataset=one.train_dataset, learning_rate=rate)
        return {rate for rate, _ in rates_of(one).values()}

    assert found(None) == {1e-2}
    assert found(None, UNTOLD) == found("auto") == set(auto.values())
    assert found("2x") == {2 * rate for rate in auto.values()}
    assert found(3e-4) == found("3e-4") == {3e-4}
    for wrong in ("fast", "x", "-1x", 0.0, math.nan, "infx"):
        with pytest.raises(ValueError, match="learning_rate expects a number above 0"):
            found(wrong)
    assert factor_of("1e-1x") == 0.1


def test_what_is_trained_beside_a_prompt_has_a_rate_of_its_own() -> None:
    model = attach("p-tuning v2")
    weight = model.base.model.norm.weight.requires_grad_(True)
    assert own_rates(model)[id(weight)] == OTHERS_RATE


def test_a_drawn_head_learns_faster_than_what_is_pretrained() -> None:
    base = encoder("Bert", "SequenceClassification")
    model = softkv.attach(base, softkv.PTuningV2(length=4), modules_to_save=["classifier", "LayerNorm"])
    rates = own_rates(model)
    saved = dict(model.modules_to_save["default"].named_parameters())
    assert {name.split(".")[0] for name in saved if rates[id(saved[name])] == HEAD_RATE} == {"classifier"}
    assert {rates[id(each)] for each in saved.values()} == {HEAD_RATE, OTHERS_RATE}


def test_rates_of_soft_tokens_grow_with_the_base() -> None:
    """A table that is ten times as large is learned ten times as fast."""
    found = []
    for factor in (1, 10):
        base = model_of("Llama")
        base.get_input_embeddings().weight.data *= factor
        torch.manual_seed(0)
        found.append(softkv.attach(base, softkv.PromptTuning(length=4)).soft.learning_rates()["embeddings"])
    assert found[1] == pytest.approx(10 * found[0], rel=1e-3)


# Warnings -------------------------------------------------------------------------------------------------------------


def test_a_loss_that_does_not_fall_is_told(tmp_path: Path) -> None:
    one = trainer("p-tuning v2", tmp_path, max_steps=24, learning_rate=1e-9, per_device_train_batch_size=24)
    with pytest.warns(UserWarning, match="the loss did not fall"):
        one.train()


def test_a_loss_that_falls_is_not(tmp_path: Path) -> None:
    model = attach("p-tuning v2")
    one = trainer("p-tuning v2", tmp_path, soft_model=model, train_dataset=toy(model.method), max_steps=24)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        one.train()


@pytest.mark.parametrize(("most", "told"), [(0.8, True), (0.99, False)])
def test_a_prefix_that_takes_all_attention_is_told(
    most: float, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softkv.train.callbacks.ALL", most)
    model = softkv.attach(model_of("Llama"), softkv.PTuningV2(length=80))  # beside 12 tokens at most
    with torch.no_grad():
        model.soft.k.mul_(0)
        for layer in model.base.model.layers:  # all are seen alike
            layer.self_attn.k_proj.weight.mul_(0)
    one = trainer("p-tuning v2", tmp_path, soft_model=model, max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one.train()
    assert any("of attention goes to the prefix" in str(each.message) for each in caught) == told


# The range test -------------------------------------------------------------------------------------------------------


def test_a_range_test_proposes_a_rate_and_leaves_no_trace(tmp_path: Path) -> None:
    model = attach("p-tuning v2")
    before = {name: value.clone() for name, value in model.soft.state_dict().items()}
    one = trainer("p-tuning v2", tmp_path, soft_model=model, train_dataset=toy(model.method), learning_rate=UNTOLD)
    result = range_test(one, 30)
    assert result.fell
    assert 0.01 < result.best < 100
    assert result.factors == sorted(result.factors)
    for name, value in model.soft.state_dict().items():
        assert torch.equal(value, before[name])
    assert {rate for rate, _ in rates_of(one).values()} == set(model.soft.learning_rates().values())
    one.optimizer = None
    one.train()  # as if nothing had been
    assert one.state.global_step == 4
    assert not list(tmp_path.glob("checkpoint-*"))


# The attention that goes to a prefix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAMES[0], *(name for name in NAMES if name.startswith(("Mistral", "GPT2")))])
def test_attention_mass_is_that_of_the_text_that_a_prefix_stands_for(name: str) -> None:
    text = tokenizer()(TEXT)["input_ids"]
    example = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, -100, -100, -100, 10]}
    whole = model_of(name, "eager")
    weights = whole(torch.tensor([text + example["input_ids"]]), output_attentions=True).attentions
    want = torch.stack([each[0, :, len(text) :, : len(text)].sum(-1).mean(-1) for each in weights])
    model = softkv.attach(model_of(name), softkv.PTuningV2(init="text", init_text=TEXT), tokenizer=tokenizer())
    torch.testing.assert_close(attention_mass(model, [example]), want, rtol=1e-4, atol=1e-5)
    both = attention_mass(model, [example, {"input_ids": [5, 6], "labels": [-100, 6]}])
    assert not torch.equal(both, attention_mass(model, [example]))


@pytest.mark.parametrize("name", ["prompt-tuning before", "p-tuning v2 encoder"])
def test_attention_mass_of_soft_tokens_in_front_and_of_an_encoder(name: str) -> None:
    model = attach(name).train()
    mass = attention_mass(model, rows(METHODS[name], 3))
    assert mass.shape == (2, 4)
    assert ((mass > 0) & (mass < 1)).all()
    assert model.training


def test_attention_mass_expects_something_in_front_and_rows() -> None:
    with pytest.raises(ValueError, match="inside the rows"):
        attention_mass(attach("prompt-tuning after"), rows(METHODS["prompt-tuning after"], 1))
    with pytest.raises(ValueError, match="at least one row"):
        attention_mass(attach("p-tuning v2"), [])


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def out_of_reach(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", out_of_reach)
    model_of("Llama", "sdpa").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    data = [{"text": f"w{n} w{n + 1}", "label": "w50"} for n in range(2, 22)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, data)) + "\n")
    return tmp_path


def command(*arguments: Any, code: int = 0) -> str:
    from typer.testing import CliRunner

    from softkv.cli import app

    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "prefix-tuning", "p-tuning-v2"])
def test_train_with_nothing_said(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softkv.cli.rate.LEAST_STEPS", 60)
    common = ["-m", folder / "model", "-d", folder / "rows.jsonl", "--answer", "label", "--cpu", "--no-end"]
    said = command("train", "--method", method, *common, "--template", "[text] [Y]", "-o", folder / method)
    assert "60 steps, loss" in said
    measured = command("eval", folder / method, "-d", folder / "rows.jsonl", "--answer", "label", "--no-end")
    assert float(measured.split()[1]) < 50  # of 61 words: from above 100


def test_looking_for_a_rate_stopping_early_and_looking_at_attention(folder: Path) -> None:
    data = ["-d", folder / "rows.jsonl", "--answer", "label"]
    common = ["train", "-m", folder / "model", *data, "--cpu", "--template", "[text] [Y]"]
    found = command(*common, "-o", folder / "rates", "--find-learning-rate")
    assert "--learning-rate" in found
    assert found.split()[1].endswith("x")
    assert (folder / "rates" / "learning_rates.png").is_file()
    early = ["--eval-data", folder / "rows.jsonl", "--eval-every", 1, "--early-stopping", 2, "--learning-rate", "1e-12"]
    assert "3 steps, loss" in command(*common, "-o", folder / "a", *early, "--steps", 9)
    assert "give --eval-data" in command(*common, "-o", folder / "b", "--early-stopping", 2, code=2)
    on = ["inspect", folder / "a", "--on", folder / "rows.jsonl", "--answer", "label"]
    seen = command(*on, "--plot", folder / "a.png")
    assert "share of attention that goes to the prefix" in seen
    assert (folder / "a.png").is_file()
    mass = json.loads(command(*on, "--json"))
    assert [len(heads) for heads in mass["attention_mass"]] == [4, 4]


def test_transformers_default_is_what_the_trainer_takes_it_for() -> None:
    assert transformers.TrainingArguments("run").learning_rate == UNTOLD
