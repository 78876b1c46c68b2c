"""A search over a recipe's keys: threshold, rank, rate, method and whatever else the recipe's `search` names.

Optuna's tree-structured Parzen estimator chooses what is tried (Bergstra et al. 2011, "Algorithms for
hyper-parameter optimization"); each trial is one training, or one a fold. The study is a SQLite file in
<output>/search, so that a search that was stopped or killed goes on: what a trial tries depends on the seed
and on the trials that ended before it alone, and so is the same as if nothing had happened. A trial that was
cut off is trained anew.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import transformers
from rich.console import Console

import pefast

from . import claim, pictures, selection, training
from . import recipe as recipes
from .methods import METHODS
from .progress import Watcher
from .recipe import Range, Recipe

FOLDER, STUDY, BEST = "search", "study.db", "best.yaml"


class Trial(NamedTuple):
    """One setting that was tried."""

    number: int  # counted from 1, of those that ended
    changes: dict[str, object]  # dotted keys
    value: float  # mean of the task's metric over the folds, or that of the validation rows; NaN: no number
    values: tuple[float, ...]  # of each fold
    trained: int  # parameters, the task head's among them
    why: str  # of a trial without a number


class Lost(Exception):
    """A setting that no training could take, such as a threshold above every score."""


class Found(NamedTuple):
    """What a search left."""

    trials: list[Trial]
    best: Trial
    recipe: Path  # ready for `pefast train`
    pictures: list[Path]


def search(
    recipe: Recipe, resume: bool = False, *, seen: Callable[[Trial], None] = lambda trial: None
) -> Found:
    """Tries what the recipe's `search` names until its number of trials has ended.

    `seen` is told of each trial that ends. Raises ValueError for settings that cannot be, for a study that is
    there without `resume`, and for one that began with another recipe; training.Stopped after Ctrl-C;
    ModuleNotFoundError without optuna.
    """
    _check(recipe)
    folder = Path(recipe.output) / FOLDER
    with claim.claim(dataclasses.replace(recipe, output=str(folder)), folder / "none", resume=False):
        study = _open(recipe, folder, resume)
        try:
            while len(ended(study)) < recipe.search.trials:
                _next(study, recipe)
                seen(ended(study)[-1])
        except KeyboardInterrupt:
            count = len(ended(study)) + 1
            raise training.Stopped(
                f"search: stopped in trial {count} of {recipe.search.trials}; --resume goes on from there"
            ) from None
        return _left(study, recipe, folder)


def ended(study) -> list[Trial]:
    """The trials of a study that came to an end, in their order."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [
        Trial(
            number,
            trial.user_attrs["changes"],
            math.nan if trial.value is None else trial.value,
            tuple(trial.user_attrs.get("values", ())),
            trial.user_attrs.get("trained", 0),
            trial.user_attrs.get("why", ""),
        )
        for number, trial in enumerate(done, 1)
    ]


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the best mean; of equal ones that which trains least.

    Raises ValueError where no trial came to a number.
    """
    numbers = [trial for trial in trials if not math.isnan(trial.value)]
    if not numbers:
        raise ValueError(f"search: no trial came to a number; the last one: {trials[-1].why}")
    return max(numbers, key=lambda trial: (trial.value, -trial.trained))


def _open(recipe: Recipe, folder: Path, resume: bool):
    """The study in the folder, new or gone on with."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "search: optuna is not installed; `pip install 'pefast[search]'` brings it"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = folder / STUDY
    if file.exists() and not resume:
        raise ValueError(
            f"search: {file} holds a study; --resume goes on with it, and without the file it begins anew"
        )
    storage = f"sqlite:///{file.resolve()}"
    study = optuna.create_study(
        storage=storage, study_name="search", direction="maximize", load_if_exists=True
    )
    # a search that was killed before it wrote this down had no trial yet
    if "recipe" not in study.user_attrs:
        study.set_user_attr("recipe", recipes.written(recipe))
    _same(recipe, study.user_attrs["recipe"])
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        # nobody trains it any more
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _same(recipe: Recipe, began: str) -> None:
    """Raises ValueError where the study began with another recipe; more trials are no other recipe."""
    was = recipes.parse(began, "the study's recipe")
    for key, before, now in recipes.differences(was, recipe):
        if key not in ("search.trials", "output"):
            raise ValueError(
                f"search: --resume with {key} = {now!r}, but the study began with {before!r};"
                " the same recipe would be right"
            )


