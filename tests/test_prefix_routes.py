"""Prefixes chosen row by row, one behind the other, and one that several tasks share."""

import copy

import pytest
import torch

import pefast
from pefast.architectures import backbone
from pefast.layers import attention
from pefast.model import parameters_of
from tests.models import FAMILIES, assert_close, assert_refused, build, inputs, logits, step, stir, trained
from tests.test_prefix import GREEDY, every_family, with_prefixes

Prefix, LoRA = pefast.Prefix, pefast.LoRA


@every_family
def test_a_routed_batch_is_each_row_on_its_own(family):
    model, fed = with_prefixes(family, one=2, two=5, three=1), inputs(family, rows=5)
    pefast.attach(model, LoRA(rank=2), "lora")
    names = ["two", None, "one", "lora", "two"]
    with pefast.route(model, names):
        got = logits(model, **fed)
        assert torch.equal(logits(model, **fed), got)
    for row, name in enumerate(names):
        pefast.activate(model, name)
        single = {key: value[row : row + 1] for key, value in fed.items()}
        assert_close(got[row : row + 1], logits(model, **single))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_routed_batch_trains_each_prefix_on_its_own_rows(family):
    model, fed = with_prefixes(family, one=2, two=4), inputs(family, rows=4)
    names = ["one", "two", "one", None]
    pefast.activate(model, ["one", "two"])
    with pefast.route(model, names):
        got, again = step(model, fed)[1], step(model, fed)[1]
    assert all(torch.equal(got[name], again[name]) for name in got)
    for name in ("one", "two"):
        pefast.activate(model, name)
        own = [row for row, each in enumerate(names) if each == name]
        _, right = step(model, {key: value[own] for key, value in fed.items()})
        for parameter, gradient in right.items():
            assert_close(got[parameter], gradient * len(own) / len(names))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_routed_batch_generates_what_each_row_would(family):
    model, fed = with_prefixes(family, one=2, two=5), inputs(family)
    fed = {key: fed[key].flip(1) for key in ("input_ids", "attention_mask")}
    names = ["two", "one", None]
    for beams in (1, 2):
        more = {"num_beams": beams}
        with pefast.route(model, [name for name in names for _ in range(beams)]):
            got = model.generate(**fed, **GREEDY, **more)
        for row, name in enumerate(names):
            pefast.activate(model, name)
            single = {key: value[row : row + 1] for key, value in fed.items()}
            assert torch.equal(got[row], model.generate(**single, **GREEDY, **more)[0])


def test_beams_of_an_encoder_and_decoder_each_compute_with_their_sequence_s_adapters():
    model, fed = build("t5"), inputs("t5")
    for name in ("one", "two"):
        methods = [pefast.LoRA(rank=2), pefast.Adapter(size=3), Prefix(tokens=2), pefast.Prompt(tokens=2)]
        pefast.attach(model, methods, name)
    stir(pefast.activate(model, ["one", "two"]), size=0.3)
    fed = {key: fed[key] for key in ("input_ids", "attention_mask")}
    names, more = ["two", "one", None], {**GREEDY, "num_beams": 3}
    hooks = len(model.get_encoder()._forward_pre_hooks)
    with pefast.route(model, [name for name in names for _ in range(3)]):
        got = model.generate(**fed, **more)
        with pytest.raises(ValueError, match="one sequence have several names"):
            with pefast.route(model, ["one", "two", "one", None, None, None]):
                model.generate(**fed, **GREEDY, num_beams=2)
        assert torch.equal(model.generate(**fed, **more), got)
    assert len(model.get_encoder()._forward_pre_hooks) == hooks
    for row, name in enumerate(names):
        pefast.activate(model, name)
        single = {key: value[row : row + 1] for key, value in fed.items()}
        assert torch.equal(got[row], model.generate(**single, **more)[0])


def test_two_prefixes_stand_one_behind_the_other():
    for family in FAMILIES:
        model, both = with_prefixes(family, one=2, two=3), with_prefixes(family, both=5)
        pefast.activate(model, ["one", "two"])
        values = [parameters_of(model, name)["prefix/prompt_embeddings"] for name in ("one", "two")]
        with torch.no_grad():
            parameters_of(both, "both")["prefix/prompt_embeddings"].copy_(torch.cat(values))
        if family == "bert":
            both.classifier.copies["both"].load_state_dict(model.classifier.copies["two"].state_dict())
        assert_close(logits(model, **inputs(family)), logits(both, **inputs(family)))


