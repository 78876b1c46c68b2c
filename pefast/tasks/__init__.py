"""What a model is trained for: one file a task, and the table that finds it.

A row is a dictionary from a role ("text", "label") to a value; an answer is what the model says to a row, in
the task's own form (logits, a tag a word, a span, a text). A task is a module with

    ROLES                                          the roles of a row and the columns they have if the recipe
                                                   names no other; None: read only where it names one
    METRIC                                         the metric that decides between two runs; more is better
    STRATUM                                        the role whose values every part has in like shares
    names(rows, given)                             label as the rows have it: the name to show, or {}
    model(folder, names, dtype)                    the base model with the task's head on top
    encode(rows, tokenizer, names, max_length)     what the model reads, one dictionary a row
    collator(tokenizer, model)                     rows of unlike length to one batch
    hits(outputs, batch)                           the share of right answers in one training batch
    predict(model, tokenizer, rows, ...)           answers in the order of the rows, each by an adapter of
                                                   its own if `adapters` come
    baseline(train, rows, names)                   what can be said without a model: in words, and as answers;
                                                   None where the base model itself is to be beaten
    metrics(answers, rows, names)                  the numbers that `pefast evaluate` prints
    say(answers, names)                            one dictionary an answer, for people and for JSON

and where a task is built on another one: OVER, whose rows and answers its own are once they are marked, and
HEAD, whose head and logits its own are, so that a batch may mix the two.
"""

from importlib import import_module
from types import ModuleType

TASKS = {
    "text-classification": "pefast.tasks.text_classification",
    "regression": "pefast.tasks.regression",
    "token-classification": "pefast.tasks.token_classification",
    "relation-classification": "pefast.tasks.relation_classification",
    "question-answering": "pefast.tasks.question_answering",
    "causal-generation": "pefast.tasks.causal_generation",
    "sequence-to-sequence": "pefast.tasks.sequence_to_sequence",
}


def find(name: str) -> ModuleType:
    """The module of a task. Raises ValueError, naming the known tasks, where there is none of that name."""
    if name not in TASKS:
        raise ValueError(f"task: {name!r} is not known; known tasks are {', '.join(TASKS)}")
    return import_module(TASKS[name])
