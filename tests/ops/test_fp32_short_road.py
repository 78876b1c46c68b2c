"""The short road of one plain LoRA in fp32: the bits of the long one, whom it lets through, writes seen."""

import pytest
import torch
from torch.nn import Parameter

import pefast
from pefast.native import delta_linear as native
from pefast.native import delta_linear_fp32_short as short
from pefast.ops.delta_linear import Segment, delta_linear

pytestmark = pytest.mark.skipif(
    not native._SEES, reason="needs AMX, and a torch that shows its tensors to csrc"
)


def tensors(rows=(37,), k=70, n=45, r=5, bias=True, conv1d=False) -> dict:
    """x, w, bias and a Segment's a and b, the same numbers at each call."""
    torch.manual_seed(3)
    w = Parameter(torch.randn(k, n) if conv1d else torch.randn(n, k), False)
    return {
        "x": torch.randn(*rows, k).requires_grad_(),
        "w": w.t() if conv1d else w,
        "bias": Parameter(torch.randn(n), False) if bias else None,
        "a": Parameter(torch.randn(r, k)),
        "b": Parameter(torch.randn(n, r)),
    }


def forward(t: dict, dropout=0.0, compute=None):
    segment = Segment(t["a"], t["b"], 1.5, dropout=dropout)
    return delta_linear(t["x"], t["w"], segment, t["bias"], seed=5, compute=compute)


def step(t: dict, dropout=0.0, compute=None, dy=None) -> tuple:
    """y and the gradients of one call, and whether it went the short road."""
    y = forward(t, dropout, compute)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape) if dy is None else dy
    wanted = [t[name] for name in ("x", "a", "b") if t[name].requires_grad]
    went = type(y.grad_fn).__name__ == "_AtOnceBackward"
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)], went


def check(t: dict, *options, **more) -> None:
    """The first call packs the weight on the long road; the next ones have its bits."""
    long, went = step(t, *options, **more)
    assert not went
    for _ in range(2):
        got, went = step(t, *options, **more)
        assert went
        assert all(torch.equal(one, other) for one, other in zip(got, long, strict=True))


@pytest.mark.parametrize("compute", [None, "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "options",
    [{}, {"rows": (2, 3, 7)}, {"bias": False}, {"conv1d": True}, {"rows": (700,), "r": 64}],
    ids=str,
)
def test_the_bits_of_the_long_road(options, dropout, compute):
    check(tensors(**options), dropout, compute)


@pytest.mark.parametrize("kind", ["columns", "expanded"])
def test_a_gradient_with_gaps(kind):
    dy = torch.randn(45, 37).t() if kind == "columns" else torch.randn(45).expand(37, 45)
    check(tensors(), dy=dy)


@pytest.mark.parametrize("frozen", ["x", "a", "b"])
def test_only_the_gradients_asked_for(frozen):
    t = tensors()
    step(t)
    t[frozen].requires_grad_(False)
    got, went = step(t)
    assert went and len(got) == 3
    with pefast.backend("eager"):
        right, _ = step(t)
    assert all(torch.allclose(one, other, atol=1e-3) for one, other in zip(got, right, strict=True))


def test_who_only_computes(monkeypatch):
    t = tensors()
    opened = []
    monkeypatch.setattr(
        native, "short_road", lambda *given: opened.append(short.short_road(*given)) or opened[-1]
    )
    with torch.no_grad():
        first, second = forward(t), forward(t)
    assert opened[0] is None and opened[1] is not None
    assert torch.equal(first, second)
    # packed for y alone, which is too little for a call that learns
    check(t)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"x": torch.randn(7, 70).requires_grad_()},
        lambda t: t | {"x": torch.randn(70, 37).t().requires_grad_()},
        lambda t: t | {"w": Parameter(t["w"].detach().clone())},
        lambda t: t | {"bias": Parameter(t["bias"].detach().clone())},
        lambda t: t | {"a": Parameter(torch.randn(70, 5).t())},
        lambda t: t | {"w": t["w"].detach()},
    ],
    ids=["few rows", "x with gaps", "w trains", "bias trains", "a with gaps", "w is no parameter"],
)
def test_whom_it_does_not_let_through(change):
    t = tensors()
    step(t), step(t)
    t = change(t)
    assert native.at_once(t["x"], t["w"], t["bias"], t["a"], t["b"], 0.0) is None


def test_masters_in_another_dtype_go_the_long_road():
    t = tensors()
    step(t)
    t["a"], t["b"] = (Parameter(t[name].detach().bfloat16()) for name in ("a", "b"))
    assert native.at_once(t["x"], t["w"], t["bias"], t["a"], t["b"], 0.0) is None


def test_contexts_that_change_the_call():
    t = tensors()
    step(t)
    with torch.autocast("cpu"):
        assert not step(t)[1]
    with pefast.backend("eager"):
        assert not step(t)[1]
    assert step(t)[1]


@pytest.mark.parametrize("write", ["in place", "through .data"])
def test_a_write_to_the_weight_is_seen(write):
    t = tensors()
    before = [step(t) for _ in range(2)][-1][0]
    with torch.no_grad():
        (t["w"].data if write == "through .data" else t["w"]).mul_(2)
    (y, dx, *_), _ = step(t)
    with pefast.backend("eager"):
        right = step(t)[0]
    assert not torch.equal(y, before[0])
    assert torch.allclose(y, right[0], atol=1e-3) and torch.allclose(dx, right[1], atol=1e-3)
    assert step(t)[1]


def test_a_write_before_backward_is_refused():
    t = tensors()
    step(t)
    y = forward(t)
    with torch.no_grad():
        t["a"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_second_derivative():
    t = tensors()
    step(t)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(forward(t).sum(), t["x"], create_graph=True)


def test_the_same_bits_for_any_number_of_threads():
    t, before, seen = tensors((300,), 200, 150, 12), torch.get_num_threads(), []
    step(t)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got, went = step(t, 0.1)
            assert went
            seen.append(got)
    finally:
        torch.set_num_threads(before)
    for got in seen[1:]:
        assert all(torch.equal(one, other) for one, other in zip(got, seen[0], strict=True))
