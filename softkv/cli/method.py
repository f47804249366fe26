"""The method that a command's options describe."""

from __future__ import annotations

from typing import Any

from softkv.cli.console import fail
from softkv.cli.options import pairs


def method_of(name: str, settings: list[str] | None, **flags: Any) -> Any:
    """The method with its options, from --set and from dedicated flags (None if not given)."""
    from dataclasses import fields

    from softkv.methods import METHODS

    given = {key: value for key, value in flags.items() if value is not None}
    options = pairs(settings, "--set") | given
    for key in {"template", "init_text"} & options.keys():
        options[key] = str(options[key]).replace("\\n", "\n")  # a shell has no easy way to write a newline
    known = [one.name for one in fields(METHODS[name])]  # type: ignore[arg-type]
    _check_names(name, options, given, known)
    if "init_text" in options:
        options.setdefault("init", "text")
    if name == "p-tuning" and "template" in options:
        options["template"] = _with_soft_tokens(options["template"])
    try:
        return METHODS[name](**options)
    except TypeError as error:  # such as a text instead of a number
        fail(f"{name} can't use {', '.join(f'{key}={value!r}' for key, value in options.items())}: {error}")


def _with_soft_tokens(template: str) -> str:
    """A template for p-tuning: one without soft tokens gets the default ones before its answer."""
    from softkv.methods.p_tuning import SOFT_TOKENS
    from softkv.methods.template import Template

    parsed = Template.parse(template)
    if parsed.soft_tokens:
        return template
    return "".join(map(str, parsed.pieces[:-1])).rstrip() + f" {SOFT_TOKENS} [Y]"


def _check_names(name: str, options: dict[str, Any], given: dict[str, Any], known: list[str]) -> None:
    if name == "p-tuning" and "length" in options:
        fail("p-tuning takes no --length: its template determines the number of soft tokens, [P1][P2]...")
    if name == "p-tuning" and "init_text" in options:
        fail("p-tuning takes no --init-text: its encoder can read a text, --set prompt_text='...'")
    if unknown := sorted(options.keys() - set(known)):
        names = [f"--{key.replace('_', '-')}" if key in given else key for key in unknown]
        fail(f"{name} has no option {', '.join(names)}: it has {', '.join(known)}")
