"""Quantised bases of every library that is installed, and their weights as plain ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.hf.tiny import model_of

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
GROUP = 32


def load(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def quantised(config: Any, path: Path) -> Any:
    """A base that is quantised as it is loaded."""
    model_of("Llama", **SIZES).save_pretrained(path)
    return load(path, quantization_config=config)


def bitsandbytes(path: Path, **options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return quantised(transformers.BitsAndBytesConfig(**options), path)


def four_bit(path: Path) -> Any:
    return bitsandbytes(path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def torchao(kind: str, path: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(GROUP)
        ),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
    }[kind]()
    return quantised(transformers.TorchAoConfig(config), path)


def quanto(weights: str, path: Path) -> Any:
    pytest.importorskip("optimum.quanto")
    return quantised(transformers.QuantoConfig(weights=weights), path)


def compressed_tensors(path: Path) -> Any:
    """4 bits as vLLM's tools write them."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as apply

    base = model_of("Llama", **SIZES)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    apply(base, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for layer in base.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data = layer.weight.unflatten(1, (-1, GROUP)).abs().amax(-1).detach() / 7
    compressor = ModelCompressor.from_pretrained_model(base)
    compressor.compress_model(base)
    base.save_pretrained(path)
    compressor.update_config(path)
    return load(path)


def packed(method: str, path: Path) -> Any:
    """4 bits as GPTQ and AWQ pack them, on the kernels that have gradients: any bits are weights."""
    pytest.importorskip("gptqmodel")
    base = model_of("Llama", **SIZES)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            wide, groups = layer.out_features, layer.in_features // GROUP
            shape = (layer.in_features // 8, wide) if method == "gptq" else (layer.in_features, wide // 8)
            del state[f"{name}.weight"]
            state[f"{name}.qweight"] = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
            state[f"{name}.qzeros"] = torch.full((groups, wide // 8), 0x77777777, dtype=torch.int32)
            state[f"{name}.scales"] = torch.rand(groups, wide).half() / 100
            if method == "gptq":
                state[f"{name}.g_idx"] = (torch.arange(layer.in_features) // GROUP).int()
    base.config.save_pretrained(path)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP} | (
        {"desc_act": False, "sym": True, "checkpoint_format": "gptq"}
        if method == "gptq"
        else {"zero_point": True, "version": "gemm"}
    )
    (path / "config.json").write_text(json.dumps(config))
    kernel = transformers.GPTQConfig if method == "gptq" else transformers.AwqConfig
    return load(path, quantization_config=kernel(bits=4, backend="auto_trainable"))


KINDS: dict[str, Callable[[Path], Any]] = {
    "bitsandbytes 4-bit": four_bit,
    "torchao int8": lambda path: torchao("int8", path),
    "torchao int4": lambda path: torchao("int4", path),
    "torchao float8": lambda path: torchao("float8", path),
    "quanto int8": lambda path: quanto("int8", path),
    "quanto int4": lambda path: quanto("int4", path),
    "compressed-tensors int4": compressed_tensors,
    "GPTQ": lambda path: packed("gptq", path),
    "AWQ": lambda path: packed("awq", path),
}


def weight_of(layer: Any) -> Tensor:
    """The plain weight of a quantised layer."""
    weight = getattr(layer, "weight", None)
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "dequantize"):
        return weight.dequantize()
    return layer(torch.eye(layer.in_features)).T


@torch.no_grad()
def dequantised(base: Any) -> Any:
    """The same model with plain weights."""
    plain = model_of("Llama", **SIZES)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = weight_of(base.get_submodule(name)).detach().clone()
    return plain
