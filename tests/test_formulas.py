"""Adapters and prompts compute their formulas, written here a second time, on models without pefast."""

import pytest
import torch
import transformers
from torch.nn import functional as F

import pefast
from pefast.model import parameters_of
from tests.models import FAMILIES, assert_close, build, inputs, logits, step, stir

# in a block: where a sublayer's input comes in, and where its output goes out
SUBLAYERS = {
    "bert": {
        "attention": ("attention.self.query", "attention.output.dense"),
        "feedforward": ("intermediate.dense", "output.dense"),
    },
    "llama": {
        "attention": ("self_attn.q_proj", "self_attn.o_proj"),
        "feedforward": ("mlp.gate_proj", "mlp.down_proj"),
    },
    "gpt2": {"attention": ("attn.c_attn", "attn.c_proj"), "feedforward": ("mlp.c_fc", "mlp.c_proj")},
    "t5": {
        "attention": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o"),
        "cross": ("layer.1.EncDecAttention.q", "layer.1.EncDecAttention.o"),
        "feedforward": ("DenseReluDense.wi", "DenseReluDense.wo"),
    },
}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def exits(model, family: str, kinds, layers=(0, 1)) -> list[tuple[str, str]]:
    """(entry, exit) paths of every sublayer of these kinds in these blocks."""
    found = []
    for path, _ in model.named_modules():
        for kind in kinds:
            entry, exit = SUBLAYERS[family].get(kind, ("", " "))
            number = next((int(part) for part in path.split(".") if part.isdigit()), None)
            # BERT's attention.output.dense also ends with output.dense
            other = kind == "feedforward" and path.endswith("attention.output.dense")
            if path.endswith(f".{exit}") and number in layers and not other:
                found.append((path.removesuffix(exit) + entry, path))
    return found


def with_hooks(model, pairs, weights, method: pefast.Adapter):
    """The formula on a plain model: hooks at entry and exit of each sublayer."""

    def put(entry, exit):
        a, b, c, d = (weights[f"adapter/{exit}.{part}"] for part in "abcd")
        kept = []

        def delta(x):
            return method.scale * (ACTIVATIONS[method.activation](x @ a.t() + c) @ b.t() + d)

        model.get_submodule(entry).register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        model.get_submodule(exit).register_forward_hook(
            lambda module, args, y: y + delta(kept.pop() if method.parallel else y)
        )

    for entry, exit in pairs:
        put(entry, exit)
    return model


