"""Encoder-decoders: ways to call them beside one forward of one adapter."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import softkv
from softkv.hf.encoder_decoder.rows import encoder_rows
from tests.hf.base_state import assert_same_state, state_of
from tests.hf.encoder_decoder_rows import METHODS, READ, WRITTEN, attached, labels_of, rows_of, sites_of
from tests.hf.encoder_decoders import Naive, embedded, model_of, padded, whisper
from tests.hf.naive import close

TWO = ["T5", "Bart"]
IDS, MASK = padded(READ, "left")


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS, mask: Tensor = MASK, **more: Any) -> Tensor:
    return model(ids, attention_mask=mask, labels=labels_of(WRITTEN), **more).logits[labels_of(WRITTEN) != -100]


@pytest.mark.parametrize("name", TWO)
def test_saved_loaded_switched_off_and_detached(name: str, tmp_path: Path) -> None:
    bare, fresh = logits_of(model_of(name)), model_of(name)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    attention = fresh.get_encoder().config._attn_implementation
    for kind, method in METHODS.items():
        model = softkv.attach(fresh, method)
        ids, mask = padded(rows_of(method), "left")
        want = logits_of(model, ids, mask)
        model.save_pretrained(tmp_path / kind)
        again = softkv.load(model_of(name), tmp_path / kind)
        assert torch.equal(logits_of(again, ids, mask), want)
        assert getattr(again.method, "where", None) == getattr(model.method, "where", None)
        with model.disabled():
            close(logits_of(model), bare)
            assert model.generate(IDS, attention_mask=MASK, max_new_tokens=3).shape[0] == len(READ)
        assert model.detach() is fresh
        assert fresh.get_encoder().config._attn_implementation == attention
        assert all(each.requires_grad for each in fresh.parameters())
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("name", [*TWO, "M2M100: positions by ids"])
def test_rows_of_different_adapters(name: str) -> None:
    """Prefixes of different lengths and sites, soft tokens, and the bare model, in one batch."""
    methods = {
        "long": softkv.PTuningV2(length=5, init_std=1.0),
        "short": softkv.PTuningV2(length=2, init_std=1.0, where=("decoder",)),
        "soft": softkv.PromptTuning(length=3, position="before"),
    }
    model = attached(name, methods["long"])
    for key, method in methods.items():
        model.add_adapter(key, method)
    for names in (["long", "short", "soft"], ["soft", None, "long"], [None, "short", "short"]):
        for side in ("left", "right"):
            ids, mask = padded(READ, side)
            output = model(ids, attention_mask=mask, labels=labels_of(WRITTEN), adapter_names=names)
            tokens = model.generate(ids, attention_mask=mask, adapter_names=names, num_beams=2, max_new_tokens=5)
            for row, key in enumerate(names):
                given = torch.tensor([READ[row]])
                alone = model(given, labels=torch.tensor([WRITTEN[row]]), adapter_names=[key])
                close(output.logits[row, : len(WRITTEN[row])], alone.logits[0])
                want = model.generate(given, adapter_names=[key], num_beams=2, max_new_tokens=5)[0]
                assert torch.equal(tokens[row, : len(want)], want)


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("kind", ["v2 everywhere", "prompt-tuning before"])
def test_every_way_to_generate(name: str, kind: str) -> None:
    model = attached(name, METHODS[kind])
    options = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False}
    want = model.generate(IDS, **options)
    for more in ({"use_cache": False}, {"cache_implementation": "static"}, {"num_return_sequences": 1, "num_beams": 1}):
        assert torch.equal(model.generate(IDS, **options, **more), want), more
    beams = model.generate(IDS, **options, num_beams=3, num_return_sequences=2)
    assert torch.equal(model.generate(IDS, **options, num_beams=3, num_return_sequences=2, use_cache=False), beams)
    assert torch.equal(model.generate(inputs_embeds=model.base.get_input_embeddings()(IDS), **options), want)
    begun = torch.tensor([[model.config.decoder_start_token_id, 7]] * len(READ))
    longer = model.generate(IDS, **options, decoder_input_ids=begun)
    assert torch.equal(model.generate(IDS, **options, decoder_input_ids=begun, use_cache=False), longer)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(IDS, **options, output_attentions=True)


@pytest.mark.parametrize("name", TWO)
def test_a_loop_of_ones_own(name: str) -> None:
    """Decoding in steps over a cache, under the adapter that filled it."""
    model = attached(name, METHODS["v2 everywhere"])
    model.add_adapter("other", softkv.PromptTuning(length=2))
    start = model.config.decoder_start_token_id
    want = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        written = torch.full((len(READ), 1), start)
        output = model(IDS, attention_mask=MASK, decoder_input_ids=written, use_cache=True)
        model.set_adapter("other")
        for _ in range(4):
            written = torch.cat([written, output.logits[:, -1:].argmax(-1)], 1)
            output = model(
                attention_mask=MASK, decoder_input_ids=written[:, -1:], past_key_values=output.past_key_values,
                encoder_outputs=(output.encoder_last_hidden_state,),
            )  # fmt: skip
    assert torch.equal(written, want)


@pytest.mark.parametrize("name", TWO)
def test_encoder_outputs(name: str) -> None:
    """They are taken where no soft prompt acts in the encoder."""
    model = attached(name, METHODS["v2 in the decoder"])
    ids, mask = padded(READ, "right")
    states = model.base.get_encoder()(ids, attention_mask=mask)
    want = logits_of(model, ids, mask)
    close(logits_of(model, None, mask, encoder_outputs=states), want)
    tokens = model.generate(encoder_outputs=states, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(tokens, model.generate(ids, attention_mask=mask, max_new_tokens=4))
    with pytest.raises(ValueError, match="expect padding on the right"):
        logits_of(model, None, MASK, encoder_outputs=states)
    for kind in ("v2 everywhere", "prompt-tuning after"):
        other = attached(name, METHODS[kind])
        with pytest.raises(ValueError, match="computed without the soft prompt of the encoder"):
            other.generate(encoder_outputs=states, attention_mask=mask)


@pytest.mark.parametrize("name", [*TWO, "M2M100: positions by ids"])
@pytest.mark.parametrize("names", [None, ["default", "short", "default"]], ids=["one adapter", "mixed"])
@torch.no_grad()
def test_embeddings_that_the_decoder_writes(name: str, names: list[str] | None) -> None:
    model = attached(name, softkv.PTuningV2(length=5, init_std=1.0))
    model.add_adapter("short", softkv.PTuningV2(length=2, init_std=1.0))
    ids = torch.tensor([[2, 8, 9], [2, 7, 5], [2, 3, 4]])  # no padding: M2M100 counts tokens by ids
    table = model.base.get_decoder().embed_tokens
    given = {"attention_mask": MASK, "adapter_names": names}
    want = model(IDS, decoder_input_ids=ids, **given).logits
    close(model(IDS, decoder_inputs_embeds=table(ids), **given).logits, want)


@pytest.mark.parametrize("name", TWO)
def test_recomputed_activations(name: str) -> None:
    """Gradients under checkpointing, in training mode."""
    gradients = []
    for recomputes in (False, True):
        model = attached(name, METHODS["v2 everywhere"]).train()
        if recomputes:
            model.gradient_checkpointing_enable()
        model(IDS, attention_mask=MASK, labels=labels_of(WRITTEN)).loss.backward()
        gradients.append(model.soft.k.grad)
    close(*gradients)


def test_a_text_as_the_start() -> None:
    """In T5's decoder the slots keep the biases of tokens in front: that text is written before what is written."""
    from tests.hf.tiny import tokenizer

    text = softkv.PTuningV2(init="text", init_text="w7 w8 w9", where="decoder")
    for name in ("T5", "UMT5: biases in each layer", "Bart"):
        model = softkv.attach(model_of(name), text, tokenizer=tokenizer())
        model.soft.k.data += torch.randn_like(model.soft.k) * 0.1
        bare = model_of(name)
        naive = Naive(bare, **sites_of(model), covers=True)
        for row, written in zip(READ, WRITTEN, strict=True):
            with torch.no_grad():
                got = model(torch.tensor([row]), decoder_input_ids=torch.tensor([written])).logits[0]
                close(got, naive(embedded(bare, row), written), 5e-5)
    for name in TWO:
        everywhere = softkv.PTuningV2(length=3, init="vocabulary")
        assert torch.isfinite(logits_of(softkv.attach(model_of(name), everywhere))).all()


