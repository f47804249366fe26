"""Many adapters on one model: a batch whose rows have different ones gives each row what it gets alone."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softkv
from softkv.methods import PTuning
from softkv.methods.base import Method, SoftPrompt
from tests.hf.continuations import batch_of
from tests.hf.naive import Row, close, greedy, row_logits
from tests.hf.rows import LAYOUTS, direction, rows_for
from tests.hf.tiny import METHODS, VOCAB, attach, model_of, tokenizer

# Beside the methods: other lengths and other numbers of soft tokens than theirs.
ADAPTERS: dict[str, Method] = {
    **METHODS,
    "a block of one": softkv.PromptTuning(length=1),
    "a longer prefix": softkv.PTuningV2(length=11, init_std=0.5),
    "a template of two": PTuning(template="[X] [P1] [P2] [Y]", encoder_size=16),
    "another encoder": softkv.PTuningV2(length=5, encoder="attention", encoder_size=8, share_encoder=False),
}
MODELS = [
    "Llama",
    "Mistral: a sliding window",
    "Gemma2: softcap, alternating windows",
    "GPT2: learned positions",
    "OPT: learned positions, a narrow embedding",
]
STEPS = 4


def model_with(name: str, adapters: dict[str, Method] = ADAPTERS, **changes: Any) -> softkv.SoftModel:
    model = attach(name, "prefix-tuning", **changes).eval()
    for adapter, method in adapters.items():
        torch.manual_seed(len(adapter))
        model.add_adapter(adapter, method)
    with torch.no_grad():
        for encoder in (soft for soft in model.adapters.values() if soft.encodes_rows):
            for mlp in encoder.mlps:  # large enough to show
                mlp[-1].weight.mul_(4)
    return model


def rows_of_all() -> tuple[list[str | None], list[Row]]:
    """Rows of every adapter and of the bare model, in an order that puts no two of one adapter together."""
    names: list[str | None] = []
    rows: list[Row] = []
    for number, name in enumerate([*ADAPTERS, None, *list(ADAPTERS)[::3]]):
        candidates = rows_for("p-tuning" if name is not None and isinstance(ADAPTERS[name], PTuning) else "other")
        row = candidates[number % len(candidates)]
        if name == "a template of two":
            row = Row([2 if i == -3 else i for i in row.ids], row.prompt)
        names.append(name)
        rows.append(row)
    return names, rows


def alone(model: softkv.SoftModel, name: str | None) -> SoftPrompt:
    """The soft prompt of a row; one that gives nothing stands for the bare model."""
    return model.adapters["default" if name is None else name] if name else SoftPrompt(METHODS["p-tuning v2"])


@functools.cache
def truth(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(logits of each row, gradients) of the rows alone."""
    model, eager = model_with(name), model_of(name)
    names, rows = rows_of_all()
    logits = [row_logits(eager, alone(model, adapter), row) for adapter, row in zip(names, rows, strict=True)]
    sum((one * direction(row, VOCAB)).sum() for one, row in zip(logits, rows, strict=True)).backward()
    gradients = {key: value.grad for key, value in model.adapters.named_parameters() if value.grad is not None}
    return [one.detach() for one in logits], gradients


@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_as_alone(name: str) -> None:
    names, rows = rows_of_all()
    wants, gradients = truth(name)
    for layout, arrange in LAYOUTS.items():
        model = model_with(name).train()
        if layout == "left-padded":
            model.activation_checkpointing_enable()
        batch, parts = arrange(rows)
        got = parts(model(**batch, adapter_names=names).logits)
        for adapter, one, want in zip(names, got, wants, strict=True):
            assert one.shape == want.shape, (layout, adapter)
            close(one, want)
        sum((one * direction(row, VOCAB)).sum() for one, row in zip(got, rows, strict=True)).backward()
        found = {key: value.grad for key, value in model.adapters.named_parameters() if value.grad is not None}
        assert found.keys() == gradients.keys()
        for key, want in gradients.items():
            close(found[key], want, 1e-4)