def _next(study, recipe: Recipe) -> None:
    """One more trial; it is PRUNED where it came to no number."""
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    done = len(ended(study))
    # a generator of its own for each trial, so that going on needs no generator's state
    study.sampler = TPESampler(seed=recipe.search.seed * 1_000_003 + done)
    trial = study.ask()
    changes = _drawn(trial, recipe)
    trial.set_user_attr("changes", changes)
    wanted = recipes.changed(dataclasses.replace(recipe, search=None), changes)
    start = time.perf_counter()
    try:
        values, trained = _judged(wanted, recipe.search.folds)
    except (FloatingPointError, Lost) as error:
        trial.set_user_attr("why", str(error))
        study.tell(trial, state=TrialState.PRUNED)
        return
    trial.set_user_attr("values", values)
    trial.set_user_attr("trained", trained)
    trial.set_user_attr("seconds", time.perf_counter() - start)
    study.tell(trial, statistics.fmean(values))


def _drawn(trial, recipe: Recipe) -> dict[str, object]:
    """What this trial changes; a method's setting is drawn only where the trial has that method."""
    changes: dict[str, object] = {}
    bare = dataclasses.replace(recipe, search=None)
    for key, axis in recipes.axes(recipe.search).items():
        if not _fits(key, recipes.changed(bare, changes).methods):
            continue
        if isinstance(axis, Range):
            draw = trial.suggest_int if isinstance(axis.low, int) else trial.suggest_float
            changes[key] = draw(key, axis.low, axis.high, log=axis.log)
        else:
            named = {recipes.label(choice): choice for choice in axis}
            changes[key] = named[trial.suggest_categorical(key, list(named))]
    return changes


def _fits(key: str, methods: list[dict]) -> bool:
    """Whether a key stands for a setting that these methods have; keys of other sections always do."""
    section, _, below = key.partition(".")
    if section != "methods" or not below:
        return True
    place, _, setting = below.partition(".")
    if not place.isdigit() or int(place) >= len(methods):
        return False
    cls = METHODS.get(methods[int(place)].get("method"))
    return cls is not None and setting.split(".")[0] in {field.name for field in dataclasses.fields(cls)}


def _check(recipe: Recipe) -> None:
    """Raises ValueError where the search names a method or a setting that cannot be."""
    if recipe.search is None:
        raise ValueError("search: the recipe has no `search`; search: {space: {training.lr: [1e-3, 3e-3]}}")
    axes, bare = recipes.axes(recipe.search), dataclasses.replace(recipe, search=None)
    lists = axes.get("methods", [recipe.methods])
    if isinstance(lists, Range) or not all(lists):
        raise ValueError("search.space.methods: a list is wanted, each entry the `methods` of a recipe")
    for key, axis in axes.items():
        if not key.startswith("methods"):
            continue
        tried = [choice for choice in lists if _fits(key, choice)]
        if not tried:
            raise ValueError(f"search.space.{key}: none of the methods has such a setting")
        values = axis[:2] if isinstance(axis, Range) else axis
        for choice in tried if key != "methods" else [recipe.methods]:
            for value in values:
                try:
                    _check_methods(recipes.changed(bare, {"methods": choice, key: value}))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"search.space.{key}: {error}") from None


def _check_methods(recipe: Recipe) -> None:
    for method in recipes.methods(recipe):
        if method.kind == "importance":
            # a training gives it batches of its own
            method.batches = ()
        method.check()


def _judged(recipe: Recipe, folds: int) -> tuple[list[float], int]:
    """The task's metric on each fold, or on the validation rows, and the parameters that trained."""
    with TemporaryDirectory() as folder:
        run = training.prepare(dataclasses.replace(recipe, output=f"{folder}/out"))
        parts = [(run.train, run.valid)]
        if folds:
            parts = selection.folds(run.train, folds, recipe.data.seed, by=run.task.STRATUM)
        values = []
        for train, held in parts:
            part = dataclasses.replace(run, train=train, valid=[] if folds else run.valid)
            # every fold begins with the same numbers
            transformers.set_seed(recipe.training.seed)
            try:
                training.attach(part)
            except ValueError as error:
                raise Lost(error) from error
            trained = training.trainable(run.model)[0]
            training.fit(part, Watcher(Console(quiet=True)))
            values.append(float(training.score(part, held)[1][run.task.METRIC]))
            pefast.detach(run.model)
            run.model.eval()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return values, trained


def _left(study, recipe: Recipe, folder: Path) -> Found:
    """Writes the best recipe and the pictures."""
    trials = ended(study)
    winner = best(trials)
    wanted = recipes.changed(dataclasses.replace(recipe, search=None), winner.changes)
    path = folder / BEST
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(recipes.written(wanted), encoding="utf-8")
    os.replace(beside, path)
    return Found(trials, winner, path, pictures.draw(study, trials, folder))
