"""`make demo`: a pretrained model learns the sentiment of film reviews, from rows to a saved adapter.

python examples/demo.py            under four minutes on two CPU cores
python examples/demo.py --quick    the same steps on fewer rows, about a minute
"""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import pefast
from pefast import recipe, reporting, training
from pefast.progress import Watcher

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment.yaml"
SENTENCES = (
    "a warm, funny and quietly devastating film that earns every one of its tears .",
    "two hours of noise in search of a story , and it never finds one .",
    "the cast does what it can , but the jokes arrive late and leave early .",
)
console = Console(highlight=False)


def say(text: str) -> None:
    """One step of the demo, with the seconds so far."""
    console.print(f"[{time.perf_counter() - START:5.1f} s] {text}", markup=False, soft_wrap=True)


def learn(changes: dict) -> tuple[training.Run, dict]:
    """Trains the recipe, scored before and after on rows that training never sees."""
    run = training.prepare(recipe.read(RECIPE, changes))
    total = training.trainable(run.model)[1]
    training.attach(run)
    count = training.trainable(run.model)[0]
    say(f"{len(run.train):,} reviews to learn from, {len(run.test):,} held out")
    say(f"{count:,} parameters train: adapters, prompt tokens and head; the model's {total:,} are frozen")
    _, before = training.score(run)
    fitted = training.fit(run, Watcher(console))
    logits, after = training.score(run)
    numbers = after | {"before": before} | fitted
    folder = training.store(run, numbers)
    scores = {"before": before, "after": after, "baseline": training.baseline(run)}
    page = reporting.finish(run, folder, logits, scores, numbers)
    size = sum(file.stat().st_size for file in (folder / training.ADAPTER).rglob("*") if file.is_file())
    say(f"saved {folder}/{training.ADAPTER}, {size / 1e6:.1f} MB")
    say(f"{page} shows what it learned, where it errs and what it cost")
    return run, {"before": before, "after": after, "logits": logits, "trainable": count, "total": total}


def reload(run: training.Run, logits: torch.Tensor) -> training.Run:
    """The saved adapter on a fresh base model; its logits must be the trained model's, bit for bit."""
    fresh = training.restore(run.recipe.output)
    same = torch.equal(training.score(fresh)[0], logits)
    verdict = "identical, bit for bit" if same else "DIFFER"
    say(f"loaded into a fresh base model: {len(logits):,} predictions {verdict}")
    if not same:
        raise SystemExit(1)
    return fresh


def show(numbers: dict, steps: dict) -> None:
    """The one table."""
    before, after = numbers["before"], numbers["after"]
    table = Table("", "before", "after")
    table.add_row("held-out accuracy", f"{before['accuracy']:.3f}", f"{after['accuracy']:.3f}")
    table.add_row("held-out macro F1", f"{before['macro_f1']:.3f}", f"{after['macro_f1']:.3f}")
    table.add_section()
    table.add_row("", "full fine-tuning", "this run", style="bold")
    table.add_row("parameters that train", f"{numbers['total']:,}", f"{numbers['trainable']:,}")
    table.add_section()
    table.add_row("", "plain PyTorch", "pefast's choice", style="bold")
    table.add_row("one training step", f"{steps['plain']:.0f} ms", f"{steps['automatic']:.0f} ms")
    console.print(table)


def main() -> None:
    """Learn, save, load, use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows")
    quick = parser.parse_args().quick
    changes = {"data.train_rows": 3000, "training.epochs": 1, "output": "out/quick"} if quick else {}
    run, numbers = learn(changes)
    fresh = reload(run, numbers["logits"])
    said = training.say(fresh, [{"text": text} for text in SENTENCES])
    for text, (name, share) in zip(SENTENCES, (answer.values() for answer in said), strict=True):
        say(f"{name:8} {share:.2f}  {text}")
    show(numbers, training.paired_steps(run))
    console.print(pefast.explain(run.model), markup=False, soft_wrap=True)
    if not numbers["after"]["accuracy"] > numbers["before"]["accuracy"]:
        raise SystemExit("demo: the model did not get better than before training")


START = time.perf_counter()
if __name__ == "__main__":
    main()
