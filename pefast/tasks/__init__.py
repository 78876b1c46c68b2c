"""What a model is trained for: one file a task, and the table that finds it.

A task is a module with

    model(folder, names, dtype)                    the base model with the task's head on top
    encode(rows, tokenizer, names, max_length)     what the model reads, one dictionary a row
    collator(tokenizer)                            rows of unlike length to one batch
    hits(logits, labels)                           the share of right answers in one training batch
    metrics(logits, labels)                        the numbers that `pefast evaluate` prints
    predict(model, tokenizer, texts, ...)          logits in the order of the texts
"""

from importlib import import_module
from types import ModuleType

TASKS = {
    "text-classification": "pefast.tasks.text_classification",
}


def find(name: str) -> ModuleType:
    """The module of a task. Raises ValueError, naming the known tasks, where there is none of that name."""
    if name not in TASKS:
        raise ValueError(f"task: {name!r} is not known; known tasks are {', '.join(TASKS)}")
    return import_module(TASKS[name])
