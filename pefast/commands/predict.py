"""`pefast predict`: a trained run's answers to texts."""

from pathlib import Path
from typing import Annotated

import typer

from .screen import RunFolder, console, in_words


def predict(
    run: RunFolder,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to label.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one text a line.")] = None,
) -> None:
    """Label texts with a trained run."""
    with in_words():
        found = list(texts or [])
        if file is not None:
            found += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise ValueError(
                "predict: no text came; write texts after the folder, or name a file with --file"
            )
        from .. import training

        restored = training.restore(run, with_rows=False)
        for text, said in zip(found, training.say(restored, [{"text": text} for text in found]), strict=True):
            words = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in said.values())
            console.print("  ".join((*words, text)), markup=False, soft_wrap=True)
