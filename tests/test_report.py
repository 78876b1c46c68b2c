"""A run's report and model card: what they say, that they say it safely, and that what they advise runs."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from typer.testing import CliRunner

from pefast import card, reporting, training
from pefast.cli import app
from pefast.reporting import charts
from pefast.reporting.page import milliseconds, page, seen, share, size
from tests import tiny_run

HOSTILE = (
    "</p><script>alert(1)</script><img src=x onerror=alert(1)>\u202eevil {{ 7 * 7 }} \x1b[31m ``` | [a](b)"
)


def pefast(*words, code=0):
    """What one command prints, errors included."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a LoRA run of thirty steps with three looks."""
    folder = tiny_run.write(tmp_path_factory.mktemp("report"))
    wanted = ["methods=[{method: lora, rank: 4}]", "data.valid_rows=20", "training.evaluate_every=10"]
    wanted += ["training.max_steps=30"]
    pefast("train", folder / "recipe.yaml", *(word for each in wanted for word in ("--set", each)))
    return folder / "out"


@pytest.fixture(scope="module")
def facts(run):
    """report.json; Python's own NaN and Infinity are not JSON."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads((run / "report.json").read_text(), parse_constant=refuse)


class Seen(HTMLParser):
    """The tags, attributes and text of a page; an end that is not the last beginning's is an error."""

    VOID = ("meta", "br", "polyline", "circle", "line")

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], set(), [], []
        self.feed(content)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [(name, value) for name, value in attrs if name in ("src", "href", "action", "data")]
        self.links += [(name, value) for name, value in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        assert tag in self.VOID, f"<{tag}/>"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_has_the_runs_numbers(run, facts):
    numbers = json.loads((run / "metrics.json").read_text())
    assert facts["scores"]["after"] == {key: numbers[key] for key in ("accuracy", "macro_f1")}
    assert facts["scores"]["before"] == numbers["before"]
    assert facts["scores"]["baseline"]["what"].startswith("always")
    assert facts["data"]["rows"]["valid"] == 20 and facts["data"]["rows"]["test"] == 24
    curves = facts["trained"]["curves"]
    assert [step for step, _ in curves["loss"]["loss"]] == list(range(1, numbers["steps"] + 1))
    assert [step for step, _ in curves["metric"]["accuracy"]] == [10, 20, 30] and set(
        curves["grad_norm"]
    ) == {
        "default/lora",
        "default/head",
    }
    assert facts["trained"]["step"]["measured"] == numbers["steps"]


def test_the_report_counts_what_trains_and_what_it_holds(facts):
    trained = facts["trained"]
    lora, head = trained["methods"]
    assert lora["settings"] == {"rank": 4} and head["settings"] == {}
    assert lora["parameters"] + head["parameters"] == trained["parameters"]["trained"]
    # fp32, and AdamW keeps two numbers for each, and one count for each tensor
    assert lora["bytes"] == lora["gradients"] == 4 * lora["parameters"]
    assert 0 <= lora["state"] - 8 * lora["parameters"] < 1000
    assert trained["memory"]["model"] == 4 * trained["parameters"]["all"]
    assert set(trained["step"]["seconds"]) == {"data", "forward", "backward", "optimizer"}


def test_the_page_stands_alone(run, facts):
    content = (run / "report.html").read_text(encoding="utf-8")
    shown = Seen(content)
    assert not shown.links and not shown.tags & {"script", "link", "iframe", "object", "embed", "form"}
    assert "url(" not in content and "@import" not in content
    assert "default-src 'none'" in content and "prefers-color-scheme: dark" in content
    text = " ".join(shown.text)
    assert f"{facts['scores']['after']['accuracy']:.3f}" in text and "How to load it" in text
    assert content.count("<svg") == 5


def poisoned(value):
    """The same facts with every text a hostile one."""
    if isinstance(value, dict):
        return {key: poisoned(each) for key, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


def test_nobodys_text_is_more_than_text(facts):
    clean = Seen(page(facts))
    wrong = {
        "texts": {"text": HOSTILE, HOSTILE: HOSTILE},
        "wanted": HOSTILE,
        "said": HOSTILE,
        "note": HOSTILE,
    }
    tagged = {"texts": {}, "words": [[HOSTILE, "O", HOSTILE]], "note": HOSTILE}
    bad = poisoned(facts) | {"metric": facts["metric"], "task": HOSTILE}
    bad["findings"] |= {"errors": [wrong, tagged], "wrong": 2, "kind": HOSTILE}
    bad["trained"]["curves"] = {
        "loss": {"loss": [[1, 2.0], [2, 1.0]]},
        "grad_norm": {HOSTILE: [[1, 2.0]], "b": [[1, 3.0]]},
    }
    content = page(bad)
    shown = Seen(content)
    assert not shown.links and not shown.tags & {"script", "img"}
    assert shown.tags <= clean.tags | {"small", "span", "p", "details", "summary"}
    text = " ".join(shown.text)
    assert "<script>alert(1)</script>" in text and "{{ 7 * 7 }}" in text
    hidden = re.findall("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", content)
    assert not hidden


def test_what_the_report_advises_runs(run, facts):
    restored = training.restore(run)
    text = "Ada went to London, and it was a good day."
    right = training.predict(restored, [{"text": text}])
    titles = [each["title"] for each in facts["load"]]
    assert titles[-1] == "With PEFT, whose files these are" and len(titles) == 3
    for each in facts["load"]:
        space, printed = {}, io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(each["code"], space)
        if "run" in space:
            assert printed.getvalue().strip() == str(training.say(restored, [{"text": text}]))
        else:
            with torch.no_grad():
                logits = space["model"](**space["tokenizer"](text, return_tensors="pt")).logits
            torch.testing.assert_close(logits, right)


def test_a_report_is_written_again_and_of_other_rows(run, facts, tmp_path):
    (run / "report.html").unlink()
    pefast("report", run)
    assert json.loads((run / "report.json").read_text()) == facts and (run / "report.html").is_file()
    (tmp_path / "rows.csv").write_text("text,label\ngood film,1\nbad story,0\n")
    pefast("report", run, "--source", tmp_path / "rows.csv", "--output", tmp_path / "other")
    other = json.loads((tmp_path / "other" / "report.json").read_text())
    assert other["findings"]["rows"] == 2 and other["trained"] == facts["trained"]
    assert other["scores"]["before"] is None
    assert "with --output" in pefast("report", run, "--source", tmp_path / "rows.csv", code=2)
    # of a run from before there were reports: what can still be known
    (run / "report.json").rename(tmp_path / "kept.json")
    pefast("report", run)
    late = json.loads((run / "report.json").read_text())["trained"]
    assert late["curves"] == {} and late["parameters"] == facts["trained"]["parameters"]
    (tmp_path / "kept.json").rename(run / "report.json")
    pefast("report", run)


def test_a_page_that_cannot_be_made_leaves_the_older_pair(tmp_path, facts):
    page_path, json_path = reporting.write(tmp_path, facts)
    before = page_path.read_bytes(), json_path.read_bytes()
    for broken in ({**facts, "title": math.nan}, {**facts, "scores": {}}):
        with pytest.raises((ValueError, jinja2.UndefinedError)):
            reporting.write(tmp_path, broken)
    assert before == (page_path.read_bytes(), json_path.read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_merged_run_is_a_model_for_transformers_alone(run, tmp_path):
    said = pefast("merge", run, tmp_path / "merged")
    assert "24 of 24 answers alike" in said
    restored = training.restore(run)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    texts = [row["text"] for row in restored.test]
    with torch.no_grad():
        got = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(got, training.predict(restored, restored.test), rtol=1e-4, atol=1e-5)
    content = (tmp_path / "merged" / "README.md").read_text()
    assert "24 of 24 of these rows" in content and 'from_pretrained("path/to/this/folder")' in content
    assert ModelCard(content).data.library_name == "transformers"
    assert "not empty" in pefast("merge", run, tmp_path / "merged", code=2)


def test_a_run_in_bf16_merges_into_fp32_without_a_loss(run, tmp_path):
    pefast("train", run.parent / "recipe.yaml", "--output", tmp_path / "narrow", *narrow_words())
    pefast("merge", tmp_path / "narrow", tmp_path / "wide", "--dtype", "float32", "--rows", "0")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "wide")
    restored = training.restore(tmp_path / "narrow")
    restored.model.float()
    inputs = restored.tokenizer("good film", return_tensors="pt")
    with torch.no_grad():
        right = restored.model.eval()(**inputs).logits
        torch.testing.assert_close(model.eval()(**inputs).logits, right)
    assert model.dtype is torch.float32
    assert "it is one of" in pefast("merge", run, tmp_path / "no", "--dtype", "int3", code=2)


def narrow_words():
    """What turns the recipe to three steps of a LoRA in bf16."""
    wanted = ("methods=[{method: lora, rank: 4}]", "training.max_steps=3", "training.dtype=bfloat16")
    return [word for each in wanted for word in ("--set", each)]


def test_a_run_that_cannot_merge_says_what_can(run, tmp_path):
    pefast(
        "train", run.parent / "recipe.yaml", "--output", tmp_path / "hybrid", "--set", "training.max_steps=1"
    )
    said = pefast("merge", tmp_path / "hybrid", tmp_path / "merged", code=2)
    assert "adapter, prompt cannot be added to a weight; LoRA, IA3" in said and said.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def test_the_card_has_the_figures_and_keeps_what_people_wrote(run, facts, tmp_path):
    path = run / "adapter" / "README.md"
    found = ModelCard(path.read_text())
    assert found.data.library_name == "peft" and {"pefast", "lora"} <= set(found.data.tags)
    results = {one.metric_type: one.metric_value for one in found.data.eval_results}
    assert results == {key: round(value, 4) for key, value in facts["scores"]["after"].items()}
    # a card goes to other people: no path of this machine
    assert str(run.parent) not in path.read_text()
    mine = (
        path.read_text()
        .replace("---\n", "---\nlicense: mit\n", 1)
        .replace("- pefast\n", "- pefast\n- mine\n")
    )
    path.write_text(
        mine.replace("<!-- pefast begins", "# My words\n\n<!-- pefast begins") + "\nMore of mine.\n"
    )
    changed = facts | {"scores": facts["scores"] | {"after": {"accuracy": 0.125, "macro_f1": None}}}
    card.write(run / "adapter", changed)
    again = ModelCard(path.read_text())
    assert again.data.license == "mit" and "mine" in again.data.tags
    assert [one.metric_value for one in again.data.eval_results] == [0.125]
    assert again.text.count("# My words") == again.text.count("More of mine.") == 1
    assert "| accuracy | " in again.text and "0.125 |" in again.text and again.text.count("## Figures") == 1
    # PEFT writes a card of its own into the folder it saves to
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        run.parent / "model", num_labels=2
    )
    peft.PeftModel.from_pretrained(model, run / "adapter").save_pretrained(run / "adapter")
    assert "More of mine." in path.read_text() and "## Figures" in path.read_text()
    card.write(run / "adapter", facts)


def test_a_card_takes_hostile_names(facts):
    bad = facts | {"title": HOSTILE, "model": HOSTILE}
    text = ModelCard(card.card(bad, {}, "")).text
    assert "<script>" not in text and "\\<script\\>" in text


def test_findings_of_a_classification():
    names = {"a": "A", "b": "B", "c": "C"}
    wanted, said = [0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 0, 2, 0]
    rows = [{"text": f"text {i}", "label": "abc"[label]} for i, label in enumerate(wanted)]
    logits = torch.nn.functional.one_hot(torch.tensor(said), 3) * torch.arange(1.0, 8.0)[:, None]
    found = findings("text-classification", logits, rows, names)
    assert found["counts"] == confusion_matrix(wanted, said).tolist()
    right = precision_recall_fscore_support(wanted, said)
    for index, one in enumerate(found["classes"]):
        assert list(one.values())[1:] == pytest.approx([each[index] for each in right])
    # the surest error comes first
    assert [error["texts"]["text"] for error in found["errors"]] == ["text 6", "text 4", "text 1"]
    assert found["errors"][0]["wanted"] == "C" and found["errors"][0]["said"] == "A"


def findings(task, answers, rows, names):
    """What a report says of answers."""
    from pefast import tasks
    from pefast.reporting.findings import findings

    return findings(tasks.find(task), answers, rows, names)


def test_findings_of_tags():
    names = {tag: tag for tag in ("O", "B-PER", "I-PER", "B-LOC")}
    rows = [{"tokens": ["Ada", "L", "in", "Rome"], "label": ["B-PER", "I-PER", "O", "B-LOC"]}] * 2
    found = findings("token-classification", [[1, 2, 0, 3], [1, 0, 0, 3]], rows, names)
    place, person = found["classes"]
    assert (place["label"], place["f1"], place["rows"]) == ("LOC", 1.0, 2)
    assert (person["label"], person["precision"], person["recall"]) == ("PER", 0.5, 0.5)
    assert found["wrong"] == 1 and found["errors"][0]["words"][1] == ["L", "I-PER", "O"]
    parts = findings(
        "token-classification", [[0, 1]], [{"tokens": ["a", "b"], "label": ["N", "N"]}], {"N": "N", "V": "V"}
    )
    assert [one["recall"] for one in parts["classes"]] == [0.5, 0.0]


def test_findings_of_numbers_spans_and_texts():
    rows = [{"text": str(i), "label": str(float(i))} for i in range(900)]
    found = findings(
        "regression", torch.arange(900.0) + (torch.arange(900) == 7), rows, {"mean": "0", "deviation": "1"}
    )
    assert (
        len(found["points"]) <= 400
        and found["errors"][0]["texts"] == {"text": "7"}
        and len(found["errors"]) == 1
    )

    asked = [
        {"question": "who?", "context": "Ada met Bob Lee Ray", "label": label}
        for label in ("Ada", "Bob Lee Ray")
    ]
    found = findings("question-answering", ["Ada", "Bob"], asked, {})
    assert [(one["label"], one["rows"]) for one in found["lengths"]] == [("1", 1), ("3 to 4", 1)]
    assert found["lengths"][1]["f1"] == pytest.approx(0.5) and found["errors"][0]["said"] == "Bob"

    told = [{"text": "x" * 5000, "label": "a b c d"}] * 3
    found = findings("sequence-to-sequence", ["a b c d", "a b", ""], told, {})
    assert found["tenths"] == [1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    assert found["errors"][0]["said"] == "" and found["examples"]["best"][0]["said"] == "a b c d"
    assert len(found["errors"][0]["texts"]["text"]) < 1100


def test_many_labels_are_a_list_and_a_stream_has_no_number(facts):
    labels = [f"label {i}" for i in range(30)]
    counts = [[9 if i == j else (i == 3 and j == 5) * 7 for j in range(30)] for i in range(30)]
    many = facts | {"findings": facts["findings"] | {"labels": labels, "counts": counts}}
    many["data"] = {"source": "s", "rows": {"train": None, "valid": 0, "test": 1}}
    text = " ".join(Seen(page(many)).text)
    assert "Commonest confusions" in text and "A stream of rows to learn from" in " ".join(text.split())
    assert "Right labels (down)" not in text and "a stream of rows of s" in card.card(many, {}, "")


def test_without_a_browser_there_is_a_sentence(run):
    script = Path(__file__).parents[1] / "examples" / "report_screenshot.py"
    program = [sys.executable, script, run / "shot", run / "report.html"]
    done = subprocess.run(program, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped, no browser of chromium" in done.stdout


def test_ticks_are_round_and_reach_over_the_values():
    for low, high in ((0, 1), (-3.2, 7.9), (1e-5, 3e-5), (0.6931, 0.6932), (5, 5), (0, 123456)):
        marks = charts.ticks(low, high)
        assert marks[0] <= low + 1e-9 and marks[-1] >= high - 1e-9 and 3 <= len(marks) <= 8
        step = marks[1] - marks[0]
        assert round(step / 10 ** math.floor(math.log10(step * 1.0001)), 6) in (1, 2, 5)
    assert [charts.number(each) for each in (0, 0.25, 2e-5, 4000)] == ["0", "0.25", "2e-5", "4\u2009000"]


def test_charts_pass_over_what_is_no_number():
    drawn = charts.lines({"a": [[1, 0.5], [2, None], [3, math.inf], [4, 1.0]]}, "step", "a < b")
    assert drawn.count("<circle") == 2 and "a &lt; b" in drawn
    assert charts.lines({"a": [[1, None]]}, "step", "t") == "" and charts.scatter([], "x", "t") == ""
    assert (size(1234567), share(0.5), milliseconds(5390.2)) == (
        "1.23 MB",
        "50.0\u00a0%",
        "5\u2009390\u00a0ms",
    )
    assert seen("a\u202eb\tc") == "a\ufffdb\tc"
