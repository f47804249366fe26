"""Providers in separate processes, so that peak memory is measured separately. They take steps in turn, so that a slow
phase of the machine affects all of them."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

_PRELOADED = ["softkv", "peft", "transformers.models.llama.modeling_llama"]  # imported once, not in each process
_MEMORY_SHARE = 0.9  # of what is free: a provider that wants more fails by itself and takes nobody with it


class TimedJob(Protocol):
    def step(self, number: int) -> tuple[float, Any]:
        """Seconds, and an answer that can be sent."""

    def peak_gib(self) -> float | None:
        """Peak memory where the process's own does not tell."""


@dataclass
class Turns:
    """What the steps gave, by provider; the first, which warms up, has no time."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, list[Any]] = field(default_factory=dict)
    peak_gib: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def take_turns(
    makers: Mapping[str, Callable[[], TimedJob]],
    rounds: int,
    *,
    accept: Callable[[dict[str, Any]], dict[str, str]] = lambda first: {},
    progress: Callable[[int], None] = lambda number: None,
) -> Turns:
    """One step that warms up and `rounds` timed ones of every provider.

    Args:
        makers: make each provider's job, in its process.
        accept: is given the first answers and says which providers are not to be timed, and why.
        progress: is told the number of each round.
    """
    import psutil

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    limit = int(_MEMORY_SHARE * psutil.virtual_memory().available)
    turns, pipes, processes = Turns(), {}, []
    for name, make in makers.items():
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=_serve, args=(make, theirs, limit), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)

    def drop(name: str, reason: str) -> None:
        turns.absent[name] = reason
        pipes.pop(name).close()

    def hear(name: str) -> Any:
        """What a provider sends, or None when it failed: then it is gone."""
        try:
            answer = pipes[name].recv()
        except EOFError:
            answer = RuntimeError("its process was ended")
        if isinstance(answer, Exception):
            return drop(name, str(answer))
        return answer

    def ask(name: str, request: int | None) -> Any:
        pipes[name].send(request)
        return hear(name)

    for name in list(pipes):
        hear(name)  # ready
    for number in range(rounds + 1):
        for name in list(pipes):
            if (answer := ask(name, number)) is not None:
                took, result = answer
                turns.answers.setdefault(name, []).append(result)
                if number:
                    turns.seconds.setdefault(name, []).append(took)
        if number == 0:
            for name, reason in accept({name: turns.answers[name][0] for name in pipes}).items():
                drop(name, reason)
        progress(number)
    for name in list(pipes):
        if (peak := ask(name, None)) is not None:
            turns.peak_gib[name] = peak
    for process in processes:
        process.join()
    return turns


def _serve(make: Callable[[], TimedJob], pipe: Connection, limit: int) -> None:
    """Steps at each number, ends at None with its peak memory; a failure is sent as one line."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        job = make()
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            pipe.send(job.step(number))
        peak = job.peak_gib()
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if peak is None else peak)
    except EOFError:
        pass  # dropped
    except Exception as failure:
        pipe.send(RuntimeError(f"{type(failure).__name__}: {failure}".splitlines()[0][:200]))
