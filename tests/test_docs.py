"""The pages tell the truth: their snippets run, the messages they explain exist, the site builds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.hf.encoder_decoders import model_of as encoder_decoder
from tests.hf.encoders import encoder
from tests.hf.tiny import model_of, tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    "index.md",
    "classification.md",
    "encoder_decoders.md",
    "serving.md",
    *(f"methods/{p.name}" for p in (DOCS / "methods").glob("*_*.md")),
]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's snippets run in their order, on a tiny model in place of the one they name."""
    monkeypatch.chdir(tmp_path)

    def tiny(name: str, attn_implementation: str = "sdpa", **_: Any) -> Any:
        return model_of("Llama", attn_implementation)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny)
    heads = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(heads, "from_pretrained", lambda name, **_: encoder("Bert", "SequenceClassification"))
    pairs = transformers.AutoModelForSeq2SeqLM
    monkeypatch.setattr(pairs, "from_pretrained", lambda name, **_: encoder_decoder("T5"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer())
    snippets = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    assert snippets
    names: dict[str, Any] = {"base": tiny(""), "tokenizer": tokenizer()}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)


def test_messages_explained_are_messages_raised() -> None:
    table = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(table) > 5
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "softkv").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals of one message end to end
    for message in table:
        assert message in joined, message


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install -e '.[docs]'")
def test_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prefix_attention" in (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
