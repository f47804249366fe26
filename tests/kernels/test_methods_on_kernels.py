"""The four methods train and generate on the Triton engine as they do on the torch one."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import softkv
from softkv.methods.base import Method

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = {
    "prompt-tuning": softkv.PromptTuning(length=3, init="random"),
    "prompt-tuning before": softkv.PromptTuning(length=3, position="before", init="random"),
    "p-tuning": softkv.PTuning(template="[X] [P1][P2] [Y]", encoder_size=8),
    "prefix-tuning": softkv.PrefixTuning(length=5),
    "p-tuning v2": softkv.PTuningV2(length=5),
    "p-tuning v2 with an encoder": softkv.PTuningV2(length=2, encoder="lstm", encoder_size=8),
}


def run(method: Method, backend: str) -> tuple[list[float], list[int]]:
    """Two training losses on a packed batch, and the tokens generated afterwards from a left-padded one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = softkv.attach(LlamaForCausalLM(config).to(DEVICE), method, backend=backend).train()
    soft = [-1, -2] if isinstance(method, softkv.PTuning) else []
    rows = [
        {"input_ids": [*prompt, *soft, answer], "labels": [-100] * (len(prompt) + len(soft)) + [answer]}
        for prompt, answer in (([5, 6, 7, 8, 9], 11), ([12, 13], 14), ([15, 16, 17], 18))
    ]
    batch = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in softkv.PackingCollator()(rows).items()
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    ids = torch.tensor([[5, 6, 7, 8, *soft], [0, 0, 12, 13, *soft]], device=DEVICE)
    tokens = model.eval().generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=3, do_sample=False)
    return losses, tokens.tolist()


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_tokens(name: str) -> None:
    losses, tokens = run(METHODS[name], "triton")
    expected_losses, expected_tokens = run(METHODS[name], "torch")
    assert losses == pytest.approx(expected_losses, abs=1e-5 if DEVICE == "cpu" else 1e-3)
    assert tokens == expected_tokens
