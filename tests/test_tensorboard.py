"""What TensorBoard shows of a run, read back from its event files."""

import math

import pytest

import pefast
from pefast import recipe, report, training
from pefast.progress import Watcher
from tests import tiny_run


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run of twelve steps with a look at the rows to choose by after each four, and its last numbers."""
    folder = tiny_run.write(tmp_path_factory.mktemp("board"))
    changes = {"training.tensorboard": True, "data.valid_rows": 20, "training.evaluate_every": 4}
    changes |= {"training.max_steps": 12, "training.clip": 0.1, "training.rates": {"prompt": {"lr": 0.1}}}
    run = training.prepare(recipe.read(folder / "recipe.yaml", changes))
    training.attach(run)
    return run, training.fit(run, Watcher())


@pytest.fixture(scope="module")
def run(fitted):
    """The run alone."""
    return fitted[0]


@pytest.fixture(scope="module")
def shown(run):
    """{tag: {step: value}} of the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{run.recipe.output}/tensorboard").Reload()
    tags = events.Tags()["scalars"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


METHODS = ("lora", "adapter", "prompt", "head")


def test_curves_of_training_and_of_the_looks(fitted, shown):
    losses = shown["train/loss"]
    assert losses.keys() == set(range(1, 13)) and shown["eval/accuracy"].keys() == {4, 8, 12}
    assert sum(losses.values()) / 12 == pytest.approx(fitted[1]["loss"], rel=1e-5)
    assert shown["train/accuracy"][12] == pytest.approx(fitted[1]["train_accuracy"])
    assert all(value > 0 for value in shown["train/tokens_per_second"].values())


def test_each_group_has_its_own_learning_rate(shown):
    for name in METHODS:
        rates = shown[f"train/learning_rate/{name}"]
        # the largest after the warm-up of one step, then falling
        assert max(rates.values()) == pytest.approx(0.1 if name == "prompt" else 0.01)
        assert rates[2] > rates[12] > 0


def test_the_methods_gradients_make_up_the_whole_before_it_is_clipped(shown):
    wholes = shown["train/grad_norm"]
    # the recipe clips at 0.1
    assert max(wholes.values()) > 0.1
    for step, whole in wholes.items():
        parts = [shown[f"train/grad_norm/default/{name}"][step] for name in METHODS]
        assert min(parts) > 0
        assert math.hypot(*parts) == pytest.approx(whole, rel=1e-4)


def test_the_share_of_layers_that_a_fused_hand_computes(run, shown):
    # twelve linear layers of two blocks, and the pooler's
    fused, whole = report.fused_layers(run.model)
    assert whole == 13 and 0 <= fused <= whole
    for share in shown["train/fused_share"].values():
        assert 0 <= share <= 1 and share * whole == pytest.approx(round(share * whole), abs=1e-4)
    lines = [line for line in pefast.explain(run.model).splitlines() if " of default: native" in line]
    assert (fused > 0) == bool(lines)
    with pefast.backend("eager"):
        assert report.fused_layers(run.model) == (0, 13)


def test_a_run_times_the_parts_of_its_steps(run):
    seconds = run.record["seconds"]
    assert run.record["measured_steps"] == 12 and min(seconds.values()) > 0
    (ended,) = (line["train_runtime"] for line in run.record["log"] if "train_runtime" in line)
    # looks and checkpoints are in none of the parts
    assert sum(seconds.values()) < ended
    assert run.record["peak_bytes"] > 1e8
