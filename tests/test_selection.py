"""Full, Layers and Bias: which tensors they choose, ties counted once, what is refused."""

import copy

import pytest
import torch

import pefast
from pefast.checkpoint import TENSORS
from pefast.methods.replacing import own_tensors
from tests.models import (
    FAMILIES,
    assert_as_it_was,
    assert_close,
    assert_refused,
    build,
    inputs,
    logits,
    snapshot,
    step,
    stir,
    trained,
)

Full, Layers, Bias, LoRA = pefast.Full, pefast.Layers, pefast.Bias, pefast.LoRA


def chosen(family, method) -> set[str]:
    return set(method.plan(build(family)))


def whole_training(model, fed):
    """Loss and gradients of the plain model when all of it trains."""
    model.requires_grad_(True)
    return step(model, fed)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_computes_what_training_the_model_itself_computes(family):
    fed = inputs(family)
    loss, right = whole_training(stir(build(family)), fed)
    model = stir(build(family))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pefast.attach(model, Full(), head=False)
    got_loss, got = step(model, fed)
    assert torch.equal(got_loss, loss)
    # the order of the paths is that of the base model; a classifier is not the method's
    names = [name for name in right if not name.startswith("classifier")]
    assert len(got) == len(names)
    for path, gradient in zip(names, got.values(), strict=True):
        assert_close(gradient, right[path])
    # the state dict still has the base model's numbers under the base model's names
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_train_and_are_stored_once(family, tmp_path):
    model = stir(pefast.attach(build(family), Full()))
    base = build(family)
    own = {name for name, _ in base.named_parameters() if not name.startswith("classifier")}
    assert set(own_tensors(base)) == own
    file = pefast.save(model, tmp_path / "full") / TENSORS
    held = sum(p.numel() * 4 for p in base.parameters())
    assert held <= file.stat().st_size <= held + 20_000
    for target, source in (getattr(base, "all_tied_weights_keys", None) or {}).items():
        weights = [model.get_submodule(path.rpartition(".")[0]).weight for path in (target, source)]
        assert weights[0] is weights[1] and weights[0].requires_grad


def test_layers_by_number_from_either_end_and_by_range():
    first = {name for name in own_tensors(build("llama")) if ".layers.0." in name}
    last = {name for name in own_tensors(build("llama")) if ".layers.1." in name}
    for method, right in (
        (Layers(layers=[0]), first),
        (Layers(layers=[-1]), last),
        (Layers(layers=range(2)), first | last),
        (Layers(first=1), first),
        (Layers(last=1), last),
        (Layers(first=1, layers=[1]), first | last),
        (Layers(names=r"model\.layers\.0"), first),
        (Layers(names=["layers.1"]), last),
        (Layers(names=["layers.1.mlp", "layers.1.self_attn"]), {n for n in last if "norm" not in n}),
        (Layers(embeddings=True), {"model.embed_tokens.weight"}),
        (Layers(final_norm=True), {"model.norm.weight"}),
        (Layers(last=1, final_norm=True), {*last, "model.norm.weight"}),
    ):
        assert chosen("llama", method) == right, method


def test_layers_of_an_encoder_decoder_and_what_lies_outside_of_blocks():
    names = chosen("t5", Layers(last=1))
    assert {name.split(".layer.")[0] for name in names} == {"encoder.block.1", "decoder.block.1"}
    assert chosen("t5", Layers(embeddings=True)) == {"shared.weight"}
    assert len(chosen("t5", Layers(final_norm=True))) == 2
    assert chosen("t5", Layers(names=["decoder.block.1"])) < names
    embeddings = chosen("bert", Layers(embeddings=True))
    assert len(embeddings) == 5 and all(name.startswith("bert.embeddings.") for name in embeddings)
    assert chosen("gpt2", Layers(embeddings=True)) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert len(chosen("gpt2", Layers(final_norm=True))) == 2


def test_bias_with_and_without_norms_and_by_layer():
    every = chosen("bert", Bias())
    assert every and all(name.endswith(".bias") and "classifier" not in name for name in every)
    assert {name for name in every if "LayerNorm" not in name} == chosen("bert", Bias(norms=False))
    one = {name for name in every if ".layer.1." in name}
    assert one == chosen("bert", Bias(layers=[-1])) and len(one) == 8


