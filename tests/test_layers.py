"""FusedLoRALinear as a module: what loads into it, what it shares, what it computes, keeps and refuses."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pefast
from pefast.ops.delta_linear import Segment, reference
from pefast.testing import assert_no_worse
from tests.models import assert_close, saved_bytes, stir

K, N, R = 48, 40, 4

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def fused(**options) -> pefast.FusedLoRALinear:
    """A layer of K to N whose update is not zero."""
    torch.manual_seed(1)
    return stir(pefast.FusedLoRALinear(K, N, **{"rank": R, **options}))


def formula(layer: pefast.FusedLoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's own parameters in the formula, without dropout."""
    return reference(x, layer.weight, [Segment(layer.lora_a, layer.lora_b, layer.scale)], layer.bias)


def run(function, layer, x, dy):
    """y and every gradient, by name."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    names = ("x", "lora_a", "lora_b")
    gradients = torch.autograd.grad(y, (x, layer.lora_a, layer.lora_b), dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def assert_formula(layer, x):
    """y and gradients are no worse than the plain formula in the layer's dtype."""
    dy = torch.randn(*x.shape[:-1], N).to(x.dtype)
    wide = copy.deepcopy(layer).double()
    got = run(layer, layer, x, dy)
    near = run(lambda t: formula(layer, t), layer, x, dy)
    exact = run(lambda t: formula(wide, t), wide, x.double(), dy.double())
    for name, right in exact.items():
        if x.dtype == torch.float64:
            # nothing is more exact: another order of the sums is all that may differ
            assert_close(got[name], right, 1e-14)
        else:
            assert_no_worse(name, got[name], near[name], right)


def test_it_starts_as_the_frozen_layer():
    torch.manual_seed(1)
    layer, x = pefast.FusedLoRALinear(K, N, rank=R), torch.randn(7, K)
    assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), 1e-6)
    assert isinstance(layer, nn.Linear)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    assert layer.lora_a.shape == (R, K) and layer.lora_b.shape == (N, R)
    assert not layer.lora_b.any()
    # PEFT's start: uniform within 1 / sqrt(K)
    assert layer.lora_a.abs().max() <= 1 / math.sqrt(K) and layer.lora_a.std() > 0.4 / math.sqrt(K)


def test_a_linear_layers_state_dict_loads():
    linear, layer, x = nn.Linear(K, N), fused(), torch.randn(3, K)
    update = layer.lora_a.detach().clone(), layer.lora_b.detach().clone()
    assert not any(layer.load_state_dict(linear.state_dict(), strict=True))
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert torch.equal(layer.lora_a, update[0]) and torch.equal(layer.lora_b, update[1])
    again = pefast.FusedLoRALinear(K, N, rank=R)
    again.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(again(x), layer(x))


def test_half_an_update_does_not_load():
    state = fused().state_dict()
    del state["lora_b"]
    with pytest.raises(RuntimeError, match="lora_b"):
        pefast.FusedLoRALinear(K, N, rank=R).load_state_dict(state)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_from_linear_shares_the_weight(bias):
    linear = nn.Linear(K, N, bias=bias).eval()
    layer, x = pefast.FusedLoRALinear.from_linear(linear, rank=R), torch.randn(5, K)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad and not layer.training
    assert_close(layer(x), linear(x), 1e-6)
    assert_formula(stir(layer), x)


def test_from_conv1d_shares_the_weight():
    conv = Conv1D(N, K)
    nn.init.normal_(conv.bias)
    layer, x = pefast.FusedLoRALinear.from_linear(conv, rank=R), torch.randn(2, 5, K)
    assert layer.weight.shape == (N, K)
    assert layer.weight.data_ptr() == conv.weight.data_ptr()
    assert_close(layer(x), conv(x), 1e-6)
    assert_formula(stir(layer), x)


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 3, 5), (0,), (2, 0)], ids=str)
def test_leading_dimensions(lead):
    layer = fused()
    x = torch.randn(*lead, K)
    assert layer(x).shape == (*lead, N)
    assert_formula(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_it_computes_the_formula(dtype, bias):
    layer = fused(bias=bias, dtype=dtype, alpha=7)
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_a.dtype == layer.lora_b.dtype == masters
    assert_formula(layer, torch.randn(33, K).to(dtype))


def test_an_input_that_is_not_contiguous():
    assert_formula(fused(), torch.randn(K, 9).t())


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 1.0),
        ({"alpha": 8}, 2.0),
        ({"alpha": 8, "rslora": True}, 4.0),
        ({"rslora": True}, 2.0),
        ({"alpha": 0.5}, 0.125),
    ],
    ids=str,
)
def test_the_scale(options, scale):
    layer, x = fused(**options), torch.randn(6, K)
    assert layer.scale == scale
    right = x @ layer.weight.t() + layer.bias + scale * (x @ layer.lora_a.t() @ layer.lora_b.t())
    assert_close(layer(x), right)


