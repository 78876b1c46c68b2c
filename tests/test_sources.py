"""Where rows come from: splits, streams, and what is odd in files and rows, said in one sentence."""

import json
from collections import Counter

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pefast import recipe, sources, training
from pefast.cli import app
from pefast.progress import Watcher
from pefast.tasks import rows
from tests import tiny_run
from tests.tiny_run import BAD, FILLER, GOOD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, rows to stream, others held out, and a recipe."""
    folder = tiny_run.write(tmp_path_factory.mktemp("sources"))
    lines = (folder / "rows.csv").read_text().splitlines()
    (folder / "held.csv").write_text("\n".join([lines[0], *lines[-24:]]))
    return folder


def settled(folder, output, **changes):
    """The recipe as a stream, with a few changes."""
    laid_over = {"data.streaming": True, "data.test_source": str(folder / "held.csv"), "data.test_rows": None}
    laid_over |= {"training.max_steps": 12, "training.save_every": 5, "training.threads": 1}
    laid_over |= {"output": str(folder / output)}
    return recipe.read(folder / "recipe.yaml", laid_over | changes)


def quiet():
    return Watcher(Console(quiet=True))


def logits(run):
    return training.score(run)[0]


def fitted(wanted, watcher=None, resume=False):
    run = training.prepare(wanted)
    training.attach(run)
    training.fit(run, watcher or quiet(), resume)
    return run


def test_a_stream_learns(folder):
    run = training.prepare(settled(folder, "learns", **{"training.max_steps": 120}))
    training.attach(run)
    before = training.score(run)[1]["accuracy"]
    training.fit(run, quiet())
    assert training.score(run)[1]["accuracy"] >= 0.9 > before


def test_a_stream_reads_no_further_than_it_must_and_leaves_out_what_is_held_out(folder, monkeypatch):
    wanted, real, taken = settled(folder, "reads"), rows.stream, []

    def counted(*args, **kwargs):
        for row in real(*args, **kwargs):
            taken.append(row["text"])
            yield row

    monkeypatch.setattr(sources, "BUFFER", 16)
    monkeypatch.setattr(sources.shuffled, "__defaults__", (16,))
    monkeypatch.setattr(rows, "stream", counted)
    held = rows.read(folder / "held.csv")
    stream = sources.Stream(wanted, None, held)
    stream.task = type("Task", (), {"encode": staticmethod(lambda some, *rest: some)})
    found = iter(stream)
    drawn = [next(found)["text"] for _ in range(40)]
    assert 40 <= len(taken) <= 40 + 16 + len(held) + 1
    assert drawn != taken[:40] and set(drawn) <= set(taken)
    assert not set(drawn) & {row["text"] for row in held}
    again = iter(stream)
    assert [next(again)["text"] for _ in range(40)] == drawn
    # the next pass has the same rows in another order
    whole = list(stream.rows())
    several = iter(stream)
    passes = [[next(several)["text"] for _ in whole] for _ in range(2)]
    assert passes[0] != passes[1] and Counter(passes[0]) == Counter(passes[1])


def test_a_stream_that_was_stopped_ends_with_the_same_bits(folder):
    class Stop(Watcher):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 7:
                raise KeyboardInterrupt

    # fewer rows than the steps take: the stream begins anew on the way
    changes = {"data.train_rows": 60, "training.batch": 8}
    whole = fitted(settled(folder, "whole", **changes))
    with pytest.raises(KeyboardInterrupt):
        fitted(settled(folder, "stopped", **changes), Stop(Console(quiet=True)))
    resumed = fitted(settled(folder, "stopped", **changes), resume=True)
    assert torch.equal(logits(resumed), logits(whole))
    assert not torch.equal(
        logits(fitted(settled(folder, "seed", **changes, **{"data.seed": 1}))), logits(whole)
    )


STREAMS = {
    "no end": ({"training.max_steps": None}, "training.max_steps=1000 says when to stop"),
    "nothing held out": ({"data.test_source": None}, "data.test_source and data.valid_source name files"),
    "rows split off": ({"data.valid_rows": 5}, "nothing is split off a stream"),
    "no epochs": ({"data.valid_source": "x.csv"}, "training.evaluate_every=100 says when to look"),
    "folds": ({"search": {"space": {"training.lr": [1]}, "folds": 2}}, "a stream has no folds"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_what_a_stream_cannot_do_is_one_sentence(folder, case):
    changes, said = STREAMS[case]
    with pytest.raises(ValueError, match=r"^data\.streaming: ") as error:
        settled(folder, "wrong", **changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_stream_in_several_processes_is_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^data\.streaming: several processes"):
        sources.parts(settled(folder, "two"))


def test_parts_have_like_shares_of_each_label(folder, tmp_path):
    made = [{"text": str(i), "label": "rare" if i % 12 == 0 else "common"} for i in range(240)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, made)))
    changes = {"data.streaming": False, "data.test_source": None, "data.test_rows": 60, "data.valid_rows": 36}
    changes |= {"data.source": str(tmp_path / "x.jsonl"), "data.names": None}
    train, valid, test = sources.parts(settled(folder, "parts", **changes))
    assert [sum(row["label"] == "rare" for row in part) for part in (train, valid, test)] == [12, 3, 5]
    loose = sources.parts(settled(folder, "parts", **changes, **{"data.stratified": False}))
    assert [len(part) for part in loose] == [144, 36, 60] and loose[2] != test


def test_a_folder_that_datasets_saved(folder, tmp_path):
    from datasets import Dataset, DatasetDict

    made = Dataset.from_dict({"text": ["a", "b", "B "], "label": [0, 1, 1]})
    made.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    assert rows.read(tmp_path / "saved") == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    with pytest.raises(ValueError, match=r"^both: holds train, test; the folder of one of them"):
        rows.read(tmp_path / "both")


FILES = {
    "empty": ("x.csv", b"", "x.csv: the file is empty"),
    "a head alone": ("x.csv", b"text,label\n", "x.csv: no row is left"),
    "broken UTF-8": ("x.csv", b"text,label\ngood,1\nb\xe9d,0\n", "x.csv: line 3 is not UTF-8"),
    "broken UTF-8 in JSON": ("x.jsonl", b'{"text": "\xff"}', "x.jsonl: line 1 is not UTF-8"),
    "a missing column": ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}', "row 2 has no 'label'"),
    "a column too many": ("x.csv", b"text,label\ngood,film,1\n", "line 2 has more values than columns"),
    "no Parquet": ("x.parquet", b"text", "x.parquet: is no Parquet"),
    "one label": ("x.csv", b"text,label\na,1\nb,1\nc,1\n", "every row has the label '1'"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_does_not_fit_is_one_sentence_and_nothing_is_written(folder, case, tmp_path):
    name, content, said = FILES[case]
    (tmp_path / name).write_bytes(content)
    words = ["train", folder / "recipe.yaml", "--output", tmp_path / "out", "--set", "data.test_rows=1"]
    words += ["--set", f"data.source={tmp_path / name}", "--set", "data.names=null"]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    last = done.output.splitlines()[-1]
    assert done.exit_code == 2 and last.startswith("pefast: ") and said in last, done.output
    assert not (tmp_path / "out").exists()


def test_rows_that_are_cut_and_labels_that_nothing_teaches_are_counted(folder, tmp_path):
    short, long = f"{GOOD[0]} {FILLER[0]}", " ".join(GOOD + BAD + FILLER)
    made = [{"text": f"{short} {word}", "label": "a"} for word in FILLER]
    made += [{"text": f"{long} {word}", "label": "b"} for word in FILLER[:3]]
    held = [{"text": BAD[0], "label": "c"}, {"text": BAD[1], "label": "c"}, {"text": BAD[2], "label": "a"}]
    for name, some in {"x": made, "y": held}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    words = ["train", folder / "recipe.yaml", "--output", tmp_path / "out", "--set", "data.names=null"]
    words += [
        "--set",
        f"data.source={tmp_path / 'x.jsonl'}",
        "--set",
        f"data.test_source={tmp_path / 'y.jsonl'}",
    ]
    words += ["--set", "training.max_steps=1", "--set", "data.test_rows=null"]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "3 of 10 rows have more than max_length=16 tokens and are cut" in done.output
    assert "no row to learn from has the label 'c' of 2 held-out rows" in done.output


def test_rows_longer_than_the_model_are_refused_before_they_are_read_by_it(folder):
    with pytest.raises(
        ValueError, match=r"^training\.max_length: 64 came; the model reads 32 tokens at most"
    ):
        training.prepare(settled(folder, "long", **{"training.max_length": 64}))
