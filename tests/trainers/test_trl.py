"""TRL's trainers, which call the decoder themselves, beside `SoftModel.forward`: losses and log-probabilities."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softkv
from softkv.hf.layout import IGNORED
from tests.hf.tiny import model_of, tokenizer
from tests.training_runs import METHODS, attach

trl = pytest.importorskip("trl")

ROWS = [
    {"prompt": "w5 w6 w7", "completion": " w8 w9"},
    {"prompt": "w15", "completion": " w16 w17 w18 w19"},
    {"prompt": "w25 w26 w27 w28 w29 w30", "completion": " w31"},
]
PAIRS = [
    {"prompt": "w5 w6 w7", "chosen": " w8 w9", "rejected": " w10"},
    {"prompt": "w15", "chosen": " w16", "rejected": " w17 w18 w19"},
]


def words() -> Any:
    known = tokenizer()
    known.eos_token = "<s>"
    return known


def arguments(kind: Any, directory: Path, **options: Any) -> Any:
    defaults = {"output_dir": str(directory), "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    defaults |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 0.05, "log_level": "error"}
    return kind(**(defaults | {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3} | options))


def sft(soft_model: softkv.SoftModel, directory: Path, rows: Any = ROWS, **options: Any) -> Any:
    data = datasets.Dataset.from_list(list(rows))
    return trl.SFTTrainer(
        soft_model,
        arguments(trl.SFTConfig, directory, **options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=words(),
    )


def surprise(model: Any, ids: list[int], labels: list[int]) -> Tensor:
    """The sum of `-log p` of a row's labels, of that row alone."""
    logits = model(torch.tensor([ids]), **({"labels": torch.tensor([labels])} if labels else {})).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum", ignore_index=IGNORED)


@pytest.mark.parametrize("layout", [{}, {"padding_free": True, "max_length": None}, {"packing": True}], ids=str)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "p-tuning"])
def test_the_sft_loss_is_that_of_the_soft_model(method: str, layout: dict[str, Any], tmp_path: Path) -> None:
    soft_model = attach(method)
    trainer = sft(soft_model, tmp_path, **layout)
    evaluated = trainer.evaluate()["eval_loss"]
    soft_model = attach(method).eval()
    total, count = torch.zeros(()), 0
    for row in ROWS:
        prompt, answer = (words()(text, add_special_tokens=False)["input_ids"] for text in row.values())
        ids = [1, *prompt, *answer, 1]
        labels = [IGNORED] * (1 + len(prompt)) + ids[1 + len(prompt) :]
        with torch.no_grad():
            total, count = total + surprise(soft_model, ids, labels), count + len(answer) + 1
    assert evaluated == pytest.approx(float(total / count), rel=2e-5)


def test_texts_without_the_soft_tokens_of_a_template_are_refused(tmp_path: Path) -> None:
    trainer = sft(attach("p-tuning"), tmp_path)
    for call in (trainer.evaluate, trainer.train):
        with pytest.raises(ValueError, match="input_ids hold none"):
            call()


