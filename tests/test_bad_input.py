"""Everything a caller can get wrong is one clear sentence, and the model is as it was, bit for bit."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

import pefast
from pefast.methods import METHODS
from tests.models import assert_as_it_was, assert_refused, build, inputs, logits, snapshot, stir

LoRA, Adapter, Prompt = pefast.LoRA, pefast.Adapter, pefast.Prompt


ATTACH = {
    "target that is nowhere": (LoRA(targets="q_prj"), ["attach: ", "'q_prj'", "q_proj", "down_proj"]),
    "targets that are nowhere": (LoRA(targets=["qq", "vv"]), ["qq", "names look like"]),
    "no targets": (LoRA(targets=[]), ["names look like"]),
    "everything excluded": (LoRA(targets=["q_proj"], exclude=["q_proj"]), ["names look like"]),
    "a layer that is not there": (LoRA(targets=["q_proj"], layers=[7]), ["q_proj"]),
    "an expression that is none": (LoRA(targets="*q_proj"), ["*q_proj", "regular expression"]),
    "rank 0": (LoRA(rank=0), ["LoRA: rank is 0"]),
    "alpha of text": (LoRA(alpha="8"), ["LoRA: alpha is '8'"]),
    "alpha is not a number": (LoRA(alpha=float("nan")), ["alpha is nan"]),
    "a rank for no expression": (LoRA(ranks={"(q": 2}), ["'(q'", "regular expression"]),
    "rank below zero": (LoRA(rank=-4), ["rank is -4"]),
    "rank and a half": (LoRA(rank=1.5), ["rank is 1.5"]),
    "rank 0 for one layer": (LoRA(ranks={"k_proj": 0}), ["rank is 0"]),
    "dropout 1": (LoRA(dropout=1.0), ["LoRA: dropout is 1.0"]),
    "dropout below zero": (LoRA(dropout=-0.1), ["dropout is -0.1"]),
    "dropout is not a number": (LoRA(dropout=float("nan")), ["dropout is nan"]),
    "activation": (Adapter(activation="swish2"), ["Adapter: no activation 'swish2'", "relu", "gelu"]),
    "adapter's size": (Adapter(size=0), ["Adapter: size is 0"]),
    "adapter's reduction": (Adapter(reduction=0), ["reduction is 0"]),
    "adapter's dropout": (Adapter(dropout=1), ["Adapter: dropout is 1"]),
    "adapter around nothing": (Adapter(around=()), ["Adapter: "]),
    "adapter around something else": (Adapter(around="mlp"), ["mlp", "attention", "feedforward"]),
    "adapter where there is no cross-attention": (Adapter(around="cross"), ["cross"]),
    "adapter in a layer that is not there": (Adapter(layers=[9]), ["9"]),
    "no tokens": (Prompt(tokens=0), ["Prompt: tokens is 0"]),
    "half a token": (Prompt(tokens=0.5), ["tokens is 0.5"]),
    "prompt's start": (Prompt(init="zeros"), ["init is 'zeros'", "random", "text"]),
    "prompt's text": (Prompt(init="text"), ["no text"]),
    "prompt's words": (Prompt(init="template"), ["init is 'template'", "no text"]),
    "prompt's words without a place": (Prompt(init="template", text="a film"), ["'a film'", "{text}"]),
    "prompt's words around two places": (Prompt(init="template", text="{text} {text}"), ["2 places"]),
    "prompt's stacks": (Prompt(stacks="all"), ["stacks is 'all'", "encoder, decoder, both"]),
    "a second stack that is not there": (Prompt(stacks="both"), ["LlamaForCausalLM has one stack"]),
    "prompt's place": (Prompt(place="end"), ["place is 'end'", "start", "inside"]),
    "two prompts": ([Prompt(), Prompt()], ["one Prompt"]),
    "a good one and a bad one": ([LoRA(rank=2), Adapter(size=4), LoRA(targets=["no"])], ["no"]),
    "good ones and a bad one at last": ([Adapter(size=4), Prompt(), LoRA(ranks={"1.*up_proj": 0})], ["rank"]),
    "no method": ([], ["attach: ", *(method.__name__ for method in METHODS.values())]),
    "None": (None, ["attach: ", "NoneType"]),
    "a class": (LoRA, ["attach: ", "the class LoRA"]),
    "a name": ("lora", ["attach: ", "str"]),
}


@pytest.mark.parametrize("beside", [False, True], ids=["fresh", "beside another"])
@pytest.mark.parametrize("case", list(ATTACH))
def test_attach(case, beside):
    method, parts = ATTACH[case]
    model = build("llama")
    if beside:
        stir(pefast.attach(model, [LoRA(rank=2), Adapter(size=3)], "other"))
    else:
        model.lm_head.weight.requires_grad_(False)
    right = logits(model, **inputs("llama"))
    before = snapshot(model)
    assert_refused(lambda: pefast.attach(model, method), *parts)
    assert_as_it_was(model, before)
    assert torch.equal(logits(model, **inputs("llama")), right)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "other", None, 3])
def test_attach_under_a_name_that_cannot_be(name):
    model = pefast.attach(build("bert"), LoRA(rank=2), "other")
    before = snapshot(model)
    assert_refused(lambda: pefast.attach(model, LoRA(rank=2), name), "attach: ", repr(name))
    assert_as_it_was(model, before)


def test_attach_where_a_method_does_not_know_the_model():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    other = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=50, max_position_embeddings=20))
    assert_refused(lambda: pefast.attach(other, Adapter()), "Adapter: ", "'clip_text_model'", "bert", "llama")
    assert_refused(
        lambda: pefast.attach(torch.nn.Sequential(torch.nn.Linear(3, 3)), Prompt()), "Prompt: ", "Sequential"
    )


def test_a_prompt_that_makes_the_input_too_long():
    model = pefast.attach(build("bert"), Prompt(tokens=5))
    fed = inputs("bert", length=44)
    assert_refused(lambda: logits(model, **fed), "Prompt: 49 positions", "48")
    assert logits(model, **inputs("bert", length=43)).isfinite().all()


def test_a_prompt_beside_a_mask_of_three_dimensions():
    model, fed = pefast.attach(build("llama"), Prompt(tokens=2)), inputs("llama")
    fed["attention_mask"] = torch.zeros(3, 9, 9)
    assert_refused(lambda: logits(model, **fed), "Prompt: ", "3 dimensions", "[batch, length]")


STATE = {
    "detach, nothing attached": (
        lambda m: pefast.detach(m),
        ["detach: nothing is attached", "pefast.attach"],
    ),
    "merge, nothing attached": (lambda m: pefast.merge(m), ["merge: nothing is attached"]),
    "activate, nothing attached": (lambda m: pefast.activate(m, None), ["activate: nothing is attached"]),
    "save, nothing attached": (lambda m: pefast.save(m, "unused"), ["save: nothing is attached"]),
}


@pytest.mark.parametrize("case", list(STATE))
def test_a_model_without_adapters(case):
    model, (action, parts) = build("bert"), STATE[case]
    before = snapshot(model)
    assert_refused(lambda: action(model), *parts)
    assert_as_it_was(model, before)


def enter(context):
    with context:
        pass


NAMES = {
    "detach": (lambda m: pefast.detach(m, "x"), ["detach: no adapter is called 'x'", "one", "two"]),
    "activate": (lambda m: pefast.activate(m, "x"), ["activate: no adapter is called 'x'", "one", "two"]),
    "activate two": (lambda m: pefast.activate(m, ["one", "x"]), ["'x'"]),
    "route": (lambda m: enter(pefast.route(m, ["one", "x"])), ["route: no adapter is called 'x'"]),
    "save": (lambda m: pefast.save(m, "unused", "x"), ["save: no adapter is called 'x'", "one", "two"]),
    "unmerge": (lambda m: pefast.unmerge(m), ["unmerge: the model is not merged"]),
    "merge a prompt": (lambda m: pefast.merge(m), ["merge: prompt cannot be added"]),
}


@pytest.mark.parametrize("case", list(NAMES))
def test_names_and_states_that_do_not_fit(case):
    action, parts = NAMES[case]
    model = pefast.attach(build("llama"), LoRA(rank=2), "one")
    stir(pefast.attach(model, Prompt(tokens=2), "two"))
    right = logits(model, **inputs("llama"))
    before = snapshot(model)
    assert_refused(lambda: action(model), *parts)
    assert_as_it_was(model, before)
    assert torch.equal(logits(model, **inputs("llama")), right)


@pytest.mark.parametrize("call", ["activate", "merge", "attach", "route"])
def test_a_merged_model_says_so(call):
    model = stir(pefast.attach(build("llama"), LoRA(rank=2)))
    pefast.merge(model)
    before = snapshot(model)
    actions = {
        "activate": lambda: pefast.activate(model, None),
        "merge": lambda: pefast.merge(model),
        "attach": lambda: pefast.attach(model, LoRA(rank=2), "other"),
        "route": lambda: enter(pefast.route(model, ["default"])),
    }
    assert_refused(actions[call], f"{call}: the model is merged")
    assert_as_it_was(model, before)


def test_merge_with_nothing_active():
    model = pefast.activate(pefast.attach(build("llama"), LoRA(rank=2)), None)
    assert_refused(lambda: pefast.merge(model), "merge: ", "active")
