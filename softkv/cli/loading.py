"""Loading for commands: a base and its tokenizer, and a soft prompt on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from softkv.cli.console import fail

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from softkv.io.soft_model import SoftModel

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_base(name: str, dtype: str) -> bool:
    """Whether the base must come from the Hub; fails with one line if there is no such base."""
    if dtype not in DTYPES:
        fail(f"--dtype expects {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")
    if Path(name).is_dir():
        return False
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        fail(f"there is no folder {name}: --model is a folder or an id on the Hugging Face Hub")
    from softkv.io.hub import reachable

    return reachable(name)


def load_base(
    name: str,
    dtype: str,
    *,
    online: bool | None = None,
    task: str | None = None,
    classes: list[str] | None = None,
) -> tuple[Any, Any]:
    """A causal LM, or a model with the head of a task for these classes, and its tokenizer. `online` is the result of
    `check_base`, if it was called before."""
    if online is None:
        online = check_base(name, dtype)
    model = load_model(name, dtype, online=online, task=task, classes=classes)

    import transformers

    return model, transformers.AutoTokenizer.from_pretrained(name, local_files_only=not online)


def load_model(
    name: str,
    dtype: str,
    *,
    online: bool | None = None,
    task: str | None = None,
    classes: list[str] | None = None,
) -> Any:
    """A causal LM, or a model with the head of a task for these classes."""
    if online is None:
        online = check_base(name, dtype)  # before slow imports

    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, labels = transformers.AutoModelForCausalLM, {}
    if task is not None:
        from softkv.train.tasks import CLASSES

        kind = getattr(transformers, CLASSES[task])
    if classes:
        labels = {"id2label": dict(enumerate(classes)), "label2id": {each: n for n, each in enumerate(classes)}}
    try:
        return kind.from_pretrained(name, dtype=dtype, local_files_only=not online, **labels)
    except SafetensorError as error:
        fail(f"the weights of {name} are damaged: {error}")


def find_device(device: str | None) -> str:
    """A device that torch can use; None: the accelerator, if there is one."""
    import torch

    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found.type if found is not None else "cpu"
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # unknown to torch, or not available
        reason = str(error).strip().splitlines()[0]
        fail(f"--device expects a device that torch can use on this machine, got {device!r}: {reason}")
    return device


def on_device(model: Any, device: str | None) -> Any:
    """The model on a device; None: the accelerator, if there is one."""
    device = find_device(device)
    try:
        return model.to(device)
    except RuntimeError as error:  # out of memory
        reason = str(error).strip().splitlines()[0]
        fail(f"the base can't be moved to --device {device}: {reason}")


def load_adapter(adapter: str, model: str | None, dtype: str, device: str | None) -> tuple[SoftModel, Any]:
    """A soft prompt on its base (or on the one given) and the base's tokenizer."""
    name = model or describe_adapter(adapter)[0]["base"]["name"]
    if not name:
        fail("the soft prompt does not name its base: give --model")
    online = check_base(name, dtype)
    device = find_device(device)

    import softkv

    base, tokenizer = load_base(name, dtype, online=online)
    return softkv.load(on_device(base, device), adapter), tokenizer


def describe_adapter(adapter: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The config of a soft prompt and the shapes of its tensors, from a folder or the Hub."""
    from softkv.io.config import WEIGHTS, described
    from softkv.io.hub import local

    folder = local(adapter)
    if (folder / WEIGHTS).is_file():
        return described(folder / WEIGHTS)

    from softkv.io.checkpoint import read  # other formats; torch takes seconds to import

    config, tensors = read(folder)
    return config, {name: list(tensor.shape) for name, tensor in tensors.items()}
