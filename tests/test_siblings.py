"""Layers that read the same input, computed together: the same numbers, and apart where they must be."""

import copy

import pytest
import torch
from torch import nn

import pefast
from pefast.layers import siblings
from pefast.native import C
from pefast.native import sibling_linear as sibling_hand
from pefast.ops.sibling_linear import OP
from tests.models import build, inputs

NEEDS_AMX = pytest.mark.skipif(C is None or not C.delta_linear_here(), reason="siblings join on AMX alone")


def adapted(family, dropout=0.0, targets="all-linear", on=True, join=True, dtype=torch.bfloat16):
    """A tiny model with a LoRA whose b is not zero, siblings joined or not."""
    model = build(family).to(dtype)
    pefast.attach(model, pefast.LoRA(rank=3, dropout=dropout, targets=targets))
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter.dtype)
    model.train()
    if join:
        pefast.accelerate(model, attention=False, dropout=False, loss=False, siblings=on)
    return model


def step(model, family, **more):
    """The first result and the gradients of one pass."""
    model.zero_grad()
    torch.manual_seed(3)
    out = model(**inputs(family), **more)[0]
    out.float().pow(2).mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Tiny models join as large ones do; the bound that is in force otherwise."""
    bound = sibling_hand._FEW
    monkeypatch.setattr(sibling_hand, "_FEW", 0)
    return bound


@pytest.fixture
def joined(monkeypatch):
    """Counts how often siblings were computed together."""
    counts = []
    run = siblings.run

    def counting(x, call, hand):
        counts.append(len(call.parts))
        return run(x, call, hand)

    monkeypatch.setattr(siblings, "run", counting)
    return counts


def close(one, other):
    torch.testing.assert_close(
        one.float(), other.float(), rtol=0.05, atol=0.05 * float(other.float().abs().max())
    )


@NEEDS_AMX
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("family", "calls"), [("bert", [3, 3]), ("llama", [3, 2, 3, 2])])
def test_the_same_numbers_as_apart(joined, family, calls, dropout, dtype):
    y, gradients = step(adapted(family, dropout, dtype=dtype), family)
    assert joined == calls
    apart, others = step(adapted(family, dropout, on=False, dtype=dtype), family)
    # forward is the same to the bit, masks of dropout too; only the gradient of x is rounded at other places
    assert torch.equal(y, apart) and gradients.keys() == others.keys()
    for name in others:
        close(gradients[name], others[name])
        if dtype is torch.float32:
            torch.testing.assert_close(gradients[name], others[name], rtol=1e-4, atol=1e-5)


@NEEDS_AMX
def test_t5_joins_what_reads_the_same(joined):
    model = adapted("t5")
    y, gradients = step(model, "t5")
    apart, others = step(adapted("t5", on=False), "t5")
    assert torch.equal(y, apart) and set(joined) >= {3}
    for name in others:
        close(gradients[name], others[name])
    # cross-attention reads two inputs: its layers are apart from then on, and say so
    assert "not called on the same input" in pefast.explain(model)
    joined.clear()
    again, _ = step(model, "t5")
    assert torch.equal(again, apart)


@NEEDS_AMX
def test_some_layers_alone_have_deltas(joined):
    model = adapted("llama", targets=["q_proj", "v_proj", "down_proj"])
    y, _ = step(model, "llama")
    assert joined == [2, 2]
    assert torch.equal(
        y, step(adapted("llama", targets=["q_proj", "v_proj", "down_proj"], on=False), "llama")[0]
    )


@NEEDS_AMX
def test_hugging_faces_layers_join(joined):
    peft = pytest.importorskip("peft")
    results = []
    for on in (True, False):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["query", "key", "value"], init_lora_weights=False)
        model = peft.get_peft_model(build("bert").to(torch.bfloat16), config).train()
        pefast.accelerate(model, attention=False, dropout=False, siblings=on)
        results.append(step(model, "bert"))
    assert joined == [3, 3] and torch.equal(results[0][0], results[1][0])
    for name in results[1][1]:
        close(results[0][1][name], results[1][1][name])


@NEEDS_AMX
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", [None, "bf16"])
def test_fused_layers_join(joined, compute, dtype):
    block, options = nn.Module(), {"dtype": dtype, "compute": compute}
    for name in ("gate_proj", "up_proj"):
        setattr(block, name, pefast.FusedLoRALinear(48, 64, rank=3, dropout=0.2, **options))
        nn.init.normal_(getattr(block, name).lora_b)
    x, results = torch.randn(40, 48).to(dtype), []
    for on in (True, False):
        pefast.accelerate(block, siblings=on)
        torch.manual_seed(1)
        results.append((block.gate_proj(x), block.up_proj(x)))
    assert joined == [2]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@NEEDS_AMX
def test_layers_too_wide_together_are_not_grouped():
    block = nn.Module()
    block.gate_proj, block.up_proj = (pefast.FusedLoRALinear(8, 2000, dtype=torch.bfloat16) for _ in range(2))
    assert not siblings.groups(pefast.accelerate(block))


@NEEDS_AMX
def test_under_checkpointing_each_computes_alone(joined):
    model = adapted("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    y, gradients = step(model, "llama", use_cache=False)
    assert not joined
    apart, others = step(adapted("llama", on=False), "llama", use_cache=False)
    assert torch.equal(y, apart) and all(torch.equal(gradients[name], others[name]) for name in others)


@NEEDS_AMX
@pytest.mark.parametrize("change", ["replaced", "hook", "pre-hook", "merged"])
def test_a_sibling_that_changed(joined, change):
    results = []
    for on in (True, False):
        model = adapted("bert", on=on)
        attention = model.bert.encoder.layer[0].attention.self
        if change == "replaced":
            attention.key = nn.Linear(32, 32, dtype=torch.bfloat16).requires_grad_(False)
            nn.init.constant_(attention.key.weight, 0.01), nn.init.zeros_(attention.key.bias)
        if change == "hook":
            attention.key.register_forward_hook(lambda module, args, y: y * 2)
        if change == "pre-hook":
            attention.key.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        if change == "merged":
            pefast.merge(model)
        with torch.set_grad_enabled(change != "merged"):
            results.append([model(**inputs("bert"))[0].detach() for _ in range(2)])
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@NEEDS_AMX
def test_an_input_that_was_written_to_between_is_another(joined):
    model = adapted("bert")
    attention = model.bert.encoder.layer[0].attention.self
    x = torch.randn(40, 32).bfloat16()
    with torch.no_grad():
        attention.query(x)
        x.mul_(2)
        key = attention.key(x)
        assert joined == [3]
        assert torch.equal(key, adapted("bert", on=False).bert.encoder.layer[0].attention.self.key(x))


@NEEDS_AMX
def test_nothing_is_kept_after_the_input_is_gone(joined):
    attention = adapted("bert").bert.encoder.layer[0].attention.self
    x = torch.randn(40, 32).bfloat16()
    with torch.no_grad():
        attention.query(x)
    assert len(attention.query.siblings._results) == 2
    del x
    assert not attention.query.siblings._results


@NEEDS_AMX
def test_a_model_with_groups_is_copied_and_taken_apart(joined):
    model = adapted("bert")
    step(model, "bert")
    torch.manual_seed(3)
    y = model(**inputs("bert"))[0]
    other = copy.deepcopy(model)
    joined.clear()
    torch.manual_seed(3)
    assert torch.equal(other(**inputs("bert"))[0], y) and joined == [3, 3]
    own = {id(module) for module in other.modules()}
    assert all(id(member) in own for group in siblings.groups(other) for member in group.members)
    assert "computed together" in pefast.explain(model)
    pefast.accelerate(model, siblings=False)
    assert not siblings.groups(model)
    pefast.accelerate(model)
    before = model.state_dict().keys()
    pefast.detach(model)
    assert not siblings.groups(model) and model.state_dict().keys() <= before


@NEEDS_AMX
def test_under_compile_each_computes_alone(joined):
    torch._dynamo.reset()
    attention = adapted("bert").bert.encoder.layer[0].attention.self
    x = torch.randn(40, 32).bfloat16()

    def both(x):
        return attention.query(x), attention.key(x)

    plain = both(x)
    joined.clear()
    graph = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    assert not joined
    for one, other in zip(plain, graph, strict=True):
        torch.testing.assert_close(one, other)


def test_without_a_kernel_nothing_changes(joined):
    model = adapted("bert")
    with pefast.backend("eager"):
        y, _ = step(model, "bert")
        assert torch.equal(y, step(adapted("bert", on=False), "bert")[0])
    assert not joined and OP.backends == ("native", "eager")


@NEEDS_AMX
def test_few_rows_learn_one_by_one(few, joined, monkeypatch):
    step(adapted("llama"), "llama")
    assert joined
    joined.clear()
    monkeypatch.setattr(sibling_hand, "_FEW", few)
    step(adapted("llama"), "llama")
    assert not joined
