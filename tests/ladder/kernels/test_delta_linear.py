"""delta_linear in Triton, on a GPU or in the interpreter: no worse than PyTorch, forward and backward."""

import pytest
import torch
from delta_linear_check import FORMS, ROADS, SEED, by_hand, check, dropped, hybrid, lora, taking
from pefast.kernels import activations, forms

from pefast.eager.activations import ACTIVATIONS
from pefast.ops.delta_linear import OP, Call, Needs, Segment, delta_linear
from pefast.testing import CASES, make_inputs

hand = OP.hands["triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# exp of what a mask leaves unread overflows in numpy, and the value is not used
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("road", ROADS)
def test_every_form_by_every_road(device, nan_filled_empty, road, form, dtype):
    with taking(hand, road):
        check(hand, FORMS[form], make_inputs("ragged", dtype), device)


@pytest.mark.parametrize("form", [lora, hybrid], ids=lambda form: form.__name__)
@pytest.mark.parametrize("case", CASES)
def test_every_size(device, nan_filled_empty, case, form):
    check(hand, form, make_inputs(case, torch.bfloat16), device)


@pytest.mark.parametrize("case", ["wide rank", "minilm", "rank above width"])
def test_sizes_in_fp32(device, nan_filled_empty, case):
    check(hand, dropped, make_inputs(case, torch.float32), device)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_activation(device, kind):
    # four times as wide, so that z reaches the bends; and within the series about zero
    inputs = make_inputs("tile multiple", torch.float32)
    inputs["a"] = inputs["a"] * torch.logspace(-2, 0.7, 16)[:, None]

    def bent(t):
        return {"segments": (Segment(t["a"], t["b"], 0.5, kind, t["c"] * 0.01),)}

    check(hand, bent, inputs, device)


def test_the_activations_are_the_eager_hands():
    assert tuple(ACTIVATIONS) == activations.KINDS


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_masters_on_a_narrow_weight(device, dtype, road):
    with taking(hand, road):
        check(hand, dropped, make_inputs("ragged", dtype, masters=torch.float32), device)


@pytest.mark.parametrize("road", ["whole", "split"])
@pytest.mark.parametrize("m", [16, 17, 64, 65, 130])
def test_every_choice_of_tiles(device, m, road):
    inputs = make_inputs("ragged", torch.bfloat16)
    inputs["x"], inputs["dy"] = torch.randn(m, 129).bfloat16(), torch.randn(m, 65).bfloat16()
    with taking(hand, road):
        check(hand, lora, inputs, device)


@pytest.mark.parametrize("rank", [8, 33, 100, 128, 200])
def test_ranks_of_one_tile_and_of_more(device, rank):
    inputs = make_inputs("ragged", torch.bfloat16)
    inputs["a"], inputs["b"] = torch.randn(rank, 129) / 11, torch.randn(65, rank) / 11
    check(hand, dropped, inputs, device)


def test_many_adapters_each_with_its_own_rows(device):
    inputs = make_inputs("ragged", torch.bfloat16)

    def many(t):
        ids = torch.arange(37, device=t["x"].device) // 4 - 1
        scales = [0.3 + 0.1 * i for i in range(12)]
        return {"segments": [Segment(t["a"], t["b"], s, adapter=i) for i, s in enumerate(scales)], "ids": ids}

    check(hand, many, inputs, device)


def test_many_strips_of_rows_and_tiles_in_groups(device):
    inputs = {
        "x": torch.randn(1300, 40),
        "w": torch.randn(150, 40) / 6,
        "a": torch.randn(5, 40) / 6,
        "b": torch.randn(150, 5),
        "bias": torch.randn(150),
        "dy": torch.randn(1300, 150),
    }
    check(hand, lora, inputs, device)


def test_any_strides(device):
    inputs = make_inputs("ragged", torch.bfloat16)
    inputs["x"] = torch.randn(129, 74).bfloat16().t()[::2]
    inputs["w"] = inputs["w"].t().contiguous().t()
    inputs["a"] = inputs["a"].t().contiguous().t()
    inputs["b"] = torch.randn(65, 6).bfloat16()[:, ::2]
    inputs["dy"] = torch.randn(37, 1).bfloat16().expand(37, 65)
    check(hand, dropped, inputs, device)


@pytest.mark.parametrize("road", ["whole", "split"])
def test_offsets_beyond_31_bits(device, road):
    if device == "cuda":
        pytest.skip("wants memory that is only promised, 6 GiB a tensor")
    from interpreter_guard import paused

    far = torch.empty(3 * 2**30, dtype=torch.float16)
    inputs = make_inputs("one row", torch.float16)
    x = far.as_strided((3, 64), (2**30, 1)).copy_(torch.randn(3, 64))
    w = far.as_strided((3, 64), (2**30, 1), 128).copy_(torch.randn(3, 64))
    call = Call(x, w, None, None, None, None, (Segment(inputs["a"], inputs["b"][:3]),))
    with paused(), taking(hand, road):
        y, ((h, _),) = hand.forward(call)
        near = call._replace(x=x.clone(), w=w.clone())
        assert torch.equal(y, hand.forward(near)[0]) and torch.equal(h, hand.forward(near)[1][0][0])


def test_the_saved_waist_has_no_scale(device):
    inputs = make_inputs("ragged", torch.float32)
    x, w, a, b = (inputs[name].to(device) for name in ("x", "w", "a", "b"))
    _, ((h, z),) = hand.forward(Call(x, w, None, None, None, None, (Segment(a, b, 3.0),)))
    assert z is None and torch.allclose(h, x @ a.t(), atol=1e-5)


def test_same_input_same_bits(device):
    inputs = make_inputs("minilm", torch.float16)
    first, second = by_hand(hand, hybrid, inputs, device), by_hand(hand, hybrid, inputs, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_is_needed(device):
    inputs = {name: value.to(device) for name, value in make_inputs("ragged", torch.float32).items()}
    call = Call(inputs["x"], inputs["w"], None, None, None, None, (Segment(inputs["a"], inputs["b"]),))
    _, saved = hand.forward(call)
    none = Needs(False, False, False, False, ((False,) * 5,))
    assert hand.backward(call, saved, inputs["dy"], none) == (None, None, None, None, [(None,) * 5])
    _, dw, _, _, ((da, db, *_),) = hand.backward(
        call, saved, inputs["dy"], Needs(False, True, False, False, ((False, True, False, False, False),))
    )
    assert da is None and db.shape == inputs["b"].shape
    assert torch.allclose(dw, inputs["dy"].t() @ inputs["x"], atol=1e-4)


def both(t):
    """What goes through every argument of the operators."""
    ids = torch.arange(37, device=t["x"].device) % 2
    lora_part = Segment(t["a"], t["b"], 0.5, dropout=0.3)
    adapter = Segment(t["a"] * 0.7, t["b"] * 0.9, 1.0, "gelu", t["c"], t["d"], adapter=1)
    return {"segments": (lora_part, adapter), "bias": t["bias"], "gain": t["gain"], "ids": ids, "seed": SEED}


def test_compiles_in_one_graph(device):
    inputs = {name: value.to(device) for name, value in make_inputs("ragged", torch.float32).items()}
    names = ("x", "a", "b", "c", "d", "gain")
    tensors = [inputs[name].requires_grad_() for name in names]

    def step(*tensors):
        t = inputs | dict(zip(names, tensors, strict=True))
        return delta_linear(t["x"], t["w"], **both(t), backend="triton")

    y = step(*tensors)
    y_compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    grads = [torch.autograd.grad(out, tensors, inputs["dy"]) for out in (y, y_compiled)]
    assert torch.equal(y, y_compiled)
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_the_operators_keep_the_registrys_rules(device):
    t = {name: value.to(device) for name, value in make_inputs("ragged", torch.float32).items()}
    checks = ("test_schema", "test_faketensor")
    call = Call(t["x"], t["w"], None, None, None, None, ())._replace(**both(t))
    flat = hand._flat(call)
    torch.library.opcheck(torch.ops.pefast.delta_linear_triton, (*flat, True), test_utils=checks)
    _, h, z, u = torch.ops.pefast.delta_linear_triton(*flat, True)
    for need_x, wanted in ((True, [True] * 4 + [False]), (False, [False] * 5), (True, [False] * 5)):
        given = (t["dy"], *flat, h, z, u, need_x, wanted * 2)
        torch.library.opcheck(torch.ops.pefast.delta_linear_triton_backward, given, test_utils=checks)


def test_refuses_in_words(device):
    inputs = {name: value.to(device) for name, value in make_inputs("ragged", torch.float32).items()}
    x, w, a, b = (inputs[name] for name in ("x", "w", "a", "b"))
    plain = Call(x, w, None, None, None, None, (Segment(a, b),))
    assert hand.refuse(plain) == ""
    assert "no segment" not in hand.refuse(plain) and "none came" in hand.refuse(plain._replace(segments=()))
    assert "seed" in hand.refuse(plain._replace(segments=(Segment(a, b, dropout=0.1),)))
    assert "one is on meta" in hand.refuse(plain._replace(bias=inputs["bias"].to("meta")))
    assert "float64" in hand.refuse(plain._replace(x=x.double(), w=w.double()))
    assert "one tensor is torch.int8" in hand.refuse(plain._replace(segments=(Segment(a.to(torch.int8), b),)))


def test_the_cost_model_takes_the_road_with_the_least_time():
    rates = forms.RATES["H100"]
    shape = forms.Shape(8192, 4096, 4096, 16)
    # at R = 64 the waist of every tile is half of the layer again; at few rows launches are what costs
    assert forms.choose(forms.forward, shape, rates, True) == "split"
    assert forms.choose(forms.forward, shape._replace(m=4), rates, True) == "whole"
    assert forms.choose(forms.forward, shape._replace(m=4), rates, False) == "split"
    assert forms.choose(forms.forward, shape._replace(m=4, r=65), rates, True) == "split"
    # a mask that every column of tiles draws again costs more than the layer
    assert forms.choose(forms.forward, shape._replace(m=512, dropout=True), rates, True) == "split"
    times = {road: forms.seconds(forms.forward(road, shape), rates) for road in ROADS}
    assert times["split"] < times["library"] and forms.library_only(shape, rates) == times["library"]
    waist, product = forms.forward("split", shape)
    assert waist.flops == 2 * 8192 * 4096 * 16 and product.flops == 2 * 8192 * 4096 * (4096 + 16)
    assert waist.read == 2 * (8192 * 4096 + 16 * 4096) and waist.written == 0
    assert product.seconds(rates) == product.flops / (rates.flops * forms.FUSED) + rates.gap
