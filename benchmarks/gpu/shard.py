"""A pytest plugin: runs every n-th test, SOFTKV_SHARD = "i/n", so that n processes share a suite."""

from __future__ import annotations

import os
from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    number, count = (int(part) for part in os.environ["SOFTKV_SHARD"].split("/"))
    mine = items[number::count]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != number])
    items[:] = mine
