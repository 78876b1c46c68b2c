"""What one call of a delta_linear hand must satisfy, sound or with a planted fault."""

import contextlib

import torch

from pefast.ops.delta_linear import Call, Needs, Segment, reference
from pefast.testing import assert_no_worse

SEED = torch.tensor([2**40 + 11])
SCALE = 0.75
ROADS = ("whole", "split", "library")


def lora(t):
    """One LoRA and a bias: the commonest call."""
    return {"segments": (Segment(t["a"], t["b"], SCALE),), "bias": t["bias"]}


def dropped(t):
    """The same with dropout on its input."""
    return {"segments": (Segment(t["a"], t["b"], SCALE, dropout=0.3),), "bias": t["bias"]}


def hybrid(t):
    """LoRA and an activated adapter side by side, each with its own mask, the adapter with its own biases."""
    first = Segment(t["a"], t["b"], SCALE, dropout=0.3)
    adapter = Segment(t["a"] * 0.7, t["b"] * 0.9, 1.5, "silu", t["c"], t["d"], 0.1)
    return {"segments": (first, adapter)}


def activated(t):
    """Two activations, a bias of the waist and a gain, without masks: all of it fits one walk."""
    first = Segment(t["a"], t["b"], SCALE, "gelu", t["c"])
    second = Segment(t["a"] * 0.7, t["b"] * 0.9, 1.5, "relu")
    return {"segments": (first, second), "gain": t["gain"], "bias": t["bias"]}


def routed(t):
    """Two adapters on different rows, one on all, and a gain."""
    ids = torch.arange(t["x"].shape[0], device=t["x"].device) % 3 - 1
    first, second = (
        Segment(t["a"], t["b"], 0.5, adapter=0),
        Segment(t["a"], t["b"], 1.0, "tanh", t["c"], adapter=1),
    )
    every = Segment(t["a"], t["b"] * 0.3, d=t["d"])
    return {"segments": (first, second, every), "ids": ids, "gain": t["gain"], "bias": t["bias"]}


def one_of_many(t):
    """One segment that belongs to every third row, with a bias of the delta."""
    ids = torch.arange(t["x"].shape[0], device=t["x"].device) % 3
    return {"segments": (Segment(t["a"], t["b"], 0.5, d=t["d"], adapter=1),), "ids": ids}


def given(t):
    """A waist that was computed elsewhere, for some rows, beside a LoRA."""
    ids = torch.arange(t["x"].shape[0], device=t["x"].device) % 2
    h = t["x"][:, : t["b"].shape[1]] * 0.5
    elsewhere = Segment(None, t["b"], 2.0, h=h, d=t["d"], adapter=1)
    return {"segments": (elsewhere, Segment(t["a"], t["b"], SCALE)), "ids": ids}


@contextlib.contextmanager
def taking(hand, road):
    """Inside, the hand takes this road wherever it can, whatever the cost model says."""
    choose = hand.forms.choose
    hand.forms.choose = lambda direction, s, rates, whole: road if whole or road != "whole" else "split"
    try:
        yield
    finally:
        hand.forms.choose = choose


FORMS = {form.__name__: form for form in (lora, dropped, hybrid, activated, routed, one_of_many, given)}


def by_formula(form, inputs, dtype):
    """y and the gradient of every input that takes part, by the formula in `dtype`, on the CPU."""
    leaves = {
        name: t.detach().to(dtype).requires_grad_(name not in ("w", "dy")) for name, t in inputs.items()
    }
    y = reference(leaves["x"], leaves["w"], **form(leaves), seed=SEED)
    y.backward(leaves["dy"])
    gradients = {f"d{name}": t.grad for name, t in leaves.items() if t.grad is not None}
    return {"y": y.detach(), **gradients}


class ByHand(torch.autograd.Function):
    """A call of a hand, which may be a mutant, as the operation itself would wire it."""

    @staticmethod
    def forward(ctx, hand, call, *tensors):
        y, saved = hand.forward(call)
        ctx.hand, ctx.call, ctx.saved, ctx.tensors = hand, call, saved, tensors
        return y

    @staticmethod
    def backward(ctx, dy):
        need = ctx.needs_input_grad[2:]
        fives = [need[at : at + 5] for at in range(4, len(need), 5)]
        dx, dw, dbias, dgain, deltas = ctx.hand.backward(ctx.call, ctx.saved, dy, Needs(*need[:4], fives))
        return None, None, dx, dw, dbias, dgain, *(t for five in deltas for t in five)


def by_hand(hand, form, inputs, device):
    """The same as by_formula by a hand."""
    leaves = {
        name: t.detach().to(device).requires_grad_(name not in ("w", "dy")) for name, t in inputs.items()
    }
    wanted = form(leaves)
    segments = wanted["segments"]
    tensors = [leaves["x"], leaves["w"], wanted.get("bias"), wanted.get("gain")]
    tensors += [t for s in segments for t in (s.a, s.b, s.c, s.d, s.h)]
    call = Call(*tensors[:4], wanted.get("ids"), SEED, segments)
    y = ByHand.apply(hand, call, *tensors)
    y.backward(leaves["dy"])
    gradients = {f"d{name}": t.grad.cpu() for name, t in leaves.items() if t.grad is not None}
    return {"y": y.detach().cpu(), **gradients}


def check(hand, form, inputs, device):
    """Fails unless y and every gradient are as close to the formula as PyTorch's own."""
    dtype = inputs["x"].dtype
    got = by_hand(hand, form, inputs, device)
    near, exact = by_formula(form, inputs, dtype), by_formula(form, inputs, torch.float64)
    assert got.keys() == exact.keys()
    for name in exact:
        wanted = inputs[name[1:]].dtype if name != "y" else dtype
        assert got[name].dtype == wanted, f"{name} is {got[name].dtype}, not {wanted}"
        assert_no_worse(name, got[name], near[name].to(wanted), exact[name])
