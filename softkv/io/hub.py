"""Adapters on the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softkv.io.config import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from softkv.hf.model import PromptedModel

_PATTERNS = [CONFIG, WEIGHTS, "adapter_config.json", "adapter_model.safetensors"]
_PATIENCE = 4.0  # seconds that the Hub has to answer


def local(directory: str | os.PathLike[str], revision: str | None = None, token: str | None = None) -> Path:
    """The folder of an adapter, fetched from the Hub where it is no local one.

    Raises:
        FileNotFoundError: when it is neither.
    """
    path = Path(directory)
    try:
        exists = path.exists()
    except OSError as error:
        raise FileNotFoundError(f"no adapter at {str(directory)!r:.300}: {error.strerror}") from None
    if exists or not isinstance(directory, str) or directory.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    offline = not reachable(directory, revision, token)
    return Path(
        snapshot_download(directory, allow_patterns=_PATTERNS, revision=revision, token=token, local_files_only=offline)
    )


def reachable(repo_id: str, revision: str | None = None, token: str | None = None) -> bool:
    """Whether the Hub answers for a repository of models; False where it doesn't, but the repository is in the cache.

    Raises:
        FileNotFoundError: when there is no such repository, or it is out of reach and was never fetched.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi(token=token).model_info(repo_id, revision=revision, timeout=_PATIENCE)
        return True
    except (HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(f"{repo_id} is neither a folder nor a repository on the Hub: {_line(error)}") from error
    except Exception as error:  # whatever the network raises
        try:
            snapshot_download(repo_id, revision=revision, local_files_only=True)
            return False
        except OSError:
            raise FileNotFoundError(
                f"{repo_id} is no folder here, was never fetched, and the Hugging Face Hub is out of reach "
                f"({_line(error)}): check the network, or give a folder"
            ) from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def push(
    model: PromptedModel, repo_id: str, *, private: bool | None = None, token: str | None = None, **kwargs: Any
) -> str:
    """Saves a soft prompt to a repository on the Hugging Face Hub, made where it doesn't exist.

    Args:
        model: the model with the soft prompt.
        repo_id: "user/name".
        private: whether a new repository is private.
        token: None uses the one of `hf auth login`.
        **kwargs: of `huggingface_hub.upload_folder`: `commit_message`, `revision`, `create_pr`.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    from softkv.io.checkpoint import save

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        if not api.file_exists(repo_id, "README.md"):
            _card(model, repo_id).save(Path(folder) / "README.md")
        kwargs.setdefault("commit_message", "Upload soft prompt")
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))


def _card(model: PromptedModel, repo_id: str) -> Any:
    """The model card of a repository."""
    from huggingface_hub import ModelCard, ModelCardData

    from softkv.hf.task_heads import head_of
    from softkv.methods import METHODS

    name = model.config.name_or_path
    kind = next(name for name, config in METHODS.items() if type(model.method) is config)
    labels = f", num_labels={model.config.num_labels}" if head_of(model.base) else ""
    known = name if "/" in name and not name.startswith((".", "/")) else None
    data = ModelCardData(library_name="softkv", tags=["softkv", "soft-prompt"], base_model=known)
    return ModelCard(f"""\
---
{data.to_yaml()}
---
A soft prompt ({kind}, {model.num_trainable():,} trained values) for {name or "a transformers model"}.

```python
import softkv, transformers

model = transformers.{type(model.base).__name__}.from_pretrained("{name}"{labels})
model = softkv.load(model, "{repo_id}")
```
""")
