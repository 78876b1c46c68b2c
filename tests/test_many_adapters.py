"""A hundred adapters on one model: what they take, how quickly they change, and all of them in one batch."""

import time

import pytest
import torch

import pefast
from pefast.model import parameters_of
from tests.models import FAMILIES, assert_close, build, inputs, logits, step, stir, trained

COUNT = 100


def method(number: int):
    """One of a few kinds, of another rank or size each."""
    kinds = [
        pefast.LoRA(rank=1 + number % 5, dropout=0.1 * (number % 3)),
        pefast.Adapter(size=1 + number % 4, dropout=0.2),
        pefast.IA3(),
        pefast.LoRA(rank=2, dora=True),
        pefast.Adapter(size=2, parallel=False),
    ]
    return kinds[number % len(kinds)]


def with_many(family: str, count: int):
    model = build(family)
    for number in range(count):
        stir(pefast.attach(model, method(number), f"task{number}"), number)
    return model


def size(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def quickest_switch(model, count: int) -> float:
    """Seconds of the quickest of some activations."""
    spans = []
    for number in range(40):
        start = time.perf_counter()
        pefast.activate(model, f"task{number % count}")
        spans.append(time.perf_counter() - start)
    return min(spans)


def test_a_hundred_adapters_take_their_own_parameters_and_no_more():
    model = with_many("bert", COUNT)
    own = sum(p.numel() for number in range(COUNT) for p in parameters_of(model, f"task{number}").values())
    assert size(model) == size(build("bert")) + own
    pefast.activate(model, "task7")
    assert sum(p.numel() for p in trained(model).values()) == sum(
        p.numel() for p in parameters_of(model, "task7").values()
    )
    # an optimizer of one holds nothing of the others
    (state,) = (sum(p.numel() for g in pefast.parameter_groups(model, 1.0) for p in g["params"]),)
    assert state == sum(p.numel() for p in trained(model).values())


def test_a_hundred_adapters_switch_as_quickly_as_two():
    few, many = with_many("bert", 2), with_many("bert", COUNT)
    spans = [(quickest_switch(few, 2), quickest_switch(many, COUNT)) for _ in range(3)]
    assert min(long for _, long in spans) < 4 * min(short for short, _ in spans)


def test_each_of_a_hundred_computes_as_if_alone():
    model, fed = with_many("llama", COUNT), inputs("llama")
    for number in (0, 41, 62, 83, 99):
        pefast.activate(model, f"task{number}")
        alone = stir(pefast.attach(build("llama"), method(number)), number)
        assert set(trained(model)) == {
            name.replace(".default.", f".task{number}.") for name in trained(alone)
        }
        # the same numbers where they are drawn: b, m and gains
        with torch.no_grad():
            values = parameters_of(model, f"task{number}")
            for key, parameter in parameters_of(alone, "default").items():
                parameter.copy_(values[key])
        assert torch.equal(logits(model, **fed), logits(alone, **fed))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_batch_of_forty_tasks_trains_each_on_its_own_row(family):
    count = 40
    model, fed = with_many(family, count), inputs(family, rows=count)
    names = [f"task{(7 * row) % count}" for row in range(count)]
    pefast.activate(model, list(dict.fromkeys(names)))
    with pefast.route(model, names):
        _, got = step(model, fed)
    for row in (0, 1, 2, 23):
        pefast.activate(model, names[row])
        _, right = step(model, {key: value[row : row + 1] for key, value in fed.items()})
        for parameter, gradient in right.items():
            assert_close(got[parameter], gradient / count, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_dropout_a_gradient_depends_on_its_own_rows_alone(family):
    model, fed = with_many(family, 5).train(), inputs(family, rows=6)
    names = ["task0", "task1", "task2", "task3", "task4", "task1"]
    pefast.activate(model, names[:5])

    def gradients(fed):
        torch.manual_seed(3)
        with pefast.route(model, names):
            return step(model, fed)[1]

    first, again = gradients(fed), gradients(fed)
    assert all(torch.equal(gradient, again[name]) for name, gradient in first.items())
    # other words in the rows of task1: gradients of the others stay, and its own change
    other = {key: value.clone() for key, value in fed.items()}
    for key in ("input_ids", "decoder_input_ids"):
        if key in other:
            other[key][[1, 5]] = (other[key][[1, 5]] + 7) % 90 + 3
    changed = gradients(other)
    for name, gradient in first.items():
        if ".task1." in name:
            assert not torch.equal(changed[name], gradient), name
        else:
            assert_close(changed[name], gradient, 1e-5)
    assert any(".task1." in name for name in first)
