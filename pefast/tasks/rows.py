"""Rows from CSV and JSON-lines files and folders of texts, and a split that is the same on every machine.

A row is a dictionary: what the task calls a value (its role, such as "text" or "label"), and the value.
"""

import csv
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

READERS = (".csv", ".jsonl")
Row = dict[str, object]
TEXT = {"text": "text", "label": "label"}


def read(
    path: Path, columns: Mapping[str, str] = TEXT, where: Mapping[str, object] | None = None
) -> list[Row]:
    """Rows of a .csv or .jsonl file, {role: value} for columns {role: column}, of those records whose columns
    named in `where` have the values given there.

    A folder with a folder of .txt files for each label has the columns label, text, headline (the first line)
    and body (the others). Texts that repeat (letter case and spaces aside) are kept once, so that a split
    never has one text on both sides. Raises ValueError for another kind of file, a missing column, or when no
    row is left.
    """
    rows, seen = [], set()
    for number, record in enumerate(_records(path), 1):
        missing = [column for column in (*columns.values(), *(where or ())) if record.get(column) is None]
        if missing:
            there = ", ".join(map(str, record))
            raise ValueError(f"{path.name}: row {number} has no {missing[0]!r}; its columns are {there}")
        if any(str(record[column]) != str(value) for column, value in (where or {}).items()):
            continue
        row = {role: record[column] for role, column in columns.items()}
        key = _key(row)
        if any(key) and key not in seen:
            seen.add(key)
            rows.append(row)
    if not rows:
        raise ValueError(f"{path.name}: no row is left{f' where {dict(where)}' if where else ''}")
    return rows


def split(rows: list[Row], test_rows: int, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on and the `test_rows` held out, shuffled by `seed`.

    Raises ValueError where nothing is left to train on.
    """
    if not 0 < test_rows < len(rows):
        raise ValueError(
            f"data.test_rows: {test_rows} of {len(rows)} rows; from 1 to {len(rows) - 1} can be held out"
        )
    order = list(rows)
    # python's own generator gives the same order on every platform and release
    random.Random(seed).shuffle(order)
    return order[test_rows:], order[:test_rows]


def without(rows: list[Row], held_out: Iterable[Row]) -> list[Row]:
    """The rows whose text is in none of `held_out`."""
    keys = {_key(row) for row in held_out}
    return [row for row in rows if _key(row) not in keys]


def _key(row: Row) -> tuple[str, ...]:
    """What makes two rows the same example: everything but the answer, letter case and spaces aside."""
    return tuple(" ".join(str(value).casefold().split()) for role, value in row.items() if role != "label")


def _records(path: Path):
    if path.is_dir():
        yield from _texts(path)
        return
    if path.suffix not in READERS:
        raise ValueError(f"{path.name}: rows are read from {' and '.join(READERS)} files")
    with path.open(encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            yield from csv.DictReader(stream)
            return
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}: line {number} is no JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path.name}: line {number} is a {type(record).__name__}; each line should be an object"
                )
            yield record


def _texts(folder: Path):
    for path in sorted(folder.glob("*/*.txt")):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            # every byte is a letter in latin-1; collections of the web mix the two
            text = content.decode("latin-1")
        headline, _, body = text.strip().partition("\n")
        yield {"label": path.parent.name, "text": text.strip(), "headline": headline, "body": body.strip()}
