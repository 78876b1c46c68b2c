"""Answers to files and streams: every task, several runs in one batch, nothing read that leads elsewhere."""

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pefast import predicting, recipe, training
from pefast.cli import app
from pefast.progress import Watcher
from pefast.tasks import batches
from tests import tiny_run
from tests.tiny_run import BAD, FILLER, GOOD

LoRA, Adapter = {"method": "lora", "rank": 2}, {"method": "adapter", "size": 3}


def ask(pick, index):
    """A row that every task finds something in."""
    head, tail = pick.choice(GOOD + BAD), pick.choice(FILLER)
    tokens = [head, *pick.choices(FILLER, k=index % 5), tail, "film"]
    text = " ".join(tokens)
    asked = {"text": text, "tokens": tokens, "head": head, "tail": tail, "question": "good", "context": text}
    kind = "good" if head in GOOD else "bad"
    return asked | {
        "two": kind,
        "three": tail[0],
        "score": len(tokens),
        "answer": head,
        "tags": ["O"] * len(tokens),
    }


# a run: its task, its columns and its methods
RUNS = {
    "films": ("text-classification", {"label": "two"}, [LoRA]),
    "letters": ("text-classification", {"label": "three"}, [Adapter, {"method": "prompt"}]),
    "lengths": ("regression", {"label": "score"}, [LoRA, Adapter]),
    "pairs": ("relation-classification", {"label": "two"}, [LoRA]),
    "tags": ("token-classification", {"label": "kinds"}, [LoRA]),
    "spans": ("question-answering", {"label": "answer"}, [Adapter]),
}
ALIKE = ("films", "letters", "lengths", "pairs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six runs of one tiny model, each of two steps, and rows that name one of them each."""
    folder = tiny_run.write(tmp_path_factory.mktemp("predict"))
    pick = random.Random(0)
    rows = [ask(pick, index) for index in range(40)]
    for row in rows:
        row["kinds"] = ["B-GOOD" if word in GOOD else "O" for word in row["tokens"]]
    rows[0]["kinds"][0] = "B-GOOD"
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, (task, columns, methods) in RUNS.items():
        changes = {"task": task, "data.source": str(folder / "rows.jsonl"), "data.columns": columns}
        changes |= {"data.names": None, "data.test_rows": 8, "training.max_steps": 2, "methods": methods}
        changes |= {"output": str(folder / name), "training.max_length": 8 + len(name), "training.threads": 1}
        run = training.prepare(recipe.read(folder / "recipe.yaml", changes))
        training.attach(run)
        training.fit(run, Watcher(Console(quiet=True)))
        # far enough from the base model that a mixed-up adapter shows
        with torch.no_grad():
            for parameter in run.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        training.store(run, {})
    return folder


def pefast(*words, code=0, piped=None):
    """What one command prints, errors included."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False, input=piped)
    assert done.exit_code == code, done.output
    return done.output


def test_one_batch_answers_as_each_run_alone(folder, monkeypatch):
    pick = random.Random(1)
    records = [ask(pick, index) | {"run": name} for index, name in enumerate(list(RUNS) * 4)]
    pick.shuffle(records)
    placed = [(f"line {number}", record) for number, record in enumerate(records, 1)]
    runs = predicting.restore([folder / name for name in RUNS])
    assert (
        len({id(runs[name].run.model) for name in ALIKE}) == 1
        and len({id(s.run.model) for s in runs.values()}) == 3
    )
    mixed, real = [], batches.routed

    def routed(model, adapters, chosen):
        mixed.append(len({adapters[index] for index in chosen}) if adapters else 1)
        return real(model, adapters, chosen)

    monkeypatch.setattr(batches, "routed", routed)
    together = list(predicting.answers(runs, predicting.asked(runs, placed, by="run"), batch=8))
    assert max(mixed) == len(ALIKE)
    assert [each.record for each, _ in together] == records
    for name in RUNS:
        alone = predicting.restore([folder / name])
        own = [(place, record) for place, record in placed if record["run"] == name]
        said = [answer for _, answer in predicting.answers(alone, predicting.asked(alone, own))]
        here = [answer for each, answer in together if each.name == name]
        assert len(said) == len(here) == 4
        for one, other in zip(said, here, strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                assert other[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def test_every_run_answers_every_row_where_none_is_named(folder):
    said = pefast("predict", folder / "films", "the film was good", "--with", folder / "letters").splitlines()
    assert [line.split()[0] for line in said] == ["films", "letters"]
    assert all(line.endswith("the film was good") for line in said)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "txt", "-csv", "-jsonl", "-text", "piped"])
def test_files_and_streams_say_the_same_in_the_same_order(folder, form, tmp_path):
    texts = [f"{word} film, it {other}" for word in GOOD + BAD for other in FILLER]
    expected = [
        json.loads(line)
        for line in pefast("predict", folder / "films", *texts, "--output-format", "jsonl").splitlines()
    ]
    assert [row["text"] for row in expected] == texts
    assert len({row["predicted"]["probability"] for row in expected}) > len(texts) / 2
    written = {
        "csv": "text\n" + "\n".join(f'"{text}"' for text in texts) + "\n",
        "jsonl": "\n".join(json.dumps({"text": text}) for text in texts),
        "txt": "\n".join(texts) + "\n\n",
    }
    kind = {"-csv": "csv", "-jsonl": "jsonl", "-text": "txt", "piped": "txt"}.get(form, form)
    words = ["predict", folder / "films", "--batch", 7, "--output", tmp_path / "said.jsonl"]
    if kind == "parquet":
        from datasets import Dataset

        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "x.parquet")
    else:
        (tmp_path / f"x.{kind}").write_text(written[kind], encoding="utf-8")
    if form == kind:
        pefast(*words, "--file", tmp_path / f"x.{form}")
    elif form == "piped":
        pefast(*words, piped=written["txt"])
    else:
        pefast(*words, "-", "--input-format", form[1:], piped=written[kind])
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    for one, other in zip(said, expected, strict=True):
        assert one["text"] == other["text"] and one["predicted"]["label"] == other["predicted"]["label"]
        assert one["predicted"]["probability"] == pytest.approx(other["predicted"]["probability"], rel=1e-4)
    assert [path.name for path in tmp_path.iterdir() if "said" in path.name] == ["said.jsonl"]


def test_a_stream_is_answered_before_it_ends(folder):
    """What comes is not kept: answers to the first rows leave while later ones are still asked for."""
    runs, taken = predicting.restore([folder / "films"]), []

    def endless():
        while True:
            taken.append(len(taken))
            yield f"line {len(taken)}", {"text": "the film was good"}

    said = predicting.answers(runs, predicting.asked(runs, endless()), batch=4)
    for _ in range(5):
        next(said)
    assert len(taken) == predicting.CHUNK * 4


def test_a_reader_that_has_enough_is_no_error(folder):
    words = [sys.executable, "-m", "pefast.cli", "predict", str(folder / "films"), "-", "--batch", "1"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe)
    process.stdin.write(b"good film\n" * 200)
    process.stdin.close()
    assert b"good film" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


WRONG = {
    "a missing column": (
        "films",
        "x.jsonl",
        '{"text": "a"}\n{"txt": "b"}',
        "x.jsonl, line 2 has no 'text'; its columns are txt",
    ),
    "a list": (
        "films",
        "x.jsonl",
        '{"text": ["a"]}',
        "'text' of x.jsonl, line 1 is ['a']; a text would be right",
    ),
    "no list": (
        "tags",
        "x.jsonl",
        '{"tokens": "a b"}',
        "'tokens' of x.jsonl, line 1 is 'a b'; a list of words",
    ),
    "no JSON": ("films", "x.jsonl", '{"text": "a"}\n{"text', "x.jsonl: line 2 is no JSON"),
    "no UTF-8": (
        "films",
        "x.csv",
        b"text\na\nb\xff\n",
        "x.csv: line 3 is not UTF-8 (invalid start byte at its byte 2)",
    ),
    "too many values": (
        "films",
        "x.csv",
        "text\na\nb,c\n",
        "x.csv: line 3 has more values than columns (text)",
    ),
    "an empty file": ("films", "x.csv", "", "no text came"),
    "a mention that is not there": (
        "pairs",
        "x.jsonl",
        '{"text": "a", "head": "b", "tail": "a"}',
        "x.jsonl, line 1: relation-classification: head 'b' is not in",
    ),
    "half a question": ("spans", "x.jsonl", '{"question": "a"}', "line 1 has no 'context'"),
    "a text for a question": ("spans", "x.txt", "a\n", "spans reads question, context, not a text alone"),
    "no Parquet": ("films", "x.parquet", "text", "x.parquet: is no Parquet"),
    "another kind": ("films", "x.xml", "text", "x.xml: rows are read from"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rows_that_do_not_fit_are_one_sentence(folder, case, tmp_path):
    run, name, content, said = WRONG[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    printed = pefast("predict", folder / run, "--file", tmp_path / name, "--output", tmp_path / "y", code=2)
    assert said in printed and printed.startswith("pefast: ") and printed.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {name}, "a half-written answer was left"


def test_runs_that_do_not_fit_are_one_sentence(folder, tmp_path):
    row = tmp_path / "x.jsonl"
    row.write_text('{"text": "a", "run": "poems"}', encoding="utf-8")
    films, letters = folder / "films", folder / "letters"
    said = pefast("predict", films, "--with", letters, "--by", "run", "--file", row, code=2)
    assert "x.jsonl, line 1 has 'run' = 'poems'; the runs are films, letters" in said
    assert "two runs are called 'films'" in pefast("predict", films, "a", "--with", films, code=2)
    other = tmp_path / "other"
    shutil.copytree(films, other)
    text = (other / "recipe.yaml").read_text()
    shutil.copytree(folder / "model", tmp_path / "model")
    (other / "recipe.yaml").write_text(text.replace(str(folder / "model"), str(tmp_path / "model")))
    assert "others are of" in pefast("predict", films, "a", "--with", other, code=2)
    assert "'yaml' came; it is one of" in pefast("predict", films, "a", "--output-format", "yaml", code=2)


class Planted:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "pytorch_model.bin"])
def test_a_planted_pickle_is_never_read(folder, name, tmp_path):
    run, mark = tmp_path / "films", tmp_path / "mark"
    shutil.copytree(folder / "films", run)
    made = io.BytesIO()
    pickle.dump(Planted(mark), made)
    (run / "adapter" / name).write_bytes(made.getvalue())
    if name.endswith("bin"):
        assert "good film" in pefast("predict", run, "good film")
        (run / "adapter" / "adapter_model.safetensors").unlink()
        assert "is missing; the folder is not whole" in pefast("predict", run, "good film", code=2)
    else:
        assert "damaged or cut off" in pefast("predict", run, "good film", code=2)
    assert not mark.exists()
    pickle.loads(made.getvalue())
    assert mark.exists(), "the planted pickle does nothing"


def test_a_base_model_in_a_pickle_is_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(tmp_path / "mark")))
    shutil.copytree(folder / "films", tmp_path / "films")
    text = (folder / "films" / "recipe.yaml").read_text()
    (tmp_path / "films" / "recipe.yaml").write_text(
        text.replace(str(folder / "model"), str(tmp_path / "model"))
    )
    assert "safetensors" in pefast("predict", tmp_path / "films", "good film", code=2)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("way", ["../films/adapter/lora", "/absolute", "a/../..", "link"])
def test_a_folder_that_leads_out_is_refused(folder, way, tmp_path):
    run = tmp_path / "lengths"
    shutil.copytree(folder / "lengths", run)
    if way == "link":
        shutil.move(run / "adapter" / "lora", tmp_path / "elsewhere")
        (run / "adapter" / "lora").symlink_to(tmp_path / "elsewhere")
        said = "leads out of its folder"
    else:
        manifest = json.loads((run / "adapter" / "pefast.json").read_text())
        manifest["methods"][0] = str(tmp_path) if way == "/absolute" else way
        (run / "adapter" / "pefast.json").write_text(json.dumps(manifest))
        said = "names of folders beside it are right"
    assert said in pefast("predict", run, "good film", code=2)
    assert "good film" in pefast("predict", folder / "lengths", "good film")
