"""`pefast predict`: trained runs' answers to texts, files and streams."""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .screen import RunFolder, in_words

SUFFIXES = {".txt": "text", ".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet", ".conll": "conll"}
INPUTS, OUTPUTS = tuple(SUFFIXES.values()), ("text", "jsonl")


def predict(
    run: RunFolder,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; - reads standard input.")
    ] = None,
    beside: Annotated[
        list[Path] | None, typer.Option("--with", metavar="RUN", help="Another run of the same base model.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="The column that names a row's run; without it each answers each row.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Rows: .csv, .jsonl, .parquet, .conll, or .txt with a text a line.")
    ] = None,
    input_format: Annotated[str | None, typer.Option(help=f"One of {', '.join(INPUTS)}.")] = None,
    output: Annotated[Path | None, typer.Option(help="A file; it appears whole or not at all.")] = None,
    output_format: Annotated[str | None, typer.Option(help="text or jsonl; .jsonl files are jsonl.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that are computed together.")] = 32,
) -> None:
    """Answer texts, files or standard input with trained runs, in their order and as they come."""
    with in_words():
        form = output_format or ("jsonl" if output is not None and output.suffix == ".jsonl" else "text")
        for name, got, known in (("input", input_format, INPUTS), ("output", form, OUTPUTS)):
            if got is not None and got not in known:
                raise ValueError(f"--{name}-format: {got!r} came; it is one of {', '.join(known)}")
        records = _records(texts or [], file, input_format)
        if (first := next(records, None)) is None:
            raise ValueError("predict: no text came; write texts behind the folder, name a --file, or pipe")
        # what takes seconds comes when there is something to do
        from .. import predicting

        runs = predicting.restore([run, *(beside or [])])
        if first[1].keys() == {"text"}:
            predicting.check_texts(runs)
        questions = predicting.asked(runs, itertools.chain([first], records), by)
        with _writer(output) as write:
            for each, answer in predicting.answers(runs, questions, batch):
                write(predicting.line(each, answer, form, len(runs) > 1))


def _records(texts: list[str], file: Path | None, form: str | None) -> Iterator[tuple[str, dict]]:
    """Every record and where it stands; a plain text's only column is "text"."""
    from ..tasks import readers

    yield from ((f"text {number}", {"text": text}) for number, text in enumerate(texts, 1) if text != "-")
    if file is not None:
        found = readers.numbered(file, form or SUFFIXES.get(file.suffix))
        yield from ((f"{file.name}, {place}", record) for place, record in found)
    if "-" in texts or not (texts or file or sys.stdin.isatty()):
        found = readers.of_stream("standard input", sys.stdin.buffer, form or "text")
        yield from ((f"standard input, {place}", record) for place, record in found)


@contextlib.contextmanager
def _writer(output: Path | None):
    """What writes a line: to standard output at once, or to a file that gets its name when all is there."""
    if output is None:
        try:
            yield lambda line: print(line, flush=True)
        except BrokenPipeError:
            # whoever read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as stream:
            yield lambda line: stream.write(line + "\n")
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
