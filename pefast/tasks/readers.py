"""Records of files, folders and streams, one dictionary each, read as they are asked for.

csv, jsonl        a record a row or line
parquet           the same, read by pyarrow; a folder that Hugging Face datasets saved, by datasets
conll             a word a line with its columns, an empty line after each sentence; the record has
                  tokens, tags (the last column) and, with three columns or more, pos (the second)
text              a line a record, under "text"; for `pefast predict`
a folder          of one folder a label with .txt files: label, text, headline (the first line), body
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet", ".txt": "conll", ".conll": "conll"}
# the longest field of a CSV file; csv's own limit is 131,072 letters
_FIELD = 1 << 30


def records(path: Path) -> Iterator[dict]:
    """Every record of a file or folder, in its order. Raises ValueError as `numbered` does."""
    for _, record in numbered(path):
        yield record


def numbered(path: Path, form: str | None = None) -> Iterator[tuple[str, dict]]:
    """Every record of a file or folder and where it stands there, such as "line 3".

    Raises ValueError for another kind of file, and naming the line for one that cannot be read.
    """
    if path.is_dir():
        saved = any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
        found = _saved(path) if saved else _texts(path)
        yield from ((f"row {number}", record) for number, record in enumerate(found, 1))
        return
    form = form or FORMATS.get(path.suffix)
    if form is None:
        raise ValueError(f"{path.name}: rows are read from {', '.join(FORMATS)} files and folders")
    if form == "parquet":
        yield from ((f"row {number}", record) for number, record in enumerate(_parquet(path), 1))
        return
    with path.open("rb") as stream:
        yield from of_stream(path.name, stream, form)


def of_stream(name: str, stream: BinaryIO, form: str) -> Iterator[tuple[str, dict]]:
    """Every record of a stream of bytes, as its lines come. Raises ValueError, naming stream and line."""
    lines = _decoded(name, stream)
    if form == "csv":
        yield from _rows(name, lines)
    elif form == "jsonl":
        yield from _json_lines(name, lines)
    elif form == "conll":
        yield from _sentences(name, lines)
    elif form == "text":
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", {"text": line.strip()}
    else:
        raise ValueError(f"{name}: a stream is read as csv, jsonl, conll or text, not as {form}")


def _decoded(name: str, stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: line {number} is not UTF-8 ({error.reason} at its byte {error.start + 1})"
            ) from None


def _rows(name: str, lines: Iterable[str]) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(_FIELD)
    reader = csv.DictReader(lines)
    try:
        for record in reader:
            if None in record:
                columns = ", ".join(map(str, reader.fieldnames))
                raise ValueError(f"{name}: line {reader.line_num} has more values than columns ({columns})")
            yield f"line {reader.line_num}", record
    except csv.Error as error:
        raise ValueError(f"{name}: line {reader.line_num} is no CSV ({error})") from None


def _json_lines(name: str, lines: Iterable[str]) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(lines, 1):
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
        yield f"line {number}", record


def _sentences(name: str, found: Iterable[str]) -> Iterator[tuple[str, dict]]:
    lines: list[list[str]] = []
    width = begin = None
    for number, line in enumerate(found, 1):
        parts = line.split()
        if not parts or parts[0] == "-DOCSTART-":
            if lines:
                yield f"line {begin}", _sentence(lines)
            lines = []
            continue
        width, begin = width or len(parts), begin if lines else number
        if len(parts) != width or width < 2:
            raise ValueError(
                f"{name}: line {number} has {len(parts)} columns; a word and {width - 1} more are wanted"
            )
        lines.append(parts)
    if lines:
        yield f"line {begin}", _sentence(lines)


def _sentence(lines: list[list[str]]) -> dict:
    words, *columns = (list(column) for column in zip(*lines, strict=True))
    return {"tokens": words, "tags": columns[-1]} | ({"pos": columns[0]} if len(columns) > 1 else {})


def _parquet(path: Path) -> Iterator[dict]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path.name}: is no Parquet ({error})") from None


def _saved(folder: Path) -> Iterator[dict]:
    # datasets takes seconds to import, and few need it
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(folder))
    if isinstance(found, DatasetDict):
        raise ValueError(f"{folder.name}: holds {', '.join(found)}; the folder of one of them would be right")
    yield from found


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