def test_whisper() -> None:
    """Sound is read and no tokens: prefixes in the decoder and across."""
    base = whisper()
    features = torch.randn(2, 5, 20)
    torch.manual_seed(1)
    model = softkv.attach(base, softkv.PTuningV2(length=4, init_std=1.0))
    assert model.method.where == ("decoder", "cross")
    naive = Naive(whisper(), **sites_of(model))
    written = [[2, 7, 8, 9], [2, 11, 12, 13]]
    output = model(input_features=features, decoder_input_ids=torch.tensor(written))
    want = [naive(None, row, input_features=features[at : at + 1]) for at, row in enumerate(written)]
    close(output.logits, torch.stack(want), 5e-5)
    learned = list(model.soft.parameters())
    for got, each in zip(torch.autograd.grad(output.logits.square().sum(), learned),
                         torch.autograd.grad(torch.stack(want).square().sum(), learned), strict=True):  # fmt: skip
        close(got, each, 5e-5)
    tokens = model.generate(features, max_new_tokens=4, do_sample=False, return_timestamps=False)
    for at, row in enumerate(tokens.tolist()):
        truth = naive.generate(None, 2, 4, input_features=features[at : at + 1])
        assert row[: len(truth)] == truth or row == truth[-len(row) :]
    for method in (softkv.PromptTuning(length=2), softkv.PTuning(template="[P1] [X] [Y]")):
        with pytest.raises(ValueError, match="reads no tokens, so soft tokens"):
            softkv.attach(whisper(), method)
    with pytest.raises(ValueError, match="can't replace the attention 'encoder'"):
        softkv.attach(whisper(), softkv.PTuningV2(length=2, where="encoder"))


