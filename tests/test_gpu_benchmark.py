"""`softkv bench gpu`: its processes, time limits and resumption with made-up jobs, and the small jobs of each part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from softkv.benchmarks.gpu import PARTS, BenchmarkPart, Settings, conductor, correctness, models, passes, table, tiles
from tests.gpu_part import TRACE, MadeUp

SETTINGS = Settings("cpu", True, 2)
MADE_UP = MadeUp("made_up", 60, "Made up")


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    trace = tmp_path / "trace"
    monkeypatch.setenv(TRACE, str(trace))
    monkeypatch.setattr(conductor, "PARTS", (MADE_UP,))
    monkeypatch.setattr(conductor, "_PRELOADED", [])
    # Environment variables set now must be seen: processes from nothing, not from a server started before.
    monkeypatch.setattr(conductor, "_context", lambda *_: conductor.multiprocessing.get_context("spawn"))
    return trace


def conduct(folder: Path, minutes: float = 1.0, **options: bool) -> tuple[str, list[str]]:
    said: list[str] = []
    return conductor.conduct(SETTINGS, folder, minutes, say=said.append, **options), said


def test_a_job_may_fail_die_or_take_too_long(tried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTKV_TEST_JOBS", "raises dies good sleeps never")
    text, said = conduct(tmp_path, minutes=0.1)
    results = json.loads((tmp_path / "made_up.json").read_text())["results"]
    assert results == {
        "raises": {"error": "ValueError: no such luck"},
        "dies": {"error": "its process ended with exit code 7"},
        "good": {"number": 1, "said": "fine"},
    }
    assert list(dict.fromkeys(tried.read_text().split())) == ["raises", "dies", "good", "sleeps"]
    assert said[-1].endswith("left open: sleeps, never")
    assert "- dies: its process ended with exit code 7" in text
    assert (tmp_path / "table.md").read_text() == text


def test_goes_on_where_it_stopped(tried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What succeeded is kept, what failed is tried again; other code or versions keep nothing."""
    monkeypatch.setenv("SOFTKV_TEST_JOBS", "good raises")
    conduct(tmp_path)
    monkeypatch.setenv("SOFTKV_TEST_JOBS", "good raises more")
    conduct(tmp_path)
    assert tried.read_text().split() == ["good", "raises", "raises", "more"]
    monkeypatch.setenv("SOFTKV_TEST_JOBS", "good")
    conduct(tmp_path, again=True)
    fingerprint = conductor.fingerprint(SETTINGS)
    monkeypatch.setattr(conductor, "fingerprint", lambda settings: fingerprint | {"code": "another"})
    conduct(tmp_path)
    assert tried.read_text().split()[4:] == ["good", "good"]


def test_the_table_is_short_whatever_the_parts_say() -> None:
    long, short = MADE_UP, MadeUp("short", 1, "Short")
    results = {long: {str(i): {"number": i} for i in range(40)}, short: {"a": {"number": 5}, "b": {"error": "broken"}}}
    text = table.of(results, {"device": "none"})
    assert 9_000 < len(text) < 10_000
    assert text.count("cut here") == 1
    assert "## Short" in text
    assert "- b: broken" in text
    assert "not run" in table.of({short: {}}, {})


def test_the_small_jobs_run(tmp_path: Path) -> None:
    """The command as a user gives it, without the command line's own libraries; kernels interpreted."""
    options = ["--quick", "--minutes", "9", "--output", str(tmp_path)]
    parts = ("environment", "correctness", "host", "models", "determinism")
    arguments = [argument for name in parts for argument in ("--part", name)]
    blocked = "import sys; sys.modules.update(dict.fromkeys(('typer', 'rich', 'psutil', 'matplotlib')));"
    main = f"sys.argv[1:] = {options + arguments!r}; from softkv.benchmarks.gpu.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", f"{blocked} {main}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text in done.stdout
    for name in parts:
        records = json.loads((tmp_path / f"{name}.json").read_text())["results"]
        assert records
        assert not [record["error"] for record in records.values() if "error" in record]
    assert "1 of 1 calls agree" in text
    assert "train tiny: v2 packed" in text


def test_the_op_and_its_passes_are_measured() -> None:
    training, decoding = passes.jobs(SETTINGS)
    records = {job: passes.run(job, SETTINGS, 60.0) for job in (training, decoding)}
    of_training = records[training]
    assert list(of_training["passes"]) == ["forward", "dq", "dkv", "dprefix"]
    for mode in ("forward", "forward + backward"):
        ways = of_training[mode]["ways"]
        assert {"softkv triton", "cat + flash", "flash, no prefix"} <= set(ways)
        assert ways["cat + flash"]["differs"] < 1e-5
        assert "expected a CUDA" in of_training[mode]["absent"]["softkv cudnn"]
    said = passes.lines(records)
    (header,) = (line for line in said if line.startswith("| B,H,G,T,P,D | mode"))
    rows = [line for line in said if line.startswith("| 1,2,1")]
    assert [row.split(" | ")[1] for row in rows] == ["f", "fb", "d"]
    assert {row.count("|") for row in rows} == {header.count("|")}
    assert any(line.startswith("- softkv cudnn did not run somewhere: RuntimeError") for line in said)


def test_tiles_are_searched_and_left_alone() -> None:
    from softkv.kernels.tiles import MEASURED

    record = tiles.run("D = 16: dq", SETTINGS, 60.0)
    assert len(record["times"]) == 2
    assert record["times"] == sorted(record["times"], key=lambda row: row[-1])
    assert record["row"].startswith('("dq", "interpreter"): {16: Tile(')
    assert not MEASURED


def test_every_part_names_its_jobs() -> None:
    """On a GPU: different names, in order of value; what compiles beforehand is named too."""
    settings = Settings("cuda", False, 16)
    for module in (correctness, models, passes, tiles):
        jobs = module.jobs(settings)
        assert len(jobs) == len(set(jobs)) > 5
        assert all(callable(call) for call in module.warm(settings))
    assert sum(part.seconds for part in PARTS) <= 9 * 60
    assert isinstance(PARTS[0], BenchmarkPart)


def test_the_shards_reports_are_added_up() -> None:
    texts = [
        "....F\nFAILED tests/a.py::test_b[1] - AssertionError: off\n1 failed, 4 passed in 2.00s\n",
        "...\n3 passed, 2 deselected in 1.00s",
        "Fatal Python error: Aborted",
    ]
    said = correctness.summary(texts, late=1)
    assert said["counts"] == {"passed": 7, "failed": 1}
    assert said["failed"] == ["tests/a.py::test_b[1] - AssertionError: off", "Fatal Python error: Aborted"]
    assert "1 of 3 processes were stopped" in said["said"]
