"""`pefast select`: how important a part must be to train, by cross-validation."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .screen import console, in_words


def select(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; its importance method says what is scored.")],
    shares: Annotated[str | None, typer.Option(help="Shares of the parameters: 0.001,0.01,0.1")] = None,
    thresholds: Annotated[str | None, typer.Option(help="Instead: thresholds on the score.")] = None,
    folds: Annotated[int, typer.Option(help="Parts that the training rows are split into.")] = 3,
    batches: Annotated[int, typer.Option(help="Batches that the units are scored on.")] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="The recipe's own short form: minutes.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key, such as data.train_rows=500."),
    ] = None,
) -> None:
    """Choose by cross-validation how important a part must be to train, and print the curve."""
    with in_words():
        from .. import recipe as recipes

        wanted = recipes.read(recipe, dict(recipes.change(text) for text in changes or []), quick)
        if shares is not None and thresholds is not None:
            raise ValueError("select: shares and thresholds came; one of them would be right")
        by = "share" if thresholds is None else "threshold"
        lines = _numbers(shares if thresholds is None else thresholds, f"--{by}s")

        from .. import selection, training

        lines = lines or selection.SHARES
        selection.check_lines(lines, by)
        run = training.prepare(wanted)
        points = selection.curve(run, lines, by=by, count=folds, batches=batches, seen=console.print)
        best = selection.best(points)
        _curve(points, best, by, run.task.METRIC)
        line = selection.scored(run, batches).threshold(best.line) if by == "share" else best.line
        console.print(
            f"on all training rows: methods: [{{method: importance, threshold: {line:.4g}}}]", markup=False
        )


def _numbers(text: str | None, flag: str) -> list[float]:
    try:
        return [float(word) for word in (text or "").split(",") if word.strip()]
    except ValueError:
        raise ValueError(f"{flag}: {text!r} came; numbers with commas between them are wanted") from None


def _curve(points, best, by: str, metric: str) -> None:
    """The curve as a table, with a bar for each mean."""
    low, high = min(point.mean for point in points), max(point.mean for point in points)
    table = Table(by, "threshold", "parameters", metric, "±", "", title="cross-validation")
    for point in points:
        count, line = len(point.values), sum(point.thresholds) / len(point.thresholds)
        bar = "█" * (1 + round(23 * (point.mean - low) / ((high - low) or 1)))
        numbers = (f"{point.line:g}", f"{line:.3g}", f"{sum(point.trained) // count:,}")
        shown = (f"{point.mean:.3f}", f"{point.error:.3f}", bar)
        table.add_row(*numbers, *shown, style="bold" if point is best else None)
    console.print(table)
