"""Runs the parts one after another, with time limits, in processes that may fail; stores records on disk and writes the
table at the end."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..results import write_json
from . import PARTS, BenchmarkPart, Settings, breaks_the_process, table
from .environment import fingerprint

FULL_MINUTES = 9.0  # what the parts' seconds are meant for
TABLE = "table.md"
_SHARE_OF_WARMING = 0.6  # of a part's time: the rest must measure
_PRELOADED = ["softkv.ops.api", "softkv.hf", "peft", "transformers.models.llama.modeling_llama"]
Say = Callable[[str], None]


class Records:
    """A part's records: `<part>.json` in the results' folder, whole after every job."""

    def __init__(self, folder: Path, part: str, about: dict[str, Any], again: bool) -> None:
        self.path, self.about, self.results = folder / f"{part}.json", about, {}
        if self.path.exists() and not again:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["about"] == about:
                self.results = kept["results"]

    def done(self, job: str) -> bool:
        return "error" not in self.results.get(job, {"error": "not run"})

    def add(self, job: str, record: dict[str, Any]) -> None:
        self.results[job] = record
        write_json(self.path, {"about": self.about, "results": self.results})


def conduct(
    settings: Settings,
    folder: Path,
    minutes: float = FULL_MINUTES,
    parts: Sequence[str] = (),
    again: bool = False,
    say: Say = print,
) -> str:
    """Run the parts, all of them unless named, and give the table, which is also written to the folder.

    What is left of the time when every part had its share goes to the jobs that are still open.
    """
    end = time.monotonic() + 60 * minutes
    chosen = [part for part in PARTS if not parts or part.name in parts]
    about = fingerprint(settings)
    _import_libraries(settings, say)
    records = {part.name: Records(folder, part.name, about, again) for part in chosen}
    for is_rest in (False, True):
        for part in chosen:
            left = end - time.monotonic()
            limit = left if is_rest else min(left, part.seconds * minutes / FULL_MINUTES)
            if limit > 0:
                _run(part, settings, limit, records[part.name], say, retry=not is_rest)
    text = table.of({part: records[part.name].results for part in chosen}, about)
    (folder / TABLE).write_text(text, encoding="utf-8")
    return text


def _run(part: BenchmarkPart, settings: Settings, limit: float, records: Records, say: Say, retry: bool) -> None:
    """Do what is open; with `retry` also what failed in an earlier run."""
    began = time.monotonic()
    deadline = began + limit
    module = importlib.import_module(part.module)
    open_jobs = [j for j in module.jobs(settings) if not (records.done(j) or (not retry and j in records.results))]
    if not open_jobs:
        return
    say(f"{part.title} ({len(open_jobs)} jobs, at most {limit:.0f} s)")
    if settings.on_gpu and hasattr(module, "warm"):
        _warm(part, settings, _SHARE_OF_WARMING * limit, say)
    while open_jobs and time.monotonic() < deadline:
        _serve(part, settings, open_jobs, deadline, records, say)
    say(f"  {time.monotonic() - began:.0f} s" + (f", left open: {', '.join(open_jobs)}" if open_jobs else ""))


def _serve(
    part: BenchmarkPart, settings: Settings, open_jobs: list[str], deadline: float, records: Records, say: Say
) -> None:
    """One process until the jobs are done, time is over or it dies; takes from `open_jobs` what was tried."""
    context = _context(part, settings)
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, part, list(open_jobs), settings, deadline))
    with _interpreting(part.interpreted and not settings.on_gpu):
        process.start()
    theirs.close()
    job = None
    try:
        while pipe.poll(max(0.0, deadline - time.monotonic())):
            kind, job, content = pipe.recv()
            if kind == "end":
                open_jobs.remove(job)
                records.add(job, content)
                say(f"  {job}: {content.get('error') or content.get('said') or 'done'}")
                job = None
    except EOFError:
        process.join()
        if job is not None:
            open_jobs.remove(job)
            records.add(job, {"error": f"its process ended with exit code {process.exitcode}"})
        elif process.exitcode:
            raise RuntimeError(f"{part.name}: its process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _work(pipe: Connection, part: BenchmarkPart, jobs: list[str], settings: Settings, deadline: float) -> None:
    """In a part's process. The clock that `deadline` is of runs alike in all processes."""
    module = importlib.import_module(part.module)
    for job in jobs:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        pipe.send(("begin", job, None))
        record = _guarded(partial(module.run, job, settings, left))
        pipe.send(("end", job, record))
        if breaks_the_process(record.get("error", "")):
            return


def _guarded(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as failure:  # a part's job says what went wrong, and the next one runs
        return {"error": f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]}


def _warm(part: BenchmarkPart, settings: Settings, limit: float, say: Say) -> None:
    """Compile what a part needs by many processes; what fails here fails where it is measured, and is told there."""
    began, pipes, processes = time.monotonic(), [], []
    for worker in range(settings.processes):
        context = _context(part, settings)
        pipe, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_compile, args=(theirs, part, settings, worker))
        process.start()
        theirs.close()
        pipes.append(pipe)
        processes.append(process)
    waiting = list(pipes)
    try:
        while waiting and (left := began + limit - time.monotonic()) > 0:
            ended = wait(waiting, left)
            waiting = [pipe for pipe in waiting if pipe not in ended]
    finally:
        for process in processes:
            process.kill()
            process.join()
    say(f"  compiled in {time.monotonic() - began:.0f} s{', not all of it' if waiting else ''}")


def _compile(pipe: Connection, part: BenchmarkPart, settings: Settings, worker: int) -> None:
    for call in importlib.import_module(part.module).warm(settings)[worker :: settings.processes]:
        _guarded(call)
    pipe.send("done")


def _context(part: BenchmarkPart, settings: Settings) -> Any:
    """Processes start from one that has imported the libraries and never touched a device; those whose kernels must not
    be interpreted like the others' start from nothing."""
    if not (part.interpreted or settings.on_gpu):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _import_libraries(settings: Settings, say: Say) -> None:
    """Start the process that the parts' start from, so that no part's time is spent on it."""
    began = time.monotonic()
    first = _context(PARTS[0], settings).Process(target=int)
    with _interpreting(not settings.on_gpu):
        first.start()
        first.join()
    say(f"Libraries imported in {time.monotonic() - began:.0f} s")


@contextmanager
def _interpreting(on: bool) -> Iterator[None]:
    """Triton decides as it is imported whether kernels are interpreted: what a process that starts now will find."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    if on:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