def test_under_autocast():
    layer, x = fused(), torch.randn(9, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_a.grad.dtype == layer.lora_b.grad.dtype == x.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        near = formula(layer, x.bfloat16()).bfloat16()
    assert_no_worse(
        "y", y.detach(), near.detach(), formula(copy.deepcopy(layer).double(), x.double()).detach()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_computes_the_same(dtype):
    layer, x = fused(dtype=dtype, alpha=6).eval(), torch.randn(20, K).to(dtype)
    before = layer.weight.clone()
    linear = layer.merged()
    assert type(linear) is nn.Linear and linear.weight.dtype == dtype and not linear.training
    assert torch.equal(layer.weight, before)
    right = before.double() + layer.scale * (layer.lora_b.double() @ layer.lora_a.double())
    # one rounding to the weight's dtype
    step = torch.finfo(dtype).eps
    assert (linear.weight.double() - right).abs().max() <= step * right.abs().max()
    assert_close(linear(x), layer(x), 2 * step if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_somebody_writes_to_counts_at_once(dtype):
    layer, x = fused(dtype=dtype, alpha=3), torch.randn(40, K).to(dtype)
    other = nn.Linear(K, N, dtype=dtype)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(-1.5)
    assert_formula(layer, x)
    layer.load_state_dict(other.state_dict())
    assert_formula(layer, x)
    layer.weight = nn.Parameter(torch.randn(N, K).to(dtype), requires_grad=False)
    assert_formula(layer, x)
    layer.weight.data = torch.randn(N, K).to(dtype)
    assert_formula(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_weight_at_an_old_address_is_a_new_weight(dtype):
    memory, x = bytearray(N * K * dtype.itemsize), torch.randn(40, K).to(dtype)
    for seed in range(3):
        layer = fused(dtype=dtype)
        weight = torch.frombuffer(memory, dtype=dtype).view(N, K)
        weight.copy_(torch.randn(N, K, generator=torch.Generator().manual_seed(seed)))
        layer.weight = nn.Parameter(weight, requires_grad=False)
        assert_formula(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_mode(dtype):
    layer, x = fused(dtype=dtype), torch.randn(40, K).to(dtype)
    right = layer(x).detach()
    with torch.inference_mode():
        assert torch.equal(layer(x), right)
        inside, given = fused(dtype=dtype), torch.randn(40, K).to(dtype)
        assert_close(inside(given), formula(inside, given), 2**-6 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(layer(x).detach(), right)


def test_merged_without_bias():
    assert fused(bias=False).merged().bias is None


def test_a_deep_copy_stands_alone():
    layer, x = fused(), torch.randn(4, K)
    right = layer(x).detach()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), right)
    stir(twin, seed=5)
    assert torch.equal(layer(x), right) and not torch.equal(twin(x), right)


def test_dropout_is_for_training_and_follows_the_seed():
    layer, x = fused(dropout=0.5), torch.randn(16, K)

    def seeded(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    layer.eval()
    assert torch.equal(seeded(1), seeded(2))
    assert_close(layer(x), formula(layer, x))


def test_dropout_keeps_the_mean():
    layer, x = fused(dropout=0.4), torch.randn(4, K)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(2000)]).double().mean(0)
        update = formula(layer, x) - nn.functional.linear(x, layer.weight, layer.bias)
        # 2000 draws: the mean of an update's element strays by a few per cent of the largest
        assert (mean - formula(layer, x)).abs().max() < 0.1 * update.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["plain", "dropout"])
def test_it_saves_the_input_the_waist_and_a_seed(dtype, rate):
    rows = 64
    layer = fused(dtype=dtype, dropout=rate)
    x = torch.randn(rows, K).to(dtype).requires_grad_()
    kept = saved_bytes(lambda: layer(x), layer)
    assert kept == rows * (K + R) * dtype.itemsize + (8 if rate else 0)


def test_the_same_run_gives_the_same_bits():
    layer, x, dy = fused(dropout=0.2), torch.randn(50, K), torch.randn(50, N)

    def once():
        torch.manual_seed(2)
        return run(layer, layer, x, dy)

    first = once()
    assert all(torch.equal(first[name], value) for name, value in once().items())


@pytest.mark.slow
def test_it_compiles_in_one_graph():
    torch.compiler.reset()
    layer, x, dy = fused(), torch.randn(10, K), torch.randn(10, N)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    right = run(layer, layer, x, dy)
    for name, value in run(compiled, layer, x, dy).items():
        assert_close(value, right[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": True}, "rank is True"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": math.nan}, "dropout is nan"),
    ],
    ids=str,
)
def test_bad_settings_say_what_would_be_right(options, said):
    for make in (
        lambda: pefast.FusedLoRALinear(K, N, **options),
        lambda: pefast.FusedLoRALinear.from_linear(nn.Linear(K, N), **options),
    ):
        with pytest.raises(ValueError, match=r"^FusedLoRALinear: ") as error:
            make()
        assert said in str(error.value)


def test_bad_settings_leave_the_linear_layer_as_it_was():
    linear = nn.Linear(K, N)
    with pytest.raises(ValueError, match="rank"):
        pefast.FusedLoRALinear.from_linear(linear, rank=0)
    assert linear.weight.requires_grad and linear.bias.requires_grad


def test_from_linear_of_something_else():
    with pytest.raises(TypeError, match=r"from_linear: got Embedding; nn\.Linear or Conv1D"):
        pefast.FusedLoRALinear.from_linear(nn.Embedding(3, 4))


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.randn(3, K + 1), f"x has {K + 1} columns"),
        (torch.randn(3, K).double(), "x is torch.float64 and the weight torch.float32"),
    ],
    ids=["width", "dtype"],
)
def test_an_input_that_does_not_fit_says_so(x, said):
    with pytest.raises(ValueError, match=r"^delta_linear: ") as error:
        fused()(x)
    assert said in str(error.value)
