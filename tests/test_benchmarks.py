"""The benchmarks measure what they say: instrument, work, providers against the oracle, merging, and quick runs."""

import itertools
import json
import re
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

from benchmarks import attention, plots, providers, report, results, tables, timing
from benchmarks.processes import take_turns
from benchmarks.providers import PROVIDERS, AttentionProblem, Provider, Unavailable
from benchmarks.shapes import QUICK, Shape, cases
from benchmarks.timing import CudaClock, HostClock, Spread, interleaved, speedup
from softkv.cli import app
from softkv.cli.bench import app as bench_app

SHAPES = {
    "grouped heads": Shape(2, 4, 2, 5, 3, 8),
    "a bank": Shape(3, 2, 2, 4, 3, 8, A=2),
    "one token": Shape(2, 4, 2, 1, 3, 8, S=6),
}
OF_CPU = ("softkv torch", "cat", "no prefix")


# The instrument ------------------------------------------------------------------------------------------------------


class Watch:
    """A clock on which call number n of a provider takes as long as it says."""

    def prepared(self, run: Any) -> Any:
        return run

    def seconds(self, run: Any, calls: int) -> float:
        return sum(run() for _ in range(calls)) / calls


def test_every_provider_has_one_sample_a_round_in_an_order_drawn_anew() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name) or 0.001) for name in "abc"}
    times = interleaved(runs, 0, at_least=20, at_most=20, hot=False, clock=Watch())
    assert [len(sample) for sample in times.values()] == [20, 20, 20]
    rounds = ["".join(order[-60:][i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({one[0] for one in rounds}) == 3


def test_hot_samples_average_calls_and_cold_ones_are_single() -> None:
    for hot, calls in ((True, 2 + 20), (False, 1 + 1)):  # one call warms up, one tells how many a hot sample takes
        count = itertools.count(1)
        interleaved({"a": lambda: next(count) and 0.0001}, 0, at_least=1, at_most=1, hot=hot, clock=Watch())  # noqa: B023
        assert next(count) - 1 == calls


def test_ratios_are_taken_within_rounds() -> None:
    times = {"ours": [1.0, 10.0, 2.0], "theirs": [2.0, 20.0, 4.0]}
    assert speedup(times, "ours", "theirs") == Spread(2.0, 2.0, 2.0)


def test_host_clock_gives_seconds_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += 2.0

    assert HostClock().seconds(run, 3) == 2.0


def test_cuda_clock_replays_a_captured_graph_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 6.0  # ms

    @contextmanager
    def capture(graph: Graph) -> Any:
        log.append("capture")
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_in = SimpleNamespace(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda s: nullcontext(),
        CUDAGraph=Graph,
        graph=capture,
        Event=Event,
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: SimpleNamespace(zero_=lambda: log.append("flush")))
    clock = CudaClock()
    replay = clock.prepared(lambda: log.append("run"))
    assert log == ["run"] * timing._CALLS_ON_STREAM + ["capture", "run"]
    log.clear()
    assert clock.seconds(replay, 3) == pytest.approx(0.002)
    assert log == ["flush", "event", "replay", "replay", "replay", "event", "wait"]


# What is measured ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_useful_work_counts_visible_pairs_and_operands(shape: Shape) -> None:
    problem = AttentionProblem.random(shape, "forward")
    pairs = shape.B * shape.H * int(problem.seen().sum())
    assert shape.gflop("forward") == pytest.approx(pairs * 2 * 2 * shape.D * 1e-9)
    assert shape.gflop("forward + backward") == pytest.approx(pairs * 7 * 2 * shape.D * 1e-9)
    numbers = sum(x.numel() for x in problem.leaves) + problem.q.numel()  # operands and out
    assert shape.mbyte("forward", 4) == pytest.approx(4e-6 * numbers)
    again = numbers + problem.q.numel()  # all of that once more, and grad_out
    gradients = sum(x.numel() for x in problem.leaves)
    assert shape.mbyte("forward + backward", 4) == pytest.approx(4e-6 * (numbers + again + gradients))


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in ("grouped heads", "a bank") for mode in ("forward", "forward + backward")]
    + [("one token", "decoding")],
)
def test_every_variant_gives_what_the_oracle_gives(name: str, mode: Any) -> None:
    shape = SHAPES[name]
    problem = AttentionProblem.random(shape, mode, dtype=torch.float64)
    direction = torch.randn_like(problem.q)
    checked = set()
    for name, provider in PROVIDERS.items():
        wanted = attention.oracle(problem, direction, provider.prefix)
        leaves = problem.leaves if provider.prefix else problem.leaves[:3]
        for variant in provider.variants.values() if mode in provider.modes and name != "flex" else ():
            try:
                step = problem.step(variant(problem), direction, leaves)
            except Unavailable:
                continue
            assert attention.largest_error(step(), wanted) < 1e-9, name
            checked.add(name)
    assert checked == {*OF_CPU, *(["cat cached"] if mode == "decoding" else [])}


def test_a_provider_that_is_wrong_or_fails_is_listed_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(problem: AttentionProblem) -> Callable[[], Any]:
        return lambda: providers.sdpa(problem.q, *problem.joined(), enable_gqa=True)

    def broken(problem: AttentionProblem) -> Callable[[], Any]:
        raise OSError("no such kernel\nat line 3")

    few = {
        "softkv torch": PROVIDERS["softkv torch"],
        "unmasked": Provider({"": unmasked}),
        "broken": Provider({"": broken}),
    }
    monkeypatch.setattr(attention, "PROVIDERS", few)
    problem = AttentionProblem.random(SHAPES["grouped heads"], "forward")
    ready, absent = attention.prepare(problem, torch.randn_like(problem.q), 1e-4, HostClock())
    assert list(ready) == ["softkv torch"]
    assert "differs from the oracle" in absent["unmasked"]
    assert absent["broken"] == "OSError: no such kernel"
    assert attention.largest_error([torch.ones(2), torch.tensor([float("nan")])], [torch.ones(2), torch.ones(1)]) != 0

    monkeypatch.setattr(attention, "PROVIDERS", few | {"softkv torch": Provider({"": unmasked})})
    with pytest.raises(RuntimeError, match="softkv failed"):
        attention.prepare(problem, torch.randn_like(problem.q), 1e-4, HostClock())


def test_names_of_cases_are_unique() -> None:
    for device in ("cpu", "cuda"):
        names = [case.name for case in cases(attention.sweeps(device, quick=False))]
        assert len(names) == len(set(names)) > 30


# Processes and files -------------------------------------------------------------------------------------------------


class Sleeper:
    def __init__(self, answer: Any) -> None:
        if answer == "unmade":
            raise MemoryError("too large")
        self.answer = answer

    def step(self, number: int) -> tuple[float, Any]:
        if self.answer == "fails":
            raise ValueError(f"step {number}")
        return 0.5 + number, self.answer

    def peak_gib(self) -> float | None:
        return 2.0 if self.answer == "right" else None


def test_processes_take_turns_and_failures_are_reasons() -> None:
    from functools import partial

    makers = {name: partial(Sleeper, name) for name in ("right", "fails", "unmade", "unwanted")}
    turns = take_turns(makers, 2, accept=lambda first: {name: "refused" for name in first if name == "unwanted"})
    assert turns.seconds == {"right": [1.5, 2.5]}
    assert turns.answers["right"] == ["right"] * 3
    assert turns.peak_gib == {"right": 2.0}
    assert turns.absent == {"fails": "ValueError: step 0", "unmade": "MemoryError: too large", "unwanted": "refused"}


def test_records_merge_by_case_in_the_order_of_cases(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    results.merge(path, {"c": 1, "gone": 5}, ["a", "b", "c"])
    results.merge(path, {"a": 2}, ["a", "b", "c"])
    results.merge(path, {"c": 3}, ["a", "b", "c"])
    assert list(json.loads(path.read_text())["results"].items()) == [("a", 2), ("c", 3), ("gone", 5)]
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


# Plots ---------------------------------------------------------------------------------------------------------------


def apart(texts: list[Any]) -> bool:
    """Whether texts that are drawn lie beside each other, inside the figure."""
    boxes = [text.get_window_extent() for text in texts if text.get_text().strip()]
    page = texts[0].figure.bbox
    inside = all(box.x0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1 for box in boxes)
    return inside and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("ends", [(1.0, 1.0, 1.0), (0.02, 99.0, 100.0), (3.0, 3.1, 60.0)])
def test_every_line_is_named_beside_its_end(ends: tuple[float, ...], from_zero: bool) -> None:
    names = ("softkv torch", "cat", "no prefix")
    lines = {name: [(1.0, 0.5), (8.0, end)] for name, end in zip(names, ends, strict=True)}
    figure = plots.growth("Title", "rows (B)", {"ms": lines, "working MiB": lines}, from_zero=from_zero)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        assert {text.get_text().strip() for text in axes.texts} == lines.keys()
        assert apart(axes.texts)
        assert all(text.clipbox is None or not text.get_clip_on() for text in axes.texts)


def test_names_move_up_and_at_the_top_down() -> None:
    assert plots.moved_apart({"a": 0.5, "b": 0.1, "c": 0.52}, 0.1) == {"b": 0.1, "a": 0.5, "c": 0.6}
    moved = plots.moved_apart({"a": 0.95, "b": 0.94, "c": 0.2}, 0.1)
    assert moved == pytest.approx({"c": 0.2, "b": 0.9, "a": 1.0})


@pytest.mark.parametrize("values", [(0.0149, 39.9), (1.2, 1.3), (1.5, 24.2), (1e-3, 1e4)])
def test_bars_have_room_for_their_figures_and_ticks(values: tuple[float, float]) -> None:
    figure = plots.bars("Title", {"a": {"softkv": values[0], "floor": values[1]}, "b": {"PEFT": values[1]}}, "ms")
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    ticks = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert len(ticks) > 1
    assert apart(ticks)
    assert apart(axes.texts)


# The command ---------------------------------------------------------------------------------------------------------


def bench(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_bench_attention_writes_records_plots_and_a_report(tmp_path: Path) -> None:
    printed = bench("attention", "--quick", "--case", "prefix/*", "--case", "bank/*A1", "-o", tmp_path)
    assert "softkv is faster by" in printed.replace("\n", " ")
    assert "needs a GPU" in printed
    assert "│         — │" in printed
    records = json.loads((tmp_path / "attention.json").read_text())["results"]
    assert [name.split("-", 4)[-1] for name in records] == ["P2-D16-A1", "P8-D16-A1", "P5-D16-A1"]
    for record in records.values():
        assert set(record["providers"]) == set(OF_CPU)
        assert set(record["absent"]) == {"softkv triton", "softkv cudnn", "softkv flash", "flex", "flash-attn cat"}
        assert {"machine", "command", "settings", "peak"} <= record.keys()
        assert record["peak"] == {}  # tiny sizes say nothing about a machine's peak
        assert record["machine"]["torch"] == torch.__version__
        ours = record["providers"]["softkv torch"]
        assert ours["error"] < 1e-4
        assert ours["cold"]["ms"]["median"] > 0
        assert ours["working_mib"] >= 0
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 1  # the sweep of two cases
    assert (tmp_path / "attention-prefix.png").exists()
    assert "prefix/" in report


def test_bench_train_and_generate_on_a_tiny_model(tmp_path: Path) -> None:
    bench("train", "--quick", "--case", "v2-64", "--steps", 1, "-o", tmp_path)
    bench("generate", "--quick", "--rounds", 1, "-o", tmp_path)
    trained = json.loads((tmp_path / "train.json").read_text())["results"]["v2-64"]
    losses = trained["first_loss"]
    assert trained["absent"] == {}
    assert losses["PEFT"] == pytest.approx(losses["softkv"], abs=1e-3)
    assert losses["floor"] != pytest.approx(losses["softkv"], abs=1e-3)
    generated = json.loads((tmp_path / "generate.json").read_text())["results"]["P5"]
    assert generated["absent"] == {}  # PEFT's tokens are softkv's
    assert set(generated["seconds"]) == {"softkv", "PEFT", "no prefix"}
    assert all(len(sample) == 1 for sample in generated["seconds"].values())
    assert all(peak > 0 for peak in generated["peak_gib"].values())


def test_an_unknown_case_is_an_error_and_cases_are_listed() -> None:
    assert "no case is called nothing" in bench("attention", "--case", "nothing", code=2)
    assert "P1024" in bench("generate", "--list").split()


def test_make_bench_runs_every_benchmark() -> None:
    recipe = (Path(__file__).parents[1] / "Makefile").read_text().split("\nbench:")[1].split("\n\n")[0]
    names = {command.callback.__name__ for command in bench_app.registered_commands if command.callback}
    assert names == {"attention", "train", "generate", "adapters", "report", "gpu"}
    names -= {"report", "gpu"}
    assert names == set(re.findall(r"softkv bench (\w+)", recipe))
    assert report.TITLES.keys() == tables.GRIDS.keys() == plots.PLOTS.keys() == names


def test_tokens_that_differ_keep_peft_from_being_timed() -> None:
    from benchmarks.generate import same_tokens

    assert same_tokens({"softkv": [[1, 2], [3, 4]], "PEFT": [[1, 2], [3, 5]], "no prefix": [[0, 0]]}) == {
        "PEFT": "its tokens differ from softkv's in 1 of 2 rows"
    }
    assert same_tokens({"softkv": [[1]], "PEFT": [[1]]}) == {}
    assert same_tokens({"PEFT": [[1]]}) == {}  # softkv's own failure is told elsewhere


def test_two_processes_may_obtain_the_model_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import smollm2

    def convert(gguf: Path, folder: Path) -> None:
        for made in (folder, tmp_path / "SmolLM2-135M-Instruct"):  # the other process is first
            made.mkdir()
            (made / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "CACHE", tmp_path)
    monkeypatch.setattr(smollm2, "_download", lambda scratch: scratch)
    monkeypatch.setattr(smollm2, "_convert", convert)
    assert smollm2.obtain() == tmp_path / "SmolLM2-135M-Instruct"
    assert [path.name for path in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct"]


def test_memory_of_a_call_is_what_it_makes() -> None:
    from benchmarks.memory import working_mib

    case = replace(cases(QUICK)[0], shape=Shape(4, 8, 8, 256, 64, 64), mode="forward")
    made = case.shape.B * case.shape.H * case.shape.T * case.shape.D * 4 / 2**20
    ours = working_mib(case, "softkv torch", "", "cpu", "float32")
    joined = working_mib(case, "cat", "bool mask, grouped heads", "cpu", "float32")
    assert ours is not None
    assert joined is not None
    assert made * 0.9 <= ours
    assert joined - made > 2 * case.shape.B * 8 * (256 + 64) * 64 * 4 / 2**20 * 0.9  # keys and values once more


def test_shapes_of_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PROVIDERS, "flex")  # its compiler takes a minute
    monkeypatch.setattr(attention, "working_mib", lambda *_: 0.0)  # a process each
    shapes = ("B=1,H=2,G=1,T=9,P=3,D=8", "B=2, H=2, G=2, T=1, S=7, P=5, D=8")
    options = [option for shape in shapes for option in ("--shape", shape)]
    result = CliRunner().invoke(bench_app, ["attention", "--quick", *options, "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "attention.json").read_text())["results"]
    assert list(records) == [
        "shapes/forward/B1-H2-G1-T9-P3-D8-A1",
        "shapes/forward+backward/B1-H2-G1-T9-P3-D8-A1",
        "decoding-shapes/decoding/B2-H2-G2-T1-P5-D8-S7-A1",
    ]
    assert all({"softkv torch", "cat", "no prefix"} <= set(record["providers"]) for record in records.values())
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B=8,H=32", "without G, T, P, D"),
        ("B=8,H=32,G=8,T=64,P=8,D=big", "'D=big'"),
        ("B=8,H=32,G=8,T=64,P=8,D=64,Z=1", "'Z=1'"),
        ("B=8,H=32,G=5,T=64,P=8,D=64", "H a multiple of G"),
        ("B=8,H=32,G=8,T=64,P=8,D=64,S=9", "as many keys as queries"),
    ],
)
def test_a_shape_that_is_none(text: str, said: str) -> None:
    result = CliRunner().invoke(bench_app, ["attention", "--shape", text])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
