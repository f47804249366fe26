"""The four methods apart from any real model: what they learn, where it starts, what they give."""

import ast
import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softkv.methods import METHODS, PrefixTuning, PromptTuning, PTuning, PTuningV2
from softkv.methods.base import BaseShape, Method, SoftMatrices, SoftPrompt, SoftTokens, layers_like
from softkv.methods.encoders import EncodedRows, pool_rows
from softkv.methods.initial import RANDOM_SIZE
from softkv.methods.matrices import ReparametrizedMatrices
from softkv.methods.p_tuning import EncodedTokens
from softkv.prefix import Prefix

L, G, D, C, VOCAB = 3, 2, 4, 16, 60
BOS, EOS = 1, 2
TEXT = "abcdefg"  # 7 tokens


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Base:
    """A frozen model whose K/V of a token depend on the token, its position and the layer."""

    def __init__(self, embedding_size: int = C) -> None:
        self.shape = BaseShape(L, G, D, D, C, embedding_size, VOCAB)
        generator = torch.Generator().manual_seed(0)
        # bf16: what a base gives must reach the learned parameters as fp32.
        self.table = (0.05 * torch.randn(VOCAB, embedding_size, generator=generator)).bfloat16()
        self.kv = torch.randn(2, L, 1, G, VOCAB, D, generator=generator).bfloat16()

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def prefix_of(self, ids: Tensor, *, standing_in: bool = True) -> Prefix:
        k, v = self.kv[:, :, :, :, ids] + 0.5 * torch.arange(len(ids))[:, None]
        return Prefix(k, v, window_covers=True)

    def words(self) -> Tensor:
        return torch.arange(VOCAB)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        ids = [ord(letter) - ord("a") + 10 for letter in text]
        return [BOS, *ids, EOS] if special else ids


class NoTokenizer(Base):
    """What loading must get by with."""

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        raise AssertionError("no tokenizer was given")

    def embed(self, ids: Tensor) -> Tensor:
        raise AssertionError("the model must not run")

    def prefix_of(self, ids: Tensor, *, standing_in: bool = True) -> Prefix:
        raise AssertionError("the model must not run")


