"""transformers' TrainingArguments, from a command's options and from --arg."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from softkv.cli.console import fail
from softkv.cli.options import pairs


def training_arguments(values: dict[str, Any], arg: list[str] | None) -> Any:
    """The values, and over them the NAME=VALUE of --arg, which transformers' own parser reads."""
    import torch
    import transformers

    class Parser(transformers.HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            fail(f"--arg: {message}")

    given = {name.replace("-", "_"): text for name, text in pairs(arg, "--arg", parse=False).items()}
    known = transformers.TrainingArguments.__dataclass_fields__
    if unknown := sorted(given.keys() - set(known)):
        fail(f"transformers' TrainingArguments have no {', '.join(unknown)}")
    texts = [f"--{name}={text}" for name, text in given.items() if text != "None"]
    parsed = vars(Parser(transformers.TrainingArguments, allow_abbrev=False).parse_args(texts))
    values = values | {name: None if text == "None" else parsed[name] for name, text in given.items()}
    for name in given:
        if isinstance(values[name], float) and not math.isfinite(values[name]):
            fail(f"--arg {name} expects a finite number, got {values[name]}")
    values.setdefault("dataloader_pin_memory", torch.accelerator.is_available() and not values["use_cpu"])
    _check_reporters(values["report_to"])
    return transformers.TrainingArguments(**values)


def _check_reporters(report_to: str | list[str] | None) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in set(names) - {"all", "none"} - set(get_available_reporting_integrations()):
        if name not in INTEGRATION_TO_CALLBACK:
            fail(f"--report-to expects one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}")
        fail(f"--report-to {name} expects the package {name}, which is not installed: pip install {name}")
