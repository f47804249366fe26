"""Adapters on disk: exact round trips in a fresh process; whatever is wrong with a file, an error and nothing
attached."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import softkv
from softkv.io import checkpoint
from softkv.io.config import FORMAT, SHAPE
from softkv.methods import PTuning
from softkv.methods.base import BaseShape, Method
from tests.hf.tiny import METHODS as PLAIN
from tests.hf.tiny import model_of, tokenizer

ROOT = Path(__file__).parents[1]
CONFIG, WEIGHTS = "softkv_config.json", "softkv.safetensors"


class OwnLinear(nn.Module):
    """An encoder of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 6)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.linear(hidden) * mask[:, :, None]


METHODS: dict[str, Method] = PLAIN | {
    "p-tuning, MLP, of a text": PTuning(
        template="[P1][P2] [X] [Y]", encoder="mlp", encoder_size=8, prompt_text="w3 w4"
    ),
    "prompt-tuning of a text": softkv.PromptTuning(init="text", init_text="w3 w4 w5"),
    "prefix-tuning of a text": softkv.PrefixTuning(init="text", init_text="w3 w4 w5"),
    "prefix-tuning through an MLP": softkv.PrefixTuning(length=4, reparametrize=True, reparametrize_size=6),
    "p-tuning v2 through an MLP": softkv.PTuningV2(length=4, reparametrize=True, reparametrize_size=6),
    "p-tuning v2 attention encoder, one a layer": softkv.PTuningV2(
        length=3, encoder="attention", encoder_size=8, share_encoder=False
    ),
    "p-tuning v2 encoder of one's own": softkv.PTuningV2(length=3, encoder=OwnLinear()),
}


def attach(method: str | Method) -> softkv.SoftModel:
    torch.manual_seed(1)
    method = METHODS[method] if isinstance(method, str) else method
    soft_model = softkv.attach(model_of("Llama"), method, tokenizer=tokenizer())
    with torch.no_grad():
        for parameter in soft_model.soft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return soft_model.eval()


def answers(soft_model: softkv.SoftModel) -> Tensor:
    """Logits of one row, and what is generated after it."""
    ids = torch.tensor([soft_model.method.encode(tokenizer(), X="w9 w8 w7 w6")["input_ids"]])
    with torch.no_grad():
        logits = soft_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    tokens = soft_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return torch.cat([logits.flatten(), tokens[0].float()])


def own_encoder(name: str) -> nn.Module | None:
    return OwnLinear() if "one's own" in name else None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method saved, folded and as a checkpoint, beside its answers."""
    directory = tmp_path_factory.mktemp("saved")
    for number, name in enumerate(METHODS):
        soft_model = attach(name)
        torch.save(answers(soft_model), directory / f"{number}.answers")
        for folded in (True, False):
            soft_model.save_pretrained(directory / f"{number} {folded}", folded=folded)
    return directory


@pytest.fixture(scope="module")
def differences(saved: Path) -> dict[str, float]:
    """The largest difference of each method's answers in a fresh process."""
    code = "import tests.test_checkpoint as t, sys; t.compare(sys.argv[1])"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def compare(saved: str) -> None:
    found = {}
    for number, name in enumerate(METHODS):
        expected = torch.load(Path(saved) / f"{number}.answers")
        for folded in (True, False):
            model = softkv.load(model_of("Llama"), Path(saved) / f"{number} {folded}", encoder=own_encoder(name))
            found[f"{name} {folded}"] = (answers(model) - expected).abs().max().item()
    print(json.dumps(found))


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_round_trip_in_a_fresh_process(name: str, folded: bool, differences: dict[str, float]) -> None:
    # What a network computes is the same to rounding of another order of threads.
    assert differences[f"{name} {folded}"] <= (1e-6 if "MLP" in name or name.startswith("p-tuning") else 0)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_kept(name: str, saved: Path) -> None:
    number = list(METHODS).index(name)
    with safe_open(saved / f"{number} True" / WEIGHTS, framework="pt") as file:
        keys = set(file.keys())
    if "encoder" in name:
        assert any(key.startswith("mlps.0") for key in keys)
    else:
        assert keys in ({"embeddings"}, {"k", "v"})  # networks are folded away
    assert {path.name for path in (saved / f"{number} True").iterdir()} == {CONFIG, WEIGHTS}
    assert json.loads((saved / f"{number} True" / CONFIG).read_text())["format"] == FORMAT


