"""What every command prints to, and its one-line errors."""

from __future__ import annotations

import functools
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
            command(*args, **kwargs)
        except KeyboardInterrupt:
            err.print("softkv: interrupted")
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            if os.environ.get("SOFTKV_TRACEBACK"):
                raise
            fail(error)

    return run


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
