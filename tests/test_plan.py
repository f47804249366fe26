"""What `softkv plan` counts on the meta device is what a step on real tensors allocates and computes."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import softkv
from softkv.cli import app
from softkv.methods import PTuning
from softkv.profiling.allocations import peak
from softkv.profiling.plan import Job, config_of, plan
from softkv.profiling.presets import PRESETS

P, B, T, ANSWER = 48, 4, 192, 24
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 3000,
    "max_position_embeddings": 512,
}
GROUPED = CONFIG | {"num_key_value_heads": 2}


def job(config: dict[str, Any], method: Any, **options: Any) -> Job:
    return Job(transformers.LlamaConfig(**config), method, P, B, T, ANSWER, torch.float32, **options)


def step_bytes(model: Any, loss_of: Any) -> int:
    """What a step allocates at its peak, beyond the model and its gradients: by the profiler's allocation events."""
    ids = torch.randint(1, 3000, (B, T))
    loss_of(model, ids).backward()  # gradients exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        loss_of(model, ids).backward()
    return peak(measured)


def softkv_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, prompt_lengths=torch.full((B,), T - ANSWER), logits_to_keep=ANSWER).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -ANSWER:].flatten())


def peft_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss


def step_plan(cost: Any) -> int:
    return cost.prefix + cost.activations + cost.workspace


MARKS = "".join(f"[P{i}]" for i in range(1, P + 1))
METHODS = {
    "p-tuning-v2": softkv.PTuningV2(length=P),
    "prefix-tuning": softkv.PrefixTuning(length=P),
    "prompt-tuning": softkv.PromptTuning(length=P, position="before", init="random"),
    "p-tuning": PTuning(template=f"{MARKS} [X] [Y]"),
}


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [*((method, False) for method in METHODS), ("p-tuning-v2", True), ("prompt-tuning", True)],
)
def test_softkv_allocates_what_is_planned(method: Any, checkpointing: bool) -> None:
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    model = softkv.attach(base, METHODS[method]).train()
    if checkpointing:
        model.gradient_checkpointing_enable()

    def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
        if method == "p-tuning":  # its soft tokens stand in the row
            ids = torch.cat([-torch.arange(1, P + 1).expand(B, -1), ids], 1)
        return softkv_loss(model, ids)

    cost = plan(job(GROUPED, method, checkpointing=checkpointing))["softkv"]
    assert step_plan(cost) == pytest.approx(step_bytes(model, loss), rel=0.15)
    assert cost.trainable == 16 * model.num_trainable()
    assert cost.parameters == sum(p.nbytes for p in base.parameters())


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("p-tuning-v2", peft.PrefixTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")),
        ("prompt-tuning", peft.PromptTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")),
    ],
)
def test_peft_allocates_what_is_planned_for_the_concatenating_way(method: Any, config: Any) -> None:
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    model = peft.get_peft_model(base, config).train()
    cost = plan(job(CONFIG, method))["concatenating"]
    assert step_plan(cost) == pytest.approx(step_bytes(model, peft_loss), rel=0.15)


@pytest.mark.parametrize(
    ("model", "billions"),
    [("smollm2-135m", 0.1345), ("llama-3.2-1b", 1.2358), ("llama-3.1-8b", 8.0303), ("llama-3.1-405b", 405.85)],
)
def test_presets_have_the_published_sizes(model: str, billions: float) -> None:
    assert model in PRESETS
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config_of(model))
    assert sum(p.numel() for p in base.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_flops_follow_the_formula() -> None:
    """2·weights a token where a logit is made, attention by its visible pairs, and a backward of about a forward."""
    cost = plan(job(GROUPED, "p-tuning-v2"))["softkv"]
    C, middle, L, H, G = 128, 320, 4, 8, 2
    D = C // H
    layer = C * (2 * C + 2 * G * D) + 3 * C * middle
    pairs = T * P + T * (T + 1) // 2
    forward_attention = 4 * B * L * H * D * pairs
    assert cost.forward_flops == 2 * B * (T * L * layer + ANSWER * C * 3000) + forward_attention
    # Layer 0 needs no gradient of its tokens: its prefix products alone, no products with its projections.
    backward_attention = 10 * B * (L - 1) * H * D * pairs + 8 * B * H * D * T * P
    assert cost.attention_flops == forward_attention + backward_attention


def test_devices_split_rows_and_weights() -> None:
    one = plan(job(GROUPED, "p-tuning-v2"))["softkv"]
    two = plan(job(GROUPED, "p-tuning-v2", devices=2))["softkv"]
    assert two.parameters * 2 == one.parameters
    assert two.forward_flops * 2 == one.forward_flops
    assert two.prefix == one.prefix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
        (["--model", "smollm2-135m", "--batch", "3", "--devices", "2"], "batch expects a multiple of devices = 2"),
        (["--model", "smollm2-135m", "--tokens", "8", "--answer", "9"], "answer expects at most tokens = 8"),
        (["--model", "smollm2-135m", "--dtype", "int8"], "--dtype expects bfloat16"),
    ],
)
def test_errors_in_a_line(options: list[str], message: str) -> None:
    said = CliRunner().invoke(app, ["plan", *options])
    assert said.exit_code == 2
    assert message in " ".join(said.stderr.split())


def test_both_ways_in_a_table_and_as_json(tmp_path: Path) -> None:
    transformers.LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    options = ["plan", "--model", str(tmp_path), "-B", "2", "-T", "64"]
    said = CliRunner().invoke(app, options)
    assert "concatenating" in said.stdout
    assert "training step" in said.stdout
    costs = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)["costs"]
    assert costs["softkv"]["total"] < costs["concatenating"]["total"]
