"""`pefast train`: what a recipe describes becomes an adapter in a folder."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ..recipe import Recipe, Source, Training
from .screen import Changes, Quick, console, in_words, table


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; recipes/ has some.")],
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows in a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the head, the order of rows and dropout.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if left out.")] = None,
    output: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint there.")] = False,
    quick: Quick = False,
    changes: Changes = None,
) -> None:
    """Train what a recipe describes and save the adapter."""
    with in_words():
        from .. import recipe as recipes

        flags = {"epochs": epochs, "lr": lr, "batch": batch, "seed": seed, "threads": threads}
        laid_over = {f"training.{key}": value for key, value in flags.items() if value is not None}
        laid_over |= {"output": str(output)} if output else {}
        laid_over |= dict(recipes.change(text) for text in changes or [])
        wanted = recipes.read(recipe, laid_over, quick)
        if not wanted.methods:
            raise ValueError("recipe.methods: none came, so there would be no adapter to save")

        from .. import training
        from ..claim import claim, is_first

        console.quiet = not is_first()
        with claim(wanted, Path(wanted.output) / training.CHECKPOINTS, resume):
            _train(wanted, resume)


def _train(wanted, resume: bool) -> None:
    from .. import reporting, sources, training
    from ..claim import is_first
    from ..progress import Watcher

    run = training.prepare(wanted)
    training.attach(run)
    count, total = training.trainable(run.model)
    console.print(
        f"{len(run.train):,} rows to learn from, {len(run.test):,} held out; "
        f"{count:,} of {total:,} parameters train"
    )
    for remark in sources.remarks(run.recipe, run.tokenizer, run.train, run.test):
        console.print(remark, markup=False, soft_wrap=True)
    before = training.score(run)[1]
    try:
        fitted = training.fit(run, Watcher(console), resume)
    except training.Stopped as stopped:
        console.print(str(stopped))
        raise typer.Exit(130) from None
    answers, after = training.score(run)
    scores = {"after": after, "before": before, "baseline": training.baseline(run)}
    numbers = after | {"before": before, "baseline": scores["baseline"]} | fitted
    numbers |= {"trainable": count, "parameters": total}
    folder = training.store(run, numbers)
    _show(scores)
    console.print(f"saved to {folder}", markup=False, soft_wrap=True)
    if is_first():
        page = reporting.finish(run, folder, answers, scores, numbers)
        console.print(f"report: {page}", markup=False, soft_wrap=True)


def _show(scores: dict) -> None:
    """The scores as a table, beside what can be said without a model."""
    plain = scores["baseline"]
    columns = ("", *(() if plain is None else (plain["what"],)), "before", "after")
    lines = [
        (name, *(() if plain is None else (plain[name],)), scores["before"][name], value)
        for name, value in scores["after"].items()
    ]
    table("held-out rows", columns, lines)


def _keys() -> str:
    """Every key of a recipe with its default, a paragraph a section."""
    lines = []
    for section, fields in (("", Recipe), ("data.", Source), ("training.", Training)):
        keys = []
        for key in dataclasses.fields(fields):
            # those made anew for each recipe are its sections and lists
            missing = key.default is dataclasses.MISSING
            keys.append(section + key.name + ("" if missing else f"={key.default}"))
        lines.append("   ".join(keys))
    return "Keys of a recipe, with their defaults:\n\n" + "\n\n".join(lines)


train.epilog = _keys()