REFUSED: dict[str, tuple[Any, str]] = {
    "an encoder of prompts": (
        softkv.PTuningV2(length=2, encoder="lstm"),
        "prompt encoders don't support encoder-decoders",
    ),
    "a position past the table": (softkv.PTuningV2(length=46), "need positions up to 51, but .* ends at 47"),
}


def test_positions_of_stacks_that_take_them() -> None:
    model = softkv.attach(_berts(), softkv.PTuningV2(length=36, init_std=1.0))
    with pytest.raises(ValueError, match=r"need positions up to 41, but .* ends at 39"):
        model(IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :2])


@torch.no_grad()
def test_a_start_where_the_decoder_has_a_smaller_vocabulary() -> None:
    apart = {"decoder_vocab_size": 30, "share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    model = softkv.attach(model_of("Marian", **apart), softkv.PTuningV2(length=40))
    assert all(torch.isfinite(each).all() for each in model.soft.parameters())
    with pytest.raises(ValueError, match=r"expected init_std=0\.1"):
        softkv.attach(whisper(), softkv.PTuningV2(length=2, init="random"))


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    method, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        logits_of(softkv.attach(model_of("Bart"), method))


def test_inputs_that_do_not_fit() -> None:
    model = softkv.attach(model_of("Bart"), softkv.PTuningV2(length=2))
    labels = labels_of(WRITTEN)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": IDS}, "expects labels or decoder_input_ids"),
        ({"labels": labels}, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "labels": labels[:2]}, r"labels expects \[3, 4\]"),
        ({"input_ids": IDS, "attention_mask": MASK[:, 1:], "labels": labels}, r"attention_mask expects \[3, 6\]"),
        ({"input_ids": IDS, "labels": labels.flip(1)}, "labels expect -100 only after"),
        (
            {"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": MASK},
            "decoder_attention_mask expects padding on the right",
        ),
    ]
    for batch, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**batch)
    with pytest.raises(ValueError, match="BartEncoder can't run alone"):
        model.get_encoder()(IDS)
    with pytest.raises(ValueError, match="where expects some of 'encoder', 'decoder', 'cross'"):
        softkv.PTuningV2(length=2, where=("decoder", "head"))
    from tests.hf.tiny import model_of as causal

    with pytest.raises(ValueError, match="is for encoder-decoders, LlamaForCausalLM has one stack"):
        softkv.attach(causal("Llama"), softkv.PTuningV2(length=2, where="decoder"))


