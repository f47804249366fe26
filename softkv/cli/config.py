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
    named = {
        option.removeprefix("--").replace("-", "_"): parameter
        for parameter in context.command.params
        if parameter.name != "config"
        for option in (*parameter.opts, parameter.name or "")
    }
    try:
        values = _parse(path)
    except (OSError, ValueError, ImportError) as error:
        fail(error)
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        parameter = named.get(str(key).replace("-", "_"))
        if parameter is None or parameter.name is None:
            fail(f"{path} sets {key!r}, which is not an option of this command: see softkv {context.info_name} --help")
        try:
            defaults[parameter.name] = _checked(context, parameter, value)
        except (ValueError, TypeError) as error:
            fail(f"{path} sets {key!r} to {value!r:.300}: {error}")
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _checked(context: typer.Context, parameter: Any, value: Any) -> Any:
    """The value of an option, which its own parser accepts."""
    if value is None:
        return None
    if parameter.multiple:
        if isinstance(value, dict):
            value = [f"{key}={one if isinstance(one, str) else json.dumps(one)}" for key, one in value.items()]
        elif not isinstance(value, list):
            value = [value]
    elif isinstance(value, list | dict):
        raise ValueError("expected one value")
    elif isinstance(value, bool) and not parameter.is_flag:
        raise ValueError("expected no true or false")
    try:
        parameter.process_value(context, value)
    except typer.BadParameter as error:
        raise ValueError(error.message) from error
    return value


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
