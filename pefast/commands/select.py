"""`pefast select`: a search over a recipe's keys, or how important a part must be to train."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .screen import Changes, Quick, console, in_words


def select(
    recipe: Annotated[
        Path,
        typer.Argument(help="A YAML file; its `search` says what is tried, its importance what is scored."),
    ],
    trials: Annotated[
        int | None, typer.Option(help="Of the search, those that ended before included.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in the output.")] = False,
    shares: Annotated[str | None, typer.Option(help="Instead: shares of the parameters, 0.001,0.1")] = None,
    thresholds: Annotated[str | None, typer.Option(help="Instead: thresholds on the score.")] = None,
    folds: Annotated[int | None, typer.Option(help="Parts that the training rows are split into.")] = None,
    batches: Annotated[int, typer.Option(help="Batches that the units are scored on.")] = 16,
    output: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    quick: Quick = False,
    changes: Changes = None,
) -> None:
    """Search a recipe's keys by folds or validation rows, stopped and continued as you like.

    With a `search` in the recipe: trials, the best recipe and pictures in OUTPUT/search. Without one, or with
    --shares or --thresholds: the curve of how important a part must be to train.
    """
    with in_words():
        from .. import recipe as recipes

        wanted = recipes.read(recipe, dict(recipes.change(text) for text in changes or []), quick)
        if shares is not None and thresholds is not None:
            raise ValueError("select: shares and thresholds came; one of them would be right")
        if output is not None:
            wanted.output = str(output)
        if wanted.search is None or shares is not None or thresholds is not None:
            if trials is not None or resume:
                raise ValueError(
                    "select: --trials and --resume are for a recipe's `search`; there is none here"
                )
            _importance(wanted, shares, thresholds, 3 if folds is None else folds, batches)
            return
        given = {"search.trials": trials, "search.folds": folds}
        _search(recipes.changed(wanted, {key: n for key, n in given.items() if n is not None}), resume)


def _search(wanted, resume: bool) -> None:
    from .. import search, training

    def seen(trial) -> None:
        setting = ", ".join(f"{key}={_short(value)}" for key, value in trial.changes.items())
        said = f"{trial.value:.3f}" if trial.values else f"lost ({trial.why})"
        console.print(f"trial {trial.number} of {wanted.search.trials}: {said}  {setting}", soft_wrap=True)

    try:
        found = search.search(wanted, resume, seen=seen)
    except training.Stopped as stopped:
        console.print(str(stopped))
        raise typer.Exit(130) from None
    ranked = sorted((trial for trial in found.trials if trial.values), key=lambda trial: -trial.value)
    table = Table("trial", "metric", "parameters", "setting", title="the best trials")
    for trial in ranked[:5]:
        setting = "\n".join(f"{key} = {_short(value)}" for key, value in trial.changes.items())
        bold = "bold" if trial is found.best else None
        table.add_row(str(trial.number), f"{trial.value:.3f}", f"{trial.trained:,}", setting, style=bold)
    console.print(table, markup=False)
    if found.pictures:
        console.print(f"pictures: {', '.join(path.name for path in found.pictures)}")
    else:
        console.print("no pictures: matplotlib is not installed; `pip install 'pefast[search]'` brings it")
    console.print(f"pefast train {found.recipe}", soft_wrap=True)


def _short(value: object) -> str:
    from ..recipe import label

    return f"{value:.3g}" if isinstance(value, float) else str(label(value))


def _importance(wanted, shares, thresholds, folds: int, batches: int) -> None:
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