def _berts() -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}
    torch.manual_seed(3)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**sizes), transformers.BertConfig(**sizes)
    )
    config.update({"decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 1})
    return transformers.EncoderDecoderModel(config=config).eval()


def _led() -> Any:
    sizes = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "attention_window": 4}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 32, "pad_token_id": 0}
    torch.manual_seed(3)
    return transformers.LEDForConditionalGeneration(transformers.LEDConfig(**sizes)).eval()


BESIDE = {  # numbers of each token beside its id
    "token_type_ids": (_berts, [[0, 0, 0, 1, 1, 1], [0, 1, 1], [1, 0, 0, 1, 1]]),
    "position_ids": (_berts, [[3, 4, 5, 6, 7, 8], [9, 2, 1], [0, 1, 2, 3, 9]]),
    "global_attention_mask": (_led, [[1, 0, 0, 0, 1, 0], [0, 1, 0], [0, 0, 0, 1, 0]]),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("kind", ["v2 in the decoder", "prompt-tuning before", "prompt-tuning after", "p-tuning"])
@torch.no_grad()
def test_numbers_of_each_token_move_with_it(name: str, kind: str) -> None:
    build, numbers = BESIDE[name]
    if build is _led and kind == "v2 in the decoder":
        return  # it takes no prefix
    method, base = METHODS[kind], build()
    rows = rows_of(method)
    if isinstance(method, softkv.PTuning):  # the rows of `rows_of` hold soft tokens 1 and 2 at columns 0 and 3
        numbers = [[row[0], *row[:2], row[2], *row[2:]] for row in numbers]
    model = softkv.attach(base, method)
    bare, soft = build(), model.soft.soft_tokens()
    written = torch.tensor([[2, 8, 9]])
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        of_tokens, _ = padded(numbers, side)
        batch = {"attention_mask": mask, name: of_tokens, "decoder_input_ids": written.expand(len(rows), -1)}
        got = model(ids, **batch).logits
        tokens = model.generate(ids, attention_mask=mask, **{name: of_tokens}, max_new_tokens=3)
        for at, (row, each) in enumerate(zip(rows, numbers, strict=True)):
            alone = {name: torch.tensor([each])}
            close(got[at], model(torch.tensor([row]), **alone, decoder_input_ids=written).logits[0], 5e-5)
            want = model.generate(torch.tensor([row]), **alone, max_new_tokens=3)[0]
            assert torch.equal(tokens[at, : len(want)], want)
            if soft is None or name == "position_ids":
                continue
            embeds, joined = embedded(bare, row, soft), each
            if kind == "prompt-tuning before":
                embeds, joined = torch.cat([soft, embeds]), [0] * len(soft) + each
            elif kind == "prompt-tuning after":
                embeds, joined = torch.cat([embeds, soft]), each + [0] * len(soft)
            given = {name: torch.tensor([joined]), "attention_mask": torch.ones(1, len(joined), dtype=torch.long)}
            naive = bare(inputs_embeds=embeds[None], **given, decoder_input_ids=written).logits[0]
            close(got[at], naive, 5e-5)


def test_unknown_numbers_of_each_token_are_refused() -> None:
    model = attached("T5", METHODS["prompt-tuning before"])
    tokens = model._soft_rows(None, len(IDS), None).tokens(len(IDS), heads=True)
    given = {"input_ids": IDS, "attention_mask": MASK, "bbox": torch.zeros(*IDS.shape, 4)}
    with pytest.raises(ValueError, match="bbox has a value for each token"):
        encoder_rows(given, tokens, model._hooks.embed)


@torch.no_grad()
def test_recordings_longer_than_a_window() -> None:
    """Whisper goes on with the recordings that are not at their end: softkv can't tell which adapters are theirs."""
    model = softkv.attach(whisper(), softkv.PTuningV2(length=2, init_std=1.0))
    model.add_adapter("other", softkv.PTuningV2(length=2, init_std=1.0))
    model.generation_config.no_timestamps_token_id = 40
    model.generation_config.max_initial_timestamp_index = None
    frames = 2 * model.config.max_source_positions
    features, mask = torch.randn(2, 5, 3 * frames), torch.ones(2, 3 * frames, dtype=torch.long)
    mask[0, frames:] = 0
    options = {"attention_mask": mask, "return_timestamps": True, "max_new_tokens": 4}
    for names in (None, ["other", "other"]):
        assert len(model.generate(features, **options, adapter_names=names)) == 2
    with pytest.raises(ValueError, match="expected one adapter for all rows"):
        model.generate(features, **options, adapter_names=["default", "other"])


@torch.no_grad()
def test_attention_that_goes_out_at_short_rows() -> None:
    """BigBird's sparse attention turns itself off at the first short row, but not at those that attaching reads."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "block_size": 2}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"num_random_blocks": 1, "max_position_embeddings": 64}
    config = transformers.BigBirdPegasusConfig(**sizes)
    base = transformers.BigBirdPegasusForConditionalGeneration(config).eval()
    ids, written = torch.randint(3, 61, (1, 40)), torch.tensor([[2, 8]])
    want = copy.deepcopy(base)(ids, decoder_input_ids=written).logits
    before = state_of(base)
    model = softkv.attach(base, softkv.PromptTuning(length=2))
    with model.disabled():
        assert torch.equal(model(ids, decoder_input_ids=written).logits, want)
    assert_same_state(state_of(model.detach()), before)
    assert base.get_encoder().attention_type == "block_sparse"


def test_a_text_in_front_is_refused() -> None:
    from tests.hf.tiny import tokenizer

    for take in (softkv.Prefix.from_text, lambda model, tokens, text: softkv.bake(model, tokenizer=tokens, text=text)):
        with pytest.raises(ValueError, match="a text in front needs a causal decoder"):
            take(model_of("T5"), tokenizer(), "w5 w6")
    with pytest.raises(ValueError, match="expects a causal decoder"):
        softkv.bake(softkv.attach(model_of("T5"), METHODS["prompt-tuning before"]))
    with pytest.raises(ValueError, match="expected a method or a folder, got a Prefix"):
        softkv.attach(model_of("T5"), softkv.Prefix(torch.zeros(2, 1, 4, 3, 8), torch.zeros(2, 1, 4, 3, 8)))


def test_copies_and_two_models_on_one_base() -> None:
    base = model_of("Bart")
    one, two = (softkv.attach(base, METHODS[kind]) for kind in ("v2 everywhere", "v2 across"))
    want = logits_of(one)
    assert not torch.allclose(logits_of(two), want)
    assert torch.equal(logits_of(one), want)
    two.detach()
    assert torch.equal(logits_of(one), want)
    assert torch.equal(logits_of(copy.deepcopy(one)), want)


def test_generate_while_layers_are_recomputed() -> None:
    """The decoder would drop its cache in training mode, and go on from the last token alone."""
    model, options = attached("T5", METHODS["v2 everywhere"]).train(), {"attention_mask": MASK, "max_new_tokens": 4}
    want = model.generate(IDS, **options)
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing keeps no cache.*call eval\(\) first"):
        model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, **options, use_cache=False), want)
    assert torch.equal(model.eval().generate(IDS, **options), want)
