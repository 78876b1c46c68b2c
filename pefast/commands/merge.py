"""`pefast merge`: a trained run as one model, for transformers alone."""

from pathlib import Path
from typing import Annotated

import typer

from .screen import RunFolder, console, in_words, table


def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the merged model.")],
    rows: Annotated[int, typer.Option(min=0, help="Held-out rows to compare both models on.")] = 200,
    dtype: Annotated[
        str | None, typer.Option(help="Of the merged weights: float32 keeps what bfloat16 would round away.")
    ] = None,
) -> None:
    """Merge a trained run's adapter into its base model, compare both, and write the model with its card."""
    with in_words():
        import torch

        import pefast

        from .. import card, recipe, reporting, training

        if dtype is not None and dtype not in recipe.DTYPES:
            raise ValueError(f"merge: --dtype {dtype!r} came; it is one of {', '.join(recipe.DTYPES)}")
        restored = training.restore(run, with_rows=rows > 0)
        restored.test = restored.test[:rows]
        before = training.score(restored) if rows else None
        if dtype is not None:
            restored.model.to(getattr(torch, dtype))
        folder = pefast.export(restored.model, out, restored.tokenizer)
        seen = _compare(restored, folder, *before) if before else {}
        if (run / reporting.REPORT).is_file():
            card.write(folder, reporting.read(run), seen)
        else:
            console.print(f"no model card: `pefast report {run}` writes what it says", markup=False)
        console.print(f"merged into {folder}", markup=False, soft_wrap=True)


def _compare(restored, folder: Path, answers, scores: dict[str, float]) -> dict[str, int]:
    """The model with its adapter, and the merged one as transformers reads it: scores and answers."""
    task, names, rows = restored.task, restored.names, restored.test
    some = next(restored.model.parameters())
    plain = task.model(folder, names, some.dtype).to(some.device).eval()
    merged = task.predict(plain, restored.tokenizer, rows, restored.recipe.training.max_length)
    got = task.metrics(merged, rows, names)
    lines = [(name, value, got[name]) for name, value in scores.items()]
    table(f"{len(rows):,} held-out rows", ("", "with the adapter", "merged"), lines)
    pairs = zip(task.say(answers, names), task.say(merged, names), strict=True)
    # probabilities and numbers differ in their last digits
    alike = sum(_words(one) == _words(other) for one, other in pairs)
    console.print(f"{alike:,} of {len(rows):,} answers alike")
    return {"rows": len(rows), "alike": alike}


def _words(answer: dict) -> list:
    return [
        f"{value:.3g}" if key == "value" else value for key, value in answer.items() if key != "probability"
    ]
