"""What one call of a delta_linear hand must satisfy, sound or with a planted fault."""

import torch

from pefast.ops.delta_linear import Call, Needs, Segment, reference
from pefast.testing import assert_no_worse

SEED = torch.tensor([2**40 + 11])
SCALE = 0.75
GRADIENTS = ("x", "a", "b", "bias")


def by_formula(inputs, rate, dtype):
    """y and the gradients by the formula in `dtype`, on the CPU."""
    values = {name: value.detach().to(dtype) for name, value in inputs.items()}
    leaves = {name: values[name].requires_grad_() for name in GRADIENTS}
    segment = Segment(leaves["a"], leaves["b"], SCALE, dropout=rate)
    y = reference(leaves["x"], values["w"], (segment,), leaves["bias"], seed=SEED)
    y.backward(values["dy"])
    return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def by_hand(hand, inputs, rate, device):
    """The same by a hand, which may be a mutant, and its waist."""
    on_device = {name: value.to(device) for name, value in inputs.items()}
    x, w, bias, a, b, dy = (on_device[name] for name in ("x", "w", "bias", "a", "b", "dy"))
    call = Call(x, w, bias, None, None, SEED, (Segment(a, b, SCALE, dropout=rate),))
    y, saved = hand.forward(call)
    needs = Needs(True, False, True, False, ((True, True, False, False, False),))
    dx, _, dbias, _, ((da, db, *_),) = hand.backward(call, saved, dy, needs)
    found = {"y": y, "dx": dx, "da": da, "db": db, "dbias": dbias}
    return {name: value.cpu() for name, value in found.items()}


def check(hand, inputs, rate, device):
    """Fails unless y and every gradient are as close to the formula as PyTorch's own."""
    dtype = inputs["x"].dtype
    got = by_hand(hand, inputs, rate, device)
    near, exact = by_formula(inputs, rate, dtype), by_formula(inputs, rate, torch.float64)
    for name in exact:
        wanted = inputs[name[1:]].dtype if name != "y" else dtype
        assert got[name].dtype == wanted, f"{name} is {got[name].dtype}, not {wanted}"
        assert_no_worse(name, got[name], near[name].to(wanted), exact[name])
