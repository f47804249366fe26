"""PEFT's adapters and softkv's: the same logits and the same generated tokens, whichever of the two reads them."""

import json
import shutil
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import softkv
from tests.hf.continuations import batch_of
from tests.hf.naive import close
from tests.hf.rows import rows_for
from tests.hf.tiny import NAMES, WINDOW, model_of

MODELS = [name for name in NAMES if name.startswith(("Llama", "Qwen3", "Mistral", "Gemma2", "GPT2"))]
SLOTS = WINDOW + 1  # slots that leave the window one by one, and one that no token sees
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix tuning": ("PrefixTuningConfig", {}),
    "prefix tuning, projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 2}),
    "prompt tuning": ("PromptTuningConfig", {}),
    "P-tuning, MLP": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "P-tuning, LSTM": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1},
    ),
    "CPT": (
        "CPTConfig",
        {
            "cpt_token_ids": list(range(3, SLOTS + 3)),
            "cpt_mask": [1] * SLOTS,
            "cpt_tokens_type_mask": [1 + slot % 4 for slot in range(SLOTS)],
            "opt_projection_epsilon": 3.0,
        },
    ),
}
ROWS = [row.ids for row in rows_for("no soft tokens")]
STEPS = WINDOW + 2


def in_peft(name: str, kind: str) -> Any:
    """A tiny model with a random PEFT adapter."""
    config, options = KINDS[kind]
    torch.manual_seed(3)
    length = {} if kind == "CPT" else {"num_virtual_tokens": SLOTS}
    model = peft.get_peft_model(
        model_of(name), getattr(peft, config)(task_type="CAUSAL_LM", **length, **options)
    ).eval()
    if kind == "CPT":  # as after a step: out of its bounds, where the next forward puts it back
        torch.nn.init.normal_(model.prompt_encoder["default"].delta_embedding.weight, std=9)
    return model


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """`[B, T, V]`, without those of virtual tokens."""
    return model(**batch).logits[:, -batch["input_ids"].shape[1] :]


def real(batch: dict[str, Tensor], logits: Tensor) -> Tensor:
    return logits[batch["attention_mask"].bool()]


