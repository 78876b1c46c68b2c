"""A prefix before every attention and the last layers, trained together: each alone, and both, on reviews.

python examples/prefix_last_layers.py               2,000 reviews, two passes, three ways
python examples/prefix_last_layers.py --rows 6530   all of them
"""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import pefast
from pefast import recipe, training

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment.yaml"
PREFIX, LAYERS = pefast.Prefix(tokens=10, init="vocabulary"), pefast.Layers(last=2)
WAYS = {"prefix": [PREFIX], "the last two layers": [LAYERS], "both": [PREFIX, LAYERS]}
# a few vectors want larger steps than layers that know the language
RATES = {"prefix": {"lr": 3e-2}, "layers": {"lr": 1e-4}, "head": {"lr": 1e-3}}
console = Console(highlight=False)


def fit(run: training.Run) -> None:
    """Two passes of AdamW, each method at its own rate, falling to zero."""
    model, wanted = run.model.train(), run.recipe.training
    kinds = {type(method).kind for method in run.methods} | {"head"}
    groups = pefast.parameter_groups(model, lr=1e-3, **{kind: RATES[kind] for kind in kinds})
    rows = run.task.encode(run.train, run.tokenizer, run.names, wanted.max_length)
    batches = torch.utils.data.DataLoader(
        rows, wanted.batch, shuffle=True, collate_fn=run.task.collator(run.tokenizer)
    )
    optimizer = torch.optim.AdamW(groups)
    steps = 2 * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for batch in (batch for _ in range(2) for batch in batches):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def one(way: str, rows: int) -> tuple[str, ...]:
    """Trains one way, writes its folder, and gives its row of the table."""
    run = training.prepare(recipe.read(RECIPE, {"data.train_rows": rows}))
    run.methods = WAYS[way]
    torch.manual_seed(0)
    pefast.attach(run.model, run.methods)
    count, _ = training.trainable(run.model)
    console.print(f"{way}: {count:,} parameters train")
    fit(run)
    _, scores = training.score(run)
    with tempfile.TemporaryDirectory() as folder:
        saved = pefast.save(run.model, folder)
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    return way, f"{count:,}", f"{size / 1e6:.1f} MB", f"{scores['accuracy']:.3f}", f"{scores['macro_f1']:.3f}"


def main() -> None:
    """The three ways, scored on the same held-out reviews."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000, help="rows to learn from")
    rows = parser.parse_args().rows
    table = Table("", "parameters that train", "folder", "accuracy", "macro F1")
    for way in WAYS:
        table.add_row(*one(way, rows))
    console.print(table)


if __name__ == "__main__":
    main()
