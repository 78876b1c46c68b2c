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
    recipe: Annotated[Path, typer.Argument(help="A YAML file; recipes/ has some.")],
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows in a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the head, the order of rows and dropout.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if left out.")] = None,
    output: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint there.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The recipe's own short form: minutes.")] = False,
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
        wanted = recipes.read(recipe, laid_over, quick)
        if not wanted.methods:
            raise ValueError("recipe.methods: none came, so there would be no adapter to save")

        from . import training
        from .claim import claim, is_first

        console.quiet = not is_first()
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
def select(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; its importance method says what is scored.")],
    shares: Annotated[str | None, typer.Option(help="Shares of the parameters: 0.001,0.01,0.1")] = None,
    thresholds: Annotated[str | None, typer.Option(help="Instead: thresholds on the score.")] = None,
    folds: Annotated[int, typer.Option(help="Parts that the training rows are split into.")] = 3,
    batches: Annotated[int, typer.Option(help="Batches that the units are scored on.")] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="The recipe's own short form: minutes.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key, such as data.train_rows=500."),
    ] = None,
) -> None:
    """Choose by cross-validation how important a part must be to train, and print the curve."""
    with _in_words():
        from . import recipe as recipes

        wanted = recipes.read(recipe, dict(recipes.change(text) for text in changes or []), quick)
        if shares is not None and thresholds is not None:
            raise ValueError("select: shares and thresholds came; one of them would be right")
        by = "share" if thresholds is None else "threshold"
        lines = _numbers(shares if thresholds is None else thresholds, f"--{by}s")

        from . import selection, training

        lines = lines or selection.SHARES
        selection.check_lines(lines, by)
        run = training.prepare(wanted)
        points = selection.curve(run, lines, by=by, count=folds, batches=batches, seen=console.print)
        best = selection.best(points)
        _curve(points, best, by, run.task.METRIC)
        line = selection.scored(run, batches).threshold(best.line) if by == "share" else best.line
        console.print(
            f"on all training rows: methods: [{{method: importance, threshold: {line:.4g}}}]", markup=False
        )


def _numbers(text: str | None, flag: str) -> list[float]:
    try:
        return [float(word) for word in (text or "").split(",") if word.strip()]
    except ValueError:
        raise ValueError(f"{flag}: {text!r} came; numbers with commas between them are wanted") from None


def _curve(points, best, by: str, metric: str) -> None:
    """The curve as a table, with a bar for each mean."""
    low, high = min(point.mean for point in points), max(point.mean for point in points)
    table = Table(by, "threshold", "parameters", metric, "±", "", title="cross-validation")
    for point in points:
        count, line = len(point.values), sum(point.thresholds) / len(point.thresholds)
        bar = "█" * (1 + round(23 * (point.mean - low) / ((high - low) or 1)))
        numbers = (f"{point.line:g}", f"{line:.3g}", f"{sum(point.trained) // count:,}")
        shown = (f"{point.mean:.3f}", f"{point.error:.3f}", bar)
        table.add_row(*numbers, *shown, style="bold" if point is best else None)
    console.print(table)


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing, and what that costs."""
    from .doctor import look

    table = Table("", "found", "what it means", title="pefast doctor")
    for row in look():
        table.add_row(*row)
    console.print(table)


@app.command()
def bench(
    layer: Annotated[str, typer.Option(help="A layer of a known model, such as bert-base.up.")],
    roofline: Annotated[bool, typer.Option("--roofline", help="Predict; nothing is measured.")] = False,
    rank: Annotated[int, typer.Option(min=1, help="Of the waist.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of x.")] = 8192,
    dropout: Annotated[bool, typer.Option(help="With a mask on x.")] = True,
    gpu: Annotated[str, typer.Option(help="Whose rates: H100, H200 or A100.")] = "H100",
    tflops: Annotated[float | None, typer.Option(help="Another peak, 10^12 a second.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Another bandwidth, 10^12 bytes a second.")] = None,
) -> None:
    """Say what a LoRA layer computes and moves by each road, and the time predicted for a GPU."""
    with _in_words():
        if not roofline:
            raise ValueError("bench: only --roofline came to the command line; `pytest benchmarks` measures")
        _predict(layer, rank, tokens, dropout, gpu, tflops, bandwidth)


def _predict(layer, rank, tokens, dropout, gpu, tflops, bandwidth) -> None:
    from . import roofline
    from .kernels.forms import RATES, Shape

    if gpu not in RATES:
        raise ValueError(f"bench: no rates for {gpu!r}; there are {', '.join(RATES)}")
    rates = RATES[gpu]
    rates = rates._replace(
        flops=tflops * 1e12 if tflops else rates.flops, bytes=bandwidth * 1e12 if bandwidth else rates.bytes
    )
    n, k = roofline.layer(layer)
    shape = Shape(tokens, n, k, rank, dropout)
    roads = roofline.roads(shape)
    base = roads[0].read + roads[0].written
    lines = [
        (
            road.name,
            len(road.launches),
            f"{road.flops / 1e9:,.0f}",
            f"{road.read / 1e6:,.1f}",
            f"{road.written / 1e6:,.1f}",
            f"{(road.read + road.written) / base:.2f}",
            f"{1e6 * road.seconds(rates):,.0f}",
        )
        for road in roads
    ]
    columns = ("forward + backward", "launches", "GFLOP", "MB read", "MB written", "of the frozen", "µs")
    title = f"predicted, not measured: {layer} M={tokens} N={n} K={k} R={rank} on {gpu}"
    _table(title, columns, lines)
    for line in roofline.losses(shape, rates):
        console.print(line, soft_wrap=True)


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
