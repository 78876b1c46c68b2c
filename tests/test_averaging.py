"""A weighted average of adapters: exact for LoRA, parameter by parameter for the others."""

import pytest
import torch

import pefast
from pefast.methods.places import deltas_of
from pefast.model import parameters_of
from tests.models import assert_as_it_was, assert_close, assert_refused, build, inputs, logits, snapshot, stir

LoRA, Adapter = pefast.LoRA, pefast.Adapter


def with_two(family: str, one, two, **other):
    """A model with two adapters, each with other numbers; the second is active."""
    model = build(family)
    for seed, (name, methods) in enumerate({"one": one, "two": two}.items()):
        stir(pefast.attach(model, methods, name, **other), seed)
    return model


def dense(model, name: str) -> dict:
    return {path: delta.delta_weight().detach() for path, delta in deltas_of(model, name, "lora")}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_loras_of_other_ranks_and_places_sum_exactly(family):
    one = LoRA(rank=4, alpha=7, rslora=True, layers=[0])
    model = with_two(family, one, LoRA(rank=3, alpha=2, ranks={"1.*": 2}))
    one, two = dense(model, "one"), dense(model, "two")
    before = {name: {k: v.clone() for k, v in parameters_of(model, name).items()} for name in ("one", "two")}
    pefast.average(model, {"one": 0.25, "two": -1.5}, "mix")
    assert model._pefast.router.active == ("mix",)
    for path, got in dense(model, "mix").items():
        right = sum(w * part[path] for w, part in ((0.25, one), (-1.5, two)) if path in part)
        assert_close(got, right)
    assert set(dense(model, "mix")) == set(one) | set(two)
    for name, values in before.items():
        assert all(torch.equal(parameters_of(model, name)[key], value) for key, value in values.items())


def test_tables_of_words_sum_too():
    method = LoRA(rank=2, alpha=3, targets=["embed_tokens", "q_proj"])
    model, fed = with_two("llama", method, method), inputs("llama")
    one, two = dense(model, "one"), dense(model, "two")
    pefast.average(model, {"one": 0.5, "two": 0.5})
    for path, got in dense(model, "mix").items():
        assert_close(got, 0.5 * one[path] + 0.5 * two[path])
    assert "model.embed_tokens" in one and logits(model, **fed).isfinite().all()


def test_an_average_of_one_adapter_computes_the_same(tmp_path):
    model, fed = with_two("bert", LoRA(rank=2), LoRA(rank=2)), inputs("bert")
    right = logits(model, **fed)
    pefast.average(model, {"two": 1.0})
    assert_close(logits(model, **fed), right)
    fresh = pefast.load(build("bert"), pefast.save(model, tmp_path / "mix", "mix"))
    assert torch.equal(logits(fresh, **fed), logits(model, **fed))
    pefast.merge(model)
    assert_close(logits(model, **fed), right)


def test_a_smaller_rank_is_the_nearest():
    model = with_two("llama", LoRA(rank=3), LoRA(rank=4))
    one, two = dense(model, "one"), dense(model, "two")
    pefast.average(model, {"one": 1.0, "two": 0.5}, "mix", rank=2)
    for path, got in dense(model, "mix").items():
        u, s, v_t = torch.linalg.svd((one[path] + 0.5 * two[path]).double())
        assert_close(got.double(), (u[:, :2] * s[:2]) @ v_t[:2], 1e-5)
    assert {delta.a.shape[0] for _, delta in deltas_of(model, "mix", "lora")} == {2}


def test_others_are_averaged_parameter_by_parameter():
    methods = [Adapter(size=3), pefast.IA3(), pefast.Prompt(tokens=2)]
    model = with_two("bert", methods, methods)
    one, two = ({k: v.clone() for k, v in parameters_of(model, name).items()} for name in ("one", "two"))
    pefast.average(model, {"one": 0.75, "two": 0.25})
    for key, got in parameters_of(model, "mix").items():
        assert_close(got, 0.75 * one[key] + 0.25 * two[key], 1e-6)
    assert any(key.startswith("head/") for key in one)


REFUSED = {
    "other methods": (LoRA(rank=2), Adapter(size=2), {}, ["'one' has lora", "'two' has adapter"]),
    "other sizes": (Adapter(size=2), Adapter(size=3), {}, ["Adapter", "different settings"]),
    "a LoRA with a bias": (LoRA(rank=2), LoRA(rank=2, bias=True), {}, ["'two'", "bias"]),
    "a DoRA": (LoRA(rank=2), LoRA(rank=2, dora=True), {}, ["'two' is a DoRA"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_refused(case):
    one, two, _, parts = REFUSED[case]
    model = with_two("bert", one, two)
    before = snapshot(model)
    assert_refused(lambda: pefast.average(model, {"one": 0.5, "two": 0.5}), "average: ", *parts)
    assert_as_it_was(model, before)


def test_settings_that_cannot_be():
    model = with_two("bert", LoRA(rank=2), LoRA(rank=3))
    stir(pefast.attach(model, LoRA(rank=2), "five", head=5))
    stir(pefast.attach(model, LoRA(rank=2), "none", head=False))
    before = snapshot(model)
    for weights, part in (
        ({}, "no adapter is named"),
        ({"one": 1, "x": 1}, "'x'"),
        ({"one": "1"}, "'1'"),
        ({"one": float("nan")}, "nan"),
        ({"one": 1, "five": 1}, "heads"),
        ({"one": 1, "none": 1}, "heads"),
    ):
        assert_refused(lambda weights=weights: pefast.average(model, weights), "average: ", part)
    assert_refused(lambda: pefast.average(model, {"one": 1}, rank=0), "rank is 0")
    assert_refused(lambda: pefast.average(model, {"one": 1}, "two"), "'two' is taken")
    assert_as_it_was(model, before)
