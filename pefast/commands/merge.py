"""`pefast merge`: a trained run as one model, for transformers alone."""

from pathlib import Path
from typing import Annotated

import typer

from .screen import RunFolder, console, in_words, table


def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the merged model.")],
    rows: Annotated[int, typer.Option(min=0, help="Held-out rows to compare both models on.")] = 200,
) -> None:
    """Merge a trained run's adapter into its base model, compare both, and write the model with its card."""
    with in_words():
        import pefast

        from .. import card, reporting, training

        restored = training.restore(run, with_rows=rows > 0)
        folder = pefast.export(restored.model, out, restored.tokenizer)
        seen = _compare(training, restored, folder, rows) if rows else {}
        facts = reporting.read(run) if (run / reporting.REPORT).is_file() else None
        if facts is None:
            console.print(f"no model card: `pefast report {run}` writes what it says", markup=False)
        else:
            card.write(folder, facts, seen)
        console.print(f"merged into {folder}", markup=False, soft_wrap=True)


def _compare(training, restored, folder: Path, rows: int) -> dict[str, int]:
    """Answers of the model with its adapter, and of the merged one as transformers reads it."""
    chosen, wanted = restored.test[:rows], restored.recipe.training
    answers, right = training.score(restored, chosen)
    said = restored.task.say(answers, restored.names)
    dtype = next(restored.model.parameters()).dtype
    plain = restored.task.model(folder, restored.names, dtype).to(restored.model.device).eval()
    merged = restored.task.predict(plain, restored.tokenizer, chosen, wanted.max_length)
    got = restored.task.metrics(merged, chosen, restored.names)
    table(
        f"{len(chosen):,} held-out rows",
        ("", "with the adapter", "merged"),
        [(name, right[name], got[name]) for name in right],
    )
    # probabilities and numbers differ in their last digits
    alike = sum(
        _words(one) == _words(other)
        for one, other in zip(said, restored.task.say(merged, restored.names), strict=True)
    )
    console.print(f"{alike:,} of {len(chosen):,} answers alike")
    return {"rows": len(chosen), "alike": alike}


def _words(answer: dict) -> list:
    return [
        f"{value:.3g}" if key == "value" else value for key, value in answer.items() if key != "probability"
    ]
