"""Files from anywhere: whatever is in them, a clear error and nothing attached, or the whole adapter that was saved;
never a crash, more memory than there is, or a file written."""

import json
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import softkv
from softkv.io import checkpoint
from softkv.io.config import FORMAT
from tests.fixtures.write import FOLDER, METHODS
from tests.hf.tiny import model_of

CURRENT = FOLDER / f"format-{FORMAT}"
WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS = "softkv.safetensors", "adapter_config.json", "adapter_model.safetensors"
REFUSALS = (ValueError, FileNotFoundError)
ROOM = 1 << 30  # bytes of address space that loading may take


def fuzzed(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A request for much memory fails here, where a machine with overcommit would grant it and die later."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@cache
def base() -> Any:
    return model_of("Llama")


@cache
def peft_files() -> dict[str, bytes]:
    """A prefix and a prompt as PEFT's files."""
    files = {}
    for kind, method in (("p-tuning-v2", {"window_covers": True}), ("prompt-tuning", {"position": "before"})):
        with tempfile.TemporaryDirectory() as folder:
            options = {"length": 2, **method}
            model = softkv.attach(model_of("Llama"), softkv.methods.METHODS[kind](**options))
            model.save_pretrained(folder, format="peft")
            for name in (PEFT_CONFIG, PEFT_WEIGHTS):
                files[f"{kind} {name}"] = (Path(folder) / name).read_bytes()
    return files


def outcome(files: dict[str, bytes], path: str = "") -> dict[str, Any] | None:
    """What loading a folder of these files (or one of them) gives: the method and its values, or None for a refusal."""
    model = base()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        try:
            loaded = softkv.load(model, folder / path)
        except REFUSALS:
            assert not hasattr(model, "_softkv_base_state")  # nothing was attached
            return None
        finally:
            assert [one.name for one in Path(name).iterdir()] == ["adapter"]
            assert {one.name: one.read_bytes() for one in folder.iterdir()} == files
        loaded.detach()
        state = {key: value.clone() for key, value in loaded.soft.state_dict().items()}
        assert state
        assert all(value.isfinite().all() for value in state.values())
        return {"method": loaded.method, **state}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """One to three accidents."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "flip", "flip", "cut", "write", "insert", "delete", "repeat"])):
            case "flip":
                data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :] if data else data
            case "cut":
                data = data[:at]
            case "write":
                new = draw(st.binary(min_size=1, max_size=9))
                data = data[:at] + new + data[at + len(new) :]
            case "insert":
                data = data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
            case "delete":
                data = data[:at] + data[at + draw(st.integers(1, 40)) :]
            case "repeat":
                data = data[:at] + data[max(at - 30, 0) :]
    return data


@pytest.mark.parametrize("name", METHODS)
def test_a_damaged_adapter_is_refused(name: str) -> None:
    whole = (CURRENT / name / WEIGHTS).read_bytes()
    expected = outcome({WEIGHTS: whole})
    assert expected is not None

    @fuzzed(150)
    @given(damaged(whole))
    def check(data: bytes) -> None:
        found = outcome({WEIGHTS: data})
        assert found is None or equal(found, expected)

    check()


def test_every_flipped_bit_of_the_values_is_found() -> None:
    whole = (CURRENT / "prompt-tuning" / WEIGHTS).read_bytes()
    begin = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in range(begin, len(whole)):
        flipped = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        assert outcome({WEIGHTS: flipped}) is None


@pytest.mark.parametrize("kind", ["p-tuning-v2", "prompt-tuning"])
def test_a_damaged_peft_adapter_is_refused_or_whole(kind: str) -> None:
    files = {name: peft_files()[f"{kind} {name}"] for name in (PEFT_CONFIG, PEFT_WEIGHTS)}
    expected = outcome(files)
    assert expected is not None

    @fuzzed(150)
    @given(st.sampled_from([PEFT_CONFIG, PEFT_WEIGHTS]).flatmap(lambda n: st.tuples(st.just(n), damaged(files[n]))))
    def check(damage: tuple[str, bytes]) -> None:
        found = outcome(files | {damage[0]: damage[1]})
        if found is None:
            return
        # PEFT's files hold no checksum: a flipped bit of a value may pass, a part of an adapter may not.
        assert found.keys() == expected.keys()
        assert found["method"] == expected["method"]
        assert all(value.shape == found[key].shape for key, value in expected.items() if key != "method")

    check()


SIZES = st.sampled_from([0, 1, 2, 3, 8, 32, -1, 2**31, 2**40, 2**63, 2**64, 10**30, 1.5, "2", None, True])
NAMES = st.sampled_from(
    ["k", "v", "embeddings", "prompt_embeddings", "prefix_encoder.embedding.weight", "trainable_keys.0", "", ".", "/",
     "../../../tmp/x", "a\0b", "\u202e", "x" * 10_000, "trainable_keys.9999", "trainable_values.0", "__class__"]
)  # fmt: skip
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "C64", "F4", 7, None]),
        "shape": st.lists(SIZES, max_size=6) | SIZES,
        "data_offsets": st.lists(SIZES, max_size=3) | SIZES,
    },
)
JSON = st.recursive(
    SIZES | NAMES | st.just(float("nan")) | st.just(float("inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def hostile_files(draw: st.DrawFn) -> bytes:
    """Safetensors files whose headers are made up, some of them valid."""
    header: dict[str, Any] = {}
    data = b"".join(struct.pack("<f", number / 7) for number in range(draw(st.integers(0, 200))))
    if draw(st.booleans()):
        names = draw(st.lists(NAMES, max_size=3, unique=True))
        share = len(data) // 4 // max(len(names), 1) * 4
        for number, name in enumerate(names):
            rows = draw(st.sampled_from([1, 2, share // 4]))
            shape = [rows, share // 4 // max(rows, 1)]
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [number * share, (number + 1) * share]}
        data = data[: share * len(names)]
    else:
        header = draw(st.dictionaries(NAMES, ENTRY | JSON, max_size=4))
    if draw(st.booleans()):
        config, tensors = checkpoint.read(CURRENT / draw(st.sampled_from(list(METHODS))))
        whole = checkpoint.header(config, tensors)
        header["__metadata__"] = draw(st.sampled_from([whole, whole | {"softkv_config": "[" * 100_000}, {"a": {}}, 5]))
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text), len(text), len(text), 0, len(text) + 1, 2**63, 2**64 - 1, 10**8]))
    return struct.pack("<Q", length) + text + data


@fuzzed(250)
@given(hostile_files())
def test_hostile_headers(data: bytes) -> None:
    outcome({WEIGHTS: data})
    outcome({PEFT_CONFIG: peft_files()[f"p-tuning-v2 {PEFT_CONFIG}"], PEFT_WEIGHTS: data})
    outcome({"prefix.safetensors": data}, "prefix.safetensors")


HOSTILE = JSON | st.sampled_from(
    [*METHODS, "lora", "[X] [P1] [Y]", "[P2] [Y]", "[X]", "[" * 5000, "lstm", "attention", "custom", "text", "[Y]" * 9]
)


@st.composite
def changed(draw: st.DrawFn, config: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A config of which one to three settings are something else, gone or new."""
    config = json.loads(json.dumps(config))
    for _ in range(draw(st.integers(1, 3))):
        group = draw(st.sampled_from([one for one in (config, config.get("config"), config.get("base")) if one]))
        if not isinstance(group, dict):
            continue
        key = draw(st.sampled_from(sorted(group) + names))
        if draw(st.integers(0, 9)):
            group[key] = draw(HOSTILE)
        else:
            group.pop(key, None)
    return config


SETTINGS = [
    "encoder",
    "encoder_size",
    "reparametrize",
    "reparametrize_size",
    "init",
    "init_text",
    "length",
    "continues",
]


@pytest.mark.parametrize("name", METHODS)
def test_hostile_configs(name: str) -> None:
    config, tensors = checkpoint.read(CURRENT / name)

    @fuzzed(200)
    @given(changed(config, SETTINGS))
    def check(changed: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_file(tensors, Path(folder) / WEIGHTS, metadata=checkpoint.header(changed, tensors))
            data = (Path(folder) / WEIGHTS).read_bytes()
        found = outcome({WEIGHTS: data})
        if found is not None:  # then with every value that the file holds
            assert equal({"method": found["method"], **tensors}, found)

    check()


@pytest.mark.parametrize("kind", ["p-tuning-v2", "prompt-tuning"])
def test_hostile_peft_configs(kind: str) -> None:
    files = {name: peft_files()[f"{kind} {name}"] for name in (PEFT_CONFIG, PEFT_WEIGHTS)}
    config = json.loads(files[PEFT_CONFIG])
    expected = outcome(files)
    assert expected is not None

    @fuzzed(200)
    @given(changed(config, ["prefix_projection", "encoder_hidden_size", "modules_to_save", "auto_mapping"]))
    def check(changed: dict[str, Any]) -> None:
        found = outcome(files | {PEFT_CONFIG: json.dumps(changed).encode()})
        assert found is None or equal(found, expected)

    check()


def test_names_are_no_paths(tmp_path: Path) -> None:
    """A name in a file decides nothing about where anything is read or written."""
    shutil.copytree(CURRENT / "p-tuning-v2", tmp_path / "adapter")
    config, tensors = checkpoint.read(tmp_path / "adapter")
    config["base"]["name"] = "../../../etc/passwd"
    save_file(tensors, tmp_path / "adapter" / WEIGHTS, metadata=checkpoint.header(config, tensors))
    loaded = softkv.load(model_of("Llama"), tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "again"}
