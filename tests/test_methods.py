"""Every promise of a method, for each named case of METHODS on each family of models."""

import copy
import dataclasses

import pytest
import torch

import pefast
from pefast.architectures import backbone
from pefast.layers import hosts, replaced
from pefast.methods import METHODS
from pefast.ops.delta_linear import reference
from pefast.ops.partial_linear import reference as partial_reference
from pefast.testing import assert_no_worse
from tests.cases import CASES, DROPPING, pairs
from tests.models import (
    DECODERS,
    INNER,
    LAYERS,
    WIDTH,
    assert_as_it_was,
    assert_close,
    build,
    inputs,
    logits,
    saved_bytes,
    snapshot,
    step,
    stir,
    trained,
)

LoRA, Prompt = pefast.LoRA, pefast.Prompt
every_pair = pytest.mark.parametrize(("family", "case"), pairs())


def attached(family: str, case: str, name: str = "default"):
    """A model with the case's methods on it, moved away from their start."""
    return stir(pefast.attach(build(family), CASES[case], name))


def test_every_method_has_a_case():
    kinds = {method.kind for methods in CASES.values() for method in methods}
    assert kinds == set(METHODS)


@every_pair
def test_it_starts_as_the_base_model_or_says_so(family, case):
    model, fed = build(family), inputs(family)
    right = logits(model, **fed)
    pefast.attach(model, CASES[case])
    if elsewhere := [type(method) for method in CASES[case] if method.kind in ("prompt", "prefix")]:
        assert all("does not start as the base model" in " ".join(each.__doc__.split()) for each in elsewhere)
        assert not torch.allclose(logits(model, **fed), right)
    else:
        assert_close(logits(model, **fed), right, 1e-6)


@every_pair
def test_only_what_it_names_trains(family, case):
    model, fed = build(family), inputs(family)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    pefast.attach(model, CASES[case])
    own = {name for name, _ in model.named_parameters()} - set(base)
    assert set(trained(model)) == own
    assert any(".copies." in name for name in own) == (family == "bert")

    stir(model)
    model(**fed).logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in own:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), f"{name} gets no gradient"
        else:
            assert parameter.grad is None, name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())


def test_a_frozen_head_stays_frozen():
    model = pefast.attach(build("bert"), LoRA(rank=2), head=False)
    assert not any("classifier" in name for name in trained(model))


@every_pair
def test_merged_computes_the_same_or_says_that_it_cannot(family, case):
    model, fed = attached(family, case), inputs(family)
    right = logits(model, **fed)
    before = snapshot(model)
    if not all(method.merges for method in CASES[case]):
        with pytest.raises(ValueError, match=r"^merge: .* cannot be added to a weight"):
            pefast.merge(model)
        assert_as_it_was(model, before)
        return
    pefast.merge(model)
    assert_close(logits(model, **fed), right)
    assert not torch.equal(logits(model, **fed), logits(build(family), **fed))
    pefast.unmerge(model)
    assert_as_it_was(model, before)
    assert torch.equal(logits(model, **fed), right)


@every_pair
def test_detach_gives_the_base_model_back(family, case):
    model, fed = build(family), inputs(family)
    next(model.parameters()).requires_grad_(False)
    right = logits(model, **fed)
    before = snapshot(model)
    stir(pefast.attach(model, CASES[case]))
    step(model.train(), fed)
    pefast.detach(model.eval())
    assert_as_it_was(model, before)
    assert torch.equal(logits(model, **fed), right)


def test_detach_while_merged_gives_the_base_model_back():
    model = build("llama")
    before = snapshot(model)
    pefast.merge(stir(pefast.attach(model, LoRA(rank=4))))
    assert_as_it_was(pefast.detach(model), before)