def sharing(hidden=False):
    """A model with two tasks on one prefix, each with a head of its own."""
    model = pefast.attach(build("bert"), Prefix(tokens=3, reparameterize=hidden), "one")
    pefast.attach(model, Prefix(share="one"), "two")
    return stir(pefast.activate(model, ["one", "two"]))


@pytest.mark.parametrize("hidden", [False, 4], ids=["plain", "network"])
def test_tasks_share_one_prefix_and_train_it_together(hidden):
    model, fed = sharing(hidden), inputs("bert", rows=4)
    names = [name for name in trained(model) if "prefixes" in name]
    assert names and not [name for name in names if ".two." in name]
    pefast.activate(model, "one")
    alone = logits(model, **fed)
    pefast.activate(model, ["one", "two"])
    with pefast.route(model, ["one", "two", "two", "one"]):
        got = step(model, fed)[1]
    parts = {}
    for name, own in (("one", [0, 3]), ("two", [1, 2])):
        pefast.activate(model, name)
        # the one prefix trains whichever task is active
        assert names == [each for each in trained(model) if "prefixes" in each]
        parts[name] = step(model, {key: value[own] for key, value in fed.items()})[1]
    for name in names:
        assert_close(got[name], (parts["one"][name] + parts["two"][name]) / 2)
    # both active without a route: one prefix, not two
    pefast.activate(model, ["two", "one"])
    assert torch.equal(logits(model, **fed), alone)
    pefast.detach(model, "one")
    pefast.activate(model, "two")
    assert step(model, fed)[1].keys() >= {"classifier.copies.two.weight"}


@pytest.mark.parametrize("hidden", [False, 4], ids=["plain", "network"])
def test_a_shared_prefix_is_saved_whole_and_shared_again(hidden, tmp_path):
    model, fed = sharing(hidden), inputs("bert")
    right = {}
    for name in ("one", "two"):
        pefast.activate(model, name)
        right[name] = logits(model, **fed)
        pefast.save(model, tmp_path / name, name)
    fresh = build("bert")
    for name in ("one", "two"):
        pefast.load(fresh, tmp_path / name, name)
        assert torch.equal(logits(fresh, **fed), right[name])
    prefixes = backbone(fresh).prefixes
    assert prefixes["one"] is prefixes["two"]
    assert len([name for name in fresh.state_dict() if "prefixes.two" in name]) > 0
    # alone, or beside another that has other numbers, it has its own
    alone = pefast.load(build("bert"), tmp_path / "two", "two")
    assert torch.equal(logits(alone, **fed), right["two"])
    other = pefast.attach(build("bert"), Prefix(tokens=3), "one")
    pefast.load(other, tmp_path / "two", "two")
    assert torch.equal(logits(other, **fed), right["two"])
    assert backbone(other).prefixes["one"] is not backbone(other).prefixes["two"]
    twin = copy.deepcopy(fresh)
    assert backbone(twin).prefixes["one"] is backbone(twin).prefixes["two"]
    assert backbone(twin).prefixes["one"] is not prefixes["one"]


def test_a_route_of_another_length_than_the_batch():
    model = with_prefixes("llama", one=2)
    three, four = inputs("llama", rows=3), inputs("llama", rows=4)
    with pefast.route(model, ["one", None]):
        assert_refused(lambda: logits(model, **three), "route names 2 rows", "has 3")
        assert_refused(lambda: logits(model, **four), "route names 2 rows", "has 4")


def test_a_routed_batch_whose_prefixes_are_as_long_needs_no_copy_of_the_keys(monkeypatch):
    model, fed, seen = with_prefixes("llama", one=3, two=3, three=2), inputs("llama"), []

    def spy(query, key, value, *rest, **options):
        seen.append((key.shape[2], rest and rest[0] is not None))
        return real(query, key, value, *rest, **options)

    real = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", spy)
    for names in (["one", "two", "one"], ["one", "two", "three"], ["one", None, "two"]):
        with pefast.route(model, names):
            got = logits(model, **fed)
        for row, name in enumerate(names):
            pefast.activate(model, name)
            alone = logits(model, **{key: value[row : row + 1] for key, value in fed.items()})
            assert_close(got[row : row + 1], alone)
        if names[-1] == "one":
            assert seen[:2] == [(9, True)] * 2
        seen.clear()
