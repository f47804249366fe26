"""What `softkv plan` counts on shapes alone is what a step on real tensors allocates and computes."""

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
from softkv.profiling.plan import PlannedStep, config_of, plan
from softkv.profiling.presets import PRESETS
from softkv.train.label_logits import label_logits

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


def job(config: dict[str, Any], method: Any, tokens: Any = T, **options: Any) -> PlannedStep:
    return PlannedStep(transformers.LlamaConfig(**config), method, P, B, tokens, ANSWER, torch.float32, **options)


def step_bytes(model: Any, loss_of: Any, tokens: int = T) -> int:
    """What a step allocates at its peak, beyond the model and its gradients: by the profiler's allocation events.

    LSTMs are torch's own: oneDNN's keep a workspace of their own, about twice what the gradients need."""
    ids = torch.randint(1, 3000, (B, tokens))
    enabled = torch.backends.mkldnn.set_flags(False)[0]
    try:
        loss_of(model, ids).backward()  # gradients exist from here on
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            loss_of(model, ids).backward()
    finally:
        torch.backends.mkldnn.set_flags(enabled)
    return peak(measured)


def softkv_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    ends = torch.full((B,), ids.shape[1] - ANSWER)
    logits = model(input_ids=ids, prompt_lengths=ends, logits_to_keep=ANSWER).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -ANSWER:].flatten())


def peft_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss


def step_plan(cost: Any) -> int:
    """Of a step on a CPU, where no Triton kernel allocates."""
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


LENGTHS = (40, 72, 192)  # rows take these in turn
ROWS = [LENGTHS[row % 3] for row in range(B)]


def test_rows_of_unequal_length_packed_and_padded() -> None:
    """softkv's trainer packs them; PEFT gets them padded to the longest."""
    config = transformers.LlamaConfig(**CONFIG)
    model = softkv.attach(transformers.LlamaForCausalLM(config), METHODS["p-tuning-v2"]).train()
    ids = [torch.randint(1, 3000, (length,)).tolist() for length in ROWS]
    labels = [[-100] * (len(row) - ANSWER) + row[-ANSWER:] for row in ids]
    examples = [{"input_ids": row, "labels": targets} for row, targets in zip(ids, labels, strict=True)]
    packed = softkv.PackingCollator()(examples)

    def packed_loss(model: Any, _: Any) -> torch.Tensor:
        output, targets = label_logits(model, dict(packed))
        return torch.nn.functional.cross_entropy(output.logits.float(), targets)

    def padded_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(T) < torch.tensor(ROWS)[:, None]
        return model(input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss

    costs = plan(job(CONFIG, "p-tuning-v2", LENGTHS))
    assert step_plan(costs["softkv"]) == pytest.approx(step_bytes(model, packed_loss), rel=0.15)
    base = transformers.LlamaForCausalLM(config)
    peer = peft.get_peft_model(base, peft.PrefixTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")).train()
    assert step_plan(costs["concatenating"]) == pytest.approx(step_bytes(peer, padded_loss), rel=0.15)


def test_flops_of_packed_rows_are_their_own() -> None:
    one = {length: plan(job(GROUPED, "p-tuning-v2", length))["softkv"] for length in LENGTHS}
    together = plan(job(GROUPED, "p-tuning-v2", LENGTHS))
    for what in ("forward_flops", "backward_flops", "attention_flops"):
        apart = sum(getattr(one[length], what) for length in ROWS) / B
        assert getattr(together["softkv"], what) == apart, what
    padded = plan(job(GROUPED, "p-tuning-v2", max(LENGTHS)))["concatenating"]
    assert together["concatenating"] == padded


@pytest.mark.parametrize(
    ("encoder", "tokens", "checkpointing"),
    [("lstm", T, False), ("lstm", T, True), ("attention", T, False), ("attention", 448, True)],
)
def test_encoders_allocate_what_is_planned(encoder: Any, tokens: int, checkpointing: bool) -> None:
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    model = softkv.attach(base, softkv.PTuningV2(length=P, encoder=encoder)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    cost = plan(job(GROUPED, "p-tuning-v2", tokens, encoder=encoder, checkpointing=checkpointing))["softkv"]
    assert step_plan(cost) == pytest.approx(step_bytes(model, softkv_loss, tokens), rel=0.15)
    assert cost.trainable == 16 * model.num_trainable()
    assert cost.prefix == (0 if checkpointing else 2 * 4 * B * P * 4 * 2 * 16)  # K, V, fp32: rows, slots, L, G, D


@pytest.mark.parametrize("encoder", ["lstm", "attention"])
def test_encoded_slots_concatenated_allocate_what_is_planned(encoder: Any) -> None:
    """No library does it this way: each block's K and V of the prompts go into transformers' own cache, in front of the
    tokens."""
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    model = softkv.attach(base, softkv.PTuningV2(length=P, encoder=encoder))
    rows, caches = model.soft, []
    base = model.detach().requires_grad_(False).train()
    base.set_attn_implementation("sdpa")

    def enter(block: Any, args: Any, kwargs: Any) -> None:
        prompt, lengths = kwargs["hidden_states"][:, : T - ANSWER], torch.full((B,), T - ANSWER)
        kwargs["past_key_values"].update(*rows.row_prefix(block.layer_idx, prompt, lengths), block.layer_idx)

    for layer in base.model.layers:
        layer.self_attn.register_forward_pre_hook(enter, with_kwargs=True)

    def loss(base: Any, ids: torch.Tensor) -> torch.Tensor:
        caches[:] = [transformers.DynamicCache()]
        seen = torch.ones(T, P + T, dtype=torch.bool).tril(P)[None, None].expand(B, 1, -1, -1)
        positions = torch.arange(P, P + T)[None]
        logits = base(ids, attention_mask=seen, position_ids=positions, past_key_values=caches[0]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())

    cost = plan(job(CONFIG, "p-tuning-v2", encoder=encoder))["concatenating"]
    assert step_plan(cost) == pytest.approx(step_bytes(base, loss), rel=0.15)


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


def test_flops_of_an_lstm_encoder() -> None:
    """Each way of the LSTM, the pooling and the MLP, over all prompts; backward twice that, but for the pooling's
    weights. (An LSTM's backward makes its input's gradient in layer 0 too, where nothing reads it.)"""
    C, E, L, kv = 128, 256, 4, 2 * 2 * 16  # kv: K and V of a slot
    plain, encoded = (plan(job(GROUPED, "p-tuning-v2", encoder=encoder))["softkv"] for encoder in (None, "lstm"))
    positions, h = B * (T - ANSWER), E // 2
    into, within = (2 * 2 * positions * 4 * h * width for width in (C, h))
    pool, mlp = 2 * P * positions * E, 2 * B * P * (E * E + E * kv)
    assert encoded.forward_flops - plain.forward_flops == L * (into + within + pool + mlp)
    assert encoded.backward_flops - plain.backward_flops == L * (2 * (into + within + mlp) + pool)


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
        (["--model", "smollm2-135m", "--lengths", "30,x"], "--lengths expects whole numbers such as 30,45,80, got"),
        (["--model", "smollm2-135m", "--lengths", "40,0"], "tokens expects at least 1 in every row, got 0"),
        (["--model", "smollm2-135m", "--lengths", "40,50", "-T", "9"], "--tokens and --lengths both set"),
        (["--model", "smollm2-135m", "--lengths", "40,50,60", "-B", "2"], "at most as many lengths as a device has"),
        (["--model", "smollm2-135m", "--lengths", "40,20"], "answer expects at most tokens = 20, got 32"),
        (["--model", "smollm2-135m", "--method", "p-tuning", "--encoder", "lstm"], "only read with method p-tuning-v2"),
    ],
)
def test_errors_in_a_line(options: list[str], message: str) -> None:
    said = CliRunner().invoke(app, ["plan", *options])
    assert said.exit_code == 2
    assert message in " ".join(said.stderr.split())


def test_other_architectures_and_those_that_softkv_cannot_run() -> None:
    small = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4}
    common: Any = ("p-tuning-v2", 4, 2, 16, 4, torch.float32)
    config = transformers.GPT2Config(**small, embd_pdrop=0, resid_pdrop=0, eos_token_id=None, bos_token_id=None)
    assert config.attn_pdrop > 0  # softkv sets it to 0, planned or run
    assert plan(PlannedStep(config, *common))["softkv"].total > 0
    with pytest.raises(ValueError, match="expected the config of a causal language model, got 't5'"):
        plan(PlannedStep(transformers.T5Config(), *common))
    bloom = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    assert plan(PlannedStep(bloom, "prompt-tuning", *common[1:]))["softkv"].total > 0  # inside its rows
    assert plan(PlannedStep(bloom, *common))["softkv"].total > 0  # in its past
    mamba = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ValueError, match="softkv can't run a MambaForCausalLM, so there is nothing to plan"):
        plan(PlannedStep(mamba, *common))


