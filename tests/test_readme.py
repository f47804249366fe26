"""README and docs say what the committed results say."""

from pathlib import Path

import pytest

from benchmarks.readme import ROOT, documents, rendered


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_come_from_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert rendered(text) == text, "run `python -m benchmarks.readme`"


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no table is called 'speed'"):
        rendered("<!-- table: speed -->\n<!-- end of table -->\n")