def test_prefixes_of_a_text_keep_counting_in_windows(tmp_path: Path) -> None:
    soft_model = attach("p-tuning v2 of a text")
    soft_model.save_pretrained(tmp_path)
    loaded = softkv.load(model_of("Llama"), tmp_path)
    assert loaded.soft.prefix().window_covers
    assert loaded.method == soft_model.method


def base_state(model: Any) -> Any:
    return (
        model.config._attn_implementation,
        model.training,
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_pre_hooks) for module in model.modules()],
    )


def rewrite(directory: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Writes an adapter again, its config and tensors changed."""
    config, tensors = checkpoint.read(directory)
    change(config, tensors)
    save_file(tensors, directory / WEIGHTS, metadata=checkpoint.header(config, tensors))


def truncate(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def only_a_pickle(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    torch.save({}, directory / "adapter_model.bin")


def without_header(directory: Path) -> None:
    save_file({"k": torch.zeros(1)}, directory / WEIGHTS)


def garbage(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"\xff" * 64)


def set_to(where: str, value: Any) -> Callable[[Path], None]:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        *path, last = where.split(".")
        for key in path:
            config = config[key]
        config[last] = value

    return lambda directory: rewrite(directory, change)


def tensor_to(name: str, value: Tensor | None) -> Callable[[Path], None]:
    def drop(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    def put(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        assert value is not None
        tensors[name] = value

    return lambda directory: rewrite(directory, drop if value is None else put)


def nested(directory: Path) -> None:
    save_file({"k": torch.zeros(1)}, directory / WEIGHTS, metadata={"softkv_config": "[" * 100_000})


NAN = torch.full((2, 1, 2, 7, 8), torch.nan)
ZEROS = torch.zeros(2, 1, 2, 7, 8)
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "is damaged"),
    "empty": (lambda directory: (directory / WEIGHTS).write_bytes(b""), "is damaged"),
    "garbage": (garbage, "is damaged"),
    "not ours": (without_header, "was not written by softkv"),
    "only a pickle": (only_a_pickle, "adapter_model.bin is a pickle, which softkv never reads"),
    "nothing": (lambda directory: shutil.rmtree(directory), "contains no soft prompt"),
    "a newer version": (
        set_to("format", FORMAT + 1),
        f"has format {FORMAT + 1}, this softkv reads up to {FORMAT}: upgrade softkv",
    ),
    "no version": (set_to("format", None), "contains no softkv config"),
    "version true": (set_to("format", True), "contains no softkv config"),
    "a deep config": (nested, "contains no softkv config"),
    "a missing tensor": (tensor_to("v", None), r"missing \['v'\]"),
    "an extra tensor": (tensor_to("w", torch.zeros(2)), r"unexpected \['w'\]"),
    "a wrong shape": (tensor_to("k", torch.zeros(2, 1, 2, 6, 8)), r"'k' has shape .*, expected \(2, 1, 2, 7, 8\)"),
    "NaN": (tensor_to("k", NAN), "contains NaN or infinite values in k"),
    "infinite": (tensor_to("k", ZEROS + torch.inf), "contains NaN or infinite values in k"),
    "integers": (tensor_to("k", ZEROS.long()), r"expects floating values, got k \(torch.int64\)"),
    "another base": (set_to("base.layers", 3), r"another base model: layers 3 \(this model: 2\)"),
    "another architecture": (set_to("base.model_type", "opt"), "another base model: opt, not llama"),
    "base of a wrong type": (set_to("base", ["layers"]), "without a valid base"),
    "layers of a wrong type": (set_to("base.layers", "2"), "without a valid base.layers"),
    "an unknown method": (set_to("method", "lora"), "unknown method 'lora'"),
    "another method": (set_to("method", "prompt-tuning"), "unknown settings of prompt-tuning"),
    "an unknown setting": (set_to("config.rank", 8), "unknown settings of p-tuning-v2: rank"),
    "a wrong setting": (set_to("config.length", "seven"), "length expects an integer"),
    "a setting of a wrong type": (set_to("config.template", 7), "the adapter's config is not one of p-tuning-v2"),
    "another length": (set_to("config.length", 8), "expected"),
    "a gigantic length": (set_to("config.length", 10**9), "'k' has shape"),
    "a length past all integers": (set_to("config.length", 10**30), "length expects an integer from 1 to 2147483647"),
    "a length as large as memory": (set_to("config.length", 400), r"expected \(2, 1, 2, 400, 8\)"),
    "a gigantic encoder": (
        lambda directory: [
            set_to(f"config.{k}", v)(directory)
            for k, v in (("init", "random"), ("encoder", "lstm"), ("encoder_size", 10**9))
        ],
        "don't fit its config",
    ),
    "an encoder that is not there": (
        lambda directory: [set_to(f"config.{k}", v)(directory) for k, v in (("init", "random"), ("encoder", "custom"))],
        "give the module again",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_nothing_is_attached_from_what_is_wrong(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    attach("p-tuning v2").save_pretrained(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    model = model_of("Llama")
    before = base_state(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        softkv.load(model, tmp_path / "adapter")
    assert base_state(model) == before


def test_restore_changes_all_or_nothing(tmp_path: Path) -> None:
    soft_model = attach("p-tuning v2")
    before = {name: value.clone() for name, value in soft_model.soft.state_dict().items()}
    other = softkv.attach(model_of("Llama"), softkv.PTuningV2(length=7))
    other.save_pretrained(tmp_path)
    tensor_to("v", ZEROS[:1])(tmp_path)
    with pytest.raises(ValueError, match="'v' has shape"):
        checkpoint.restore(soft_model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in soft_model.soft.state_dict().items())
    other.save_pretrained(tmp_path)
    checkpoint.restore(soft_model, tmp_path)
    assert torch.equal(soft_model.soft.k, other.soft.k)


def test_a_base_of_another_name_is_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    soft_model = attach("p-tuning v2")
    soft_model.config.name_or_path = "somebody/small"
    soft_model.save_pretrained(tmp_path)
    model = model_of("Llama")
    model.config.name_or_path = "/data/small"  # the same, from a folder
    softkv.load(model, tmp_path).detach()
    assert not [warning for warning in recwarn if "was trained on" in str(warning.message)]
    model.config.name_or_path = "somebody/large"
    with pytest.warns(UserWarning, match="was trained on somebody/small, not on somebody/large"):
        softkv.load(model, tmp_path)


def test_a_failed_save_keeps_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft_model = attach("p-tuning v2")
    soft_model.save_pretrained(tmp_path)
    expected = answers(soft_model)
    with torch.no_grad():
        soft_model.soft.k.mul_(2)

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            soft_model.save_pretrained(tmp_path)
    with torch.no_grad():
        soft_model.soft.v[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite values in v"):
        soft_model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    assert torch.equal(answers(softkv.load(model_of("Llama"), tmp_path)), expected)


def test_a_save_killed_between_its_files_is_the_new_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach("p-tuning v2").save_pretrained(tmp_path)
    longer = attach(softkv.PTuningV2(length=9))
    real = os.replace

    def killed(source: Any, target: Path) -> None:
        if target.name == CONFIG:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            longer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["config"]["length"] == 7
    assert torch.equal(answers(softkv.load(model_of("Llama"), tmp_path)), answers(longer))


def test_custom_encoders_are_asked_for(tmp_path: Path) -> None:
    attach("p-tuning v2 encoder of one's own").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give the module again"):
        softkv.load(model_of("Llama"), tmp_path)
    attach("p-tuning v2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not trained with a custom encoder"):
        softkv.load(model_of("Llama"), tmp_path, encoder=OwnLinear())


class TestHub:
    def test_push(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        calls: list[Any] = []

        class Api:
            def __init__(self, token: str | None = None) -> None:
                calls.append(token)

            def create_repo(self, repo_id: str, **options: Any) -> Any:
                calls.append((repo_id, options))
                return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

            def file_exists(self, repo_id: str, name: str) -> bool:
                return False

            def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> str:
                shutil.copytree(folder_path, tmp_path / "pushed")
                calls.append((repo_id, options))
                return "https://huggingface.co/me/soft/commit/1"

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        soft_model = attach("p-tuning v2")
        soft_model.config.name_or_path = "somebody/small"
        assert soft_model.push_to_hub("me/soft", private=True, token="t") == "https://huggingface.co/me/soft/commit/1"
        assert calls == [
            "t",
            ("me/soft", {"private": True, "exist_ok": True}),
            ("me/soft", {"commit_message": "Upload soft prompt"}),
        ]
        assert {path.name for path in (tmp_path / "pushed").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
        card = (tmp_path / "pushed" / "README.md").read_text()
        assert "base_model: somebody/small" in card
        assert 'softkv.load(model, "me/soft")' in card
        assert torch.equal(answers(softkv.load(model_of("Llama"), tmp_path / "pushed")), answers(soft_model))

    def test_load(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        soft_model, asked = attach("p-tuning v2"), []
        soft_model.save_pretrained(tmp_path)

        def download(repo_id: str, **options: Any) -> str:
            asked.append((repo_id, options))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *arguments, **options: None)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        loaded = softkv.load(model_of("Llama"), "me/soft", revision="v1")
        patterns = [CONFIG, WEIGHTS, "adapter_config.json", "adapter_model.safetensors"]
        options = {"allow_patterns": patterns, "revision": "v1", "token": None, "local_files_only": False}
        assert asked == [("me/soft", options)]
        assert torch.equal(answers(loaded), answers(soft_model))

    @pytest.fixture
    def out_of_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        def fail(*arguments: Any, timeout: float, **options: Any) -> None:
            assert timeout < 5
            raise ConnectionError("Name or service not known\nand more")

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)

    @pytest.mark.usefixtures("out_of_reach")
    def test_the_cache_serves_where_the_hub_is_out_of_reach(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        soft_model = attach("p-tuning v2")
        soft_model.save_pretrained(tmp_path)

        def download(repo_id: str, local_files_only: bool, **options: Any) -> str:
            assert local_files_only
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert torch.equal(answers(softkv.load(model_of("Llama"), "me/soft")), answers(soft_model))

    @pytest.mark.usefixtures("out_of_reach")
    def test_out_of_reach_and_never_fetched(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"^me/soft is no folder here, .* \(Name or service not known\): "):
            softkv.load(model_of("Llama"), "me/soft")

    def test_neither_a_folder_nor_a_repository(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError

        def fail(*arguments: Any, **options: Any) -> None:
            raise HFValidationError("Cannot find it\nand more")

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
        with pytest.raises(
            FileNotFoundError, match=r"^me/soft is neither a folder nor a repository on the Hub: Cannot"
        ):
            softkv.load(model_of("Llama"), "me/soft")
        with pytest.raises(FileNotFoundError, match="contains no soft prompt"):
            softkv.load(model_of("Llama"), "runs/of/mine")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_file_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        attach("p-tuning v2").save_pretrained(tmp_path / "soft")
        attach("prompt-tuning before").save_pretrained(tmp_path / "peft", format="peft")
    finally:
        os.umask(before)
    files = [path for folder in ("soft", "peft") for path in (tmp_path / folder).iterdir()]
    assert len(files) == 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def test_config_names_the_sizes_of_a_base() -> None:
    assert tuple(field.name for field in fields(BaseShape)) == (*SHAPE, "widths", "reads")  # of each layer


def test_only_softkvs_methods_are_saved(tmp_path: Path) -> None:
    class Mine(softkv.PTuningV2):
        pass

    with pytest.raises(ValueError, match=r"only prompt-tuning, .* can be saved, got Mine"):
        softkv.attach(model_of("Llama"), Mine(length=3)).save_pretrained(tmp_path)
