"""README says what the committed results say."""

from benchmarks.readme import ROOT, rendered


def test_figures_come_from_committed_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rendered(readme) == readme, "run `python -m benchmarks.readme`"
