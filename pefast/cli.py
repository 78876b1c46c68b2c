"""The command line: parses, calls, prints. torch is imported only by the commands that compute."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"pefast: the command line needs {missing.name}; `pip install 'pefast[train]'` brings it, "
        "and `python -m pefast.doctor` works without it"
    ) from None

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune transformers at the cost of the frozen model.",
)
console = Console(highlight=False)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `pefast train` wrote.")]


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """One sentence instead of a traceback for what a person can mend; PEFAST_TRACE=1 shows both."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("PEFAST_TRACE"):
            raise
        typer.echo(f"pefast: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; examples/recipes has some.")],
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows in a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the head, the order of rows and dropout.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if left out.")] = None,
    output: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint there.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key, such as data.train_rows=500."),
    ] = None,
) -> None:
    """Train what a recipe describes and save the adapter."""
    with _in_words():
        from . import recipe as recipes

        flags = {"epochs": epochs, "lr": lr, "batch": batch, "seed": seed, "threads": threads}
        laid_over = {f"training.{key}": value for key, value in flags.items() if value is not None}
        laid_over |= {"output": str(output)} if output else {}
        laid_over |= dict(recipes.change(text) for text in changes or [])
        wanted = recipes.read(recipe, laid_over)
        if not wanted.methods:
            raise ValueError("recipe.methods: none came, so there would be no adapter to save")

        from . import training
        from .claim import claim

        with claim(wanted, Path(wanted.output) / training.CHECKPOINTS, resume):
            _train(wanted, resume)


def _train(wanted, resume: bool) -> None:
    from . import training
    from .progress import Watcher

    run = training.prepare(wanted)
    training.attach(run)
    count, total = training.trainable(run.model)
    console.print(
        f"{len(run.train):,} rows to learn from, {len(run.test):,} held out; "
        f"{count:,} of {total:,} parameters train"
    )
    before = training.score(run)[1]
    try:
        fitted = training.fit(run, Watcher(console), resume)
    except training.Stopped as stopped:
        console.print(str(stopped))
        raise typer.Exit(130) from None
    after = training.score(run)[1]
    numbers = after | {"before": before} | fitted | {"trainable": count, "parameters": total}
    folder = training.store(run, numbers)
    _table("held-out rows", ("", "before", "after"), [(name, before[name], after[name]) for name in after])
    console.print(f"saved to {folder}")


@app.command()
def evaluate(
    run: RunFolder,
    source: Annotated[Path | None, typer.Option(help="Other rows: a .csv or .jsonl file.")] = None,
) -> None:
    """Score a trained run on its held-out rows, or on a file."""
    with _in_words():
        from . import training

        restored = training.restore(run, with_rows=source is None)
        if source is not None:
            restored.test = training.read_rows(restored.recipe, source)
        metrics = training.score(restored)[1]
        _table(f"{len(restored.test):,} rows", ("", "score"), list(metrics.items()))


@app.command()
def predict(
    run: RunFolder,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to label.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one text a line.")] = None,
) -> None:
    """Label texts with a trained run."""
    with _in_words():
        found = list(texts or [])
        if file is not None:
            found += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise ValueError(
                "predict: no text came; write texts after the folder, or name a file with --file"
            )
        from . import training

        restored = training.restore(run, with_rows=False)
        for text, said in zip(found, training.say(restored, [{"text": text} for text in found]), strict=True):
            words = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in said.values())
            console.print("  ".join((*words, text)), markup=False, soft_wrap=True)


@app.command()
def explain(
    target: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="A trained folder, or a recipe file.")],
) -> None:
    """Say which hand computes each layer, and why the others do not."""
    with _in_words():
        import pefast

        from . import recipe as recipes
        from . import training

        if target.is_dir():
            run = training.restore(target, with_rows=False)
        else:
            run = training.prepare(recipes.read(target))
            training.attach(run)
        console.print(str(pefast.explain(run.model)), markup=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing, and what that costs."""
    from .doctor import look

    table = Table("", "found", "what it means", title="pefast doctor")
    for row in look():
        table.add_row(*row)
    console.print(table)


def _table(title: str, columns: tuple[str, ...], lines: list[tuple]) -> None:
    table = Table(*columns, title=title)
    for line in lines:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line))
    console.print(table)


def main() -> None:
    """The `pefast` command."""
    app()


if __name__ == "__main__":
    main()
