"""`python -m softkv.cli` is the `softkv` command."""

from softkv.cli import app

app()
