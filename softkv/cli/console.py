"""Output and one-line errors of every command."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

out, err = Console(highlight=False), Console(stderr=True, highlight=False)


def fail(message: object) -> NoReturn:
    err.print(f"[bold red]softkv:[/] {escape(' '.join(str(message).split()))}", soft_wrap=True)
    raise typer.Exit(2)


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """One line instead of a traceback (SOFTKV_TRACEBACK=1 shows it), exit code 2; 130 for Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _quiet()
            _check_finite(kwargs)
            command(*args, **kwargs)
        except KeyboardInterrupt:
            err.print("softkv: interrupted")
            raise typer.Exit(130) from None
        except ModuleNotFoundError as error:
            if os.environ.get("SOFTKV_TRACEBACK"):
                raise
            fail(_missing(error))
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            if os.environ.get("SOFTKV_TRACEBACK"):
                raise
            fail(error)

    return run


def _check_finite(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"--{name.replace('_', '-')} expects a finite number, got {value}")


# Packages that only some commands need → what of softkv brings them.
_EXTRAS = {"matplotlib": "plots", "peft": "bench", "psutil": "bench", "gguf": "demo", "datasets": "data"}


def _missing(error: ModuleNotFoundError) -> str:
    name = (error.name or str(error)).partition(".")[0]
    package = f"'softkv[{_EXTRAS[name]}]'" if name in _EXTRAS else name
    return f"this needs the package {name}, which is not installed: pip install {package}"


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