class OwnMean(nn.Module):
    """An encoder of one's own: each position and the mean of its row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * C, 12)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mean = hidden.sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp_min(1)
        return self.linear(torch.cat([hidden, mean.expand_as(hidden)], -1))


TEMPLATE = "[X] is [P1] and [P2] [P3] [Y]"
ENCODED: dict[str, PTuningV2] = {
    "lstm": PTuningV2(length=5, encoder="lstm", encoder_size=6),
    "lstm a layer": PTuningV2(length=5, encoder="lstm", encoder_size=6, share_encoder=False),
    "attention": PTuningV2(length=5, encoder="attention", encoder_size=8),
    "attention a layer": PTuningV2(length=5, encoder="attention", encoder_size=8, share_encoder=False),
    "custom": PTuningV2(length=5, encoder=OwnMean()),
    "custom a layer": PTuningV2(length=5, encoder=OwnMean(), share_encoder=False),
}
ALL: dict[str, Method] = {
    "prompt": PromptTuning(length=5),
    "prompt before": PromptTuning(length=5, position="before", init="random"),
    "prompt text": PromptTuning(init="text", init_text=TEXT),
    "p-tuning": PTuning(template=TEMPLATE, encoder_size=8),
    "p-tuning mlp": PTuning(template=TEMPLATE, encoder="mlp", encoder_size=8),
    "p-tuning text": PTuning(template=TEMPLATE, encoder_size=8, prompt_text=TEXT),
    "prefix": PrefixTuning(length=5),
    "prefix vocabulary": PrefixTuning(length=5, init="vocabulary"),
    "prefix text": PrefixTuning(init="text", init_text=TEXT),
    "prefix reparametrized": PrefixTuning(length=5, reparametrize=True, reparametrize_size=7),
    "v2": PTuningV2(length=5),
    "v2 vocabulary": PTuningV2(length=5, init="vocabulary"),
    "v2 text": PTuningV2(init="text", init_text=TEXT),
    "v2 reparametrized": PTuningV2(length=5, reparametrize=True, reparametrize_size=7),
    **ENCODED,
}
every_method = pytest.mark.parametrize("method", ALL.values(), ids=ALL.keys())
every_encoder = pytest.mark.parametrize("method", ENCODED.values(), ids=ENCODED.keys())


def trainable(soft: SoftPrompt) -> int:
    return sum(parameter.numel() for parameter in soft.parameters() if parameter.requires_grad)


def values(soft: SoftPrompt) -> list[Tensor]:
    """Whatever a soft prompt gives at a forward pass."""
    if soft.encodes_rows:
        hidden = torch.linspace(-1, 1, 2 * 4 * C).view(2, 4, C)
        return [part for layer in range(L) for part in soft.row_prefix(layer, hidden, torch.tensor([4, 2]))]
    prefix, tokens = soft.prefix(), soft.soft_tokens()
    assert (prefix is None) != (tokens is None)
    return [tokens] if prefix is None else [prefix.k, prefix.v]


def same(left: SoftPrompt, right: SoftPrompt) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(left), values(right), strict=True))


# What is learned ------------------------------------------------------------------------------------------------------


def lstm(width: int, half: int) -> int:
    """One bidirectional layer: four gates with two biases, each way."""
    return 2 * 4 * half * (width + half + 2)


LSTM_V2 = lstm(C, 3) + 6 * 7 + 2 * G * D * 7
ATTENTION_V2 = 8 * (C + 1) + 4 * 8 + 8 * (12 * 8 + 9) + 8 * 9 + 2 * G * D * 9
CUSTOM_V2 = 12 * (2 * C + 1) + 12 * 13 + 2 * G * D * 13
COUNTS = {
    "prompt": 5 * C,
    "prompt before": 5 * C,
    "prompt text": 7 * C,
    "p-tuning": 3 * C + lstm(C, 4) + lstm(8, 4) + 8 * 9 + C * 9,
    "p-tuning mlp": 3 * C + 8 * (C + 1) + 8 * 9 + C * 9,
    "p-tuning text": lstm(C, 4) + lstm(8, 4) + 8 * 9 + C * 9,
    "prefix": 2 * 5 * G * D,
    "prefix vocabulary": 2 * 5 * G * D,
    "prefix text": 2 * 8 * G * D,
    "prefix reparametrized": 5 * 7 + 7 * 8 + 2 * G * D * 8,
    "v2": 2 * 5 * G * D * L,
    "v2 vocabulary": 2 * 5 * G * D * L,
    "v2 text": 2 * 8 * G * D * L,
    "v2 reparametrized": 5 * 7 + 7 * 8 + 2 * G * D * L * 8,
    "lstm": LSTM_V2,
    "lstm a layer": L * LSTM_V2,
    "attention": ATTENTION_V2,
    "attention a layer": L * ATTENTION_V2,
    "custom": CUSTOM_V2,
    "custom a layer": L * CUSTOM_V2,
}


@pytest.mark.parametrize("name", ALL)
def test_trainable_parameters_by_formula(name: str) -> None:
    assert trainable(ALL[name].build(Base())) == COUNTS[name]


@every_method
def test_everything_learned_gets_a_gradient_in_fp32(method: Method) -> None:
    soft = method.build(Base())
    sum(part.square().sum() for part in values(soft)).backward()
    for name, parameter in soft.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@every_method
def test_where_it_goes(method: Method) -> None:
    soft = method.build(Base())
    if isinstance(method, PromptTuning | PTuning):
        assert soft.placement == ("inline" if isinstance(method, PTuning) else method.position)
        assert soft.soft_tokens().shape == (soft.config.length, C)
    else:
        assert soft.placement is None
    if isinstance(method, PrefixTuning | PTuningV2) and not soft.encodes_rows:
        layers = 1 if isinstance(method, PrefixTuning) else L
        assert soft.prefix().k.shape == (layers, 1, G, soft.config.length, D)
    assert soft.encodes_rows == (method in ENCODED.values())


@pytest.mark.parametrize("method", [PrefixTuning(length=5), PTuningV2(length=5)])
def test_the_prefix_is_the_parameters_without_a_copy(method: Method) -> None:
    soft = method.build(Base())
    assert isinstance(soft, SoftMatrices)
    assert soft.prefix().k is soft.k
    assert soft.prefix().v is soft.v


def test_embeddings_narrower_than_the_hidden_size() -> None:
    base = Base(embedding_size=6)
    assert PromptTuning(length=5).build(base).soft_tokens().shape == (5, 6)
    assert PTuning(template=TEMPLATE).build(base).soft_tokens().shape == (3, 6)


def test_methods_import_neither_transformers_nor_kernels() -> None:
    folder = Path(__file__).parents[1] / "softkv" / "methods"
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                known = name.startswith(("softkv.methods", "softkv.prefix", "torch", "typing_extensions"))
                assert known or name.split(".")[0] in __import__("sys").stdlib_module_names, f"{file.name}: {name}"


# Where it starts ------------------------------------------------------------------------------------------------------

IDS = torch.tensor(Base().tokenize(TEXT))


@pytest.mark.parametrize("length", [None, 7, 3, 17])
def test_soft_tokens_from_a_text_are_its_embeddings(length: int | None) -> None:
    soft = PromptTuning(length=length, init="text", init_text=TEXT).build(Base())
    expected = IDS.repeat(3)[: length or 7]
    assert torch.equal(soft.soft_tokens(), Base().table[expected].float())
    assert soft.config.length == len(expected)


@pytest.mark.parametrize("length", [None, 8, 3, 17])
def test_v2_from_a_text_is_that_text_in_context(length: int | None) -> None:
    soft = PTuningV2(length=length, init="text", init_text=TEXT).build(Base())
    # BOS stands once in front, EOS nowhere; a text that is too short is repeated without its BOS.
    expected = Base().prefix_of(torch.cat([torch.tensor([BOS]), IDS.repeat(3)])[: length or 8])
    prefix = soft.prefix()
    assert torch.equal(prefix.k, expected.k.float())
    assert torch.equal(prefix.v, expected.v.float())
    assert prefix.window_covers


@pytest.mark.parametrize("name", ["v2", "v2 vocabulary", "prefix", "prefix text", "v2 reparametrized"])
def test_learned_slots_stay_outside_windows(name: str) -> None:
    soft = ALL[name].build(Base())
    assert not soft.prefix().window_covers
    assert not soft.folded().prefix().window_covers


def test_prefix_tuning_from_a_text_is_the_mean_over_layers() -> None:
    prefix = PrefixTuning(init="text", init_text=TEXT).build(Base()).prefix()
    real = Base().prefix_of(torch.cat([torch.tensor([BOS]), IDS]))
    torch.testing.assert_close(prefix.k, real.k.float().mean(0, keepdim=True))
    torch.testing.assert_close(prefix.v, real.v.float().mean(0, keepdim=True))


def test_vocabulary_samples_different_tokens() -> None:
    table = Base().table.float()
    rows = PromptTuning(length=VOCAB).build(Base()).soft_tokens()
    assert torch.equal(rows.sort(0).values, table.sort(0).values)
    k = PTuningV2(length=5, init="vocabulary").build(Base()).k
    first = k[:, :, :, 0].detach()  # position 0 adds nothing to a token's K
    assert any(torch.equal(first, Base().kv[0, :, :, :, token].float()) for token in range(VOCAB))
    assert len(PromptTuning(length=2 * VOCAB + 1).build(Base()).soft_tokens()) == 2 * VOCAB + 1


def test_random_starts_have_the_scale_they_promise() -> None:
    base = Base()
    scale = base.table.float().std().item()
    prompt = PromptTuning(length=500, init="random").build(base).soft_tokens()
    assert prompt.std().item() == pytest.approx(scale, rel=0.05)
    many = " ".join(f"[P{number}]" for number in range(1, 201)) + "[Y]"
    for method in (PTuning(template=many), PTuning(template=many, encoder="mlp")):
        assert method.build(base).soft_tokens().std().item() == pytest.approx(scale, rel=0.01)
    for std in (None, 0.05):
        for kind in (PrefixTuning, PTuningV2):
            k = kind(length=200, init_std=std, reparametrize=True).build(base).prefix().k
            assert k.std().item() == pytest.approx(std or 0.1, rel=0.1)
        for encoder in ("lstm", "attention"):
            soft = PTuningV2(length=8, encoder=encoder, init_std=std).build(base)
            k, v = soft.row_prefix(0, torch.randn(8, 16, C), torch.full((8,), 16))
            assert torch.stack([k, v]).std().item() == pytest.approx(std or 0.1, rel=0.3)


def test_random_slots_are_a_part_of_the_models_own_size_in_each_layer() -> None:
    base = Base()
    base.kv[:, 1] *= 40  # one layer's K and V
    real = base.prefix_of(torch.arange(VOCAB))
    random = PTuningV2(length=VOCAB, init="random").build(base).prefix()
    for x, y in ((random.k, real.k), (random.v, real.v)):
        expected = RANDOM_SIZE * y.float().square().mean((1, 2, 3, 4)).sqrt()
        torch.testing.assert_close(x.square().mean((1, 2, 3, 4)).sqrt(), expected, rtol=0.3, atol=0)
        assert expected.max() > 2 * expected.min()


def test_nothing_said_starts_from_real_tokens_with_a_length_of_its_own() -> None:
    base = Base()
    v2, shared, prompt = (kind().build(base) for kind in (PTuningV2, PrefixTuning, PromptTuning))
    assert (v2.config.length, shared.config.length, prompt.config.length) == (32, 32, 20)
    assert (v2.config.init, shared.config.init, prompt.config.init) == ("vocabulary",) * 3
    assert any(torch.equal(v2.k[:, :, :, 0], base.kv[0, :, :, :, token].float()) for token in range(VOCAB))
    for kind in (PTuningV2, PrefixTuning):  # a deviation asks for a random start
        assert kind(length=50, init_std=0.01).build(base).k.std().item() == pytest.approx(0.01, rel=0.1)
    assert PTuning().length == 8


def test_one_pair_for_layers_that_differ_in_shape() -> None:
    base = Base()
    sizes = layers_like([(G, D, D), (1, 2 * D, D), (G, D, D)])
    base.shape = dataclasses.replace(base.shape, **sizes)
    assert sizes["layers"] == L
    for options in ({}, {"init": "vocabulary"}, {"reparametrize": True}):
        with pytest.raises(ValueError, match="layers differ"):
            PrefixTuning(length=2, **options).build(base)
    of_each = PTuningV2(length=2, init_std=0.1).build(base)
    assert [tuple(each.shape) for name, each in of_each.named_parameters() if name.startswith("k")] == [
        (1, G, 2, D), (1, 1, 2, 2 * D), (1, G, 2, D)
    ]  # fmt: skip


# Configs --------------------------------------------------------------------------------------------------------------

NAMES = {kind: name for name, kind in METHODS.items()}


def test_names_of_the_methods() -> None:
    expected = {"prompt-tuning": PromptTuning, "p-tuning": PTuning, "prefix-tuning": PrefixTuning}
    assert expected | {"p-tuning-v2": PTuningV2} == METHODS


@every_method
def test_saved_and_loaded_it_gives_the_same(method: Method) -> None:
    soft = method.build(Base()).eval()
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.add_(torch.randn_like(parameter))
    folded = soft.folded()
    saved = json.dumps({"method": NAMES[type(method)], **dataclasses.asdict(folded.config)})

    options = json.loads(saved)
    config = METHODS[options.pop("method")](**options)
    if options.get("encoder") == "custom":
        config = dataclasses.replace(config, encoder=OwnMean())
    else:
        assert config == folded.config
    base = NoTokenizer() if not isinstance(method, PTuningV2) or method.encoder is None else Base()
    loaded = config.build(base, folded=True).eval()
    loaded.load_state_dict({name: value.clone() for name, value in folded.state_dict().items()})
    assert same(loaded, folded)
    torch.testing.assert_close(values(loaded), values(soft))
    assert loaded.placement == soft.placement
    if (prefix := loaded.prefix()) is not None:
        assert prefix.window_covers == soft.prefix().window_covers


@every_method
def test_training_state_loads_into_a_fresh_build(method: Method) -> None:
    soft, other = method.build(Base()), method.build(Base())
    other.load_state_dict(soft.state_dict())
    assert same(soft, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptTuning(length=0), "length expects an integer from 1 to 2147483647, got 0"),
        (lambda: PromptTuning(length=True), "got True"),
        (lambda: PromptTuning(length=2.0), "got 2.0"),
        (lambda: PromptTuning(length=2, position="behind"), "position expects one of 'after', 'before', got 'behind'"),
        (lambda: PromptTuning(length=2, init="zeros"), "init expects one of 'random', 'vocabulary', 'text'"),
        (lambda: PromptTuning(length=2, init="text"), "give init_text"),
        (lambda: PromptTuning(length=2, init_text="a"), 'init_text is only read with init="text"'),
        (
            lambda: PromptTuning(length=2, template="[X] [P1] [Y]"),
            "PromptTuning expects a template without soft tokens",
        ),
        (lambda: PrefixTuning(length=2, template="[X] [P1] [Y]"), "PrefixTuning expects a template without"),
        (lambda: PTuningV2(length=2, template="[X] [P1] [Y]"), "PTuningV2 expects a template without"),
        (lambda: PTuningV2(length=2, template="[X]"), "has no answer"),
        (lambda: PTuning(template="[X] [Y]"), "PTuning expects soft tokens"),
        (lambda: PTuning(template=TEMPLATE, encoder="gru"), "encoder expects one of 'lstm', 'mlp'"),
        (lambda: PTuning(template=TEMPLATE, encoder_size=7), "even number"),
        (lambda: PTuning(template=TEMPLATE, prompt_text=""), "prompt_text expects a text"),
        (lambda: PrefixTuning(length=2, init_std=0), "init_std expects a number above 0"),
        (lambda: PrefixTuning(length=2, init="vocabulary", init_std=1), "init_std is only read"),
        (lambda: PrefixTuning(length=2, init="vocabulary", reparametrize=True), "reparametrize=True expects init"),
        (lambda: PrefixTuning(length=2, reparametrize_size=3), "only read with reparametrize=True"),
        (lambda: PTuningV2(length=2, reparametrize=True, reparametrize_size=0), "from 1 to 2147483647, got 0"),
        (lambda: PTuningV2(length=2, encoder="gru"), "encoder expects one of"),
        (lambda: PTuningV2(length=2, encoder_size=4), "only read with an encoder"),
        (lambda: PTuningV2(length=2, share_encoder=False), "only read with an encoder"),
        (lambda: PTuningV2(length=2, encoder="lstm", encoder_size=5), "multiple of 2, got 5"),
        (lambda: PTuningV2(length=2, encoder="attention", encoder_size=6), "multiple of 4, got 6"),
        (lambda: PTuningV2(length=2, encoder=OwnMean(), encoder_size=6), "only read with encoder="),
        (lambda: PTuningV2(length=2, encoder="lstm", reparametrize=True), "an encoder expects"),
        (lambda: PTuningV2(length=2, encoder="lstm", init="vocabulary"), "an encoder expects"),
        (lambda: PTuningV2(length=2, encoder="custom").build(Base()), "give the module again"),
        (lambda: PTuningV2(length=2, window_covers=True, encoder="lstm"), "read for plain matrices only"),
        (lambda: PTuningV2(length=2, window_covers=False, reparametrize=True), "read for plain matrices only"),
        (lambda: PTuningV2(length=2, window_covers="yes"), "window_covers expects True or False"),
        (lambda: PTuningV2(length=2, continues=None), "continues expects True or False"),
        (lambda: PromptTuning(init="text", init_text=" ").build(Blank()), "at least one token"),
        (lambda: PTuning(template=TEMPLATE, prompt_text=" ").build(Blank()), "at least one token"),
        (lambda: PTuningV2(length=2).build(Base()).row_prefix(0, torch.zeros(1, 1, C), torch.ones(1)), "does not enc"),
    ],
)
def test_what_does_not_fit_is_a_clear_error(make, message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make()


class Blank(Base):
    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return []


# P-tuning's encoder ---------------------------------------------------------------------------------------------------


COMPUTED = [PTuning(template=TEMPLATE), PTuning(template=TEMPLATE, encoder="mlp"), ALL["v2 reparametrized"]]


@pytest.mark.parametrize("method", COMPUTED)
def test_what_is_computed_follows_the_weights(method: Method) -> None:
    soft = method.build(Base()).eval()
    first, second = method.build(Base()).state_dict(), method.build(Base()).state_dict()

    def check(change: str) -> None:
        fresh = method.build(Base()).to(next(soft.parameters()).dtype).eval()
        fresh.load_state_dict(soft.state_dict())
        with torch.no_grad():
            expected = values(fresh)[0]
            assert values(soft)[0].dtype == expected.dtype, change
            assert torch.equal(values(soft)[0], expected), change

    check("nothing")
    soft.load_state_dict(first)
    check("load_state_dict")
    soft.load_state_dict(second, assign=True)
    check("load_state_dict, assigned")
    soft.load_state_dict(first, assign=True)
    check("load_state_dict, assigned again: no version counter tells")
    soft.double()
    check("another dtype")
    sum(part.sum() for part in values(soft)).backward()
    torch.optim.SGD(soft.parameters(), lr=1.0).step()
    check("an optimizer's step in evaluation mode")
    with torch.inference_mode():
        assert torch.equal(values(copy.deepcopy(soft))[0], values(soft)[0])


def test_folded_drops_the_encoder() -> None:
    soft = PTuning(template=TEMPLATE).build(Base())
    folded = soft.folded()
    assert isinstance(soft, EncodedTokens)
    assert isinstance(folded, SoftTokens)
    assert set(folded.state_dict()) == {"embeddings"}
    torch.testing.assert_close(folded.soft_tokens(), soft.soft_tokens())
    assert not folded.soft_tokens().grad_fn
    assert folded.placement == "inline"


def test_folded_drops_the_reparametrisation() -> None:
    for method, layers in ((PrefixTuning, 1), (PTuningV2, L)):
        soft = method(length=5, reparametrize=True).build(Base())
        folded = soft.folded()
        assert isinstance(soft, ReparametrizedMatrices)
        assert set(folded.state_dict()) == {"k", "v"}
        assert trainable(folded) == 2 * 5 * G * D * layers
        torch.testing.assert_close(values(folded), values(soft))
        assert folded.prefix().k.is_contiguous()


@pytest.mark.parametrize("text", ["ab", "abc", TEXT])
def test_the_encoder_reads_the_pooled_embeddings_of_a_text(text: str) -> None:
    base = Base()
    soft = PTuning(template=TEMPLATE, prompt_text=text).build(base)
    rows = base.table[torch.tensor(base.tokenize(text))].float()
    pooled = F.adaptive_avg_pool1d(rows.T[None], 3)[0].T
    torch.testing.assert_close(F.cosine_similarity(soft.inputs, pooled), torch.ones(3))
    assert "inputs" in soft.state_dict()
    assert "inputs" not in dict(soft.named_parameters())


def test_the_encoder_is_bidirectional() -> None:
    soft = PTuning(template=TEMPLATE).build(Base())
    assert isinstance(soft, EncodedTokens)
    for at in (0, 2):
        (gradient,) = torch.autograd.grad(soft.soft_tokens()[at].sum(), soft.inputs)
        assert (gradient.abs().sum(1) > 0).all()


def test_autocast_leaves_the_encoder_in_fp32() -> None:
    soft = PTuning(template=TEMPLATE).build(Base())
    expected = soft.soft_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft.soft_tokens(), expected)


# Encoder mode of P-tuning v2 ------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([6, 9, 1, 0, 5])  # longer than the slots, the longest, one, none, as many as the slots


@every_encoder
def test_a_row_depends_on_neither_padding_nor_neighbours(method: PTuningV2) -> None:
    soft = method.build(Base())
    hidden = torch.randn(5, 9, C)
    for row, length in enumerate(LENGTHS.tolist()):
        hidden[row, length:] = torch.nan
    k, v = soft.row_prefix(1, hidden, LENGTHS)
    assert k.shape == v.shape == (5, G, 5, D)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = soft.row_prefix(1, hidden[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close((k[row], v[row]), (alone[0][0], alone[1][0]), atol=1e-6, rtol=1e-5)
    assert torch.isfinite(k).all(), "a prompt of length 0 too"
    assert torch.isfinite(v).all()


@every_encoder
def test_gradients_reach_the_hidden_states_of_the_prompt_only(method: PTuningV2) -> None:
    soft = method.build(Base())
    hidden = torch.randn(5, 9, C, requires_grad=True)
    k, v = soft.row_prefix(0, hidden, LENGTHS)
    (k.square().sum() + v.square().sum()).backward()
    assert hidden.grad is not None
    inside = torch.arange(9) < LENGTHS[:, None]
    assert (hidden.grad[inside].abs().sum(-1) > 0).all()
    assert (hidden.grad[~inside] == 0).all()
    for name, parameter in soft.named_parameters():
        if not name.startswith(("encoders.1", "encoders.2", "mlps.1", "mlps.2")):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@every_encoder
def test_one_encoder_for_all_layers_or_one_each(method: PTuningV2) -> None:
    soft = method.build(Base())
    hidden = torch.randn(2, 4, C)
    first, last = (soft.row_prefix(layer, hidden, torch.tensor([4, 4]))[0] for layer in (0, L - 1))
    assert torch.equal(first, last) == method.share_encoder


@every_encoder
def test_hidden_states_in_bf16_and_under_autocast(method: PTuningV2) -> None:
    soft = method.build(Base())
    hidden = torch.randn(5, 9, C).bfloat16()
    k, v = soft.row_prefix(0, hidden, LENGTHS)
    exact, _ = soft.row_prefix(0, hidden.float(), LENGTHS)
    assert k.dtype == v.dtype == torch.bfloat16
    assert torch.equal(k, exact.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft.row_prefix(0, hidden.float(), LENGTHS)[0], exact)


@every_encoder
def test_the_order_of_a_prompt_matters(method: PTuningV2) -> None:
    soft = method.build(Base())
    hidden = torch.randn(1, 9, C)
    k, _ = soft.row_prefix(0, hidden, torch.tensor([9]))
    flipped, _ = soft.row_prefix(0, hidden.flip(1), torch.tensor([9]))
    assert not torch.allclose(k, flipped)


@pytest.mark.parametrize("encoder", ["lstm", "attention"])
def test_encoders_look_both_ways(encoder: str) -> None:
    soft = PTuningV2(length=9, encoder=encoder).build(Base())
    hidden = torch.randn(1, 9, C, requires_grad=True)
    k, _ = soft.row_prefix(0, hidden, torch.tensor([9]))
    for slot in (0, 8):
        (gradient,) = torch.autograd.grad(k[:, :, slot].sum(), hidden, retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("slots", [1, 2, 5, 9, 13])
def test_pooling_is_adaptive_over_each_rows_length(slots: int) -> None:
    states = torch.randn(5, 9, 3)
    pooled = pool_rows(states, LENGTHS, slots)
    for row, length in enumerate(LENGTHS.tolist()):
        if length:
            expected = F.adaptive_avg_pool1d(states[row, :length].T[None], slots)[0].T
            torch.testing.assert_close(pooled[row], expected)
    assert (pooled[3] == 0).all()


class Wrong(nn.Module):
    def __init__(self, give: object) -> None:
        super().__init__()
        self.give = give

    def forward(self, hidden: Tensor, mask: Tensor) -> object:
        return self.give(hidden) if callable(self.give) else self.give


@pytest.mark.parametrize(
    "give", [None, lambda hidden: (hidden, hidden), lambda hidden: hidden[:, 0], lambda hidden: hidden[:, :1]]
)
def test_an_encoder_of_ones_own_must_keep_its_contract(give: object) -> None:
    with pytest.raises(ValueError, match=r"Wrong as an encoder must map hidden \[R, M, 16\]"):
        PTuningV2(length=2, encoder=Wrong(give)).build(Base())


def test_states_that_change_shape_later() -> None:
    soft = PTuningV2(length=2, encoder=Wrong(lambda hidden: hidden[:, :16])).build(Base())
    with pytest.raises(ValueError, match=r"must be \[R, M, E\] = \(1, 17, 16\), got \(1, 16, 16\)"):
        soft.row_prefix(0, torch.zeros(1, 17, C), torch.tensor([17]))


def test_an_encoder_of_ones_own_is_copied() -> None:
    own = OwnMean().double()
    method = PTuningV2(length=2, encoder=own, share_encoder=False)
    first, second = method.build(Base()), method.build(Base())
    assert isinstance(first, EncodedRows)
    owners = [*own.parameters(), *first.parameters(), *second.parameters()]
    assert len({parameter.data_ptr() for parameter in owners}) == len(owners)
    assert own.linear.weight.dtype == torch.float64
