"""`pefast report`: what a trained run learned and where it errs, as a page and as JSON."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .screen import RunFolder, console, in_words


def report(
    run: RunFolder,
    source: Annotated[Path | None, typer.Option(help="Other rows than the held-out ones.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder to write to; the run's own if left out.")
    ] = None,
) -> None:
    """Write a run's report.html, report.json and model card again; or a report on other rows."""
    with in_words():
        if source is not None and output is None:
            raise ValueError("report: --source came; with --output the run's own report stays as it is")
        from .. import card, reporting, sources, training

        restored = training.restore(run)
        numbers = json.loads((run / training.METRICS).read_text(encoding="utf-8"))
        scores = {"before": numbers.get("before"), "baseline": numbers.get("baseline")}
        if source is not None:
            restored.test, scores = (
                sources.read(restored.recipe, source),
                {"before": None, "baseline": None},
            )
        answers, scores["after"] = training.score(restored)
        known = (run / reporting.REPORT).is_file()
        trained = reporting.read(run)["trained"] if known else reporting.trained(restored, numbers)
        facts = reporting.collect(restored, run, answers, scores, trained)
        page, _ = reporting.write(output or run, facts)
        if output is None:
            card.write(run / training.ADAPTER, facts)
        console.print(f"wrote {page}", markup=False, soft_wrap=True)