@pytest.mark.parametrize("name", MODELS[1:4])
def test_greedy_is_as_alone(name: str) -> None:
    names, rows = rows_of_all()
    prompts, model, eager = [row.ids[: row.prompt] for row in rows], model_with(name), model_of(name)
    wants = [greedy(eager, alone(model, adapter), p, STEPS) for adapter, p in zip(names, prompts, strict=True)]
    for side, options in (("left", {}), ("right", {"cache_implementation": "static"}), ("left", {"use_cache": False})):
        batch = batch_of(prompts, side, extra=1)
        got = model.generate(**batch, adapter_names=names, max_new_tokens=STEPS, **options)
        assert got[:, -STEPS:].tolist() == wants, (side, options)


def test_beams_are_those_alone() -> None:
    names, rows = rows_of_all()
    prompts, model = [row.ids[: row.prompt] for row in rows], model_with("Mistral: a sliding window")
    options = {"max_new_tokens": STEPS, "num_beams": 3, "num_return_sequences": 2}
    got = model.generate(**batch_of(prompts, "left"), adapter_names=names, **options)[:, -STEPS:]
    for r, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        ids = torch.tensor([prompt])
        one = model.generate(ids, adapter_names=[name], **options)
        assert torch.equal(got[2 * r : 2 * r + 2], one[:, -STEPS:]), name


@pytest.mark.parametrize("name", ["Llama", "Mistral: a sliding window"])
def test_a_cache_goes_on_with_the_adapters_that_filled_it(name: str) -> None:
    model = model_with(name)
    prompts = torch.randint(2, VOCAB, (len(ADAPTERS) + 1, 6), generator=torch.Generator().manual_seed(3))
    names = [*ADAPTERS, None]
    with torch.no_grad():
        whole = model(prompts, adapter_names=names, prompt_lengths=torch.full((len(names),), 4)).logits
        begun = model(prompts[:, :4], adapter_names=names)
        close(begun.logits, whole[:, :4])
        one = model(prompts[:, 4:5], past_key_values=begun.past_key_values)
        close(one.logits[:, 0], whole[:, 4])
        last = model(
            prompts[:, 5:],
            past_key_values=begun.past_key_values,
            attention_mask=torch.ones(len(names), 6),
            position_ids=torch.full((1, 1), 5),
            adapter_names=names,
        )
        close(last.logits[:, 0], whole[:, 5])
        with pytest.raises(ValueError, match="the cache was filled with the adapters"):
            model(prompts[:, 5:], past_key_values=begun.past_key_values, adapter_names=[None] * len(names))


class Touched(TorchDispatchMode):
    """What operations read of adapters, and the largest tensor that they made."""

    def __init__(self, model: softkv.SoftModel) -> None:
        super().__init__()
        self.owners = {p.untyped_storage().data_ptr(): name for name, p in model.adapters.named_parameters()}
        self.adapters: set[str] = set()
        self.operations, self.reads, self.most = 0, 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self.owners:
                self.adapters.add(self.owners[tensor.untyped_storage().data_ptr()].split(".")[0])
                self.reads += 1
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes())
        return result


def test_a_thousand_adapters() -> None:
    model = attach("Llama", "p-tuning v2").eval()
    runs: list[int] = []
    model.base.get_decoder().register_forward_pre_hook(lambda *_: runs.append(1))
    method, size = replace(METHODS["p-tuning v2"], init="random", init_std=0.1), model.num_trainable()
    counts = []
    for number in range(1000):
        with Touched(model) if number in (0, 999) else torch.no_grad() as seen:
            model.add_adapter(f"a{number}", method)
        if isinstance(seen, Touched):
            assert not seen.adapters  # no other adapter is read
            counts.append((seen.operations, seen.most))
    assert counts[0] == counts[1]
    assert counts[0][1] <= size * 4  # no tensor larger than the adapter
    assert not runs  # the base is not run
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.adapters.parameters()}
    assert sum(memory.values()) == 1001 * size * 4
    names = ["a7", None, "a990", "a7"]
    with torch.no_grad(), Touched(model) as seen:
        model.generate(torch.full((4, 3), 5), adapter_names=names, max_new_tokens=3)
    assert seen.adapters == {"a7", "a990"}


