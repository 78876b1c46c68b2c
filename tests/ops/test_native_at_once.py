"""The short road of one plain LoRA in bf16: the bits of the long road, and whom it lets through."""

import pytest
import torch
from torch.nn import Parameter

import pefast
from pefast.native import C
from pefast.native import delta_linear as native
from pefast.ops.delta_linear import Segment, delta_linear

pytestmark = pytest.mark.skipif(
    not native._SEES, reason="needs AMX, and a torch that shows its tensors to csrc"
)


def tensors(rows=(37,), k=70, n=45, r=5, masters=torch.float32, bias=True, conv1d=False) -> dict:
    """x, w, bias and a Segment's a and b, the same numbers at each call."""
    torch.manual_seed(3)
    w = Parameter(torch.randn(k, n).bfloat16() if conv1d else torch.randn(n, k).bfloat16(), False)
    return {
        "x": torch.randn(*rows, k).bfloat16().requires_grad_(),
        "w": w.t() if conv1d else w,
        "bias": Parameter(torch.randn(n).bfloat16(), False) if bias else None,
        "a": Parameter(torch.randn(r, k).to(masters)),
        "b": Parameter(torch.randn(n, r).to(masters)),
    }


def asked(given: dict, dropout=0.0) -> tuple:
    """What at_once() is asked about one call."""
    return tuple(given[name] for name in ("x", "w", "bias", "a", "b")) + (dropout,)


def step(given: dict, dropout=0.0, dy=None) -> dict:
    """y and the gradients of one call."""
    segment = Segment(given["a"], given["b"], 1.5, dropout=dropout)
    y = delta_linear(given["x"], given["w"], segment, given["bias"], seed=5)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16() if dy is None else dy)
    return {"y": y.detach()} | {f"d{name}": given[name].grad for name in ("x", "a", "b")}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": (2, 3, 7)},
        {"rows": ()},
        {"rows": (0,)},
        {"rows": (2, 0)},
        {"masters": torch.bfloat16},
        {"bias": False},
        {"conv1d": True},
        {"rows": (700,), "r": 64},
    ],
    ids=str,
)
def test_the_bits_of_the_long_road(options, dropout, monkeypatch):
    given = tensors(**options)
    assert native.at_once(*asked(given))
    short = step(given, dropout)
    monkeypatch.setattr(native, "_SEES", False)
    long = step(tensors(**options), dropout)
    assert all(torch.equal(short[name], long[name]) for name in long)
    assert all(short[name].dtype is long[name].dtype for name in long)


@pytest.mark.parametrize("kind", ["columns", "expanded"])
def test_a_gradient_with_gaps(kind, monkeypatch):
    dy = (
        torch.randn(45, 37).bfloat16().t() if kind == "columns" else torch.randn(45).bfloat16().expand(37, 45)
    )
    short = step(tensors(), dy=dy)
    monkeypatch.setattr(native, "_SEES", False)
    long = step(tensors(), dy=dy)
    assert all(torch.equal(short[name], long[name]) for name in long)


@pytest.mark.parametrize("frozen", ["x", "a", "b"])
def test_only_the_gradients_asked_for(frozen):
    given, whole = tensors(), step(tensors())
    given[frozen].requires_grad_(False)
    got = step(given)
    assert got.pop(f"d{frozen}") is None
    assert all(torch.equal(got[name], whole[name]) for name in got)


class Own(torch.Tensor):
    """A tensor of somebody else's."""


OTHERS = {
    "x in fp32": lambda t: t | {"x": t["x"].detach().float()},
    "x with gaps": lambda t: t | {"x": torch.randn(70, 37).bfloat16().t()},
    "x of another class": lambda t: t | {"x": t["x"].detach().as_subclass(Own)},
    "x elsewhere": lambda t: t | {"x": t["x"].detach().to("meta")},
    "x too narrow": lambda t: t | {"x": torch.randn(37, 69).bfloat16()},
    "w trains": lambda t: t | {"w": Parameter(t["w"].detach().clone())},
    "w for one call": lambda t: t | {"w": t["w"].detach().clone()},
    "bias trains": lambda t: t | {"bias": Parameter(t["bias"].detach().clone())},
    "bias too long": lambda t: t | {"bias": Parameter(torch.randn(46).bfloat16(), False)},
    "bias in fp64": lambda t: t | {"bias": Parameter(torch.randn(45).double(), False)},
    "a with gaps": lambda t: t | {"a": Parameter(torch.randn(70, 5).t())},
    "a in fp16": lambda t: t | {"a": Parameter(t["a"].detach().half())},
    "another rank": lambda t: t | {"a": Parameter(torch.randn(6, 70))},
    "b too short": lambda t: t | {"b": Parameter(torch.randn(44, 5))},
    "nothing learns": lambda t: {name: None if v is None else v.detach() for name, v in t.items()},
}