def test_both_ways_in_a_table_and_as_json(tmp_path: Path) -> None:
    transformers.LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    options = ["plan", "--model", str(tmp_path), "-B", "2", "-T", "64"]
    said = CliRunner().invoke(app, options)
    assert "concatenating" in said.stdout
    assert "training step" in said.stdout
    costs = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)["costs"]
    assert costs["softkv"]["total"] < costs["concatenating"]["total"]


def test_an_encoder_and_rows_that_differ_on_the_command_line(tmp_path: Path) -> None:
    transformers.LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    options = ["plan", "--model", str(tmp_path), "-B", "3", "--lengths", "40,50,90", "--encoder", "attention"]
    said = CliRunner().invoke(app, options)
    assert "p-tuning-v2 (attention encoder) P=64, B=3 T=40,50,90" in " ".join(said.stdout.split()), said.output
    content = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert (content["settings"]["tokens"], content["settings"]["encoder"]) == ([40, 50, 90], "attention")
    softkv, other = content["costs"]["softkv"], content["costs"]["concatenating"]
    assert softkv["prefix"] == other["prefix"]  # each row's own, either way
    assert softkv["forward_flops"] < other["forward_flops"]


def test_strategies_of_the_command(tmp_path: Path) -> None:
    transformers.LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    options = ["plan", "-m", str(tmp_path), "-B", "4", "-T", "64", "--answer", "4", "--devices", "4", "--strategies"]
    done = CliRunner().invoke(app, [*options, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == ["DDP×4", "FSDP2×4", "TP×2 FSDP2×2"]  # two key/value heads
    assert found["DDP×4"]["parameters"] == 4 * found["FSDP2×4"]["parameters"]
    assert "TP×2 FSDP2×2" in CliRunner().invoke(app, options).stdout
    done = CliRunner().invoke(app, [*options, "-B", "3"])
    assert done.exit_code == 2
    assert "4 devices can share neither 3 rows nor 2 key/value heads" in done.stderr
