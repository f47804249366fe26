"""PEFT's adapters of encoder-decoders and softkv's: the same logits and the same generated tokens."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import softkv
from tests.hf.encoder_decoder_rows import READ, WRITTEN, labels_of
from tests.hf.encoder_decoders import NAMES, model_of, padded
from tests.hf.naive import close

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix tuning": ("PrefixTuningConfig", {}),
    "prefix tuning, projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
    "cartridge": ("CartridgeConfig", {}),
    "prompt tuning": ("PromptTuningConfig", {}),
    "prompt tuning of one stack": ("PromptTuningConfig", {"num_transformer_submodules": 1}),
    "P-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
}
SCALED = ("Pegasus", "Marian")  # PEFT leaves the scale out
IDS, MASK = padded(READ, "right")


def bare(name: str, layers: int) -> Any:
    """PEFT counts the layers of the encoder; T5 takes no other number in the decoder."""
    sizes = {"encoder_layers": 3, "decoder_layers": layers} if "T5" not in name.upper() else {
        "num_layers": layers, "num_decoder_layers": layers}  # fmt: skip
    return model_of(name, **sizes)


def in_peft(base: Any, kind: str) -> Any:
    config, options = KINDS[kind]
    torch.manual_seed(3)
    given = getattr(peft, config)(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, **options)
    model = peft.get_peft_model(base, given).eval()
    if "Prefix" in config or "Cartridge" in config:
        for parameter in model.prompt_encoder.parameters():
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def answers_of(model: Any) -> tuple[Tensor, Tensor]:
    labels = labels_of(WRITTEN)
    logits = model(input_ids=IDS, attention_mask=MASK, labels=labels).logits[labels != -100]
    return logits, model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)


def compare(got: Any, want: tuple[Tensor, Tensor]) -> None:
    logits, tokens = answers_of(got)
    close(logits, want[0], 5e-5)
    assert torch.equal(tokens, want[1])


CASES = [
    (name, kind) for name in NAMES for kind in KINDS if name in ("T5", "Bart") or kind in ("prefix tuning", "P-tuning")
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_from_peft(name: str, kind: str, tmp_path: Path) -> None:
    base = bare(name, 3)
    theirs = in_peft(base, kind)
    want = answers_of(theirs)
    theirs.save_pretrained(tmp_path)
    if name.startswith(SCALED) and "refix" not in kind and kind != "cartridge":
        for read in (lambda: softkv.from_peft(theirs), lambda: softkv.load(bare(name, 3), tmp_path)):
            with pytest.raises(ValueError, match="don't mean the same here"):
                read()
        return
    compare(softkv.load(bare(name, 3), tmp_path), want)
    mine = softkv.from_peft(theirs)
    compare(mine, want)
    mine.save_pretrained(tmp_path / "mine")
    compare(softkv.load(bare(name, 3), tmp_path / "mine"), want)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_of_pairs(layers: int, tmp_path: Path) -> None:
    """PEFT holds as many pairs as the encoder has layers; the decoder may have fewer, not more."""
    theirs = in_peft(bare("Bart", layers), "prefix tuning")
    want = answers_of(theirs)
    theirs.save_pretrained(tmp_path)
    compare(softkv.load(bare("Bart", layers), tmp_path), want)
    with pytest.raises(ValueError, match="has 3 layers, this model's decoder has 4"):
        softkv.load(bare("Bart", 4), tmp_path)


@pytest.mark.parametrize("name", ["T5", "Bart", "MBart: scaled embeddings", "M2M100: positions by ids"])
@pytest.mark.parametrize("layers", [2, 3])
def test_to_peft(name: str, layers: int, tmp_path: Path) -> None:
    methods = {
        "v2": softkv.PTuningV2(length=5, init_std=1.0, where="decoder", window_covers=True),
        "shared": softkv.PrefixTuning(length=5, init_std=1.0, where="decoder"),
        "prompt": softkv.PromptTuning(length=5, position="before"),
    }
    for kind, method in methods.items():
        mine = softkv.attach(bare(name, layers), method)
        if kind == "shared" and name == "T5":
            with pytest.raises(ValueError, match="slots have position biases"):
                mine.save_pretrained(tmp_path / kind, format="peft")
            continue
        mine.save_pretrained(tmp_path / kind, format="peft")
        want = answers_of(mine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(peft.PeftModel.from_pretrained(bare(name, layers), tmp_path / kind).eval(), want)
        compare(softkv.load(bare(name, layers), tmp_path / kind), want)


def test_not_to_peft(tmp_path: Path) -> None:
    mine = softkv.attach(bare("Bart", 2), softkv.PTuningV2(length=2))
    with pytest.raises(ValueError, match="in the decoder's self-attention only"):
        mine.save_pretrained(tmp_path, format="peft")
    mine = softkv.attach(bare(NAMES[5], 2), softkv.PromptTuning(length=2, position="before"))
    with pytest.raises(ValueError, match="multiplies the embeddings of tokens by"):
        mine.save_pretrained(tmp_path, format="peft")
    with pytest.raises(ValueError, match="reads no CPT of encoder-decoders"):
        softkv.io.peft.check_kind({"peft_type": "CPT", "task_type": "SEQ_2_SEQ_LM"}, "it")
