"""What commands load: a base and its tokenizer, and a soft prompt on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from softkv.cli.console import fail

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from softkv.io.model import SoftModel


def load_base(name: str, dtype: str) -> tuple[Any, Any]:
    """A causal LM and its tokenizer."""
    import transformers

    return load_model(name, dtype), transformers.AutoTokenizer.from_pretrained(name)


def load_model(name: str, dtype: str) -> Any:
    """A causal LM."""
    import transformers

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        fail(f"--dtype expects auto, float32, bfloat16 or float16, got {dtype!r}")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        fail(f"there is no folder {name}: --model is a folder or an id on the Hugging Face Hub")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


def on_device(model: Any, device: str | None) -> Any:
    """The model on a device; None takes the accelerator, if there is one."""
    import torch

    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found.type if found is not None else "cpu"
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:  # unknown to torch, out of its reach, or too small
        reason = str(error).strip().splitlines()[0]
        fail(f"--device expects a device that this machine's torch can put the model on, got {device!r}: {reason}")


def load_adapter(adapter: str, model: str | None, dtype: str, device: str | None) -> tuple[SoftModel, Any]:
    """A soft prompt on its base (or on the one given) and the base's tokenizer."""
    import softkv

    name = model or read_adapter(adapter)[0]["base"]["name"]
    if not name:
        fail("the soft prompt doesn't say what its base is called: give --model")
    base, tokenizer = load_base(name, dtype)
    return softkv.load(on_device(base, device), adapter), tokenizer


def read_adapter(adapter: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the tensors of a soft prompt, from a folder or the Hub."""
    from softkv.io.checkpoint import read
    from softkv.io.hub import local

    return read(local(adapter))
