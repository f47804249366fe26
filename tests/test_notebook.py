"""The notebook runs from its first cell to its last, on a tiny model; it is kept without outputs."""

import json
from pathlib import Path

import pytest

from tests.hf.tiny import model_of, tokenizer

PATH = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    model_of("Llama", "sdpa").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("SOFTKV_MODEL", str(tmp_path))
    notebook = nbformat.read(PATH, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = [each.get("text", "") for cell in notebook.cells for each in cell.get("outputs", [])]
    assert any("trainable params: 512" in text for text in printed)
    assert any("with the prefix:" in text for text in printed)


def test_notebook_is_kept_without_outputs() -> None:
    cells = [cell for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
