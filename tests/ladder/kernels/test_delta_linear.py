"""The Triton LoRA, on a GPU or in the interpreter: no worse than PyTorch, forward and backward."""

import pytest
import torch
from delta_linear_check import SEED, by_hand, check

from pefast.ops.delta_linear import OP, Call, Needs, Segment, delta_linear
from pefast.testing import CASES, make_inputs

hand = OP.hands["triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TAKEN = [name for name, (_, _, _, rank) in CASES.items() if rank <= 64]


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TAKEN)
def test_forward_and_gradients(device, nan_filled_empty, case, dtype, rate):
    check(hand, make_inputs(case, dtype), rate, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_masters_on_a_narrow_weight(device, dtype):
    check(hand, make_inputs("ragged", dtype, masters=torch.float32), 0.3, device)


@pytest.mark.parametrize("m", [16, 17, 64, 65, 130])
def test_every_choice_of_tiles(device, m):
    inputs = make_inputs("ragged", torch.bfloat16)
    inputs["x"], inputs["dy"] = torch.randn(m, 129).bfloat16(), torch.randn(m, 65).bfloat16()
    check(hand, inputs, 0.3, device)


@pytest.mark.parametrize("rank", [8, 100, 128])
def test_ranks_that_16_bits_take(device, rank):
    inputs = make_inputs("ragged", torch.bfloat16)
    inputs["a"], inputs["b"] = torch.randn(rank, 129) / 11, torch.randn(65, rank) / 11
    check(hand, inputs, 0.3, device)


def test_many_strips_of_rows_and_tiles_in_groups(device):
    inputs = {
        "x": torch.randn(1300, 40),
        "w": torch.randn(150, 40) / 6,
        "a": torch.randn(5, 40) / 6,
        "b": torch.randn(150, 5),
        "bias": torch.randn(150),
        "dy": torch.randn(1300, 150),
    }
    check(hand, inputs, 0.0, device)


def test_any_strides(device):
    inputs = make_inputs("ragged", torch.bfloat16)
    inputs["x"] = torch.randn(129, 74).bfloat16().t()[::2]
    inputs["w"] = inputs["w"].t().contiguous().t()
    inputs["a"] = inputs["a"].t().contiguous().t()
    inputs["b"] = torch.randn(65, 6).bfloat16()[:, ::2]
    inputs["dy"] = torch.randn(37, 1).bfloat16().expand(37, 65)
    check(hand, inputs, 0.3, device)


def test_offsets_beyond_31_bits(device):
    if device == "cuda":
        pytest.skip("wants memory that is only promised, 6 GiB a tensor")
    from interpreter_guard import paused

    far = torch.empty(3 * 2**30, dtype=torch.float16)
    inputs = make_inputs("one row", torch.float16)
    x = far.as_strided((3, 64), (2**30, 1)).copy_(torch.randn(3, 64))
    w = far.as_strided((3, 64), (2**30, 1), 128).copy_(torch.randn(3, 64))
    call = Call(x, w, None, None, None, None, (Segment(inputs["a"], inputs["b"][:3]),))
    with paused():
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
    first, second = by_hand(hand, inputs, 0.3, device), by_hand(hand, inputs, 0.3, device)
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


def test_compiles_in_one_graph(device):
    inputs = {name: value.to(device) for name, value in make_inputs("ragged", torch.float32).items()}
    tensors = [inputs[name].requires_grad_() for name in ("x", "a", "b")]

    def step(x, a, b):
        segment = Segment(a, b, 0.5, dropout=0.3)
        return delta_linear(x, inputs["w"], segment, inputs["bias"], seed=SEED, backend="triton")

    y = step(*tensors)
    y_compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    grads = [torch.autograd.grad(out, tensors, inputs["dy"]) for out in (y, y_compiled)]
    assert torch.equal(y, y_compiled)
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_the_operators_keep_the_registrys_rules(device):
    inputs = {name: value.to(device) for name, value in make_inputs("ragged", torch.float32).items()}
    x, w, bias, a, b, dy = (inputs[name] for name in ("x", "w", "bias", "a", "b", "dy"))
    checks = ("test_schema", "test_faketensor")
    call = (x, w, bias, a, b, 0.5, 0.3, SEED)
    torch.library.opcheck(torch.ops.pefast.delta_linear_triton, call, test_utils=checks)
    h = torch.ops.pefast.delta_linear_triton(*call)[1]
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        call = (dy, x, w, a, b, h, 0.5, 0.3, SEED, *wanted)
        torch.library.opcheck(torch.ops.pefast.delta_linear_triton_backward, call, test_utils=checks)


def test_refuses_in_words(device):
    inputs = {name: value.to(device) for name, value in make_inputs("ragged", torch.float32).items()}
    x, w, a, b = (inputs[name] for name in ("x", "w", "a", "b"))
    plain = Call(x, w, None, None, None, None, (Segment(a, b),))
    wide = Segment(a.new_empty(65, 129), b.new_empty(65, 65))
    double = plain._replace(x=x.double(), w=w.double())
    assert hand.refuse(plain) == ""
    assert "one segment, 2 came" in hand.refuse(plain._replace(segments=plain.segments * 2))
    assert "gain" in hand.refuse(plain._replace(gain=inputs["gain"]))
    assert "relu" in hand.refuse(plain._replace(segments=(Segment(a, b, activation="relu"),)))
    assert "one adapter" in hand.refuse(plain._replace(segments=(Segment(a, b, adapter=0),)))
    assert "rank 65" in hand.refuse(plain._replace(segments=(wide,)))
    assert "float64" in hand.refuse(double)
