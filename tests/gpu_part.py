"""Jobs of a made-up part of `softkv bench gpu`: they succeed, raise, take the process with them, take too long."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softkv.benchmarks.gpu import BenchmarkPart, Settings

TRACE = "SOFTKV_TEST_TRACE"


@dataclass(frozen=True)
class MadeUp(BenchmarkPart):
    @property
    def module(self) -> str:
        return __name__


def jobs(settings: Settings) -> list[str]:
    return os.environ["SOFTKV_TEST_JOBS"].split()


def run(job: str, settings: Settings, seconds: float) -> dict[str, Any]:
    with Path(os.environ[TRACE]).open("a") as trace:
        trace.write(f"{job}\n")
    if job == "raises":
        raise ValueError("no such\nluck")
    if job == "dies":
        os._exit(7)
    if job == "sleeps":
        time.sleep(60)
    return {"number": 1, "said": "fine"}


def lines(results: dict[str, Any]) -> list[str]:
    return [f"- {job}: {record['number']} " + "x" * 900 for job, record in results.items()]
