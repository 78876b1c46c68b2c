"""delta_linear: every hand against the formula, for the result and each gradient."""

import pytest
import torch

from pefast.eager.activations import ACTIVATIONS
from pefast.ops import Segment, delta_linear
from pefast.ops.delta_linear import OP, Call, reference
from pefast.testing import CASES, assert_no_worse, make_inputs

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SEED = torch.tensor([20240917])


def plain(t):
    """One LoRA."""
    return {"segments": (Segment(t["a"], t["b"], 0.5),)}


def with_bias(t):
    return {"segments": (Segment(t["a"], t["b"], 2.0),), "bias": t["bias"]}


def dropped(t):
    """One LoRA with dropout on its input."""
    return {"segments": (Segment(t["a"], t["b"], 0.5, dropout=0.25),), "bias": t["bias"], "seed": SEED}


def hybrid(t):
    """LoRA and an activated adapter side by side, each with its own dropout."""
    lora = Segment(t["a"], t["b"], 0.5, dropout=0.1)
    adapter = Segment(t["a"] * 0.7, t["b"] * 0.9, 1.5, "silu", t["c"], t["d"], 0.3)
    return {"segments": (lora, adapter), "seed": SEED}


def routed(t):
    """Two adapters on different rows, one on all, and a gain."""
    ids = torch.arange(t["x"].shape[0]) % 3 - 1
    first, second = (
        Segment(t["a"], t["b"], 0.5, adapter=0),
        Segment(t["a"], t["b"], 1.0, "tanh", t["c"], adapter=1),
    )
    every = Segment(t["a"], t["b"] * 0.3, 1.0, d=t["d"])
    return {"segments": (first, second, every), "ids": ids, "gain": t["gain"], "bias": t["bias"]}


FROZEN = {"plain": ("w", "dy", "bias"), "with_bias": ("w", "dy", "bias"), "dropped": ("w", "dy", "bias")}
FORMS = {form.__name__: form for form in (plain, with_bias, dropped, hybrid, routed)}


def leaves(form, inputs, dtype):
    """The inputs in a dtype, those that train as leaves of the graph."""
    frozen = FROZEN.get(form, ("w", "dy"))
    return {name: v.to(dtype).detach().requires_grad_(name not in frozen) for name, v in inputs.items()}


def run(function, form, inputs, dtype, **options):
    """The result and every gradient of one form of the call."""
    t = leaves(form, inputs, dtype)
    y = function(t["x"], t["w"], **FORMS[form](t), **options)
    y.backward(t["dy"])
    return {"y": y.detach()} | {
        f"d{name}": tensor.grad for name, tensor in t.items() if tensor.grad is not None
    }


def pooled(function, form, case, dtype, at, **options):
    """Results over three draws of the inputs in one row: one small draw says little about an error."""
    runs = [run(function, form, make_inputs(case, dtype, seed=seed), at, **options) for seed in range(3)]
    return {name: torch.cat([one[name].flatten() for one in runs]) for name in runs[0]}