METHODS = {
    "parallel": pefast.Adapter(size=6, scale=1.5),
    "serial": pefast.Adapter(size=6, parallel=False, scale=0.5, activation="gelu"),
    "around attention": pefast.Adapter(size=3, around="attention", activation="tanh"),
    "around feed-forward": pefast.Adapter(size=3, around="feedforward", parallel=False, activation="silu"),
    "one block": pefast.Adapter(reduction=4, layers=[1]),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", list(METHODS))
def test_an_adapter_computes_its_formula(family, case):
    method, fed = METHODS[case], inputs(family)
    model = stir(pefast.attach(build(family), method, head=False), size=0.3)
    weights = parameters_of(model, "default")
    plain = build(family).requires_grad_(False)
    around = [method.around] if isinstance(method.around, str) else method.around
    pairs = exits(plain, family, around, method.layers or (0, 1))
    assert {exit for _, exit in pairs} == {name.split("/")[1].rsplit(".", 1)[0] for name in weights}
    assert next(iter(weights.values())).shape[0] == (method.size or 32 // 4)
    with_hooks(plain, pairs, weights, method)
    assert_close(logits(model, **fed), logits(plain, **fed))

    _, gradients = step(model, fed)
    right = torch.autograd.grad(plain(**fed).logits.float().square().mean(), list(weights.values()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, gradient in zip(weights.values(), right, strict=True):
        assert_close(gradients[names[id(parameter)]], gradient)


def test_an_adapter_around_cross_attention_computes_its_formula():
    method, fed = pefast.Adapter(size=5, around="cross"), inputs("t5")
    model = stir(pefast.attach(build("t5"), method), size=0.3)
    plain = build("t5")
    pairs = exits(plain, "t5", ["cross"])
    assert len(pairs) == 2
    with_hooks(plain, pairs, parameters_of(model, "default"), method)
    assert_close(logits(model, **fed), logits(plain, **fed))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("place", ["start", "after_first"])
def test_a_prompt_stands_where_it_says(family, place):
    model, fed = (
        stir(pefast.attach(build(family), pefast.Prompt(tokens=3, place=place))),
        inputs(family, rows=1),
    )
    plain = build(family)
    if family == "bert":
        # the pooler sees the first position alone, so the hidden states say more
        model, plain = model.bert, plain.bert
    embeddings = plain.get_input_embeddings()(fed["input_ids"])
    first = int(place == "after_first")
    prompt = (model.base_model if family != "bert" else model).prompts["default"].embeddings[None]
    both = torch.cat((embeddings[:, :first], prompt, embeddings[:, first:]), 1)
    with torch.no_grad():
        got, right = model(**fed), plain(inputs_embeds=both)
    got, right = (out[0] for out in (got, right))
    assert_close(got, torch.cat((right[:, :first], right[:, first + 3 :]), 1))


def test_a_prompt_leaves_labels_and_states_where_they_are():
    fed = inputs("llama", rows=2)
    model = stir(pefast.attach(build("llama"), pefast.Prompt(tokens=3)))
    out = model(**fed, labels=fed["input_ids"], output_hidden_states=True)
    ids, found = fed["input_ids"][:, 1:], out.logits[:, :-1]
    assert_close(out.loss.detach(), F.cross_entropy(found.flatten(0, 1), ids.flatten()).detach())
    assert {states.shape for states in out.hidden_states} == {(2, 9, 32)}
    assert model(**fed, return_dict=False)[0].shape == (2, 9, 96)


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
def test_a_prompt_before_a_head_over_tokens(head):
    torch.manual_seed(1)
    config = build("bert").config
    config.num_labels = 2
    model = getattr(transformers, f"BertFor{head}")(config).eval()
    fed, v = inputs("bert"), 3
    pefast.attach(model, pefast.Prompt(tokens=v))
    asked = {"labels": torch.ones(3, 9, dtype=torch.long)}
    if head == "QuestionAnswering":
        asked = {"start_positions": torch.tensor([0, 2, 8]), "end_positions": torch.tensor([1, 4, 8])}
    out = model(**fed, **asked)
    scores = out.logits if head == "TokenClassification" else out.start_logits[..., None]
    assert scores.shape[:2] == (3, 9) and out.loss.isfinite()
    if head == "QuestionAnswering":
        right = [F.cross_entropy(out[f"{end}_logits"], asked[f"{end}_positions"]) for end in ("start", "end")]
        assert_close(out.loss.detach(), sum(right).detach() / 2)


def test_a_prompt_takes_embeddings_and_arguments_by_position():
    model, fed = stir(pefast.attach(build("llama"), pefast.Prompt(tokens=3))), inputs("llama")
    right = logits(model, **fed)
    ids, mask = fed.values()
    assert torch.equal(
        logits(model, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask), right
    )
    with torch.no_grad():
        states = model.model(ids, mask)[0]
    assert torch.equal(model.lm_head(states).detach(), right)


def test_a_forward_that_failed_leaves_nothing_behind():
    methods = [pefast.Prompt(tokens=3), pefast.Adapter(size=4)]
    model, fed = stir(pefast.attach(build("llama"), methods)), inputs("llama")
    right = logits(model, **fed)

    def fails(module, args):
        raise MemoryError("in the middle")

    handle = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(fails)
    with pytest.raises(MemoryError):
        logits(model, **fed)
    handle.remove()
    pefast.activate(model, None)
    assert torch.equal(logits(model, **fed), logits(build("llama"), **fed))
    pefast.activate(model, "default")
    assert torch.equal(logits(model, **fed), right)


def test_a_prompt_from_a_text():
    class Words:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [int(word) for word in text.split()]}

    for text, ids in {"5 7": [5, 7, 5, 7], "9 8 7 6 5": [9, 8, 7, 6]}.items():
        model = build("llama")
        pefast.attach(model, pefast.Prompt(tokens=4, init="text", text=text, tokenizer=Words()))
        right = model.get_input_embeddings().weight[ids]
        assert torch.equal(model.model.prompts["default"].embeddings, right)


def test_no_activation_is_held_between_calls():
    model, fed = pefast.attach(build("llama"), pefast.Adapter(size=4)), inputs("llama")
    step(model.train(), fed)
    held = [path for path, module in model.named_modules() if getattr(module, "h", None) is not None]
    assert not held


def test_a_block_that_runs_its_end_alone_says_so():
    model = pefast.attach(build("llama"), pefast.Adapter(size=4))
    with pytest.raises(RuntimeError, match="its waist is not there"):
        model.model.layers[0].mlp.down_proj(torch.randn(2, 56))
