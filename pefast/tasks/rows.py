"""Rows from files and folders, and a split that is the same on every machine.

A row is a dictionary: what the task calls a value (its role, such as "text" or "label"), and the value.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import Formatter

from .derived import DERIVED
from .readers import records

Row = dict[str, object]
TEXT = {"text": "text", "label": "label"}


def read(
    path: Path,
    columns: Mapping[str, str] = TEXT,
    where: Mapping[str, object] | None = None,
    derive: str | None = None,
) -> list[Row]:
    """Rows of a file or folder (see readers.py), {role: value} for columns {role: column}, of those records
    whose columns named in `where` have the values given there; `derive` makes other records of them first.
    A column may be a text around columns: "Give this article a headline: {body}".

    Examples that repeat (letter case and spaces aside) are kept once, so that a split never has one on both
    sides. Raises ValueError for another kind of file, a missing column, or when no row is left.
    """
    rows, seen = [], set()
    for row in stream(path, columns, where, derive):
        key = key_of(row)
        if any(key) and key not in seen:
            seen.add(key)
            rows.append(row)
    if not rows:
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"{path.name}: the file is empty")
        raise ValueError(f"{path.name}: no row is left{f' where {dict(where)}' if where else ''}")
    return rows


def stream(
    path: Path,
    columns: Mapping[str, str] = TEXT,
    where: Mapping[str, object] | None = None,
    derive: str | None = None,
) -> Iterator[Row]:
    """The rows of `read` as the file gives them, repeated ones too; nothing is kept."""
    wanted = [name for column in columns.values() for name in names_of(column)]
    for number, record in enumerate(_derived(path, derive), 1):
        missing = [column for column in (*wanted, *(where or ())) if record.get(column) is None]
        if missing:
            there = ", ".join(map(str, record))
            raise ValueError(f"{path.name}: row {number} has no {missing[0]!r}; its columns are {there}")
        if all(str(record[column]) == str(value) for column, value in (where or {}).items()):
            yield {role: filled(column, record) for role, column in columns.items()}


def filled(column: str, record: Mapping[str, object]) -> object:
    """The value of a record's column, or a text around columns with their values in it."""
    return column.format_map(record) if "{" in column else record[column]


def names_of(column: str) -> list[str]:
    """The columns that a column's text names; itself where it is none."""
    if "{" not in column:
        return [column]
    try:
        return [name for _, name, _, _ in Formatter().parse(column) if name]
    except ValueError as error:
        raise ValueError(f"data.columns: {column!r} is no text around columns ({error})") from None


def _derived(path: Path, derive: str | None) -> Iterator[dict]:
    if derive is None:
        yield from records(path)
        return
    if derive not in DERIVED:
        raise ValueError(f"data.derive: {derive!r} is not known; known are {', '.join(DERIVED)}")
    yield from DERIVED[derive].make(_having(path, DERIVED[derive].needs))


def _having(path: Path, column: str) -> Iterator[dict]:
    for record in records(path):
        if column not in record:
            right = {"tags": "a CoNLL file", "headline": "a folder of texts"}[column]
            raise ValueError(f"data.derive: {path.name} has no {column!r}; {right} would be right")
        yield record


def split(rows: list[Row], test_rows: int, seed: int, by: str | None = None) -> tuple[list[Row], list[Row]]:
    """The rows to train on and the `test_rows` held out, shuffled by `seed`; with `by` each value of that
    role has the same share in both, to rounding.

    Raises ValueError where nothing is left to train on.
    """
    if not 0 < test_rows < len(rows):
        raise ValueError(
            f"data.test_rows: {test_rows} of {len(rows)} rows; from 1 to {len(rows) - 1} can be held out"
        )
    order = list(rows)
    # python's own generator gives the same order on every platform and release
    random.Random(seed).shuffle(order)
    if by is None:
        return order[test_rows:], order[:test_rows]
    left = _shares(Counter(str(row[by]) for row in order), test_rows)
    train, test = [], []
    for row in order:
        held = left[str(row[by])] > 0
        left[str(row[by])] -= held
        (test if held else train).append(row)
    return train, test


def _shares(counts: Counter, wanted: int) -> dict[str, int]:
    """`wanted` things divided as `counts` are, by largest remainders."""
    total = counts.total()
    shares = {value: count * wanted // total for value, count in counts.items()}
    rests = sorted(counts, key=lambda value: (-(counts[value] * wanted % total), value))
    for value in rests[: wanted - sum(shares.values())]:
        shares[value] += 1
    return shares


def without(rows: list[Row], held_out: Iterable[Row]) -> list[Row]:
    """The rows whose text is in none of `held_out`."""
    keys = {key_of(row) for row in held_out}
    return [row for row in rows if key_of(row) not in keys]


def key_of(row: Row) -> tuple[str, ...]:
    """What makes two rows the same example: everything but the answer, letter case and spaces aside."""
    return tuple(" ".join(str(value).casefold().split()) for role, value in row.items() if role != "label")