@pytest.mark.parametrize("method", ["prompt-tuning after", "p-tuning v2", "p-tuning v2 encoder"])
def test_sft_learns_and_its_checkpoint_loads(method: str, tmp_path: Path) -> None:
    soft_model = attach(method)
    trainer = sft(soft_model, tmp_path, max_steps=8, save_strategy="steps", save_steps=8, packing=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    loaded = softkv.load(model_of("Llama"), tmp_path / "checkpoint-8")
    ids = torch.tensor([[1, 20, 21, 22]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, soft_model.eval()(ids).logits)


def test_all_tokens_of_a_text_are_learned(tmp_path: Path) -> None:
    soft_model = attach("p-tuning v2")
    evaluated = sft(soft_model, tmp_path, [{"text": "w5 w6 w7"}, {"text": "w9 w10 w11 w12 w13"}]).evaluate()[
        "eval_loss"
    ]
    rows = [[1, 5, 6, 7, 1], [1, 9, 10, 11, 12, 13, 1]]
    with torch.no_grad():
        total = sum(surprise(soft_model.eval(), ids, ids) for ids in rows)
    assert evaluated == pytest.approx(float(total) / (4 + 6), rel=2e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "p-tuning"])
def test_the_reference_of_dpo_is_the_bare_base(method: str, tmp_path: Path) -> None:
    soft_model = attach(method)
    data = datasets.Dataset.from_list(PAIRS)
    trainer = trl.DPOTrainer(
        soft_model,
        soft_model.base,
        arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=2, beta=0.5, max_steps=1),
        train_dataset=data,
        processing_class=words(),
    )
    before = [parameter.clone() for parameter in soft_model.soft.parameters()]
    trainer.train()
    logged = trainer.state.log_history[0]
    assert all(bool((a != b).any()) for a, b in zip(before, soft_model.soft.parameters(), strict=True) if a.numel())

    fresh = attach(method).eval()
    rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for row in PAIRS:
        prompt = [1, *words()(row["prompt"], add_special_tokens=False)["input_ids"]]
        for kind, found in rewards.items():
            ids = [*prompt, *words()(row[kind], add_special_tokens=False)["input_ids"], 1]
            labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
            with torch.no_grad():
                soft = surprise(fresh, ids, labels)
                with fresh.disabled():
                    found.append(float(0.5 * (surprise(fresh, ids, labels) - soft)))
    for kind, found in rewards.items():
        assert logged[f"rewards/{kind}"] == pytest.approx(sum(found) / 2, rel=1e-4, abs=1e-5)
    margins = torch.tensor(rewards["chosen"]) - torch.tensor(rewards["rejected"])
    assert logged["loss"] == pytest.approx(float(-F.logsigmoid(margins).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "method", ["prompt-tuning after", "prompt-tuning before", "p-tuning v2", "p-tuning v2 encoder"]
)
def test_grpo_scores_and_generates_with_the_prompt(method: str, tmp_path: Path) -> None:
    soft_model = attach(method)
    seen = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(set(text.split()))) for text in completions]

    trainer = trl.GRPOTrainer(
        soft_model,
        reward,
        arguments(
            trl.GRPOConfig,
            tmp_path,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
            temperature=0.7,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=words(),
    )
    ids, mask = torch.tensor([[0, 1, 5, 6, 7], [1, 15, 16, 17, 18]]), torch.tensor([[0, 1, 1, 1, 1], [1] * 5])
    with torch.no_grad():
        scored = trainer._get_per_token_logps_and_entropies(soft_model.eval(), ids, mask, logits_to_keep=2)[0]
        labels = ids.clone()
        labels[:, :3] = IGNORED
        logits = soft_model(ids, attention_mask=mask, labels=labels).logits[:, 2:4] / 0.7
    expected = logits.log_softmax(-1).gather(2, ids[:, 3:, None])[:, :, 0]
    torch.testing.assert_close(scored, expected)

    before = [parameter.clone() for parameter in soft_model.soft.parameters()]
    trainer.train()
    assert len(seen) == 2 * 4
    assert any(bool((a != b).any()) for a, b in zip(before, soft_model.soft.parameters(), strict=True))


def test_what_reaches_inside_carries_the_prompt() -> None:
    """Hidden states of the decoder, by every name that others reach it by."""
    for method in METHODS.keys() - {"p-tuning"}:
        soft_model = attach(method).eval()
        ids = torch.tensor([[1, 5, 6, 7], [1, 15, 16, 17]])
        with torch.no_grad():
            expected = soft_model(ids, output_hidden_states=True).hidden_states[-1]
            bare = soft_model.base.model(ids).last_hidden_state
            inner = (soft_model.base_model, soft_model.model, soft_model.get_decoder(), soft_model.get_base_model())
            for module in inner[:3]:
                torch.testing.assert_close(module(ids).last_hidden_state, expected)
                assert not torch.allclose(module(ids).last_hidden_state, bare, atol=1e-3)
            with soft_model.disabled():
                torch.testing.assert_close(soft_model.model(ids).last_hidden_state, bare)
        assert inner[3] is soft_model
        assert soft_model.model.layers is soft_model.base.model.layers
        assert soft_model.lm_head is soft_model.base.lm_head
