"""How the commands of this project start and how they fail."""

import sys
from collections.abc import Callable

import typer


def run_cli(main: Callable[..., None]) -> None:
    """Runs a typer command; bad input ends it with one clear line on standard error and exit code 2.

    ValueError, NotImplementedError and OSError are bad input. With --debug among the arguments they show a traceback.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (ValueError, NotImplementedError, OSError) as error:
        if "--debug" in sys.argv[1:]:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
