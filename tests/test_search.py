"""A search over a recipe's keys: what it tries, what it leaves; stopping or killing it changes nothing."""

import math
import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from pefast import recipe, search, selection, training
from pefast.cli import app
from tests import tiny_run

pytest.importorskip("optuna", reason="`pip install 'pefast[search]'` brings it")

SPACE = {
    "training.lr": {"low": 1e-3, "high": 1e-1, "log": True},
    "methods": [[{"method": "lora"}], [{"method": "adapter"}]],
    "methods.0.rank": [2, 4],
    "methods.0.size": {"low": 2, "high": 6},
}
SETTINGS = {"training.max_steps": 2, "training.threads": 1, "data.valid_rows": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, rows and a recipe."""
    return tiny_run.write(tmp_path_factory.mktemp("search"))


def settled(folder, output, **changes):
    """The recipe with a search of four trials."""
    laid_over = SETTINGS | {"search": {"trials": 4, "space": SPACE}, "output": str(folder / output)} | changes
    return recipe.read(folder / "recipe.yaml", laid_over)


def tried(found):
    """What was tried and what came of it, to the bit."""
    return [(trial.changes, trial.value, trial.trained) for trial in found.trials]


def run(folder, output):
    """A search from wherever it was to its end, in a process that may be killed."""
    torch.set_num_threads(1)
    search.search(settled(folder, output), resume=True)


@pytest.fixture(scope="module")
def whole(folder):
    """The search that nobody stops, and what it told on its way."""
    heard = []
    return search.search(settled(folder, "whole"), seen=heard.append), heard


def test_it_tries_what_the_space_says_and_leaves_the_best(folder, whole):
    found, heard = whole
    assert heard == found.trials and [trial.number for trial in heard] == [1, 2, 3, 4]
    for trial in found.trials:
        assert 1e-3 <= trial.changes["training.lr"] <= 1e-1 and 0 <= trial.value <= 1 and trial.trained > 0
        (method,) = trial.changes["methods"]
        # a setting is drawn only for the method that has it
        assert ("methods.0.rank" in trial.changes) == (method["method"] == "lora")
        assert ("methods.0.size" in trial.changes) == (method["method"] == "adapter")
    assert len({trial.changes["methods"][0]["method"] for trial in found.trials}) == 2
    assert found.best.value == max(trial.value for trial in found.trials)
    best = recipe.read(found.recipe)
    assert best.search is None and best.output == str(folder / "whole")
    assert best.training.lr == found.best.changes["training.lr"]
    ready = training.prepare(best)
    training.attach(ready)
    assert training.trainable(ready.model)[0] == found.best.trained
    training.fit(ready, selection.Watcher())
    assert training.score(ready, ready.valid)[1]["accuracy"] == found.best.value


def test_its_pictures_are_drawn(whole):
    pytest.importorskip("matplotlib")
    names = {path.name for path in whole[0].pictures}
    assert names >= {"history.svg", "history.png", "slice.svg", "slice.png"}
    for path in whole[0].pictures:
        begin = path.read_bytes()[:200]
        assert b"svg" in begin if path.suffix == ".svg" else begin.startswith(b"\x89PNG")


def test_killed_and_continued_it_tries_the_same(folder, whole):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pefast.search", "optuna", "tests.test_search"])
    file = folder / "killed" / "search" / "study.db"
    for kill in range(2):
        process, begun = context.Process(target=run, args=(folder, "killed")), states(file).total()
        process.start()
        deadline = time.monotonic() + 120
        # in the middle of the first trial, then in that of one behind a whole one
        while states(file).total() <= begun + kill:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert states(file)["RUNNING"] == 1
    assert states(file)["COMPLETE"] >= 1
    found = search.search(settled(folder, "killed"), resume=True)
    assert tried(found) == tried(whole[0])
    assert states(file) == {"COMPLETE": 4, "FAIL": 2}


def states(file):
    """How many trials of a study are in each state."""
    import sqlite3

    if not file.exists():
        return Counter()
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        try:
            return Counter(state for (state,) in connection.execute("select state from trials"))
        except sqlite3.OperationalError:
            return Counter()


def test_ctrl_c_stops_and_resume_goes_on(folder, whole):
    def press(trial):
        if trial.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(training.Stopped, match=r"stopped in trial 3 of 4; --resume goes on"):
        search.search(settled(folder, "pressed"), seen=press)
    with pytest.raises(ValueError, match=r"holds a study; --resume goes on with it"):
        search.search(settled(folder, "pressed"))
    with pytest.raises(ValueError, match=r"--resume with training\.batch = 4, but the study began with 8"):
        search.search(settled(folder, "pressed", **{"training.batch": 4}), resume=True)
    assert tried(search.search(settled(folder, "pressed"), resume=True)) == tried(whole[0])
    # more trials are no other search
    more = settled(folder, "pressed", search={"trials": 5, "space": SPACE})
    assert tried(search.search(more, resume=True))[:4] == tried(whole[0])


def test_folds_judge_and_a_loss_that_is_no_number_is_a_trial_that_lost(folder):
    space = {"trials": 3, "folds": 2, "space": {"training.lr": [1e30, 0.02]}, "seed": 2}
    changes = {"search": space, "data.valid_rows": 0, "data.train_rows": 48, "training.max_steps": 12}
    found = search.search(settled(folder, "folds", **changes))
    lost = [trial for trial in found.trials if math.isnan(trial.value)]
    assert lost and all(trial.changes == {"training.lr": 1e30} for trial in lost)
    assert all("a smaller training.lr may help" in trial.why for trial in lost)
    assert found.best.changes == {"training.lr": 0.02} and len(found.best.values) == 2
    assert found.best.value == pytest.approx(sum(found.best.values) / 2)


def test_a_threshold_on_importance_is_a_key_as_any(folder):
    methods = [{"method": "importance", "unit": "row", "threshold": 1e-9}]
    space = {"trials": 3, "space": {"methods.0.threshold": [1e-9, 3e-3, 1e9]}, "seed": 4}
    found = search.search(settled(folder, "threshold", search=space, methods=methods))
    lines = {trial.changes["methods.0.threshold"]: trial for trial in found.trials}
    assert len(lines) == 3 and "no row scores above 1e+09" in lines.pop(1e9).why
    pairs = sorted((line, trial.trained) for line, trial in lines.items())
    # a higher line leaves less to train
    assert [trained for _, trained in pairs] == sorted((trained for _, trained in pairs), reverse=True)
    assert pairs[0][1] > pairs[-1][1] > 0
    assert recipe.read(found.recipe).methods[0]["threshold"] == found.best.changes["methods.0.threshold"]


def test_folds_and_splits_are_stratified():
    from pefast.tasks import rows

    made = [{"text": str(i), "label": "rare" if i % 10 == 0 else "common"} for i in range(100)]
    for _, held in selection.folds(made, 5, seed=3, by="label"):
        assert Counter(row["label"] for row in held) == {"common": 18, "rare": 2}
    for seed in range(5):
        train, test = rows.split(made, 30, seed, by="label")
        assert Counter(row["label"] for row in test) == {"common": 27, "rare": 3}
        assert sorted(int(row["text"]) for row in train + test) == list(range(100))
    assert rows.split(made, 30, 0, by="label") == rows.split(made, 30, 0, by="label")
    assert rows.split(made, 30, 0, by="label") != rows.split(made, 30, 1, by="label")


def test_the_command_searches_and_names_the_best_recipe(folder):
    words = ["select", str(folder / "recipe.yaml"), "--trials", "2", "--output", str(folder / "command")]
    for key, value in SETTINGS.items():
        words += ["--set", f"{key}={value}"]
    words += ["--set", "search={space: {methods.1.size: [2, 4], training.lr: [0.01]}}"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "trial 2 of 2: 0." in done.output and "the best trials" in done.output
    line = done.output.replace("\n", "").partition("pefast train ")[2].strip()
    assert recipe.read(line).methods[1]["size"] in (2, 4)


LR = {"training.lr": [1e-3, 1e-2]}
WRONG = {
    "no key": ({"space": {}}, "search.space: no key came"),
    "no space": ({"trials": 3}, "recipe.search: 'space' is missing"),
    "another key": ({"space": LR, "sampler": "x"}, "recipe.search: 'sampler' is not known; known keys are"),
    "no trial": ({"space": LR, "trials": 0}, "search: 0 trials and 0 folds came"),
    "one fold": ({"space": LR, "folds": 1}, "1 folds came"),
    "a key that judges": ({"space": {"data.test_rows": [5, 6]}}, "data.test_rows: a search changes model"),
    "an unknown key": ({"space": {"training.speed": [1]}}, "training.speed: recipe.training: 'speed' is not"),
    "no choice": ({"space": {"training.lr": []}}, "search.space.training.lr: [] came; a list of choices"),
    "half a range": ({"space": {"training.lr": {"low": 1}}}, "training.lr: {'low': 1} came; a list of"),
    "a range upside down": ({"space": {"training.lr": {"low": 1, "high": 0.5}}}, "from 1 to 0.5 came"),
    "a logarithm of 0": ({"space": {"training.lr": {"low": 0, "high": 1, "log": True}}}, "and above 0 is"),
    "a value that cannot be": ({"space": {"training.batch": [8, 0]}}, "training.batch: 0 came; it should"),
    "a method's unknown setting": ({"space": {"methods.0.size": [2]}}, "methods.0.size: none of the methods"),
    "a method that is not there": ({"space": {"methods.7.rank": [2]}}, "methods.7.rank: none of the methods"),
    "a rank that cannot be": ({"space": {"methods.0.rank": [2, 0]}}, "methods.0.rank: LoRA: rank is 0"),
    "an unknown method": ({"space": {"methods": [[{"method": "lorra"}]]}}, "'lorra' is not known"),
    "a method without a list": ({"space": {"methods": [{"method": "lora"}]}}, "methods"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_space_that_cannot_be_is_one_sentence(folder, case):
    given, said = WRONG[case]
    with pytest.raises(ValueError) as error:
        search.search(settled(folder, "wrong", search=given))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "wrong").exists()


def test_without_rows_to_judge_by_it_says_so(folder):
    with pytest.raises(ValueError, match=r"data\.valid_rows=200 holds some out, search\.folds=3"):
        settled(folder, "unjudged", **{"data.valid_rows": 0})
