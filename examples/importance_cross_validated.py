"""How much of a model must train? A threshold on importance, by cross-validation; its curve as a picture.

python examples/importance_cross_validated.py            600 reviews, three folds, six shares; a training each
python examples/importance_cross_validated.py --rows 60 --epochs 1 --folds 2 --shares 0.01 0.1

The score of a unit is S = mean |∂L/∂θ| over its entries and some batches; units above the threshold train,
the rest is frozen and costs neither gradient nor optimizer. `pefast select` does the same for any recipe.
"""

import argparse
from pathlib import Path

from rich.console import Console

import pefast
from pefast import recipe, selection, training
from pefast.progress import Watcher

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment.yaml"
SHARES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
OUTPUT = Path("out/importance")
console = Console(highlight=False)


def picture(points: list[selection.Point], chosen: selection.Point, path: Path) -> bool:
    """Draws accuracy over the share that trains; False where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    shares, means = [point.line for point in points], [point.mean for point in points]
    axes.errorbar(
        shares, means, [point.error for point in points], marker="o", capsize=3, label="mean of folds"
    )
    for number in range(len(points[0].values)):
        axes.plot(shares, [point.values[number] for point in points], color="0.8", zorder=0)
    axes.axvline(chosen.line, linestyle=":", label=f"chosen: {chosen.line:g}")
    axes.set(xscale="log", xlabel="share of the linear layers' entries that trains", ylabel="accuracy")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def main() -> None:
    """The curve, its picture, and a run with the threshold that won."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=600, help="rows to learn from")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over them in each training")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument(
        "--unit", default="row", choices=["tensor", "row", "column", "head", "tile", "element"]
    )
    asked = parser.parse_args()
    changes = {
        "methods": [{"method": "importance", "unit": asked.unit}],
        "data.train_rows": asked.rows,
        "training.epochs": asked.epochs,
        # few rows: small batches, so that there are steps enough
        "training.batch": 8,
        "training.lr": 1e-3,
        "output": str(OUTPUT),
    }
    run = training.prepare(recipe.read(RECIPE, changes))
    points = selection.curve(run, asked.shares, count=asked.folds, seen=console.print)
    chosen = selection.best(points)
    for point in points:
        mark = "  <- chosen" if point is chosen else ""
        console.print(f"share {point.line:<7g} accuracy {point.mean:.3f} ± {point.error:.3f}{mark}")
    path = OUTPUT / "curve.png"
    drawn = picture(points, chosen, path)
    console.print(
        f"drawn to {path}" if drawn else "no picture: `pip install 'pefast[demo]'` brings matplotlib"
    )

    scores = selection.scored(run)
    threshold = scores.threshold(chosen.line)
    pefast.attach(run.model, pefast.Importance(scores=scores, threshold=threshold))
    count, total = training.trainable(run.model)
    console.print(f"on all rows the threshold is {threshold:.3g}: {count:,} of {total:,} parameters train")
    training.fit(run, Watcher(console))
    console.print(f"accuracy on {len(run.test):,} held-out reviews: {training.score(run)[1]['accuracy']:.3f}")
    folder = pefast.save(run.model, OUTPUT / "adapter")
    size = sum(file.stat().st_size for file in folder.iterdir())
    console.print(f"saved to {folder}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
