"""A decoding step: few rows, no gradient, each row with adapters of its own, in one native call a layer."""

import copy

import pytest
import torch
from torch import nn

import pefast
from pefast.layers import decode
from pefast.native import WHY_NOT, C
from pefast.testing import assert_no_worse

pytestmark = pytest.mark.skipif(
    C is None or not C.delta_linear_here(), reason=WHY_NOT or "the kernel needs AMX tiles for bfloat16"
)

RANKS = {"one": 4, "two": 16, "odd": 5, "wide": 32, "thin": 1}
NAMES = list(RANKS)
# name: K, N, bias
LAYERS = {"ragged": (100, 70, True), "tiles": (128, 96, False), "narrow": (24, 7, True)}
# name: leading sizes of x, the adapter of each row or sequence
STEPS = {
    "one row": ((1, 1), ["two"]),
    "each its own": ((5, 1), NAMES),
    "some without": ((6, 1), ["one", None, "odd", None, "one", "wide"]),
    "two dimensions": ((4,), ["wide", "one", "one", "thin"]),
    "three tokens": ((3, 3), ["two", None, "odd"]),
    "as many as fit": ((32, 1), [*NAMES, None, "two", "two"] * 4),
}


def make(layer="ragged", dtype=torch.bfloat16, dropout=0.0):
    """A linear layer with five LoRAs that do something."""
    torch.manual_seed(0)
    k, n, bias = LAYERS[layer]
    model = nn.Sequential(nn.Linear(k, n, bias=bias, dtype=dtype))
    for name, rank in RANKS.items():
        pefast.attach(
            model, pefast.LoRA(rank=rank, alpha=2 * rank, dropout=dropout, targets=["0"]), name=name
        )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def planned(model):
    """Whether the layer's last step had a plan."""
    memory = model[0].__dict__.get("remembered")
    return memory is not None and memory.plan is not None


def by_formula(model, names, x, dtype):
    """The same step of a copy of the model in another dtype, by the general path."""
    other = copy.deepcopy(model).to(dtype)
    with pefast.route(other, names), pefast.backend("eager"), torch.no_grad():
        return other(x.to(dtype))


def check(model, names, x):
    """One step with a plan, close enough to the formula."""
    with pefast.route(model, names), torch.inference_mode():
        y = model(x)
    assert planned(model)
    near, exact = (by_formula(model, names, x, dtype) for dtype in (torch.bfloat16, torch.float64))
    assert_no_worse("y", y, near, exact)
    return y


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("layer", LAYERS)
def test_each_row_with_its_own_adapter(layer, step):
    model, (sizes, names) = make(layer), STEPS[step]
    check(model, names, torch.randn(*sizes, LAYERS[layer][0]).bfloat16())


def test_the_check_sees_a_scale_that_is_off_by_a_tenth(monkeypatch):
    plain = decode.RowDelta
    monkeypatch.setattr(decode, "RowDelta", lambda row, a, b, scale: plain(row, a, b, scale * 1.1))
    with pytest.raises(AssertionError, match="error"):
        check(make(), NAMES, torch.randn(5, 1, 100).bfloat16())


def test_several_active_adapters_on_every_row():
    model, x = make(), torch.randn(4, 1, 100).bfloat16()
    pefast.activate(model, ["one", "odd"])
    with torch.no_grad():
        y = model(x)
        with pefast.backend("eager"):
            near = model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert planned(model)
    assert_no_worse("y", y, near, exact)


def test_strided_rows():
    model = make()
    check(model, NAMES, torch.randn(100, 5).bfloat16().t())
    check(model, NAMES, torch.randn(5, 3, 100).bfloat16()[:, 1])
    check(model, NAMES, torch.randn(5, 3, 100).bfloat16()[:, :1])
    check(model, NAMES, torch.randn(5, 3, 200).bfloat16()[:, 1:2, ::2])