@every_pair
def test_it_survives_save_and_load(family, case, tmp_path):
    model, fed = attached(family, case), inputs(family)
    folder = pefast.save(model, tmp_path / "adapter")
    drawn = torch.get_rng_state()
    fresh = pefast.load(build(family), folder)
    # a training that goes on from a folder sees the numbers that it would have seen
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(logits(fresh, **fed), logits(model, **fed))
    assert list(trained(fresh)) == list(trained(model))

    # the file says all: what is loaded can be saved again, under another name and over an older folder
    other = pefast.load(build(family), folder, name="other", trainable=False)
    assert not trained(other)
    pefast.save(other, folder)
    assert torch.equal(logits(pefast.load(build(family), folder), **fed), logits(model, **fed))


@every_pair
def test_its_state_dict_goes_to_another_model_with_the_same_methods(family, case):
    model, fed = attached(family, case), inputs(family)
    other = pefast.attach(build(family), CASES[case])
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other, **fed), logits(model, **fed))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_compiles_in_one_graph(family, recwarn):
    torch.compiler.reset()
    model, fed = stir(pefast.attach(build(family), DROPPING["hybrid"])).train(), inputs(family)
    torch.manual_seed(7)
    loss, gradients = step(model, fed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    got = compiled(**fed).logits.float().square().mean()
    assert_close(got.detach(), loss)
    found = torch.autograd.grad(got, list(trained(model).values()))
    for gradient, right in zip(found, gradients.values(), strict=True):
        assert_close(gradient, right)
    # another seed, another mask: the graph holds none
    assert not torch.equal(compiled(**fed).logits.float().square().mean(), got)
    assert not [str(each.message) for each in recwarn if "pefast" in str(each.message)]


def plain_formula(monkeypatch):
    """From here on every host computes the reference: the formula and nothing else."""

    def plain(x, w, segments, bias, ids=None, **_):
        return reference(x, w, segments, bias, ids=ids)

    monkeypatch.setattr(hosts, "delta_linear", plain)
    monkeypatch.setattr(replaced, "partial_linear", partial_reference)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@every_pair
def test_it_works_in_bf16_and_under_autocast(family, case, autocast, monkeypatch, nan_filled_empty):
    model, fed = build(family), inputs(family)
    model = model if autocast else model.bfloat16()
    stir(pefast.attach(model, CASES[case]))
    wide = copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, gradients = logits(model, **fed), step(model, fed)[1]
        plain_formula(monkeypatch)
        near = logits(model, **fed)
    assert_no_worse("logits", got, near, logits(wide, **fed))
    for name, parameter in trained(model).items():
        assert gradients[name].dtype == parameter.dtype
        assert gradients[name].isfinite().all(), name
        # whole tensors are copied in the model's own dtype
        own = ".copies." in name or ".replaced." in name
        assert parameter.dtype == torch.float32 or own


@pytest.mark.parametrize(("family", "case"), pairs(cases=tuple(DROPPING), table=DROPPING))
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_changes_nothing(family, case, reentrant):
    model, fed = stir(pefast.attach(build(family), DROPPING[case])).train(), inputs(family)
    torch.manual_seed(5)
    loss, gradients = step(model, fed)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(5)
    again = model(**fed).logits.float().square().mean()
    again.backward()
    assert_close(again.detach(), loss, 1e-6)
    for name, parameter in trained(model).items():
        assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize(("family", "case"), pairs(DECODERS))
def test_generate_and_its_cache(family, case):
    model, fed = attached(family, case), inputs(family)
    fed = {"input_ids": fed["input_ids"].flip(1), "attention_mask": fed["attention_mask"].flip(1)}
    options = {
        "do_sample": False,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(**fed, **options, use_cache=True)
    plain = model.generate(**fed, **options, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for got, right in zip(cached.logits, plain.logits, strict=True):
        assert_close(got, right)

    # the second row without its padding, and beams
    second = {key: value[1:2, 3:] for key, value in fed.items()}
    assert torch.equal(new(model, second, **options), new(model, fed, **options)[1:2])
    beams = [new(model, fed, **options, num_beams=2, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)


def new(model, fed, **options) -> torch.Tensor:
    """The tokens that generate adds."""
    sequences = model.generate(**fed, **options).sequences
    return sequences if model.config.model_type == "t5" else sequences[:, fed["input_ids"].shape[1] :]


def hidden(model, fed) -> torch.Tensor:
    """The backbone's last hidden states, with the positions that each real token has without padding."""
    places = (fed["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return backbone(model)(**fed, position_ids=places).last_hidden_state


@pytest.mark.parametrize("side", ["left", "right"])
@every_pair
def test_padding_changes_nothing_for_the_real_tokens(family, case, side):
    model, fed = attached(family, case), inputs(family, rows=1, length=7)
    pad = (0, 4) if side == "right" else (4, 0)
    padded = {
        key: torch.nn.functional.pad(value, pad)
        for key, value in fed.items()
        if not key.startswith("decoder")
    }
    # a longer row beside it, so that rows of one batch are padded differently
    longer = {
        "input_ids": torch.randint(3, 90, (1, 11)),
        "attention_mask": torch.ones(1, 11, dtype=torch.long),
    }
    padded = {key: torch.cat((value, longer[key])) for key, value in padded.items()}
    if family == "t5":
        padded["decoder_input_ids"] = fed["decoder_input_ids"].repeat(2, 1)
        assert_close(logits(model, **padded)[:1], logits(model, **fed))
        return
    real = slice(0, 7) if side == "right" else slice(4, 11)
    assert_close(hidden(model, padded)[:1, real], hidden(model, fed))


@every_pair
def test_the_same_run_gives_the_same_bits(family, case):
    def run():
        torch.manual_seed(6)
        model = attached(family, case).train()
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
        for _ in range(2):
            for parameter, gradient in zip(
                trained(model).values(), step(model, inputs(family))[1].values(), strict=True
            ):
                parameter.grad = gradient
            optimizer.step()
        return trained(model)

    first, second = run(), run()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@every_pair
def test_a_deep_copy_stands_alone(family, case):
    model, fed = attached(family, case), inputs(family)
    right = logits(model, **fed)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, **fed), right)
    stir(twin, seed=9)
    pefast.activate(twin, None)
    assert torch.equal(logits(model, **fed), right)
    pefast.detach(twin)
    assert torch.equal(logits(model, **fed), right)
    assert torch.equal(logits(twin, **fed), logits(build(family), **fed))
    assert set(twin.state_dict()) == set(build(family).state_dict())


@pytest.mark.parametrize(("family", "case"), pairs(cases=tuple(DROPPING), table=DROPPING))
def test_dropout_is_for_training_and_follows_the_seed(family, case):
    model, fed = stir(pefast.attach(build(family), DROPPING[case])), inputs(family)
    still = logits(model, **fed)
    assert torch.equal(logits(model, **fed), still)
    model.train()

    def seeded(seed):
        torch.manual_seed(seed)
        return logits(model, **fed)

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    assert not torch.equal(seeded(1), still)
    assert torch.equal(logits(model.eval(), **fed), still)


# numbers that a token leaves behind in one block of Llama, beside what the frozen model keeps, and deltas
SAVED = {
    # inputs of q, k, v together, of gate and up together, and of down; attention keeps that of o; the waists
    "lora": (2 * WIDTH + INNER + 7 * 4, 7),
    # inputs of attention and feed-forward, and the waists
    "adapter parallel": (2 * WIDTH + 2 * 6, 2),
    # outputs of attention and feed-forward, and what gelu takes and gives
    "adapter serial": (2 * WIDTH + 2 * (6 + 6), 2),
}


@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("case", list(SAVED))
def test_it_saves_what_the_formula_says(case, rate):
    fed = inputs("llama")
    model = pefast.attach(build("llama"), dataclasses.replace(CASES[case][0], dropout=rate))
    base = build("llama").requires_grad_(False)
    for each in (model, base):
        each.train().enable_input_require_grads()
    numbers, deltas = SAVED[case]
    more = saved_bytes(lambda: model(**fed), model) - saved_bytes(lambda: base(**fed), base)
    seeds = 8 * deltas if rate else 0
    assert more == LAYERS * (4 * fed["input_ids"].numel() * numbers + seeds)