def refusal(backend, form, case, dtype):
    t = leaves(form, make_inputs(case, dtype), dtype)
    call = Call(t["x"], t["w"], None, None, None, None, ())._replace(**FORMS[form](t))
    return OP.why_not(backend, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", OP.backends)
def test_forward_and_gradients(backend, form, case, dtype):
    if why := refusal(backend, form, case, dtype):
        pytest.skip(why)
    got = pooled(delta_linear, form, case, dtype, dtype, backend=backend)
    near, exact = (pooled(reference, form, case, dtype, at) for at in (dtype, torch.float64))
    assert got.keys() == exact.keys()
    for name in exact:
        if dtype == torch.float64:
            # the formula has no wider dtype to be compared in: two orders of the same sums
            torch.testing.assert_close(got[name], exact[name], rtol=1e-11, atol=1e-11, msg=name)
        else:
            assert_no_worse(name, got[name], near[name], exact[name])


@pytest.mark.parametrize("backend", OP.backends)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masters_in_fp32_beside_a_half_weight(backend, dtype):
    """a and b may be wider than x; their gradients come in their own dtype."""
    t = make_inputs("tile multiple", dtype, masters=torch.float32)
    call = Call(t["x"], t["w"], None, None, None, None, plain(t)["segments"])
    if why := OP.why_not(backend, call):
        pytest.skip(why)
    a, b = t["a"].requires_grad_(), t["b"].requires_grad_()
    y = delta_linear(t["x"], t["w"], Segment(a, b, 0.5), backend=backend)
    y.backward(t["dy"])
    assert y.dtype == dtype and a.grad.dtype == b.grad.dtype == torch.float32
    ra, rb = (v.detach().to(dtype).double().requires_grad_() for v in (a, b))
    exact = reference(t["x"].double(), t["w"].double(), (Segment(ra, rb, 0.5),))
    exact.backward(t["dy"].double())
    na, nb = (v.detach().to(dtype).requires_grad_() for v in (a, b))
    near = reference(t["x"], t["w"], (Segment(na, nb, 0.5),))
    near.backward(t["dy"])
    assert_no_worse("y", y.detach(), near.detach(), exact.detach())
    for got, wide, like in ((a, ra, na), (b, rb, nb)):
        assert_no_worse("gradient", got.grad.to(dtype), like.grad, wide.grad)


@pytest.mark.parametrize("backend", OP.backends)
def test_strided_inputs(backend):
    """Rows apart, a transposed weight as Conv1D has it, an expanded gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        t = make_inputs("ragged", dtype)
        wide = torch.full((t["x"].shape[0], 200), float("nan"), dtype=dtype)
        wide[:, : t["x"].shape[1]] = t["x"]
        x, w = wide[:, : t["x"].shape[1]], t["w"].t().contiguous().t()
        call = Call(x, w, None, None, None, None, plain(t)["segments"])
        if why := OP.why_not(backend, call):
            pytest.skip(why)
        a = t["a"].requires_grad_()
        x.requires_grad_()
        delta_linear(x, w, Segment(a, t["b"], 0.5), backend=backend).sum().backward()
        dense = [t["x"].clone().requires_grad_(), t["a"].detach().clone().requires_grad_()]
        y = delta_linear(dense[0], t["w"], Segment(dense[1], t["b"], 0.5), backend=backend)
        y.backward(torch.ones_like(y))
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        for got, want in ((x.grad, dense[0].grad), (a.grad, dense[1].grad)):
            # in units of the largest value, as the sums behind them are long
            torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), **close)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_every_activation(activation):
    t = make_inputs("rank one", torch.float64)
    x, a, b, c, d = (t[name].requires_grad_() for name in ("x", "a", "b", "c", "d"))
    x = x[:5].detach().requires_grad_()

    def formula(function, **options):
        def of(x, a, b, c, d):
            segment = Segment(a, b, 0.7, activation, c, d, 0.25)
            return function(x, t["w"], (segment,), gain=t["gain"], seed=SEED, **options)

        return of

    assert torch.autograd.gradcheck(formula(reference), (x, a, b, c, d))
    assert torch.autograd.gradcheck(formula(delta_linear, backend="eager"), (x, a, b, c, d))


def test_a_waist_from_elsewhere():
    """h given: the second half alone, its gradient goes back to h."""
    t = make_inputs("ragged", torch.float64)
    h = torch.randn(t["x"].shape[0], 3, dtype=torch.float64, requires_grad=True)
    b = t["b"].requires_grad_()
    for function in (reference, delta_linear):
        h.grad = b.grad = None
        y = function(t["x"], t["w"], (Segment(None, b, 0.5, h=h, d=t["d"]),), t["bias"])
        y.backward(t["dy"])
        torch.testing.assert_close(y, t["x"] @ t["w"].t() + 0.5 * (h @ b.t() + t["d"]) + t["bias"])
        torch.testing.assert_close(h.grad, 0.5 * t["dy"] @ b)
        torch.testing.assert_close(b.grad, 0.5 * t["dy"].t() @ h)


def test_the_weight_trains_where_it_is_asked_to():
    t = make_inputs("ragged", torch.float64)
    w = t["w"].requires_grad_()
    delta_linear(t["x"], w, plain(t)["segments"]).backward(t["dy"])
    torch.testing.assert_close(w.grad, t["dy"].t() @ t["x"])


def test_leading_dimensions_and_ids_by_sequence():
    t = make_inputs("tile multiple", torch.float64)
    x = t["x"].view(4, 16, -1)
    segments = (Segment(t["a"], t["b"], adapter=0), Segment(t["a"], t["b"], 3.0, adapter=1))
    ids = torch.tensor([0, 1, -1, 0])
    y = delta_linear(x, t["w"], segments, ids=ids)
    assert y.shape == (4, 16, t["w"].shape[0])
    for row, scale in enumerate((1.0, 3.0, 0.0, 1.0)):
        torch.testing.assert_close(y[row], reference(x[row], t["w"], (Segment(t["a"], t["b"], scale),)))


@pytest.mark.parametrize("backend", OP.backends)
@pytest.mark.parametrize("form", ["with_bias", "dropped"])
def test_same_bits_run_to_run(backend, form):
    for dtype in (torch.float32, torch.bfloat16):
        if refusal(backend, form, "minilm", dtype):
            continue
        first, second = (
            run(delta_linear, form, make_inputs("minilm", dtype), dtype, backend=backend) for _ in range(2)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", OP.backends)
def test_no_output_is_left_unwritten(backend):
    """With deterministic algorithms torch fills every new tensor with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            if not refusal(backend, "dropped", "ragged", dtype):
                got = run(delta_linear, "dropped", make_inputs("ragged", dtype), dtype, backend=backend)
                assert all(value.isfinite().all() for value in got.values())
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.are_deterministic_algorithms_enabled()


FAULTS = {
    "scale 1 % wrong": lambda t: t | {"b": t["b"] * 1.01},
    "last rank dropped": lambda t: t | {"a": torch.cat((t["a"][:-1], 0 * t["a"][-1:]))},
    "last input column dropped": lambda t: t | {"x": torch.cat((t["x"][:, :-1], 0 * t["x"][:, -1:]), 1)},
    "last row dropped": lambda t: t | {"x": torch.cat((t["x"][:-1], 0 * t["x"][-1:]))},
    "bias forgotten": lambda t: t | {"bias": 0 * t["bias"]},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    """The measure of closeness must see each of these in fp32, or it would not see them in a kernel."""
    inputs = make_inputs("ragged", torch.float32)
    exact = run(reference, "with_bias", inputs, torch.float64)["y"]
    near = run(reference, "with_bias", inputs, torch.float32)["y"]
    assert_no_worse("healthy", run(delta_linear, "with_bias", inputs, torch.float32)["y"], near, exact)
    wrong = run(delta_linear, "with_bias", FAULTS[fault](inputs), torch.float32)["y"]
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse(fault, wrong, near, exact)


def test_another_mask_in_backward_is_caught():
    """A backward that made another mask than forward would be seen in da."""
    inputs = make_inputs("ragged", torch.float32)
    exact, near = (run(reference, "dropped", inputs, at) for at in (torch.float64, torch.float32))
    other = dict(FORMS)
    try:
        FORMS["dropped"] = lambda t: dropped(t) | {"seed": SEED + 1}
        wrong = run(delta_linear, "dropped", inputs, torch.float32)
    finally:
        FORMS.update(other)
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse("da", wrong["da"], near["da"], exact["da"])


@pytest.mark.parametrize("form", ["with_bias", "hybrid"])
def test_compiles_in_one_graph_cold(form):
    torch._dynamo.reset()
    inputs = make_inputs("ragged", torch.float32)
    compiled = torch.compile(delta_linear, fullgraph=True, backend="aot_eager")
    plain_run, graph_run = (
        run(delta_linear, form, inputs, torch.float32),
        run(compiled, form, inputs, torch.float32),
    )
    for name in plain_run:
        torch.testing.assert_close(graph_run[name], plain_run[name])


def test_autocast_gives_x_and_w_its_dtype():
    t = make_inputs("tile multiple", torch.float32)
    a = t["a"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = delta_linear(t["x"], t["w"], Segment(a, t["b"]))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert a.grad.dtype == torch.float32


def test_a_second_derivative_is_refused():
    t = make_inputs("ragged", torch.float64)
    x = t["x"].requires_grad_()
    y = delta_linear(x, t["w"], plain(t)["segments"])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_inputs_are_never_written_to():
    inputs = make_inputs("ragged", torch.float32)
    before = {name: value.clone() for name, value in inputs.items()}
    run(delta_linear, "hybrid", inputs, torch.float32)
    assert all(torch.equal(before[name], inputs[name]) for name in inputs)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: {"w": t["w"][:, :-1]}, "x has 129 columns"),
        (lambda t: {"w": t["w"].double()}, "one dtype, or autocast"),
        (
            lambda t: {"segments": Segment(t["a"], t["b"], activation="swoosh")},
            "no activation 'swoosh'; there are",
        ),
        (lambda t: {"segments": Segment(t["a"], t["b"], dropout=1.0)}, "dropout is 1.0"),
        (lambda t: {"segments": Segment(t["a"][:, :-1], t["b"])}, "do not fit a weight of"),
        (lambda t: {"segments": Segment(t["a"], t["b"], adapter=0)}, "ids must say"),
        (lambda t: {"segments": Segment(t["a"], t["b"], h=t["x"])}, "either a or h"),
        (lambda t: {"segments": (), "ids": torch.zeros(5)}, "one id for each of 37 rows"),
        (
            lambda t: {"segments": Segment(t["a"], t["b"]), "backend": "abacus"},
            "there is no back end 'abacus'",
        ),
    ],
)
def test_bad_calls_get_one_sentence(change, text):
    t = make_inputs("ragged", torch.float32)
    call = {"x": t["x"], "w": t["w"]} | change(t)
    with pytest.raises(ValueError, match=text):
        delta_linear(call.pop("x"), call.pop("w"), **call)
