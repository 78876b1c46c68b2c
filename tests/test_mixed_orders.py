"""Methods mixed in orders that no single method's tests have: attached beside an active one, in either order,
and trained by a backward that comes after the switch.
"""

import io
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import pefast
from pefast.model import parameters_of
from tests.cases import CASES
from tests.models import (
    FAMILIES,
    assert_as_it_was,
    assert_close,
    assert_refused,
    build,
    inputs,
    logits,
    snapshot,
    stir,
    trained,
)

LoRA, Adapter, Prompt, Prefix, IA3 = pefast.LoRA, pefast.Adapter, pefast.Prompt, pefast.Prefix, pefast.IA3
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("settings", [{"dora": True}, {"init": "pissa"}, {"init": "olora"}], ids=str)
def test_what_starts_from_the_weights_starts_from_the_base_models(settings, tmp_path):
    model, fed = build("llama"), inputs("llama")
    right = logits(model, **fed)
    stir(pefast.attach(model, pefast.Full(), "full"))
    pefast.attach(model, LoRA(rank=4, **settings), "lora")
    assert_close(logits(model, **fed), right)
    folder = pefast.save(stir(model), tmp_path / "lora", "lora")
    assert_close(logits(pefast.load(build("llama"), folder), **fed), logits(model, **fed))


@every_family
def test_prefix_and_prompt_compute_the_same_in_either_order(family):
    prefix, prompt = Prefix(tokens=3), Prompt(tokens=2)
    values, fed = {}, inputs(family)
    found = []
    for methods in ([prompt, prefix], [prefix, prompt]):
        model = stir(pefast.attach(build(family), methods))
        values = values or {key: value.clone() for key, value in parameters_of(model, "default").items()}
        with torch.no_grad():
            for key, parameter in parameters_of(model, "default").items():
                parameter.copy_(values[key])
        found.append(logits(model, **fed))
    assert_close(found[1], found[0], 1e-6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.parametrize("method", [LoRA(4), LoRA(4, dora=True), IA3(), Adapter(6), Prefix(3)], ids=repr)
@every_family
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_backward_behind_a_route_under_checkpointing(family, method, reentrant):
    model, fed = build(family).train(), inputs(family)
    for seed, name in enumerate(("one", "two")):
        stir(pefast.attach(model, method, name), seed)
    pefast.activate(model, ["two", "one"])

    def gradients():
        losses = []
        for names in (["one", "two", None], ["two", "two", "one"]):
            with pefast.route(model, names):
                losses.append(model(**fed).logits.square().mean())
        model.zero_grad()
        sum(losses).backward()
        return {name: parameter.grad for name, parameter in trained(model).items()}

    right = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for name, gradient in gradients().items():
        assert_close(gradient, right[name])


def test_a_route_inside_a_route_gives_the_outer_one_back():
    model, fed = build("bert"), inputs("bert")
    for seed, name in enumerate(("one", "two")):
        stir(pefast.attach(model, LoRA(rank=4), name), seed)
    with pefast.route(model, ["one", "two", None]):
        right = logits(model, **fed)
        with pefast.route(model, ["two", None]):
            assert not torch.equal(logits(model, **inputs("bert", rows=2)), right[:2])
        assert torch.equal(logits(model, **fed), right)


@pytest.mark.parametrize("case", ["hybrid with prefix", "prompt", "full", "columns and lora", "dora"])
@every_family
def test_a_model_that_pickle_wrote_goes_on(family, case):
    model, fed = stir(pefast.attach(build(family), CASES[case])), inputs(family)
    pefast.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(logits(other, **fed), logits(model, **fed))
    assert list(trained(other)) == list(trained(model))
    pefast.accelerate(pefast.detach(other), attention=False, dropout=False, loss=False, peft=False)
    assert torch.equal(logits(other, **fed), logits(build(family), **fed))
    assert {type(part) for part in other.modules()} == {type(part) for part in build(family).modules()}


def test_nothing_is_attached_or_switched_inside_a_route():
    model, fed = stir(pefast.attach(build("llama"), LoRA(rank=4), "one")), inputs("llama")
    refused = {
        "attach": lambda: pefast.attach(model, LoRA(rank=2), "two"),
        "activate": lambda: pefast.activate(model, None),
        "detach": lambda: pefast.detach(model, "one"),
        "merge": lambda: pefast.merge(model),
    }
    with pefast.route(model, ["one", None, "one"]):
        right, before = logits(model, **fed), snapshot(model)
        for who, action in refused.items():
            assert_refused(action, f"{who}: rows are routed")
        assert_as_it_was(model, before)
        assert torch.equal(logits(model, **fed), right)
    pefast.merge(model)


def test_a_pickled_prefix_computes_in_a_process_that_has_not_seen_pefast(tmp_path):
    model, fed = stir(pefast.attach(build("t5"), Prefix(tokens=3))), inputs("t5")
    torch.save((model, fed, logits(model, **fed)), tmp_path / "model.pt")
    lines = [
        f"import torch; model, fed, right = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)",
        "with torch.no_grad(): print(torch.equal(model(**fed).logits, right))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_saves_a_model_whose_tied_words_train(family, tmp_path):
    model, fed = stir(pefast.attach(build(family), pefast.Full(), "one")), inputs(family)
    pefast.merge(stir(pefast.attach(model, pefast.Layers(embeddings=True), "two")))
    model.save_pretrained(tmp_path)
    assert_close(logits(type(model).from_pretrained(tmp_path).eval(), **fed), logits(model, **fed))


def test_an_adapter_named_twice_computes_once():
    model, fed = stir(pefast.attach(build("llama"), LoRA(rank=4), "one")), inputs("llama")
    right = logits(pefast.activate(model, "one"), **fed)
    assert torch.equal(logits(pefast.activate(model, ["one", "one"]), **fed), right)


def test_chosen_entries_are_averaged_where_they_are_the_same(tmp_path):
    model = build("llama")
    for seed, name in enumerate(("one", "two")):
        stir(pefast.attach(model, pefast.Subnetwork(fraction=0.1), name), seed)
        pefast.save(model, tmp_path / name, name)
    pefast.attach(model, pefast.Subnetwork(fraction=0.1, seed=1), "other")
    assert_refused(lambda: pefast.average(model, {"one": 1.0, "other": 1.0}), "different entries")
    # what came from a folder has no settings to choose by
    model = build("llama")
    for name in ("one", "two"):
        pefast.load(model, tmp_path / name, name)
    pefast.average(model, {"one": 0.25, "two": 0.75}, "mix")
    found = [parameters_of(model, name) for name in ("one", "two", "mix")]
    for one, two, mix in zip(*(each.values() for each in found), strict=True):
        assert_close(mix, 0.25 * one + 0.75 * two, 1e-6)


def test_transformers_saves_a_model_whose_adapters_share_a_prefix(tmp_path):
    model = pefast.attach(build("llama"), Prefix(tokens=3), "one")
    pefast.attach(pefast.attach(model, Prefix(share="one"), "two"), Prefix(share="two"), "three")
    model.save_pretrained(tmp_path / "three")
    pefast.detach(model, "one").save_pretrained(tmp_path / "two")
    for folder in ("three", "two"):
        found = [key for key in load_file(tmp_path / folder / "model.safetensors") if "prefixes" in key]
        assert len(found) == 1
