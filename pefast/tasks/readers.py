"""Records of files and folders, one dictionary each.

.csv, .jsonl      a record a row or line
.parquet          the same, read by Hugging Face datasets; so is a folder that datasets saved
.txt, .conll      CoNLL: a word a line with its columns, an empty line after each sentence; the record has
                  tokens, tags (the last column) and, with three columns or more, pos (the second)
a folder          of one folder a label with .txt files: label, text, headline (the first line), body
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

READERS = (".csv", ".jsonl", ".parquet", ".txt", ".conll")


def records(path: Path) -> Iterator[dict]:
    """Every record, in the order of the file.

    Raises ValueError for another kind of file, and naming the line for one that cannot be read.
    """
    if path.is_dir():
        yield from _saved(path) if (path / "dataset_info.json").exists() else _texts(path)
        return
    if path.suffix not in READERS:
        raise ValueError(f"{path.name}: rows are read from {', '.join(READERS)} files and folders")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".csv":
                yield from csv.DictReader(stream)
            elif path.suffix == ".jsonl":
                yield from _json_lines(path.name, stream)
            else:
                yield from _sentences(path.name, stream)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name}: byte {error.start} of a piece is not UTF-8 ({error.reason})"
        ) from None
    except csv.Error as error:
        raise ValueError(f"{path.name}: is no CSV ({error})") from None


def _json_lines(name: str, stream) -> Iterator[dict]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: line {number} is no JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{name}: line {number} is a {type(record).__name__}; each line should be an object"
            )
        yield record


def _sentences(name: str, stream) -> Iterator[dict]:
    lines: list[list[str]] = []
    width = None
    for number, line in enumerate([*stream, ""], 1):
        parts = line.split()
        if not parts or parts[0] == "-DOCSTART-":
            if lines:
                yield _sentence(lines)
            lines = []
            continue
        width = width or len(parts)
        if len(parts) != width or width < 2:
            raise ValueError(
                f"{name}: line {number} has {len(parts)} columns; a word and {width - 1} more are wanted"
            )
        lines.append(parts)


def _sentence(lines: list[list[str]]) -> dict:
    words, *columns = (list(column) for column in zip(*lines, strict=True))
    return {"tokens": words, "tags": columns[-1]} | ({"pos": columns[0]} if len(columns) > 1 else {})


def _parquet(path: Path) -> Iterator[dict]:
    # datasets takes seconds to import, and few need it
    from datasets import Dataset

    yield from Dataset.from_parquet(str(path), keep_in_memory=True)


def _saved(folder: Path) -> Iterator[dict]:
    from datasets import load_from_disk

    yield from load_from_disk(str(folder), keep_in_memory=True)


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
