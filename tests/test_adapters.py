"""Several named adapters on one model: attach, activate, route, detach one by one."""

import pytest
import torch

import pefast
from pefast.model import parameters_of
from tests.models import (
    FAMILIES,
    assert_as_it_was,
    assert_close,
    build,
    inputs,
    logits,
    snapshot,
    step,
    stir,
    trained,
)

SETS = {
    "one": [pefast.LoRA(rank=4)],
    "two": [pefast.LoRA(rank=2, alpha=5), pefast.Adapter(size=3)],
    "three": [pefast.Adapter(size=5, parallel=False)],
}


def with_all(family: str):
    """A model with all of SETS on it, the last one active, each with other numbers."""
    model = build(family)
    for name in SETS:
        put(model, name)
    return model


def put(model, name: str):
    """Attaches one of SETS, with the same numbers each time."""
    seed = list(SETS).index(name)
    torch.manual_seed(seed)
    return stir(pefast.attach(model, SETS[name], name), seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_active_adapter_computes_as_if_alone(family):
    model, fed = with_all(family), inputs(family)
    for name in SETS:
        pefast.activate(model, name)
        assert torch.equal(logits(model, **fed), logits(put(build(family), name), **fed))
        assert set(trained(model)) == set(trained(put(build(family), name)))
    pefast.activate(model, None)
    assert torch.equal(logits(model, **fed), logits(build(family), **fed))
    assert not trained(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_active_adapters_are_one_adapter_of_both(family):
    fed, model, both = inputs(family), with_all(family), build(family)
    pefast.activate(model, ["one", "three"])
    pefast.attach(both, [*SETS["one"], *SETS["three"]], "both", head=False)
    values = [
        value
        for name in ("one", "three")
        for key, value in parameters_of(model, name).items()
        if not key.startswith("head/")
    ]
    with torch.no_grad():
        for parameter, value in zip(parameters_of(both, "both").values(), values, strict=True):
            parameter.copy_(value)
    if family == "bert":
        # of several heads the last one's answers
        both.classifier.load_state_dict(model.classifier.copies["three"].state_dict())
    assert_close(logits(model, **fed), logits(both, **fed))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_routed_batch_is_each_row_on_its_own(family):
    model, fed = with_all(family), inputs(family, rows=5)
    pefast.activate(model, "one")
    names = ["two", None, "one", "three", "two"]
    with pefast.route(model, names):
        got = logits(model, **fed)
    for row, name in enumerate(names):
        pefast.activate(model, name)
        single = logits(model, **{key: value[row : row + 1] for key, value in fed.items()})
        assert_close(got[row : row + 1], single)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_routed_batch_trains_each_adapter_on_its_own_rows(family):
    model, fed = with_all(family), inputs(family, rows=4)
    names = ["one", "three", "one", None]
    pefast.activate(model, ["one", "three"])
    with pefast.route(model, names):
        _, got = step(model, fed)
    for name in ("one", "three"):
        pefast.activate(model, name)
        own = [row for row, each in enumerate(names) if each == name]
        _, right = step(model, {key: value[own] for key, value in fed.items()})
        for parameter, gradient in right.items():
            assert_close(got[parameter], gradient * len(own) / len(names))


def test_route_ends_with_its_context_also_after_an_error():
    model, fed = with_all("llama"), inputs("llama")
    right = logits(model, **fed)
    with pytest.raises(KeyError), pefast.route(model, ["one", "two", None]):
        raise KeyError("the caller's own")
    assert torch.equal(logits(model, **fed), right)


def test_a_batch_of_another_size_than_the_route_says_so():
    model, fed = with_all("llama"), inputs("llama", rows=3)
    with pefast.route(model, ["one", "two"]), pytest.raises(ValueError, match="ids"):
        logits(model, **fed)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_leave_one_by_one(family):
    model, fed = build(family), inputs(family)
    before = snapshot(model)
    for name in SETS:
        put(model, name)
    pefast.activate(model, "one")
    right = logits(model, **fed)
    pefast.detach(model, "three")
    pefast.detach(model, "two")
    assert torch.equal(logits(model, **fed), right)
    pefast.detach(model, "one")
    assert_as_it_was(model, before)


def test_a_frozen_adapter_stays_frozen(tmp_path):
    folder = pefast.save(put(build("bert"), "one"), tmp_path / "one")
    model = pefast.load(build("bert"), folder, "still", trainable=False)
    put(model, "two")
    for names in ("still", ["still", "two"]):
        pefast.activate(model, names)
        assert not [name for name in trained(model) if ".still." in name]
    assert any(".two." in name for name in trained(model))
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not fit"):
        pefast.load(model, pefast.save(put(build("llama"), "one"), tmp_path / "other"))
    assert_as_it_was(model, before)
    pefast.detach(model, "still")
    assert trained(pefast.load(model, folder, "still"))


def test_a_merged_adapter_leaves_and_the_other_stays():
    model, fed = with_all("llama"), inputs("llama")
    pefast.activate(model, "one")
    pefast.merge(model)
    pefast.detach(model, "one")
    pefast.activate(model, "two")
    assert torch.equal(logits(model, **fed), logits(put(build("llama"), "two"), **fed))


def test_two_prompts_stand_one_behind_the_other():
    model, fed = build("llama"), inputs("llama")
    for seed, (name, tokens) in enumerate({"one": 2, "two": 3}.items()):
        stir(pefast.attach(model, pefast.Prompt(tokens=tokens), name), seed)
    both = pefast.attach(build("llama"), pefast.Prompt(tokens=5))
    pefast.activate(model, ["one", "two"])
    vectors = torch.cat([parameters_of(model, name)["prompt/prompt_embeddings"] for name in ("one", "two")])
    with torch.no_grad():
        parameters_of(both, "default")["prompt/prompt_embeddings"].copy_(vectors)
    assert torch.equal(logits(model, **fed), logits(both, **fed))
