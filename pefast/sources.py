"""The rows of a recipe: read, split, or streamed where they do not fit in memory; and what is odd in them."""

import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from . import tasks
from .recipe import Recipe
from .tasks import carried, rows
from .tasks.rows import Row

# rows that are looked at before a stream begins, and rows that wait to be drawn from
HEAD, BUFFER = 1000, 1000
# longer than any text: what was not cut
_UNCUT = 1 << 24


class Stream(IterableDataset):
    """A recipe's training rows without an end, pass behind pass, as features; nothing but a buffer is kept.

    A row is drawn from a buffer that the file fills, so the order is that of the file loosened up; it is a
    function of the seed alone, and a resumed run reads again what it has passed. Rows that are held out are
    left out; rows that repeat are not.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, held_out: Sequence[Row]):
        super().__init__()
        self.recipe, self.tokenizer, self.task = recipe, tokenizer, tasks.find(recipe.task)
        self.held_out = {rows.key_of(row) for row in held_out}

    def rows(self) -> Iterator[Row]:
        """One pass in the order of the file. Raises ValueError where no row is left."""
        data = self.recipe.data
        place, columns = _place(self.recipe, data.source)
        there = rows.stream(place, columns, data.where, data.derive)
        kept = (row for row in there if rows.key_of(row) not in self.held_out)
        found = itertools.islice(kept, data.train_rows)
        if (first := next(found, None)) is None:
            raise ValueError(f"{place.name}: no row is left that is not held out")
        yield first
        yield from found

    def __iter__(self) -> Iterator[dict]:
        wanted = self.recipe.training
        for turn in itertools.count():
            for row in shuffled(self.rows(), self.recipe.data.seed * 1_000_003 + turn):
                names = self.recipe.data.names
                yield from self.task.encode([row], self.tokenizer, names, wanted.max_length)


def shuffled(found: Iterator[Row], seed: int, buffer: int = BUFFER) -> Iterator[Row]:
    """The rows in another order: each is drawn from the next `buffer` ones."""
    pick, waiting = random.Random(seed), []
    for row in found:
        if len(waiting) < buffer:
            waiting.append(row)
            continue
        place = pick.randrange(buffer)
        yield waiting[place]
        waiting[place] = row
    pick.shuffle(waiting)
    yield from waiting


def read(recipe: Recipe, source: str) -> list[Row]:
    """The rows of one source, as the recipe's task and columns want them."""
    place, columns = _place(recipe, source)
    return rows.read(place, columns, recipe.data.where, recipe.data.derive)


def _place(recipe: Recipe, source: str):
    task = tasks.find(recipe.task)
    given = recipe.data.columns or {}
    if unknown := sorted(set(given) - set(task.ROLES)):
        raise ValueError(
            f"data.columns: {recipe.task} has no {unknown[0]!r}; its roles are {', '.join(task.ROLES)}"
        )
    columns = {role: column for role, column in (task.ROLES | given).items() if column is not None}
    return carried.resolve(str(source)), columns


def parts(recipe: Recipe) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to train on, to choose by, and held out to the end; no text is in two of them.

    In each part the task's classes have like shares. Of a stream the first rows stand for those to train on.
    """
    data, valid = recipe.data, []
    by = tasks.find(recipe.task).STRATUM if data.stratified else None
    if data.streaming:
        return _of_stream(recipe)
    train = read(recipe, data.source)
    if data.test_source is None:
        train, test = rows.split(train, 1000 if data.test_rows is None else data.test_rows, data.seed, by)
    else:
        test = read(recipe, data.test_source)[: data.test_rows]
        train = rows.without(train, test)
        random.Random(data.seed).shuffle(train)
    if data.valid_source is not None:
        valid = rows.without(read(recipe, data.valid_source), test)
        train = rows.without(train, valid)
    elif data.valid_rows:
        train, valid = rows.split(train, data.valid_rows, data.seed, by)
    return train[: data.train_rows], valid, test


def _of_stream(recipe: Recipe) -> tuple[list[Row], list[Row], list[Row]]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("data.streaming: several processes would read the same rows; one process is right")
    data = recipe.data
    test = read(recipe, data.test_source)[: data.test_rows]
    valid = rows.without(read(recipe, data.valid_source), test) if data.valid_source is not None else []
    found = Stream(recipe, None, test + valid).rows()
    return list(itertools.islice(found, HEAD)), valid, test


def check_length(recipe: Recipe, model: torch.nn.Module) -> None:
    """Raises ValueError where the recipe cuts rows at more tokens than the model has positions for."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most and recipe.training.max_length > most:
        raise ValueError(
            f"training.max_length: {recipe.training.max_length} came; the model reads {most} tokens at most"
        )


def remarks(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train: list[Row], test: list[Row]
) -> Iterator[str]:
    """What is odd about the rows, a sentence each: rows that are cut, and answers that no row teaches."""
    task, longest = tasks.find(recipe.task), recipe.training.max_length
    features = task.encode(train, tokenizer, recipe.data.names, _UNCUT)
    cut = sum(_length(row) > longest for row in features)
    if cut:
        done = "read in windows" if recipe.task == "question-answering" else "cut"
        yield f"{cut:,} of {len(features):,} rows have more than max_length={longest} tokens and are {done}"
    if task.STRATUM is not None:
        known = {str(row[task.STRATUM]) for row in train}
        new = Counter(str(row[task.STRATUM]) for row in test if str(row[task.STRATUM]) not in known)
        for label, count in new.items():
            yield f"no row to learn from has the label {label!r} of {count:,} held-out rows"


def _length(row: dict) -> int:
    """Tokens of a row, or of its answer where that is a longer text."""
    labels = row.get("labels")
    return max(len(row["input_ids"]), len(labels) if isinstance(labels, list) else 0)
