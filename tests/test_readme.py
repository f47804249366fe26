"""README and docs say what the committed results say."""

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from benchmarks import tiny
from benchmarks.readme import ROOT, documents, rendered
from benchmarks.results import FOLDER, read_json
from benchmarks.static_bounds import PUBLISHED, bound_of


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_come_from_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert rendered(text) == text, "run `python -m benchmarks.readme`"


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no table is called 'speed'"):
        rendered("<!-- table: speed -->\n<!-- end of table -->\n")


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_of_the_readme_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, but for the model: a tiny one."""
    model, tokenizer = tiny.load()

    def from_pretrained(name: str, attn_implementation: str | None = None) -> Any:
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[number], f"example {number + 1} of README.md", "exec"), {})


def test_a_kernel_was_not_measured_above_its_bound() -> None:
    content = read_json(FOLDER / "static_published.json")
    peaks = {rates["target"]: rates["teraflops"] for rates in content["rates"]}
    compiled = [one for one in PUBLISHED if one.package is not None]
    assert compiled
    for one in compiled:
        row = bound_of(one, content["rows"])
        assert row["work"] == 1
        assert 0.5 * row["serial"] < one.teraflops / peaks[one.target] < row["overlap"]
