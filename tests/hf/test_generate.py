"""Generation: token by token what recomputing everything without a cache gives, from sequences that begin with the ids
given."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.hf.continuations import STEPS, alone, answers, batch_of, prompts_of, truth
from tests.hf.naive import recomputing
from tests.hf.tiny import METHODS, NAMES, attach, model_of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_greedy_on_every_architecture(name: str, method: str) -> None:
    model = attach(name, method)
    for side in ("left", "right"):
        batch = batch_of(prompts_of(method), side, extra=1)
        assert answers(model.generate(**batch, max_new_tokens=STEPS), batch) == truth(name, method), side


GREEDY_WAYS: dict[str, dict[str, Any]] = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 2},
    "chunks of one token": {"prefill_chunk_size": 1},
    "scores and logits": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "a penalty that changes nothing": {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
}
MODELS = ["Llama", "Mistral: a sliding window", "Gemma2: softcap, alternating windows", "GPT2: learned positions"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_greedy_in_every_way(name: str, method: str) -> None:
    model, want = attach(name, method), truth(name, method)
    batch = batch_of(prompts_of(method), "left")
    for way, options in GREEDY_WAYS.items():
        if "chunk" in way and method == "p-tuning v2 encoder":
            with pytest.raises(ValueError, match="reads whole prompts at once"):
                model.generate(**batch, max_new_tokens=STEPS, **options)
            continue
        # Prompt lookup is for one row.
        batches = [alone(batch, row) for row in range(4)] if way == "prompt lookup" else [batch]
        got = []
        for one in batches:
            output = model.generate(**one, max_new_tokens=STEPS, **options)
            got += answers(output if isinstance(output, Tensor) else output.sequences, one)
        assert got == want, way


SEARCHES: dict[str, tuple[int, dict[str, Any]]] = {  # sequences a row, options
    "sampling": (1, {"do_sample": True, "temperature": 1.3}),
    "sampling, several sequences a row": (3, {"do_sample": True, "num_return_sequences": 3, "top_k": 9}),
    "beams": (1, {"num_beams": 3}),
    "all beams": (3, {"num_beams": 3, "num_return_sequences": 3}),
    "sampled beams": (1, {"num_beams": 2, "do_sample": True}),
    "repetition penalty": (1, {"repetition_penalty": 1.7}),
    "an end token: rows finish apart": (1, {"eos_token_id": list(range(2, 20))}),
    "an end token in beams": (2, {"eos_token_id": list(range(2, 12)), "num_beams": 3, "num_return_sequences": 2}),
    "beams in a static cache": (1, {"num_beams": 3, "cache_implementation": "static"}),
    "beams without cache": (1, {"num_beams": 3, "use_cache": False}),
    "min_p and typical": (1, {"do_sample": True, "min_p": 0.01, "typical_p": 0.9}),
}


@pytest.mark.parametrize("method", METHODS)
def test_searches(method: str) -> None:
    name = "Gemma2: softcap, alternating windows"
    prompts, model = prompts_of(method), attach(name, method).eval()
    shown = [[i for i in prompt if i >= 0] for prompt in prompts]
    naive = recomputing(model_of(name), model.soft, prompts)
    width = max(map(len, shown))
    for search, (repeats, options) in SEARCHES.items():
        torch.manual_seed(3)
        plain = {key: value for key, value in options.items() if key != "cache_implementation"} | {"use_cache": False}
        want = naive.generate(**batch_of(shown, "left"), max_new_tokens=3, **plain)[:, width:].tolist()
        for side in ("left", "right"):
            batch = batch_of(prompts, side)
            torch.manual_seed(3)
            assert answers(model.generate(**batch, max_new_tokens=3, **options), batch, repeats) == want, (search, side)


@pytest.mark.parametrize("method", METHODS)
def test_an_assistant_changes_nothing(method: str) -> None:
    name = "Llama"
    model, assistant = attach(name, method), model_of(name, num_hidden_layers=1)
    for row, want in enumerate(truth(name, method)):
        batch = alone(batch_of(prompts_of(method), "left"), row)
        sequences = model.generate(**batch, max_new_tokens=STEPS, assistant_model=assistant)
        assert answers(sequences, batch) == [want]


class Recorder:
    """A streamer that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.shown.append(value.flatten().tolist())

    def end(self) -> None:
        self.shown.append([])


@pytest.mark.parametrize("method", METHODS)
def test_lengths_streams_and_outputs(method: str) -> None:
    name = "Llama"
    model, want = attach(name, method), truth(name, method)[1]
    batch = alone(batch_of(prompts_of(method), "left"), 1)
    given = batch["input_ids"]
    T, streamer = given.shape[1], Recorder()
    # max_length and min_length count the ids given and the answer, nothing that is inserted.
    for options in (
        {"max_length": T + STEPS},
        {"generation_config": transformers.GenerationConfig(max_length=T + STEPS, pad_token_id=0)},
        {"max_length": T + STEPS, "streamer": streamer},
    ):
        assert answers(model.generate(**batch, **options), batch) == [want]
    ends = {"eos_token_id": want[0]}  # forbidden while the sequence is short
    least = model.generate(**batch, max_new_tokens=STEPS, min_new_tokens=2, **ends)
    assert torch.equal(model.generate(**batch, max_length=T + STEPS, min_length=T + 2, **ends), least)
    assert streamer.shown == [given.clamp(min=0)[0].tolist(), *([token] for token in want), []]
    output = model.generate(
        **batch, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True, output_hidden_states=True
    )
    assert answers(output.sequences, batch) == [want]
    assert [int(step.argmax()) for step in output.logits] == want
    assert len(model.generate(**batch)[0]) == T + 20  # transformers' default
    assert model.generate(given, max_new_tokens=STEPS).tolist() == output.sequences.tolist()
    assert model.generate(inputs=given, max_new_tokens=STEPS).tolist() == output.sequences.tolist()
    config = transformers.GenerationConfig(max_new_tokens=STEPS, pad_token_id=0)  # second, as transformers takes it
    assert model.generate(given, config).tolist() == output.sequences.tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "p-tuning"])
def test_from_embeddings(name: str, method: str) -> None:
    model = attach(name, method)
    for side in ("left", "right"):
        batch = batch_of(prompts_of(method), side)
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
        mask = {"attention_mask": batch["attention_mask"]}
        alone = model.generate(inputs_embeds=embeds, **mask, max_new_tokens=STEPS)
        assert alone.tolist() == truth(name, method)  # only what is new
        beside = model.generate(**batch, inputs_embeds=embeds, max_new_tokens=STEPS)
        assert answers(beside, batch) == truth(name, method)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_manual_decoding(name: str, method: str) -> None:
    model, want = attach(name, method).eval(), torch.tensor(truth(name, method))
    batch = batch_of(prompts_of(method), "left")
    caches = {
        "none given": None,
        "dynamic": transformers.DynamicCache(config=model.config),
        "static": transformers.StaticCache(config=model.config, max_cache_len=32),
    }
    for kind, cache in caches.items():
        ids, mask, got = batch["input_ids"], batch["attention_mask"], []
        with torch.no_grad():
            for step in range(STEPS):
                options = {} if step == 2 else {"use_cache": True}
                output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
                cache = output.past_key_values
                ids = output.logits[:, -1:].argmax(-1)
                got.append(ids)
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
        assert torch.equal(torch.cat(got, 1), want), kind