def test_prefixes_are_gathered_once_a_call() -> None:
    model = model_with("Llama")
    names = ["p-tuning v2", "a longer prefix", "prefix-tuning", None]
    reads = []
    for steps in (2, 9):
        model.to(model.device)  # has it forget the bank
        with Touched(model) as seen:
            model.generate(torch.full((4, 3), 5), adapter_names=names, max_new_tokens=steps)
        reads.append(seen.reads)
    assert reads[0] == reads[1] > 0


def test_the_active_adapter() -> None:
    model = model_with("Llama")
    ids = torch.full((2, 4), 7)
    for name in ("p-tuning v2", "prompt-tuning before", "default"):
        model.set_adapter(name)
        assert model.soft is model.adapters[name]
        assert model.method == model.soft.config
        assert torch.equal(model(ids).logits, model(ids, adapter_names=[name, name]).logits)
    bare = model_of("Llama", "softkv")(ids).logits
    close(model(ids, adapter_names=[None, None]).logits, bare)
    assert list(model.adapters) == ["default", *ADAPTERS]
    model.delete_adapter("a longer prefix")
    assert "a longer prefix" not in model.adapters
    with pytest.raises(ValueError, match="has no adapter 'a longer prefix'"):
        model(ids, adapter_names=["a longer prefix", None])
    model.detach()
    assert torch.equal(model.base(ids).logits, model_of("Llama")(ids).logits)


def test_a_bank_follows_its_adapters() -> None:
    """What is remembered of them ends with a change of a value, and with a new adapter under an old name."""
    model = model_with("Llama", {"one": METHODS["p-tuning v2"], "two": METHODS["prompt-tuning before"]})
    ids, names = torch.full((2, 4), 7), ["one", "two"]
    with torch.no_grad():
        first = model(ids, adapter_names=names).logits
        for name in names:
            next(model.adapters[name].parameters()).mul_(3)
        second = model(ids, adapter_names=names).logits
        assert not torch.isclose(first, second).all(2).all(1).any()
        for name, method in zip(names, ("prefix-tuning", "prompt-tuning before"), strict=True):
            model.delete_adapter(name)
            torch.manual_seed(9)
            model.add_adapter(name, METHODS[method])
        third = model(ids, adapter_names=names).logits
        assert not torch.isclose(second, third).all(2).all(1).any()


def test_from_a_folder_a_text_and_a_prefix(tmp_path: Any) -> None:
    trained = attach("Llama", "p-tuning v2")
    trained.save_pretrained(tmp_path / "adapter")
    model = attach("Llama", "prompt-tuning after").eval()
    prefix = softkv.Prefix.from_text(model, tokenizer(), "w7 w8 w9")
    model.add_adapter("saved", tmp_path / "adapter")
    model.add_adapter("prefix", prefix)
    model.add_adapter("text", softkv.PTuningV2(init="text", init_text="w7 w8 w9"), tokenizer=tokenizer())
    ids = torch.randint(2, VOCAB, (3, 5), generator=torch.Generator().manual_seed(4))
    got = model(ids, adapter_names=["saved", "prefix", "text"]).logits
    close(got[0], trained.eval()(ids).logits[0])
    in_context = torch.cat([torch.tensor([[1, 7, 8, 9]]).expand(3, -1), ids], 1)
    close(got[1:], model_of("Llama")(in_context).logits[1:, 4:])


def test_beside_another_soft_model_on_the_base() -> None:
    model = model_with("Llama", {"one": METHODS["p-tuning v2"]})
    batch = batch_of([[5, 6, 7, 8], [9]], "left")
    want = model.generate(**batch, adapter_names=["one", None], max_new_tokens=2)
    softkv.attach(model.base, METHODS["prefix-tuning"])
    assert torch.equal(model.generate(**batch, adapter_names=["one", None], max_new_tokens=2), want)