REFUSED = {
    "no layer chosen": ("llama", Layers(), ["Layers: nothing is chosen", "last=2"]),
    "no layer in the list": ("llama", Layers(layers=[]), ["Layers: no layer is chosen"]),
    "a layer that is not there": ("llama", Layers(layers=[0, 2]), ["no layer 2 in model.layers", "-2 to 1"]),
    "too many from the end": ("llama", Layers(last=3), ["no layer -3", "has 2"]),
    "half a layer": ("llama", Layers(layers=[0.5]), ["layers has 0.5"]),
    "layers of text": ("llama", Layers(layers="01"), ["layers is '01'"]),
    "first 0": ("llama", Layers(first=0), ["first is 0"]),
    "a name that is nowhere": ("llama", Layers(names=["q_prj"]), ["'q_prj'", "q_proj"]),
    "no expression": ("llama", Layers(names="(q"), ["regular expression"]),
    "no final norm": ("bert", Layers(final_norm=True), ["has no final norm"]),
    "the head is attach's": ("bert", Layers(names=["classifier"]), ["no parameter lies in 'classifier'"]),
    "no bias": ("llama", Bias(), ["Bias: ", "has no bias"]),
    "bias in no layer": ("bert", Bias(layers=[5]), ["Bias: there is no layer 5"]),
    "full and layers": ("llama", [Full(), Layers(last=1)], ["Full and Layers both train", "layers.1"]),
    "two layers": ("llama", [LoRA(), Layers(last=1), Layers(first=2)], ["Layers and Layers both train"]),
    "bias and layers": ("bert", [Bias(), Layers(last=1)], ["Bias and Layers both train", ".bias"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_in_one_sentence_and_nothing_is_changed(case):
    family, method, parts = REFUSED[case]
    model = build(family)
    before = snapshot(model)
    assert_refused(lambda: pefast.attach(model, method), *parts)
    assert_as_it_was(model, before)
    pefast.attach(model, LoRA(rank=2), "other")
    before = snapshot(model)
    assert_refused(lambda: pefast.attach(model, method), *parts)
    assert_as_it_was(model, before)


def test_several_adapters_are_switched_by_name_and_share_no_entry():
    model, fed = build("llama"), inputs("llama")
    base = logits(model, **fed)
    answers = {}
    for name, method, seed in (("a", Layers(last=1), 3), ("b", Layers(last=1), 4), ("c", Layers(first=1), 5)):
        stir(pefast.attach(model, method, name), seed)
        answers[name] = logits(model, **fed)
    optimizer_sees = dict(model.named_parameters())
    for name in ("b", "a", "c", "a"):
        pefast.activate(model, name)
        assert torch.equal(logits(model, **fed), answers[name])
    before = snapshot(model)
    assert_refused(lambda: pefast.activate(model, ["a", "b"]), "activate: 'a''s Layers", "'b''s Layers")
    assert_as_it_was(model, before)
    assert torch.equal(logits(model, **fed), answers["a"])
    pefast.activate(model, ["a", "c"])
    assert not torch.equal(logits(model, **fed), answers["a"])
    assert len(trained(model)) == 18
    # an optimizer made before keeps the parameters that it was given
    assert all(parameter is optimizer_sees[name] for name, parameter in model.named_parameters())
    pefast.activate(model, None)
    assert torch.equal(logits(model, **fed), base)
    assert_refused(lambda: pefast.route(model, ["a", "b"]).__enter__(), "route: ", "Layers")


def test_layers_of_one_linear_with_a_lora_merge_and_unmerge_in_any_order():
    model, fed = build("gpt2"), inputs("gpt2")
    before = snapshot(model)
    stir(pefast.attach(model, [LoRA(rank=2), Layers(last=2)]))
    right, twin = logits(model, **fed), copy.deepcopy(model)
    pefast.merge(model)
    assert_close(logits(model, **fed), right)
    pefast.unmerge(model)
    assert torch.equal(logits(model, **fed), right) and torch.equal(logits(twin, **fed), right)
    pefast.merge(model)
    assert_as_it_was(pefast.detach(model), before)


def test_the_loss_without_logits_steps_aside_for_an_output_embedding_that_trains():
    model = pefast.accelerate(build("llama").train())
    fed = inputs("llama", rows=1)
    pefast.attach(model, Layers(embeddings=True))
    output = model(**fed, labels=fed["input_ids"])
    output.loss.backward()
    assert output.logits is not None
    (parameter,) = trained(model).values()
    assert parameter.grad.any(1).all(), "every word is an output, so every row has a gradient"
    pefast.accelerate(model, attention=False, dropout=False, loss=False, peft=False)
    pefast.detach(model)
    assert type(model) is type(build("llama"))
