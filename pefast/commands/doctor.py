"""`pefast doctor`: what this machine has."""

from rich.table import Table

from .screen import console


def doctor() -> None:
    """Say what this machine has, what is missing, and what that costs."""
    from ..doctor import look

    table = Table("", "found", "what it means", title="pefast doctor")
    for row in look():
        table.add_row(*row)
    console.print(table)
