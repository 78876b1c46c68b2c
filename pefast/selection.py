"""How much of a model to train, and which part: the threshold on the importance of its units, by k-fold
cross-validation over a recipe's training rows.

For each fold the units are scored on the rows of the other folds; for each share of the parameters the units
above the threshold that leaves about that share train on those rows, and the task's metric is taken on the
fold. Kohavi 1995, "A study of cross-validation and bootstrap for accuracy estimation and model selection".
"""

import dataclasses
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console

import pefast

from . import recipe as recipes
from . import training
from .methods import Importance, Scores
from .progress import Watcher
from .tasks.rows import Row
from .training import Run

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)


class Point(NamedTuple):
    """One line that was drawn, and what came of it in each fold."""

    line: float  # the share or the threshold that was asked for
    thresholds: tuple[float, ...]
    trained: tuple[int, ...]  # parameters, the task head's among them
    values: tuple[float, ...]  # the task's metric on the fold

    @property
    def mean(self) -> float:
        """Of the metric over the folds."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean; 0 for one fold."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else 0.0


def folds(
    rows: Sequence[Row], count: int, seed: int = 0, by: str | None = None
) -> list[tuple[list[Row], list[Row]]]:
    """(the other rows, the fold's) for each of `count` folds, shuffled, their sizes at most one apart; with
    `by` each value of that role has its share in every fold.

    Raises ValueError for fewer than two folds or more folds than rows.
    """
    if not isinstance(count, int) or not 2 <= count <= len(rows):
        raise ValueError(f"select: {count} folds of {len(rows)} rows; 2 to {len(rows)} would be right")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    if by is not None:
        # dealt out value by value, so that no fold gets more than its share of one; the sort keeps the order
        order.sort(key=lambda index: str(rows[index][by]))
    parts = [set(order[i::count]) for i in range(count)]
    return [
        ([row for i, row in enumerate(rows) if i not in part], [rows[i] for i in sorted(part)])
        for part in parts
    ]


def curve(
    run: Run,
    lines: Sequence[float] = SHARES,
    *,
    by: str = "share",
    count: int = 3,
    batches: int = 16,
    seen: Callable[[str], None] = lambda text: None,
) -> list[Point]:
    """The metric over `count` folds for each line: shares of the parameters, or thresholds with
    by="threshold".

    The recipe's importance method says unit, measure and targets; its other methods train too. `run` comes
    from training.prepare, and its model is afterwards as it was. `seen` is told of each training. Raises
    ValueError for lines that cannot be.
    """
    check_lines(lines, by)
    found: dict[float, list[tuple[float, int, float]]] = {line: [] for line in lines}
    parts = folds(run.train, count, run.recipe.data.seed, run.task.STRATUM)
    quiet = Watcher(Console(quiet=True))
    with tempfile.TemporaryDirectory() as folder:
        recipe = dataclasses.replace(run.recipe, output=f"{folder}/out")
        for number, (train, held) in enumerate(parts, 1):
            part = dataclasses.replace(run, recipe=recipe, train=train, valid=[])
            scores = scored(part, batches)
            for line in lines:
                threshold = scores.threshold(line) if by == "share" else line
                trained, value = _trial(part, scores, threshold, held, quiet)
                found[line].append((threshold, trained, value))
                seen(f"fold {number} of {count}, {by} {line:g}: {trained:,} parameters, {value:.3f}")
    return [Point(line, *zip(*trials, strict=True)) for line, trials in found.items()]


def check_lines(lines: Sequence[float], by: str) -> None:
    """Raises ValueError for no line, or for shares outside of 0 to 1."""
    if by not in ("share", "threshold"):
        raise ValueError(f"select: by is {by!r}; share or threshold would be right")
    if not lines:
        raise ValueError("select: no line came; --shares 0.001,0.01,0.1 would be right")
    if by == "share" and (odd := [line for line in lines if not 0 < line <= 1]):
        raise ValueError(f"select: the share {odd[0]:g} came; above 0 and up to 1 would be right")


def best(points: Sequence[Point]) -> Point:
    """The point with the best mean; of equal ones that which trains least."""
    return max(points, key=lambda point: (point.mean, -statistics.fmean(point.trained)))


def scored(run: Run, batches: int = 16) -> Scores:
    """The scores of the model's units on some batches of the run's training rows."""
    kept = ("unit", "measure", "targets", "exclude", "layers", "tile", "keep")
    settings = {name: getattr(_importance(run), name) for name in kept}
    return pefast.score(run.model, training.batches(run, batches), **settings)


def _importance(run: Run) -> Importance:
    given = [method for method in recipes.methods(run.recipe) if isinstance(method, Importance)]
    return given[0] if given else Importance()


def _trial(run: Run, scores: Scores, threshold: float, held: list[Row], watcher: Watcher):
    """Parameters that trained, and the metric on the fold."""
    others = [method for method in recipes.methods(run.recipe) if not isinstance(method, Importance)]
    pefast.attach(run.model, [Importance(scores=scores, threshold=threshold), *others])
    try:
        training.fit(run, watcher)
        value = training.score(run, held)[1][run.task.METRIC]
        return training.trainable(run.model)[0], float(value)
    finally:
        pefast.detach(run.model)
        run.model.eval()