def test_save_one_of_several(tmp_path: Any) -> None:
    model = model_with("Llama", {"one": METHODS["p-tuning v2"], "two": METHODS["prompt-tuning before"]})
    model.save_pretrained(tmp_path / "two", adapter_name="two")
    assert model.active_adapter == "default"
    model.add_adapter("again", tmp_path / "two")
    assert torch.equal(model.adapters["again"].embeddings, model.adapters["two"].embeddings)


def test_training_keeps_every_adapter(tmp_path: Any) -> None:
    adapters = {"one": METHODS["p-tuning v2"], "two": METHODS["prompt-tuning after"]}
    rows = [
        {"input_ids": [5, 6, 7 + r, 8], "labels": [-100, -100, 7 + r, 8], "adapter_names": ("one", "two")[r % 2]}
        for r in range(8)
    ]

    def trained(**options: Any) -> dict[str, Tensor]:
        arguments = transformers.TrainingArguments(
            str(tmp_path / "run"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
        )
        model = model_with("Llama", adapters)
        softkv.Trainer(model, arguments, train_dataset=rows).train(**options)
        return {name: value.clone() for name, value in model.adapters.state_dict().items()}

    before, whole = model_with("Llama", adapters).adapters.state_dict(), trained()
    moved = {name.split(".")[0] for name, value in whole.items() if not torch.equal(value, before[name])}
    assert moved == {"one", "two"}
    resumed = trained(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_clear_errors(tmp_path: Any) -> None:
    model = model_with("Llama", {"one": METHODS["p-tuning v2"], "template": METHODS["p-tuning"]})
    ids = torch.full((2, 4), 7)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="has no adapter 'none': expected one of 'default', 'one', 'template'"):
            call(ids, adapter_names=["one", "none"])
        with pytest.raises(ValueError, match="one name per row, 2, got 3"):
            call(ids, adapter_names=["one"] * 3)
        with pytest.raises(TypeError, match="expects a list of names"):
            call(ids, adapter_names="one")
        soft_tokens = torch.tensor([[-1, 5], [-1, 5]])
        with pytest.raises(ValueError, match="id -1 in row 1, but PTuningV2 places 0"):
            call(soft_tokens, adapter_names=["template", "one"])
        with model.disabled(), pytest.raises(ValueError, match="leave adapter_names out"):
            call(ids, adapter_names=["one", "one"])
    packed = {"position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(ValueError, match="one name per row, 2, got 1"):
        model(ids[:1], **packed, adapter_names=["one"])

    with pytest.raises(ValueError, match="already has an adapter 'one'"):
        model.add_adapter("one", METHODS["p-tuning v2"])
    for name in ("", "../one", "a.b", "keys", 3):
        with pytest.raises(ValueError, match="the name of an adapter expects"):
            model.add_adapter(name, METHODS["p-tuning v2"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is the active one"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="has no adapter 'two'"):
        model.set_adapter("two")
    with pytest.raises(FileNotFoundError):
        model.add_adapter("two", tmp_path / "nothing")
    with pytest.raises(ValueError, match="needs the tokenizer"):
        softkv.attach(model_of("Llama"), METHODS["p-tuning v2"]).add_adapter("two", METHODS["p-tuning v2 of a text"])
    attach("GPT2: learned positions", "p-tuning v2").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on another base model"):
        model.add_adapter("two", tmp_path / "other")
    with pytest.raises(ValueError, match="the prefix does not fit this model"):
        model.add_adapter("two", softkv.Prefix(*torch.zeros(2, 3, 1, 2, 4, 8)))
    assert list(model.adapters) == ["default", "one", "template"]
    model.train()
    model.add_adapter("after", METHODS["prompt-tuning after"])
    model.add_adapter("encoder", METHODS["p-tuning v2 encoder"])
    with pytest.raises(ValueError, match="PromptTuning and PTuningV2 must know"):
        model(torch.full((3, 4), 7), adapter_names=["after", "encoder", "one"])
