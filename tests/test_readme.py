"""README and docs say what the committed results say."""

from pathlib import Path

import pytest

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


def test_a_kernel_was_not_measured_above_its_bound() -> None:
    content = read_json(FOLDER / "static_published.json")
    peaks = {rates["target"]: rates["teraflops"] for rates in content["rates"]}
    compiled = [one for one in PUBLISHED if one.package is not None]
    assert compiled
    for one in compiled:
        row = bound_of(one, content["rows"])
        assert row["work"] == 1
        assert 0.5 * row["serial"] < one.teraflops / peaks[one.target] < row["overlap"]