@pytest.mark.parametrize("name", OTHERS)
def test_whom_it_does_not_let_through(name):
    given = OTHERS[name](tensors())
    assert not native.at_once(*asked(given))


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "relu"},
        {"c": torch.ones(5)},
        {"d": torch.ones(45)},
        {"adapter": 0},
        {"a": None, "h": torch.ones(37, 5).bfloat16()},
    ],
    ids=str,
)
def test_segments_that_are_no_plain_lora(changes):
    t = tensors()
    segment = Segment(t["a"], t["b"])._replace(**changes)
    ids = torch.zeros(37, dtype=torch.int64) if segment.adapter is not None else None
    y = delta_linear(t["x"], t["w"], segment, t["bias"], ids=ids)
    assert type(y.grad_fn).__name__ != "_AtOnceBackward"


@pytest.mark.parametrize("dropout", [1.0, -0.1, 0, None, torch.tensor(0.1)], ids=str)
def test_rates_that_it_does_not_take(dropout):
    assert not native.at_once(*asked(tensors(), dropout))


def test_contexts_that_change_the_call():
    t = tensors()
    segment = Segment(t["a"], t["b"])
    assert native.at_once(*asked(t))
    with torch.autocast("cpu"):
        assert not native.at_once(*asked(t))
    with pefast.backend("eager"):
        y = delta_linear(t["x"], t["w"], segment, t["bias"])
        assert type(y.grad_fn).__name__ != "_AtOnceBackward"
    assert type(delta_linear(t["x"], t["w"], segment, t["bias"]).grad_fn).__name__ == "_AtOnceBackward"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_who_only_computes_goes_the_same_road(mode, dropout):
    t = tensors((2, 3, 7))
    segment = Segment(t["a"], t["b"], 1.5, dropout=dropout)
    with mode():
        assert native.at_once(*asked(t, dropout))
        y = delta_linear(t["x"], t["w"], segment, t["bias"], seed=5)
    assert y.grad_fn is None and not y.requires_grad and y.is_inference() is (mode is torch.inference_mode)
    # no gradient comes to x, which wants one elsewhere
    assert native.packed_bytes(t["w"]) == C.packed_size(70, 45) * 2
    assert torch.equal(y, step(t, dropout)["y"])


def test_a_weight_of_inference_mode():
    with torch.inference_mode():
        t = tensors()
        y = delta_linear(t["x"], t["w"], Segment(t["a"], t["b"]), t["bias"])
        again = delta_linear(t["x"], t["w"], Segment(t["a"], t["b"]), t["bias"])
        t["w"].data.mul_(2)
        assert torch.equal(again, y)
        assert not torch.equal(delta_linear(t["x"], t["w"], Segment(t["a"], t["b"]), t["bias"]), y)


def test_a_write_through_data_is_seen():
    given = tensors()
    before = step(given)["y"]
    given["w"].data.mul_(2)
    assert not torch.equal(step(given)["y"], before)


def test_no_second_derivative():
    t = tensors()
    y = delta_linear(t["x"], t["w"], Segment(t["a"], t["b"]), t["bias"])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), t["x"], create_graph=True)


def test_a_write_before_backward_is_refused():
    t = tensors()
    y = delta_linear(t["x"], t["w"], Segment(t["a"], t["b"]), t["bias"])
    with torch.no_grad():
        t["a"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("w", torch.zeros(45, 71).bfloat16(), "w is no bf16"),
        ("y", torch.zeros(45, 37).bfloat16().t(), "y has gaps"),
        ("a", torch.zeros(5, 71), "do not fit"),
        ("h", torch.zeros(37, 5, device="meta").bfloat16(), "h is no plain tensor on the CPU"),
        ("packed", None, "packed is no plain tensor on the CPU"),
        ("y", None, "y is no plain tensor on the CPU"),
    ],
)
def test_the_door_refuses_in_words(name, wrong, words):
    t = tensors()
    given = {name: t[name] for name in ("x", "w", "bias", "a", "b")}
    given |= {"packed": torch.zeros(9).bfloat16(), "mark": 0, "seed": None}
    given |= {"y": torch.zeros(37, 45).bfloat16(), "h": torch.zeros(37, 5).bfloat16(), name: wrong}
    with pytest.raises(ValueError, match=words):
        C.one_lora_forward(*given.values(), 1.0, 0.0, 1, None, None)


def test_the_doors_count_their_arguments():
    with pytest.raises(TypeError, match="2 arguments came; 6 would be right"):
        C.one_lora_fits(1, 2)
    with pytest.raises(TypeError, match="0 arguments came; 15 would be right"):
        C.one_lora_backward()
    room = torch.zeros(9).bfloat16()
    with pytest.raises(TypeError, match="int"):
        C.one_lora_forward(*asked(tensors())[:5], room, "no mark", None, room, room, 1.0, 0.0, 1, None, None)


def test_backward_wants_a_pack_for_dx():
    t = tensors()
    x, a, b, dy, h = t["x"], t["a"], t["b"], torch.zeros(37, 45).bfloat16(), torch.zeros(37, 5).bfloat16()
    with pytest.raises(ValueError, match="there is no packed weight"):
        C.one_lora_backward(
            dy, x, a, b, h, None, None, torch.empty_like(x), None, None, 1.0, 0.0, 1, None, False
        )


def test_ids_that_do_not_fit_are_refused_here_too():
    t = tensors()
    with pytest.raises(ValueError, match="one id for each of 37 rows"):
        delta_linear(
            t["x"], t["w"], Segment(t["a"], t["b"]), t["bias"], ids=torch.zeros(3, dtype=torch.int64)
        )
