"""What every command shares: the console, tables, and errors as one sentence."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

console = Console(highlight=False)

Quick = Annotated[bool, typer.Option("--quick", help="The recipe's own short form: minutes.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, such as data.train_rows=500.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `pefast train` wrote.")]


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """One sentence instead of a traceback for what a person can mend; PEFAST_TRACE=1 shows both."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("PEFAST_TRACE"):
            raise
        typer.echo(f"pefast: {error}", err=True)
        raise typer.Exit(2) from error


def table(title: str, columns: tuple[str, ...], lines: list[tuple]) -> None:
    """Prints lines under column names; fractions with three digits."""
    drawn = Table(*columns, title=title)
    for line in lines:
        drawn.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line))
    console.print(drawn)