WRITES = {
    "an optimiser's step": lambda host: host.deltas["one"]["lora"].a.mul_(1.5),
    "a write through .data": lambda host: host.deltas["two"]["lora"].b.data.mul_(1.5),
    "a new parameter": lambda host: setattr(
        host.deltas["odd"]["lora"], "a", nn.Parameter(host.deltas["odd"]["lora"].a * 1.5)
    ),
    "a new scale": lambda host: setattr(host.deltas["odd"]["lora"], "scale", 3.0),
    "the weight": lambda host: host.weight.mul_(1.5),
    "the weight through .data": lambda host: host.weight.data.mul_(1.5),
    "the bias": lambda host: host.bias.mul_(1.5),
    "bf16 adapters": lambda host: host.deltas.bfloat16(),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_plan_ends_with_a_write(write):
    model, x = make(), torch.randn(5, 1, 100).bfloat16()
    before = check(model, NAMES, x)
    with torch.no_grad():
        WRITES[write](model[0])
    after = check(model, NAMES, x)
    assert (write == "bf16 adapters") or not torch.equal(before, after)


def test_a_plan_ends_with_a_write_to_half_of_each_number():
    model = make("tiles")
    b, x = model[0].deltas["two"]["lora"].b, torch.randn(5, 1, model[0].in_features).bfloat16()
    # 1 and 2 differ in their upper halves alone
    b.data.fill_(1.0)
    before = check(model, NAMES, x)
    b.data.fill_(2.0)
    assert not torch.equal(check(model, NAMES, x), before)


def test_a_plan_ends_with_its_adapter():
    model, x = make(), torch.randn(5, 1, 100).bfloat16()
    check(model, NAMES, x)
    pefast.detach(model, "odd")
    pefast.attach(model, pefast.LoRA(rank=8, targets=["0"]), name="odd")
    nn.init.normal_(model[0].deltas["odd"]["lora"].b)
    check(model.eval(), NAMES, x)
    pefast.detach(model)
    assert type(model[0]) is nn.Linear and "remembered" not in vars(model[0])


def test_what_else_computes_goes_the_general_way():
    model, x = make(dropout=0.5), torch.randn(5, 1, 100).bfloat16()
    check(model, NAMES, x)
    with pefast.route(model, NAMES), torch.no_grad():
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x)) and planned(model)
    pefast.activate(model, "one")
    with torch.no_grad():
        y = model(x)
        pefast.merge(model)
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        pefast.unmerge(model)
        assert torch.equal(model(x), y)
    assert model(x).requires_grad
    fp32 = make(dtype=torch.float32)
    with pefast.route(fp32, NAMES), torch.no_grad():
        y = fp32(x.float())
    exact = by_formula(fp32, NAMES, x, torch.float64)
    assert_no_worse("y", y, by_formula(fp32, NAMES, x, torch.float32), exact)


def test_a_step_of_a_model_wrapped_by_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16))
    for name, rank in RANKS.items():
        config = peft.LoraConfig(r=rank, target_modules=["0"], lora_dropout=0.1)
        model = peft.get_peft_model(model, config, name) if name == "one" else model
        if name != "one":
            model.add_adapter(name, config)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.5)
    names, x = ["wide", "__base__", "one", "wide", "thin"], torch.randn(5, 1, 64).bfloat16()
    fast = pefast.accelerate(copy.deepcopy(model.eval()))

    def compared():
        with torch.no_grad():
            y, near = (each(x, adapter_names=names) for each in (fast, model))
            exact = copy.deepcopy(model).double()(x.double(), adapter_names=names)
        memory = fast.base_model.model[0].remembered
        assert memory.plan is not None
        assert_no_worse("y", y, near, exact)
        return y

    before = compared()
    for each in (model, fast):
        each.base_model.model[0].set_scale("wide", 3.0)
    assert not torch.equal(compared(), before)
    for each in (model, fast):
        torch.manual_seed(1)
        each.delete_adapter("thin")
        each.add_adapter("thin", peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
        each.eval()
    compared()


def test_ids_that_do_not_fit_are_refused_as_ever():
    model = make()
    with pefast.route(model, NAMES), torch.no_grad(), pytest.raises(ValueError, match="ids"):
        model(torch.randn(4, 1, 100).bfloat16())


def test_a_copy_begins_without_a_plan():
    model, x = make(), torch.randn(5, 1, 100).bfloat16()
    y = check(model, NAMES, x)
    other = copy.deepcopy(model)
    assert not planned(other)
    assert torch.equal(check(other, NAMES, x), y)


def test_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 900, dtype=torch.bfloat16))
    pefast.attach(model, pefast.LoRA(rank=16, targets=["0"]))
    nn.init.normal_(model[0].deltas["default"]["lora"].b)
    x, before, found = torch.randn(8, 1, 600).bfloat16(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(model(x))
    finally:
        torch.set_num_threads(before)
    assert planned(model) and all(torch.equal(found[0], y) for y in found)
