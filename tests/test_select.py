"""Choosing by cross-validation: the folds, the curve, and the command."""

import json

import pytest
import torch
from typer.testing import CliRunner

from pefast import recipe, selection, training
from pefast.cli import app
from tests import tiny_run

METHODS = "methods=[{method: importance, unit: row, measure: square}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("select"))


def prepared(folder, **changes):
    changes = {"training.epochs": 1, "data.train_rows": 60, **changes}
    return training.prepare(recipe.read(folder / "recipe.yaml", dict([recipe.change(METHODS)]) | changes))


def test_folds_take_every_row_once_and_leave_the_others():
    rows = [{"text": str(i)} for i in range(11)]
    parts = selection.folds(rows, 3, seed=1)
    assert sorted(len(held) for _, held in parts) == [3, 4, 4]
    assert sorted(int(row["text"]) for _, held in parts for row in held) == list(range(11))
    for train, held in parts:
        assert len(train) + len(held) == 11 and not [row for row in train if row in held]
    assert parts == selection.folds(rows, 3, seed=1) != selection.folds(rows, 3, seed=2)
    for count in (0, 1, 12, 2.5):
        with pytest.raises(ValueError, match=r"^select: .* would be right"):
            selection.folds(rows, count)


def test_the_curve_of_a_run(folder):
    run = prepared(folder)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    heard = []
    points = selection.curve(run, [0.01, 0.3], count=3, batches=2, seen=heard.append)
    after = run.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(heard) == 6 and "fold 3 of 3" in heard[-1]
    small, large = points
    assert all(0 <= value <= 1 for point in points for value in point.values)
    assert len(small.values) == 3 and small.error >= 0
    # a higher line for the smaller share, and fewer parameters in each fold
    for i in range(3):
        assert small.thresholds[i] > large.thresholds[i] > 0
        assert 0 < small.trained[i] < large.trained[i]
    again = selection.curve(run, [0.01, 0.3], count=3, batches=2)
    assert again == points, "the same rows and seed give the same numbers"
    # the thresholds themselves, asked for, draw the same lines
    # the lowest one: every fold has scores above it
    line = min(small.thresholds)
    i = small.thresholds.index(line)
    (by_line,) = selection.curve(run, [line], by="threshold", count=3, batches=2)
    assert by_line.trained[i] == small.trained[i] and by_line.values[i] == small.values[i]


def test_the_best_point_and_of_equals_the_smallest():
    def point(line, trained, *values):
        return selection.Point(line, (0.0,) * len(values), (trained,) * len(values), values)

    points = [point(0.3, 300, 0.8, 0.9), point(0.1, 100, 0.9, 0.8), point(0.01, 10, 0.7, 0.7)]
    assert selection.best(points) is points[1]
    assert points[0].mean == pytest.approx(0.85) and points[0].error == pytest.approx(0.05)


def test_the_command_prints_the_curve_and_a_threshold_that_a_recipe_takes(folder):
    words = ["select", str(folder / "recipe.yaml"), "--shares", "0.02,0.3", "--folds", "2", "--batches", "2"]
    for text in (METHODS, "data.train_rows=60", "training.epochs=2"):
        words += ["--set", text]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "cross-validation" in done.output and "█" in done.output and "0.02" in done.output
    line = done.output.strip().splitlines()[-1].partition("methods: ")[2]
    made = recipe.read(folder / "recipe.yaml", dict([recipe.change(f"methods={line}")]))
    made.methods[0]["measure"] = "square"
    assert made.methods[0]["threshold"] > 0


def test_a_recipe_trains_by_importance_and_is_restored(folder):
    changes = {"output": str(folder / "important"), "methods": [{"method": "importance", "fraction": 0.05}]}
    run = prepared(folder, **changes)
    training.attach(run)
    count, total = training.trainable(run.model)
    assert 0 < count < 0.1 * total
    training.fit(run, selection.Watcher())
    right = training.score(run)[0]
    training.store(run, {})
    restored = training.restore(folder / "important")
    assert torch.equal(torch.as_tensor(training.score(restored)[0]), torch.as_tensor(right))
    config = json.loads((folder / "important" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PEFAST_IMPORTANCE" and config["fraction"] == 0.05


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shares", "0.1,much"], "'0.1,much' came; numbers with commas"),
        (["--shares", "2"], "the share 2 came"),
        (["--shares", "0.1", "--thresholds", "1"], "one of them would be right"),
        (["--folds", "1"], "1 folds of"),
        (["--thresholds", "1e9"], "no row scores above 1e+09"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(folder, words, said):
    call = ["select", str(folder / "recipe.yaml"), *words, "--set", METHODS, "--set", "data.train_rows=40"]
    done = CliRunner().invoke(app, call, catch_exceptions=False)
    assert done.exit_code == 2 and said in done.output, done.output
    assert "Traceback" not in done.output
