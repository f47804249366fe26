"""`--config`: the values of a file become the defaults of options, which click then parses like flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from softkv.cli.console import fail


def _configured(context: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    names = {
        option.removeprefix("--").replace("-", "_"): parameter.name
        for parameter in context.command.params
        for option in (*parameter.opts, parameter.name or "")
    }
    try:
        values = _parse(path)
    except (OSError, ValueError, ImportError) as error:
        fail(error)
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(key.replace("-", "_"))
        if name is None:
            fail(f"{path} sets {key!r}, which is not an option of this command: see softkv {context.info_name} --help")
        if isinstance(value, dict):
            value = [f"{key}={one if isinstance(one, str) else json.dumps(one)}" for key, one in value.items()]
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _parse(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml":
            import tomllib

            values: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml", ".json"):  # JSON is YAML, except for 1e-3
            import yaml

            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        else:
            raise ValueError("it is neither .yaml, .toml nor .json")
    except ModuleNotFoundError:
        raise ValueError(f"{path} is TOML, which needs Python 3.11: use YAML or JSON") from None
    except Exception as error:  # from any of three parsers
        raise ValueError(f"{path} can't be read as options: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} contains no options: expected name: value")
    return values


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        callback=_configured,
        is_eager=True,
        help="YAML, TOML or JSON file of these options, by their long names; flags win.",
    ),
]
