"""The `softkv` command. A new command is a module with a function, named below; `friendly` gives it one-line errors."""

import typer

from softkv.cli import bake, bench, evaluate, generate, inspect, methods, plan, profile, train
from softkv.cli.console import friendly

app = typer.Typer(
    help="Train, measure and use soft prompts on frozen language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(profile.app, name="profile")
app.add_typer(bench.app, name="bench")
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command(epilog=train.EXAMPLES)(friendly(train.train))
app.command("eval", epilog=evaluate.EXAMPLES)(friendly(evaluate.evaluate))
app.command(epilog=generate.EXAMPLES)(friendly(generate.generate))
app.command(epilog=inspect.EXAMPLES)(friendly(inspect.inspect))
app.command(epilog=bake.EXAMPLES)(friendly(bake.bake))
app.command(epilog=methods.EXAMPLES)(friendly(methods.methods))
