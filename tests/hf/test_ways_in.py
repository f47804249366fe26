"""Other ways into a soft model: pipelines, compiled forwards, caches that are kept, copied and continued, threads."""

import copy
import logging
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.hf.continuations import STEPS, alone, answers, batch_of, prompts_of, truth
from tests.hf.naive import close
from tests.hf.tiny import METHODS, attach, model_of, tokenizer

PLAIN = [method for method in METHODS if method != "p-tuning"]  # its prompts hold ids that texts don't


@pytest.mark.parametrize("method", PLAIN)
def test_pipeline(method: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = attach("Llama", method).eval()
    texts = ["w5 w6 w7", "w9 w10 w11 w12 w13"]
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())
    for batch_size in (1, 2):
        found = pipe(texts, max_new_tokens=STEPS, batch_size=batch_size, return_full_text=False, do_sample=False)
        assert "SoftModel" not in caplog.text
        for text, answer in zip(texts, found, strict=True):
            ids = tokenizer()(text, return_tensors="pt")["input_ids"]
            want = tokenizer().decode(model.generate(ids, max_new_tokens=STEPS)[0, ids.shape[1] :])
            assert answer[0]["generated_text"].strip() == want


@pytest.mark.parametrize("method", METHODS)
def test_a_prefilled_cache_is_copied_and_continued(method: str) -> None:
    """Prompt caching: read a prompt once, answer from copies of its cache, several rows each."""
    name = "Mistral: a sliding window"
    model, want = attach(name, method).eval(), truth(name, method)[1]
    batch = alone(batch_of(prompts_of(method), "left"), 1)
    with torch.no_grad():
        output = model(batch["input_ids"], use_cache=True)
        for repeats in (1, 3):
            cache, ids, got = copy.deepcopy(output.past_key_values), output.logits[:, -1:].argmax(-1), []
            cache.batch_repeat_interleave(repeats)
            ids = ids.expand(repeats, 1)
            for _ in range(STEPS):
                got.append(ids)
                ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            assert torch.cat(got, 1).tolist() == [want] * repeats


@pytest.mark.parametrize("method", METHODS)
def test_conversations_go_on(method: str) -> None:
    """A second generate from the first one's cache; refused where a block belongs behind the new prompt."""
    model = attach("Llama", method).eval()
    ids = alone(batch_of(prompts_of(method), "left"), 1)["input_ids"]
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    longer = torch.cat([ids, first.sequences[:, ids.shape[1] :], torch.tensor([[5, 6, 7]])], 1)
    if method == "prompt-tuning after":
        with pytest.raises(ValueError, match="expects an empty cache"):
            model.generate(longer, max_new_tokens=4, past_key_values=first.past_key_values)
        return
    got = model.generate(longer, max_new_tokens=4, past_key_values=first.past_key_values)
    if method == "p-tuning v2 encoder":  # it still speaks for the first prompt, which is what its K/V were made of
        assert torch.equal(got[:, : longer.shape[1]], longer)
    else:
        assert torch.equal(got, model.generate(longer, max_new_tokens=4))


def test_compiled_forward() -> None:
    model = attach("Llama", "p-tuning v2", num_hidden_layers=1).eval()
    ids = torch.randint(2, 60, (2, 9))
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        close(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", ["p-tuning v2", "p-tuning v2 of a text"])
def test_compiled_forward_with_windows(method: str) -> None:
    """Rows of a batch are not taken for packed ones in a traced forward, with a padding mask and without."""
    model = attach("Gemma2: softcap, alternating windows", method).eval()
    ids = torch.randint(2, 60, (2, 7))
    for mask in (None, torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])):
        torch.compiler.reset()
        compiled: Any = torch.compile(model, backend="eager")
        with torch.no_grad():
            want = model(ids, attention_mask=mask).logits
            got = compiled(ids, attention_mask=mask).logits
        real = slice(None) if mask is None else mask.bool()
        close(got[real], want[real])


def test_threads_do_not_meet() -> None:
    """Two soft prompts on one base, and two generations of one, at the same time."""
    model, wants = attach("Llama", "prompt-tuning after").eval(), truth("Llama", "prompt-tuning after")
    batch = batch_of(prompts_of("prompt-tuning after"), "left")
    got: dict[int, Any] = {}

    def work(row: int) -> None:
        for _ in range(3):
            one = alone(batch, row)
            got[row] = answers(model.generate(**one, max_new_tokens=STEPS), one)[0]

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[row] for row in range(4)] == wants
    assert model_of("Llama").config._attn_implementation == "eager"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("explicit", [False, True])
def test_manual_steps_after_generate(method: str, side: str, explicit: bool) -> None:
    """From generate's cache, with the mask of the ids given (and with positions, or without)."""
    name = "GPT2: learned positions"
    model, want = attach(name, method).eval(), torch.tensor(truth(name, method))
    batch = batch_of(prompts_of(method), side)
    output = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    ids = output.sequences[:, -1:]
    assert torch.equal(ids, want[:, 2:3])
    mask = F.pad(batch["attention_mask"], (0, 3), value=1)
    for step in (3, 4):
        positions = {"position_ids": mask.sum(1, keepdim=True) - 1} if explicit else {}
        ids = model(ids, attention_mask=mask, past_key_values=output.past_key_values, **positions).logits.argmax(-1)
        assert torch.equal(ids, want[:, step : step + 1])
        mask = F.pad(mask, (0, 1), value=1)