@cache
def answers_of_peft(name: str, kind: str) -> tuple[Tensor, list[Tensor]]:
    """PEFT's logits of a right-padded batch, and what it generates after each row alone."""
    model = in_peft(name, kind)
    batch = batch_of(ROWS, "right", extra=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [model.generate(**batch_of([ids], "right"), max_new_tokens=STEPS) for ids in ROWS]
        return real(batch, logits_of(model, batch)), [row[0, -STEPS:] for row in alone]


@torch.no_grad()
def check(model: softkv.SoftModel, name: str, kind: str) -> None:
    logits, tokens = answers_of_peft(name, kind)
    for side in ("right", "left"):  # where PEFT would depend on the padding, softkv's rows are those of PEFT unpadded
        batch = batch_of(ROWS, side, extra=1)
        close(real(batch, logits_of(model, batch)), logits)
        generated = model.generate(**batch, max_new_tokens=STEPS)
        assert torch.equal(generated[:, -STEPS:], torch.stack(tokens))
    for ids in ROWS:
        batch = batch_of([ids], "right")
        assert torch.equal(model.generate(**batch, max_new_tokens=STEPS)[0, -STEPS:], tokens[ROWS.index(ids)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_and_live_models(name: str, kind: str, tmp_path: Path) -> None:
    model = in_peft(name, kind)
    model.save_pretrained(tmp_path)
    loaded = softkv.load(model_of(name), tmp_path)
    check(loaded, name, kind)
    live = softkv.from_peft(model.train())  # dropout in PEFT's encoder does not reach the values
    assert live.base is model.get_base_model()
    assert live.method == loaded.method
    for key, value in live.soft.state_dict().items():
        close(value, loaded.soft.state_dict()[key], tolerance=1e-6)


def soft_prompt(name: str, method: Any) -> softkv.SoftModel:
    torch.manual_seed(4)
    model = softkv.attach(model_of(name), method).eval()
    with torch.no_grad():
        for parameter in model.soft.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@torch.no_grad()
def same_in_peft(model: softkv.SoftModel, name: str, directory: Path) -> Any:
    """PEFT reads what softkv wrote, answers the same, and writes what softkv reads as the same method."""
    model.save_pretrained(directory, format="peft")
    read = peft.PeftModel.from_pretrained(model_of(name), directory)
    batch = batch_of(ROWS, "right", extra=1)
    close(real(batch, logits_of(read, batch)), real(batch, logits_of(model, batch)))
    for ids in ROWS:
        batch = batch_of([ids], "right")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = read.generate(**batch, max_new_tokens=STEPS)
        assert torch.equal(model.generate(**batch, max_new_tokens=STEPS), wanted)
    read.save_pretrained(directory / "again")
    return softkv.load(model_of(name), directory / "again")


@pytest.mark.parametrize("name", MODELS)
def test_prefixes_go_to_peft_and_back(name: str, tmp_path: Path) -> None:
    model = soft_prompt(name, softkv.PTuningV2(length=SLOTS, window_covers=True))
    again = same_in_peft(model, name, tmp_path)
    assert replace(again.method, init=model.method.init) == model.method  # PEFT does not keep how one started
    assert torch.equal(again.soft.k, model.soft.k)
    assert torch.equal(again.soft.v, model.soft.v)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_go_to_peft_and_back(name: str, tmp_path: Path) -> None:
    model = soft_prompt(name, softkv.PromptTuning(length=SLOTS, position="before"))
    again = same_in_peft(model, name, tmp_path)
    assert again.method == model.method
    assert torch.equal(again.soft.embeddings, model.soft.embeddings)


@pytest.mark.parametrize(
    "method",
    [
        softkv.PrefixTuning(length=3),
        softkv.PrefixTuning(length=3, reparametrize=True, reparametrize_size=6),
        softkv.PTuningV2(length=3, reparametrize=True, reparametrize_size=6),
    ],
)
def test_prefix_tuning_is_repeated_and_networks_are_folded(method: Any, tmp_path: Path) -> None:
    model = soft_prompt("Llama", method)
    again = same_in_peft(model, "Llama", tmp_path)
    for (k, v), (wanted_k, wanted_v) in zip(again.soft.prefix().layers(2), model.soft.prefix().layers(2), strict=True):
        close(k, wanted_k)
        close(v, wanted_v)


WINDOWED = "Mistral: a sliding window"
INEXPRESSIBLE = {
    "after": ("Llama", softkv.PromptTuning(length=3), "these after the prompt"),
    "template": ("Llama", softkv.PTuning(template="[P1] [X] [Y]", encoder_size=8), r"softkv\.bake makes a prefix"),
    "encoder": ("Llama", softkv.PTuningV2(length=3, encoder="lstm", encoder_size=8), "from each row's prompt"),
    "window": (WINDOWED, softkv.PTuningV2(length=3), "PEFT's leave the sliding windows"),
    "one pair, window": (WINDOWED, softkv.PrefixTuning(length=3), "PEFT's leave the sliding windows"),
    "not finite": ("Llama", softkv.PTuningV2(length=3), "NaN or infinite values in prompt_embeddings"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_peft_can_not_express(case: str, tmp_path: Path) -> None:
    name, method, message = INEXPRESSIBLE[case]
    model = softkv.attach(model_of(name), method)
    if case == "not finite":
        with torch.no_grad():
            model.soft.k[0, 0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new", format="peft")
    assert not (tmp_path / "new").exists()


def test_ways_to_save(tmp_path: Path) -> None:
    model = soft_prompt("Llama", softkv.PTuningV2(length=3))
    with pytest.raises(ValueError, match="folded=False"):
        model.save_pretrained(tmp_path, format="peft", folded=False)
    with pytest.raises(ValueError, match="'softkv' or 'peft', got 'lora'"):
        model.save_pretrained(tmp_path, format="lora")
    model.save_pretrained(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for other in (softkv.PTuningV2(length=4), softkv.PromptTuning(length=3, position="before")):
        with pytest.raises(ValueError, match="another kind or size of PEFT adapter"):
            soft_prompt("Llama", other).save_pretrained(tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == config
    newer = soft_prompt("Llama", softkv.PTuningV2(length=3))
    with torch.no_grad():
        newer.soft.k.mul_(2)
    newer.save_pretrained(tmp_path, format="peft")
    assert torch.equal(softkv.load(model_of("Llama"), tmp_path).soft.k, newer.soft.k)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def edited(**changes: Any) -> Any:
    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def with_tensors(change: Any) -> Any:
    def edit(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def in_folders(directory: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(directory, directory / name, ignore=shutil.ignore_patterns("first"))
    for file in directory.glob("*.*"):
        file.unlink()


def written(text: str) -> Any:
    return lambda directory: (directory / "adapter_config.json").write_text(text)


UNREADABLE: dict[str, tuple[Any, str]] = {
    "another kind": (edited(peft_type="LORA"), "of a 'LORA' adapter: softkv reads PREFIX_TUNING, CARTRIDGE"),
    "tasks in one": (edited(peft_type="MULTITASK_PROMPT_TUNING"), "its prompt depends on the task id of each row"),
    "a mixture": (edited(peft_type="XLORA"), r"of a 'XLORA' adapter \(it mixes LoRA adapters"),
    "a kind to come": (edited(peft_type="SOFTER_" + "X" * 10**6), "of a 'SOFTER_X+...X+' adapter: softkv reads"),
    "a prompt beside LoRA": (
        with_tensors(lambda tensors: tensors | {"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}),
        "which belongs to none of its modules_to_save",
    ),
    "features": (edited(task_type="FEATURE_EXTRACTION"), "of the task 'FEATURE_EXTRACTION'"),
    "a folder of folders": (in_folders, r"adapters in folders by name: first, second \(pass one"),
    "no kind": (edited(peft_type=None), "of a None adapter"),
    "a kind that is a list": (edited(peft_type=[]), r"of a \[\] adapter"),
    "an encoder-decoder": (
        edited(task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2),
        "one answer per target, and LlamaForCausalLM gives one per next token",
    ),
    "one stack of two": (
        edited(task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1),
        "prefixes with num_transformer_submodules=2 only of encoder-decoders",
    ),
    "two stacks of one": (edited(num_transformer_submodules=2), "the task 'CAUSAL_LM' .with 2 transformer submodules"),
    "a classifier": (
        edited(task_type="SEQ_CLS"),
        "one answer per row, and LlamaForCausalLM gives one per next token",
    ),
    "a tagger": (edited(task_type="TOKEN_CLS"), "one answer per token, and LlamaForCausalLM gives one per next"),
    "a pickle": (pickled, "adapter_model.bin is a pickle, which softkv never reads. If you trust it, convert it"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "found no adapter_model.safetensors"),
    "no tensors": (with_tensors(lambda tensors: {}), "expects a tensor 'prompt_embeddings', got none"),
    "other tensors": (with_tensors(lambda tensors: {"lora_A": torch.zeros(2)}), "'prompt_embeddings', got lora_A"),
    "weights of the base": (
        with_tensors(lambda tensors: tensors | {"base_model.embed_tokens.weight": torch.zeros(2)}),
        "the weight 'embed_tokens.weight', which belongs to none of its modules_to_save",
    ),
    "a wrong width": (
        with_tensors(lambda tensors: {"prompt_embeddings": tensors["prompt_embeddings"][:, 1:].contiguous()}),
        r"expected a prefix of shape \[P, 64\] for 2 layers, 2 key/value heads of 8, got \(6, 63\)",
    ),
    "one axis": (
        with_tensors(lambda tensors: {"prompt_embeddings": tensors["prompt_embeddings"].flatten()}),
        r"shape \(384,\), expected 6 rows",
    ),
    "integers": (
        with_tensors(lambda tensors: {"prompt_embeddings": tensors["prompt_embeddings"].long()}),
        "expects floating values",
    ),
    "NaN": (
        with_tensors(lambda tensors: {"prompt_embeddings": tensors["prompt_embeddings"] * torch.nan}),
        "NaN or infinite values in prompt_embeddings",
    ),
    "another length": (edited(num_virtual_tokens=10**15), "expected 1000000000000000 rows"),
    "no length": (edited(num_virtual_tokens=None), "num_virtual_tokens expects a whole number of at least 1, got None"),
    "a length of True": (edited(num_virtual_tokens=True), "num_virtual_tokens expects a whole number"),
    "other layers": (edited(num_layers=1, num_attention_heads=4, token_dim=32), "layers 1 .this model: 2."),
    "other heads": (edited(num_attention_heads=3), "token_dim 16 is not a multiple of num_attention_heads 3"),
    "heads split otherwise": (edited(num_attention_heads=4), r"kv_heads 4 \(this model: 2\), head_dim 4"),
    "gigantic sizes": (
        edited(num_layers=10**12, token_dim=10**12, num_attention_heads=1),
        "expected a prefix of shape",
    ),
    "a name that is no text": (edited(base_model_name_or_path=["x"]), "base_model_name_or_path expects a text"),
    "no JSON": (written("{"), "adapter_config.json is not JSON"),
    "not UTF-8": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff{}"), "adapter_config.json is not JSON"),
    "a list": (written("[]"), "expects a JSON object, got list"),
    "deep JSON": (written("[" * 100_000), "adapter_config.json is not JSON"),
    "giant JSON": (written("[" + "[]," * (1 << 21) + "1]"), "expected a config of at most 4,194,304"),
    "a giant number": (written('{"num_virtual_tokens": ' + "9" * 10_000 + "}"), "adapter_config.json is not JSON"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_nothing_is_attached_from_what_can_not_be_read(case: str, tmp_path: Path) -> None:
    damage, message = UNREADABLE[case]
    in_peft("Llama", "prefix tuning").save_pretrained(tmp_path)
    damage(tmp_path)
    model = model_of("Llama")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        softkv.load(model, tmp_path)
    assert model.config._attn_implementation == "eager"


def test_prompts_of_another_width(tmp_path: Path) -> None:
    in_peft("Llama", "prompt tuning").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"embedding_size 32 \(this model: 16\)"):
        softkv.load(model_of("OPT: learned positions, a narrow embedding"), tmp_path)


class TestFromPeft:
    def test_an_adapter_by_its_name(self) -> None:
        model = in_peft("Llama", "prefix tuning")
        torch.manual_seed(5)
        model.add_adapter("second", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        assert softkv.from_peft(model).method.length == SLOTS
        second = softkv.from_peft(model, adapter_name="second")
        assert second.method == softkv.PTuningV2(length=2, window_covers=True)
        with pytest.raises(ValueError, match="has the adapters default, second, no 'third'"):
            softkv.from_peft(model, adapter_name="third")

    def test_one_that_was_loaded(self, tmp_path: Path) -> None:
        for kind in ("prefix tuning, projected", "P-tuning, MLP"):
            model = in_peft("Llama", kind)
            model.save_pretrained(tmp_path)
            loaded = peft.PeftModel.from_pretrained(model_of("Llama"), tmp_path)
            check(softkv.from_peft(loaded), "Llama", kind)

    def test_other_kinds_and_other_models(self) -> None:
        lora = peft.get_peft_model(model_of("Llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="adapter 'default' is of a 'LORA' adapter"):
            softkv.from_peft(lora)
        with pytest.raises(TypeError, match=r"expects a peft\.PeftModel, got LlamaForCausalLM"):
            softkv.from_peft(model_of("Llama"))


def test_softkvs_own_files_come_first(tmp_path: Path) -> None:
    model = soft_prompt("Llama", softkv.PTuningV2(length=3))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, format="peft")
    assert not softkv.load(model_of("Llama"), tmp_path).method.window_covers
    (tmp_path / "softkv.safetensors").unlink()
    assert softkv.load(model_of("Llama"), tmp_path).method.window_covers
