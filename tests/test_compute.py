"""compute="bf16" and linear=True: fp32 models with faster products, listed, close and removable."""

import copy

import pytest
import torch
import transformers
from torch import nn

import pefast
from pefast.layers.frozen_linear import FrozenLinear
from pefast.native import C
from pefast.testing import assert_no_worse
from tests.models import build

pytestmark = pytest.mark.skipif(C is None or not C.fp32_here(), reason="fp32 products in csrc need AMX")

IDS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(2))


def attached(dtype=torch.float32):
    """A tiny BERT with a LoRA whose b is not zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.BertConfig(**sizes, vocab_size=100, max_position_embeddings=64)
    model = transformers.BertForSequenceClassification(config).eval()
    pefast.attach(model, pefast.LoRA(rank=4, targets=["query", "value"]))
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def step(model) -> dict:
    """The loss, the logits and every gradient."""
    model.zero_grad()
    output = model(input_ids=IDS, labels=torch.tensor([0, 1, 1, 0]))
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def test_every_frozen_layer_to_the_precision_of_fp32():
    plain, exact = step(attached()), step(attached(torch.float64))
    model = pefast.accelerate(attached(), linear=True)
    assert sum(isinstance(module, FrozenLinear) for module in model.modules()) == 9
    got = step(model)
    for name in exact:
        assert_no_worse(name, got[name], plain[name], exact[name])


def test_products_in_bf16_are_held_to_bf16():
    bf16, exact = step(attached(torch.bfloat16)), step(attached(torch.float64))
    model = pefast.accelerate(attached(), compute="bf16")
    got, full = step(model), step(attached())
    for name in exact:
        assert got[name].dtype == torch.float32
        assert_no_worse(name, got[name].bfloat16(), bf16[name], exact[name])
    assert not torch.equal(got["logits"], full["logits"])


def test_explain_lists_it_and_it_can_be_taken_out():
    model = attached()
    before = [type(module) for module in model.modules()]
    plain = step(model)
    pefast.accelerate(model, compute="bf16")
    said = pefast.explain(model)
    assert "lora of default: native, products in bf16" in said
    assert "frozen layer alone: native, products in bf16" in said
    pefast.accelerate(model, attention=False, dropout=False, loss=False, peft=False, siblings=False)
    assert [type(module) for module in model.modules()] == before
    assert "bf16" not in pefast.explain(model)
    again = step(model)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_a_layer_by_itself():
    torch.manual_seed(0)
    linear = nn.Linear(96, 80)
    x = torch.randn(40, 96)
    results = {}
    for compute in (None, "bf16"):
        torch.manual_seed(1)
        layer = pefast.FusedLoRALinear.from_linear(linear, rank=4, compute=compute)
        nn.init.normal_(layer.lora_b)
        results[compute] = layer(x)
    near = nn.functional.linear(x.bfloat16(), linear.weight.bfloat16())
    assert results["bf16"].dtype == torch.float32 and not torch.equal(results[None], results["bf16"])
    assert (results["bf16"] - results[None]).abs().max() < 0.05 * near.float().abs().max()
    assert "products in bf16" in pefast.explain(layer)
    for make in (
        lambda: pefast.FusedLoRALinear(8, 8, compute="fp8"),
        lambda: pefast.accelerate(attached(), compute="fp8"),
    ):
        with pytest.raises(ValueError, match="compute is 'fp8'; None or 'bf16' would be right"):
            make()


def test_a_weight_that_trains_again_goes_pytorchs_way():
    model = pefast.accelerate(nn.Sequential(nn.Linear(32, 24).requires_grad_(False)), linear=True)
    assert isinstance(model[0], FrozenLinear)
    model.requires_grad_(True)
    model(torch.randn(20, 32)).sum().backward()
    assert model[0].weight.grad is not None


def test_attached_and_detached_over_it():
    model = build("bert").requires_grad_(False).eval()
    pefast.accelerate(model, compute="bf16")
    plain = model(input_ids=IDS).logits
    kinds = [type(module) for module in model.modules()]
    pefast.attach(model, [pefast.LoRA(rank=4), pefast.Adapter(size=8)])
    model(input_ids=IDS, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    pefast.detach(model)
    assert [type(module) for module in model.modules()] == kinds
    # detach leaves the base model ready to train, which PyTorch's own product is for
    assert torch.equal(model.requires_grad_(False)(input_ids=IDS).logits, plain)


def test_in_one_compiled_graph():
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64)).requires_grad_(False)
    fast = pefast.accelerate(copy.deepcopy(model), compute="bf16")
    x = torch.randn(40, 64, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got, right = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, fast))
    torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)
