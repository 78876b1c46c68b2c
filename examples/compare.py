"""Five ways to fine-tune one model on one split, in one table: full, LoRA, adapters, prompt, and the hybrid.

python examples/compare.py                  the recipe's two passes over 7,530 reviews, five times
python examples/compare.py --rows 2000      a quicker look
python examples/compare.py --only lora hybrid
"""

import argparse
import gc
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pefast import recipe, training
from pefast.progress import Watcher

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment.yaml"
ADAPTERS, PROMPT = recipe.read(RECIPE).methods
# the hybrid is the recipe as it stands; it and LoRA had their learning rates chosen on a part of the training
# rows, the others have usual ones
WAYS = {
    "full": {"methods": [], "training.lr": 1e-4},
    "lora": {"methods": [{"method": "lora", "rank": 16}], "training.lr": 1e-3},
    "adapters": {"methods": [ADAPTERS]},
    "prompt": {"methods": [PROMPT], "training.lr": 3e-2},
    "hybrid": {},
}
console = Console(highlight=False)


def one(way: str, common: dict) -> tuple[str, ...]:
    """Trains one way and gives its row of the table."""
    run = training.prepare(recipe.read(RECIPE, common | WAYS[way]))
    training.attach(run)
    count, _ = training.trainable(run.model)
    console.print(f"{way}: {count:,} parameters train")
    fitted = training.fit(run, Watcher(console))
    _, scores = training.score(run)
    speed = fitted["steps"] / fitted["seconds"]
    return way, f"{count:,}", f"{scores['accuracy']:.3f}", f"{scores['macro_f1']:.3f}", f"{speed:.1f}"


def main() -> None:
    """All of them, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="rows to learn from")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    asked = parser.parse_args()
    common = {"output": "out/compare"} | ({"data.train_rows": asked.rows} if asked.rows else {})
    table = Table("", "parameters that train", "accuracy", "macro F1", "steps/s")
    for way in asked.only:
        table.add_row(*one(way, common))
        gc.collect()
    console.print(table)


if __name__ == "__main__":
    main()
