"""Gates that are learned: they open where a task needs a change, and leave the model as it was."""

import pytest
import torch

import pefast
from pefast.methods.gates import chance_open, drawn
from tests.models import assert_as_it_was, assert_refused, build, inputs, logits, snapshot

TARGET = "model.layers.1.mlp.down_proj"


def moved_rows(family="llama", rows=(3, 17)):
    """A loss that is zero once these rows of one weight are what they are in a hidden twin."""
    twin, fed = build(family), inputs(family)
    with torch.no_grad():
        weight = twin.get_submodule(TARGET).weight
        weight[list(rows)] += torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
    right = logits(twin, **fed)
    return lambda model, batch: (model(**fed).logits - right).square().mean()


def test_gates_are_drawn_as_often_open_as_their_chance_says():
    generator = torch.Generator().manual_seed(0)
    for log_alpha in (-2.0, 0.0, 1.0):
        z = drawn(torch.full((20_000,), log_alpha), generator)
        assert 0 <= z.min() and z.max() <= 1
        chance = float(chance_open(torch.tensor(log_alpha)))
        # three standard errors
        assert abs(float((z > 0).float().mean()) - chance) < 3 * (chance * (1 - chance) / 20_000) ** 0.5


def test_the_gates_of_the_rows_that_matter_stay_open():
    model, loss = build("llama"), moved_rows()
    before = snapshot(model)
    scores = pefast.learn_gates(model, range(100), loss, targets=[TARGET], lr=0.05)
    assert_as_it_was(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    plan = scores.choose(threshold=0.5)
    assert plan[f"{TARGET}.weight"].at.tolist() == [3, 17]
    pefast.attach(model, pefast.Subnetwork(mask=plan))
    values = pefast.model.parameters_of(model, "default")
    assert [tuple(value.shape) for value in values.values()] == [(2, model.config.intermediate_size)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("unit", ["row", "column", "head", "tile"])
def test_every_unit_can_be_gated(unit, family):
    model, fed = build(family), inputs(family)
    target = logits(model, **fed) * 1.2
    before = snapshot(model)

    def loss(model, batch):
        return (model(**fed).logits - target).square().mean()

    first, again = (
        pefast.learn_gates(model, range(3), loss, unit=unit, tile=8, seed=seed) for seed in (1, 1)
    )
    assert_as_it_was(model, before)
    assert torch.equal(first.values, again.values)
    assert (first.values > 0).all() and (first.values < 1).all() and len(first.values.unique()) > 1
    plan = first.choose(fraction=0.4)
    assert pefast.Importance(scores=first, fraction=0.4).plan(model).keys() == plan.keys()


def test_refused_in_one_sentence():
    model = build("llama")
    before = snapshot(model)
    loss = moved_rows()
    for options, said in (
        ({"unit": "element"}, "unit is 'element'; row, column, head or tile"),
        ({"unit": "tile", "tile": 7}, "tiles of 7x7 do not divide"),
        ({"targets": "no"}, "no linear layer matches"),
    ):
        assert_refused(lambda options=options: pefast.learn_gates(model, [1], loss, **options), said)
        assert_as_it_was(model, before)
    assert_refused(lambda: pefast.learn_gates(model, [], loss), "learn_gates: no batch came")
    assert_refused(lambda: pefast.learn_gates(model, [3]), "learn_gates: a batch is a int")
    assert_as_it_was(model, before)
    pefast.attach(model, pefast.LoRA(rank=2))
    assert_refused(lambda: pefast.learn_gates(model, [1], loss), "has adapters; pefast.detach first")
