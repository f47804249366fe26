"""What any trainer saves is what is learned: it loads with `softkv.load`, and training goes on from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import safetensors.torch
import torch
import transformers

import softkv
from softkv.io import checkpoint
from tests.hf.tiny import model_of
from tests.training_runs import METHODS, arguments, attach, rows

IDS = torch.tensor([[1, 20, 21, 22]])


def logits(soft_model: softkv.SoftModel) -> torch.Tensor:
    ids = IDS.clone()
    if isinstance(soft_model.method, softkv.PTuning):
        ids[0, 1] = -1
    with torch.no_grad():
        return soft_model.eval()(ids).logits


def plain_trainer(
    soft_model: softkv.SoftModel, directory: Path, kind: Any = transformers.Trainer, **options: Any
) -> Any:
    if kind is transformers.Seq2SeqTrainer:
        options |= {"kind": transformers.Seq2SeqTrainingArguments}
    data = rows(soft_model.method, 16)
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **options}
    return kind(
        soft_model,
        arguments(directory, **settings),
        data_collator=softkv.PaddingCollator(),
        train_dataset=data,
        eval_dataset=data[:4],
    )


def test_each_learned_parameter_has_a_storage_of_its_own() -> None:
    for method in METHODS:
        for soft_model in (attach(method), attach(method)):
            softs = [soft_model.soft, soft_model.soft.folded()]
            for soft in softs:
                values = list(soft.state_dict().values())
                storages = {each.untyped_storage().data_ptr() for each in values}
                assert len(storages) == len(values), method
                assert all(each.untyped_storage().nbytes() == each.nbytes for each in values), method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [transformers.Trainer, transformers.Seq2SeqTrainer])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_trainers_save_and_resume(kind: Any, method: str, tied: bool, tmp_path: Path) -> None:
    if (kind, tied) != (transformers.Trainer, True) and method not in ("p-tuning", "p-tuning v2"):
        pytest.skip("one kind of base and one trainer are enough for each method")

    def base() -> Any:
        return model_of("Llama", tie_word_embeddings=tied)

    def fresh() -> softkv.SoftModel:
        torch.manual_seed(1)
        return softkv.attach(base(), METHODS[method])

    whole = plain_trainer(fresh(), tmp_path, kind, save_total_limit=2, load_best_model_at_end=True)
    whole.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    saved = tmp_path / "checkpoint-4" / "model.safetensors"
    # The config in a tensor of one size, and the header.
    assert saved.stat().st_size < 4 * fresh().num_trainable() + 4096 + 4000
    ends = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    best = tmp_path / ("checkpoint-2" if ends[0] < ends[1] else "checkpoint-4")
    torch.testing.assert_close(logits(softkv.load(base(), best)), logits(whole.model))

    second = plain_trainer(fresh(), tmp_path, kind)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    reached = softkv.load(base(), saved.parent)
    for name, value in second.model.soft.folded().state_dict().items():
        torch.testing.assert_close(reached.soft.folded().state_dict()[name], value, rtol=0, atol=0)
    whole.save_model(str(tmp_path / "end"))
    torch.testing.assert_close(logits(softkv.load(base(), tmp_path / "end")), logits(whole.model))


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    plain_trainer(attach("p-tuning v2"), tmp_path).train()
    with pytest.raises(ValueError, match="expected prefix-tuning"):
        plain_trainer(attach("prefix-tuning"), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"'length': 7.*'length': 5"):
        attach(softkv.PTuningV2(length=5)).load_state_dict(attach("p-tuning v2").state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_accelerate_saves_whole_adapters(method: str, tmp_path: Path) -> None:
    soft_model = attach(method)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(soft_model.soft.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(soft_model, optimizer)
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(prepared, tmp_path / "model")
    expected = logits(soft_model)
    for folder in ("state", "model"):
        torch.testing.assert_close(logits(softkv.load(model_of("Llama"), tmp_path / folder)), expected)
    with torch.no_grad():
        for parameter in soft_model.soft.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    torch.testing.assert_close(logits(soft_model), expected)
    accelerator.save_state(tmp_path / "pickled", safe_serialization=False)
    accelerator.load_state(tmp_path / "pickled")
    with pytest.raises(FileNotFoundError, match="is a pickle, which softkv never reads"):
        softkv.load(model_of("Llama"), tmp_path / "pickled")


def test_what_a_state_dict_holds() -> None:
    soft_model = attach("p-tuning v2")
    soft_model.add_adapter("other", softkv.PromptTuning(length=3))
    state = soft_model.state_dict()
    learned = {f"adapters.{name}" for name in ("default.k", "default.v", "other.embeddings")}
    assert state.keys() == learned | {"_extra_state"}
    soft_model.base.lm_head.weight.requires_grad_(True)
    assert soft_model.state_dict().keys() == learned | {"_extra_state", "base.lm_head.weight"}
    wrapped = torch.nn.ModuleDict({"module": soft_model})
    assert wrapped.state_dict().keys() == {f"module.{name}" for name in soft_model.state_dict()}
    assert wrapped.load_state_dict(wrapped.state_dict()) == ([], [])
    del state["adapters.default.k"]
    with pytest.raises(RuntimeError, match=r'"base.lm_head.weight", "adapters.default.k"'):
        soft_model.load_state_dict(state)


def damaged(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged(lambda tensors: tensors.pop("_extra_state")), "is not a state dict of a SoftModel"),
        (damaged(lambda tensors: tensors["_extra_state"].fill_(7)), "has no softkv config"),
        (damaged(lambda tensors: tensors.pop("adapters.default.k")), "missing"),
        (damaged(lambda tensors: tensors["adapters.default.k"].fill_(torch.nan)), "NaN"),
        (damaged(lambda tensors: tensors.update({"base.lm_head.weight": torch.zeros(2)})), "also has lm_head.weight"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
    ],
)
def test_a_damaged_state_dict_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(attach("p-tuning v2").state_dict(), path)
    base = model_of("Llama")
    before = base(IDS).logits
    damage(path)
    with pytest.raises(ValueError, match=message):
        softkv.load(base, tmp_path)
    assert torch.equal(base(IDS).logits, before)


# LoRA beside the prompt -----------------------------------------------------------------------------------------------


def with_lora(seed: int = 5) -> Any:
    base = model_of("Llama")
    torch.manual_seed(seed)
    base.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    return base


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("ours", [False, True], ids=["transformers.Trainer", "softkv.Trainer"])
def test_lora_is_saved_resumed_and_loaded_with_the_prompt(ours: bool, trained: bool, tmp_path: Path) -> None:
    def fresh(seed: int = 5) -> softkv.SoftModel:
        torch.manual_seed(1)
        soft_model = softkv.attach(with_lora(seed), softkv.PTuningV2(length=3))
        for name, parameter in soft_model.base.named_parameters():
            parameter.requires_grad_(trained and "lora" in name)
        return soft_model

    kind = softkv.Trainer if ours else transformers.Trainer
    whole = plain_trainer(fresh(), tmp_path, kind)
    whole.train()
    lora = {name: value.clone() for name, value in whole.model.base.named_parameters() if "lora" in name}
    start = dict(fresh().base.named_parameters())
    assert all(torch.equal(start[name], value) != trained for name, value in lora.items())
    second = plain_trainer(fresh(seed=6), tmp_path, kind)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=0, atol=0)

    whole.model.save_pretrained(tmp_path / "adapter")
    expected = logits(whole.model)
    for folder in ("adapter", "checkpoint-4"):
        for base in (with_lora(seed=7), model_of("Llama")):  # LoRA that is there, and a base without it
            loaded = softkv.load(base, tmp_path / folder)
            torch.testing.assert_close(logits(loaded), expected)
            assert loaded.num_trainable() == loaded.soft.k.numel() * 2
            assert loaded.state_dict().keys() == whole.model.state_dict().keys()


def test_what_lora_can_not_do(tmp_path: Path) -> None:
    soft_model = softkv.attach(with_lora(), softkv.PTuningV2(length=3))
    with pytest.raises(ValueError, match="together with trained parameters of the base"):
        soft_model.save_pretrained(tmp_path, format="peft")
    soft_model.save_pretrained(tmp_path)
    text = (tmp_path / checkpoint.CONFIG).read_text()
    assert json.loads(text)["peft"]["default"]["r"] == 2
    other = attach("p-tuning v2")
    with pytest.raises(ValueError, match="LoRA or trained parameters of the base"):
        other.add_adapter("lora", tmp_path)
    soft_model.base.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes the base's own weights"):
        soft_model.save_pretrained(tmp_path)


# Vocabularies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_added_after_attach_do_not_matter(method: str, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    soft_model = softkv.attach(model_of("Llama", tie_word_embeddings=tied), METHODS[method])
    before = logits(soft_model)
    soft_model.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(logits(soft_model)[..., :61], before)
    soft_model.save_pretrained(tmp_path)
    small = model_of("Llama", tie_word_embeddings=tied)
    large = model_of("Llama", tie_word_embeddings=tied)
    large.resize_token_embeddings(80, mean_resizing=False)
    for base in (small, large):
        torch.testing.assert_close(logits(softkv.load(base, tmp_path))[..., :61], before)
