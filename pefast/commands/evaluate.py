"""`pefast evaluate`: the score of a trained run."""

from pathlib import Path
from typing import Annotated

import typer

from .screen import RunFolder, in_words, table


def evaluate(
    run: RunFolder,
    source: Annotated[Path | None, typer.Option(help="Other rows: a .csv or .jsonl file.")] = None,
) -> None:
    """Score a trained run on its held-out rows, or on a file."""
    with in_words():
        from .. import sources, training

        restored = training.restore(run, with_rows=source is None)
        if source is not None:
            restored.test = sources.read(restored.recipe, source)
        metrics = training.score(restored)[1]
        table(f"{len(restored.test):,} rows", ("", "score"), list(metrics.items()))
