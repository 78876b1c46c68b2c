"""Answers to rows from files and streams, as they come: by one run, or by several of one base model.

Runs whose heads are of one kind (text classification, regression and relations; or the same task) share a
batch: every row computes with its own run's adapter and head. Runs of other kinds have a model each.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

import pefast

from . import recipe as recipes
from . import tasks, training
from .checkpoint import refill
from .tasks import carried
from .tasks.rows import Row, filled, names_of
from .trainer import ADAPTER
from .training import Run

# rows are sorted by length within so many batches, to pad little
CHUNK = 8


class Served(NamedTuple):
    """A run and the name of its adapter in the model, which others may be on too."""

    run: Run
    adapter: str

    @property
    def kind(self) -> ModuleType:
        """The task whose head, rows and answers the run's are."""
        return getattr(self.run.task, "HEAD", self.run.task)


class Asked(NamedTuple):
    """A row and the run that is to answer it."""

    name: str
    record: dict
    row: Row


def restore(folders: Sequence[str | Path]) -> dict[str, Served]:
    """The trained runs in these folders by the folders' names, those with heads of one kind on one model.

    Raises ValueError for runs of other base models, for names that come twice, and for a folder with a file
    that leads out of it; and what training.restore raises.
    """
    found: dict[str, Served] = {}
    for folder in map(Path, folders):
        # . and .. have no name of their own
        name = folder.name or folder.resolve().name
        if name in found:
            raise ValueError(
                f"predict: two runs are called {name!r}; folders with names of their own are right"
            )
        _inside(folder)
        found[name] = _beside(folder, name, found) or Served(
            training.restore(folder, with_rows=False), "default"
        )
    return found


def _inside(folder: Path) -> None:
    """Raises ValueError where a file of a run is a link to somewhere else."""
    root = folder.resolve()
    for path in (folder / training.RECIPE, folder / ADAPTER, *(folder / ADAPTER).rglob("*")):
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"predict: {path} leads out of its folder; a run with files of its own is right")


def _beside(folder: Path, name: str, there: Mapping[str, Served]) -> Served | None:
    """The run on the model of one that is there already; None where there is none for its kind of head."""
    if not there or not (folder / training.RECIPE).is_file():
        return None
    recipe, first = recipes.read(folder / training.RECIPE), next(iter(there.values())).run.recipe
    if carried.resolve(recipe.model) != carried.resolve(first.model):
        raise ValueError(f"predict: {name} is of {recipe.model}, others are of {first.model}; one is right")
    task = tasks.find(recipe.task)
    kind = getattr(task, "HEAD", task)
    like = next((each.run for each in there.values() if each.kind is kind), None)
    if like is None:
        return None
    # a regression's names are mean and deviation, its head has one output; texts and spans have no names
    labels = 1 if task.METRIC == "pearson" else len(recipe.data.names or {}) or True
    pefast.attach(like.model, recipes.methods(recipe), name, head=labels)
    refill(like.model, folder / ADAPTER, name)
    return Served(dataclasses.replace(like, recipe=recipe, task=task), name)


def columns_of(run: Run) -> dict[str, str]:
    """The column of each role that a row must have to be answered; its own name where the recipe has none."""
    given = run.task.ROLES | (run.recipe.data.columns or {})
    return {role: column for role, column in given.items() if column is not None and role != "label"}


def row_of(run: Run, record: Mapping[str, object], place: str) -> Row:
    """What a record says to a run: its columns, or the roles' own names where one column is what they say.

    Raises ValueError, naming the place, where something is missing or of the wrong kind.
    """
    row = {}
    for role, column in columns_of(run).items():
        names = names_of(column)
        missing = [name for name in names if record.get(name) is None]
        if role == "tokens" and record.get(column) is None and record.get("text") is not None:
            row["text"] = record["text"]
        elif not missing:
            row[role] = filled(column, record)
        elif record.get(role) is not None and len(names) == 1:
            row[role] = filled(column, {names[0]: record[role]})
        else:
            there = ", ".join(map(str, record))
            raise ValueError(f"predict: {place} has no {missing[0]!r}; its columns are {there}")
    for role, value in row.items():
        words = isinstance(value, list) and all(isinstance(word, str) for word in value)
        if not (words if role == "tokens" else isinstance(value, str | int | float)):
            wanted = "a list of words" if role == "tokens" else "a text"
            raise ValueError(f"predict: {role!r} of {place} is {value!r:.60}; {wanted} would be right")
    if marked := getattr(run.task, "marked", None):
        try:
            marked(row)
        except ValueError as error:
            raise ValueError(f"predict: {place}: {error}") from None
    return row


