"""What a search found, drawn: how the best value grew, what each key did to it, and which key mattered."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from . import recipe

FORMS = ("svg", "png")
# so many numbers stand side by side, more on an axis
FEW = 6


def draw(study, trials: Sequence, folder: Path) -> list[Path]:
    """history, slice and importance as SVG and PNG in the folder; none where matplotlib is missing.

    Importance (Hutter et al. 2014, "An efficient approach for assessing hyperparameter importance") wants
    four trials and values that differ.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return []
    shown = [trial for trial in trials if not math.isnan(trial.value)]
    pictures = {"history": _history(Figure, shown), "slice": _slice(Figure, shown)}
    if weights := _weights(study, shown):
        pictures["importance"] = _importance(Figure, weights)
    paths = [folder / f"{name}.{form}" for name in pictures for form in FORMS]
    for path in paths:
        # no date in the file: the same study draws the same bytes
        metadata = {"Date": None} if path.suffix == ".svg" else None
        pictures[path.stem].savefig(path, dpi=120, metadata=metadata)
    return paths


def _history(figure_of, trials: Sequence):
    figure = figure_of(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    numbers, values = [trial.number for trial in trials], [trial.value for trial in trials]
    axes.plot(numbers, values, "o", color="0.6", label="a trial")
    axes.step(
        numbers, [max(values[:end]) for end in range(1, len(values) + 1)], where="post", label="the best"
    )
    axes.set(xlabel="trial", ylabel="metric")
    axes.legend()
    return figure


def _slice(figure_of, trials: Sequence):
    keys = list(dict.fromkeys(key for trial in trials for key in trial.changes))
    figure = figure_of(figsize=(3.4 * len(keys), 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        pairs = [(recipe.label(trial.changes[key]), trial.value) for trial in trials if key in trial.changes]
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x, _ in pairs)
        if numbers and len({x for x, _ in pairs}) > FEW:
            axes.plot(*zip(*pairs, strict=True), "o", alpha=0.7)
            low, high = min(x for x, _ in pairs), max(x for x, _ in pairs)
            axes.set_xscale("log" if low > 0 and high > 20 * low else "linear")
        else:
            pairs.sort(key=lambda pair: pair if numbers else str(pair[0]))
            axes.plot([_word(x) for x, _ in pairs], [value for _, value in pairs], "o", alpha=0.7)
            axes.margins(x=0.2)
            axes.tick_params(axis="x", labelsize=7)
        axes.set_xlabel(key)
    figure.axes[0].set_ylabel("metric")
    return figure


def _word(choice: object) -> str:
    """A choice as it stands under an axis, a method's braces taken off."""
    return re.sub(r"method: |[\[\]{}]", "", f"{choice:.3g}" if isinstance(choice, float) else str(choice))


def _weights(study, trials: Sequence) -> dict[str, float]:
    """Each key's share in what the values differ by; nothing where that cannot be said."""
    if len(trials) < 4 or len({trial.value for trial in trials}) < 2:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    # only keys that every trial has can be weighed against each other
    keys = [key for key in trials[0].changes if all(key in trial.changes for trial in trials)]
    if not keys:
        return {}
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=keys)


def _importance(figure_of, weights: dict[str, float]):
    figure = figure_of(figsize=(6, 0.8 + 0.5 * len(weights)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(weights)[::-1], list(weights.values())[::-1])
    axes.set(xlabel="share in the metric's variance", xlim=(0, 1))
    return figure
