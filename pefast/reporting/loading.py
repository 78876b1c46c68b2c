"""Lines of Python that load what a run wrote: with pefast, and with PEFT where the folder is PEFT's."""

import json
from pathlib import Path

from ..checkpoint import CONFIG
from ..tasks import carried
from ..trainer import ADAPTER
from ..training import Run

CLASSES = {
    "text_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "causal_generation": "AutoModelForCausalLM",
    "sequence_to_sequence": "AutoModelForSeq2SeqLM",
}
_WITH_PEFAST = """\
{imports}from transformers import {name}, AutoTokenizer

import pefast
{resolve}
tokenizer = AutoTokenizer.from_pretrained(base)
model = {name}.from_pretrained(base{options}).eval()
pefast.load(model, {adapter!r})
"""
_WITH_PEFT = """\
{imports}import peft
from transformers import {name}, AutoTokenizer
{resolve}
tokenizer = AutoTokenizer.from_pretrained(base)
model = {name}.from_pretrained(base{options})
model = peft.PeftModel.from_pretrained(model, {adapter!r}).eval()
"""
_WITH_RUN = """\
from pefast import training

run = training.restore({folder!r}, with_rows=False)
print(training.say(run, [{row!r}]))
"""


def snippets(run: Run, folder: Path) -> list[dict[str, str]]:
    """Programs, each with a title; every one runs as it stands where the folder is."""
    kind = getattr(run.task, "OVER", run.task).__name__.rpartition(".")[2]
    options = _options(run, kind)
    known = run.recipe.model in carried.CARRIED
    parts = {
        "name": CLASSES[kind],
        "adapter": str(folder / ADAPTER),
        "options": "".join(f", {key}={value!r}" for key, value in options.items()),
        "resolve": f"\nbase = carried.resolve({run.recipe.model!r})"
        if known
        else f"\nbase = {run.recipe.model!r}",
        "imports": "",
    }
    with_pefast = _WITH_PEFAST.format(**parts)
    with_peft = _WITH_PEFT.format(**parts)
    if known:
        with_pefast = with_pefast.replace(
            "import pefast\n", "import pefast\nfrom pefast.tasks import carried\n"
        )
        with_peft = with_peft.replace(
            "AutoTokenizer\n", "AutoTokenizer\n\nfrom pefast.tasks import carried\n", 1
        )
    found = [
        {"title": "The whole run: what it says to a row", "code": _whole(run, folder)},
        {"title": "The adapter on a model of your own", "code": with_pefast},
    ]
    if reads_in_peft(folder / ADAPTER):
        found.append({"title": "With PEFT, whose files these are", "code": with_peft})
    return found


def reads_in_peft(adapter: Path) -> bool:
    """Whether an adapter's folder is one of PEFT's own, as it stands."""
    config = adapter / CONFIG
    if not config.is_file():
        return False
    return not json.loads(config.read_text(encoding="utf-8"))["peft_type"].startswith("PEFAST")


def _whole(run: Run, folder: Path) -> str:
    row = {role: _example(role) for role in run.task.ROLES if role != "label"}
    row = {
        role: text
        for role, text in row.items()
        if role != "pair" or (run.recipe.data.columns or {}).get("pair")
    }
    return _WITH_RUN.format(folder=str(folder), row=row)


def _example(role: str) -> object:
    known = {
        "tokens": ["Rain", "in", "Berlin"],
        "question": "Where did it rain?",
        "context": "It rained in Berlin.",
        "head": "Ada",
        "tail": "London",
    }
    return known.get(role, "Ada went to London, and it was a good day.")


def _options(run: Run, kind: str) -> dict[str, object]:
    options: dict[str, object] = {}
    if kind in ("text_classification", "token_classification"):
        options["num_labels"] = len(run.names)
    elif kind == "regression":
        options["num_labels"] = 1
    if run.recipe.training.dtype != "float32":
        options["dtype"] = run.recipe.training.dtype
    return options