def check_texts(runs: Mapping[str, Served]) -> None:
    """Raises ValueError where a run's rows are more than a text alone."""
    for name, served in runs.items():
        wanted = [one for column in columns_of(served.run).values() for one in names_of(column)]
        if len(wanted) > 1:
            raise ValueError(
                f"predict: {name} reads {', '.join(wanted)}, not a text alone; a CSV or JSON Lines file with"
                " these columns would be right"
            )


def asked(
    runs: Mapping[str, Served], records: Iterable[tuple[str, dict]], by: str | None = None
) -> Iterator[Asked]:
    """Each record for the run that its column `by` names, or for every run.

    Raises ValueError, naming the place, for a record that no run can answer.
    """
    for place, record in records:
        names = list(runs)
        if by is not None:
            if not isinstance(record.get(by), str) or record[by] not in runs:
                raise ValueError(
                    f"predict: {place} has {by!r} = {record.get(by)!r}; the runs are {', '.join(runs)}"
                )
            names = [record[by]]
        yield from (Asked(name, record, row_of(runs[name].run, record, place)) for name in names)


def answers(
    runs: Mapping[str, Served], questions: Iterable[Asked], batch: int = 32
) -> Iterator[tuple[Asked, dict]]:
    """Each question with what its run says, in their order; so many batches at a time are read."""
    questions = iter(questions)
    while some := list(itertools.islice(questions, CHUNK * batch)):
        said: list[dict | None] = [None] * len(some)
        kinds = dict.fromkeys(runs[each.name].kind for each in some)
        for kind in kinds:
            chosen = [i for i, each in enumerate(some) if runs[each.name].kind is kind]
            for index, answer in zip(chosen, _said(runs, [some[i] for i in chosen], batch), strict=True):
                said[index] = answer
        yield from zip(some, said, strict=True)


def _said(runs: Mapping[str, Served], some: Sequence[Asked], batch: int) -> list[dict]:
    """The answers of runs on one model to a few rows, mixed in one batch."""
    first = runs[some[0].name]
    rows, lengths, adapters = [], [], []
    for each in some:
        served = runs[each.name]
        mark = getattr(served.run.task, "marked", dict)
        rows.append(mark(each.row))
        lengths.append(served.run.recipe.training.max_length)
        adapters.append(served.adapter)
    alone = sum(served.run.model is first.run.model for served in runs.values()) == 1
    model, tokenizer = first.run.model, first.run.tokenizer
    found = first.kind.predict(model, tokenizer, rows, lengths, batch, None if alone else adapters)
    said: list[dict] = [{}] * len(some)
    for name in dict.fromkeys(each.name for each in some):
        chosen = [i for i, each in enumerate(some) if each.name == name]
        run = runs[name].run
        for index, answer in zip(chosen, run.task.say(_own(run, found, chosen), run.names), strict=True):
            said[index] = answer
    return said


def _own(run: Run, found, chosen: list[int]):
    """A run's own of the answers: its rows, and of logits its head's columns."""
    if not isinstance(found, Tensor):
        return [found[index] for index in chosen]
    own = found[chosen]
    return own[:, 0] if run.task.METRIC == "pearson" else own[:, : len(run.names)]


def line(each: Asked, answer: dict, form: str, several: bool) -> str:
    """An answer as one line: JSON, or for people."""
    if form == "jsonl":
        named = {"run": each.name} if several else {}
        whole = {**each.record, **named, "predicted": answer}
        return json.dumps(whole, ensure_ascii=False, default=str)
    words = [each.name] if several else []
    words += [f"{value:.3f}" if isinstance(value, float) else str(value) for value in answer.values()]
    words += [" ".join(value) if isinstance(value, list) else str(value) for value in each.row.values()]
    return "  ".join(" ".join(word.split()) for word in words)
