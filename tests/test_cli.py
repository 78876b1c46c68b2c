"""The command line from a recipe to labels, on a tiny model made here; and what it says of mistakes."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from pefast import doctor, native, recipe, training
from pefast.cli import app
from pefast.progress import Watcher
from pefast.recipe import Source, Training
from tests import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, rows and a recipe."""
    return tiny_run.write(tmp_path_factory.mktemp("run"))


def pefast(*words, code=0):
    """What one command prints, errors included."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def trained(folder):
    """The run's folder, trained once for all tests below."""
    said = pefast("train", folder / "recipe.yaml")
    assert "24 held out" in said and "training 140/140" in said
    return folder / "out"


def test_training_learns_and_writes_its_numbers(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.9 > metrics["before"]["accuracy"]
    assert metrics["steps"] == 140 and 0 < metrics["trainable"] < metrics["parameters"]
    # only what trains is on the disk: no file as large as the base model
    base = (trained.parent / "model" / "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in (trained / "adapter").rglob("*") if file.is_file()) < base


def test_a_restored_run_computes_the_same_bits(folder, trained):
    first, second = training.restore(trained), training.restore(trained)
    assert torch.equal(training.score(first)[0], training.score(second)[0])
    assert (
        training.score(first)[1]["accuracy"] == json.loads((trained / "metrics.json").read_text())["accuracy"]
    )


def test_two_trainings_give_the_same_bits(folder):
    logits = []
    for name in ("one", "two"):
        changes = {"output": f"{folder}/{name}", "training.max_steps": 3}
        run = training.prepare(recipe.read(folder / "recipe.yaml", changes))
        training.attach(run)
        training.fit(run, Watcher())
        logits.append(training.score(run)[0])
    assert torch.equal(*logits)


def test_predictions_come_in_the_order_of_the_texts(trained):
    run = training.restore(trained, with_rows=False)
    texts = ["the film was good", "dull", "it was a warm story it was", "awful cast"]
    together = training.predict(run, [{"text": text} for text in texts])
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(training.predict(run, [{"text": text}])[0], row, rtol=1e-4, atol=1e-5)


def test_paired_steps_leave_the_run_as_it_was(trained):
    run = training.restore(trained)
    before = training.score(run)[0]
    steps = training.paired_steps(run, pairs=1)
    assert steps.keys() == {"automatic", "plain"} and min(steps.values()) > 0
    assert torch.equal(training.score(run)[0], before)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_evaluate_and_predict(folder, trained):
    assert "24 rows" in pefast("evaluate", trained)
    assert "1.000" in pefast("evaluate", trained, "--source", folder / "rows.csv")
    (folder / "texts.txt").write_text("it was a lovely warm great story\n\n", encoding="utf-8")
    lines = pefast("predict", trained, "awful cold poor cast", "--file", folder / "texts.txt").splitlines()
    assert [line.split()[0] for line in lines] == ["negative", "positive"]


def test_explain_speaks_of_a_run_and_of_a_recipe(folder, trained):
    for target in (trained, folder / "recipe.yaml"):
        assert "query" in pefast("explain", target)


def test_flags_and_set_lay_over_the_recipe(folder):
    words = ("--lr", "0.5", "--batch", "4", "--output", folder / "flags", "--set", "training.max_steps=2")
    pefast("train", folder / "recipe.yaml", *words)
    kept = recipe.read(folder / "flags" / "recipe.yaml").training
    assert (kept.lr, kept.batch, kept.max_steps) == (0.5, 4, 2)


def test_without_methods_everything_trains(folder):
    run = training.prepare(recipe.read(folder / "recipe.yaml", {"methods": []}))
    training.attach(run)
    count, total = training.trainable(run.model)
    assert count == total


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "no.yaml"], "no.yaml is no file"),
        (["train", "{recipe}", "--set", "training.speed=9"], "'speed' is not known; known keys are epochs"),
        (["train", "{recipe}", "--set", "data.source=gone.csv"], "no such file or folder"),
        (["train", "{recipe}", "--set", "task=poetry"], "known tasks are text-classification"),
        (["train", "{recipe}", "--set", "methods=[{{method: lora, rank: 0}}]"], "rank"),
        (["train", "{recipe}", "--set", "methods=[]"], "methods: none came"),
        (["train", "{recipe}", "--lr", "1e30"], "a smaller training.lr may help"),
        (["evaluate", "{folder}"], "holds no trained run"),
        (["predict", "{folder}"], "no text came"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(folder, words, said):
    filled = [word.format(recipe=folder / "recipe.yaml", folder=folder) for word in words]
    output = f"{folder}/mistake"
    before = {path.name for path in folder.iterdir()}
    printed = pefast(*filled, *(["--output", output] if words[0] == "train" else []), code=2)
    assert said in printed and "Traceback" not in printed and printed.splitlines()[-1].startswith("pefast: ")
    assert {path.name for path in folder.iterdir()} == before


def test_doctor_says_what_is_missing_and_what_it_costs(monkeypatch):
    assert "native extension" in pefast("doctor")
    monkeypatch.setattr(native, "C", None)
    monkeypatch.setattr(native, "WHY_NOT", "it was never built")
    line = next(line for line in doctor.look() if line.name == "native extension")
    assert (
        line.found == "missing" and "it was never built" in line.meaning and "plain PyTorch" in line.meaning
    )


def test_doctor_without_anything_optional(monkeypatch):
    find = doctor.importlib.util.find_spec
    optional = {*doctor.EXTRAS, "triton"}
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name in optional else find(name)
    )
    missing = {line.name for line in doctor.look() if line.found == "missing"}
    assert missing >= {"accelerate", "scikit-learn", "pyyaml", "peft", "triton"}


def test_help_and_a_wrong_recipe_do_not_wait_for_torch():
    code = "import sys, pefast.cli, pefast.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_without_its_libraries_the_command_line_names_them():
    code = "import sys; sys.modules['typer'] = None; import pefast.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "needs typer" in done.stderr and "Traceback" not in done.stderr


def test_the_help_of_train_shows_every_key_of_a_recipe_with_its_default():
    said = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--help"]).output
    for key in dataclasses.fields(Training):
        assert f"training.{key.name}={key.default}" in said
    assert all(f"data.{key.name}" in said for key in dataclasses.fields(Source))
