"""What one call of a prefix_attention hand must satisfy, sound or with a planted fault."""

import torch

from pefast.ops.prefix_attention import Call, reference
from pefast.testing import assert_no_worse

SEED = torch.tensor([2**40 + 11])
LEAVES = ("q", "k", "v", "prefix_k", "prefix_v")
# B, H, G, L, S, P, D
CASES = {
    "one of each": (1, 1, 1, 1, 1, 1, 16),
    "ragged": (2, 3, 3, 37, 45, 5, 32),
    "no prefix": (2, 2, 2, 70, 70, 0, 64),
    "decode, grouped": (3, 8, 2, 1, 77, 3, 64),
    "grouped": (2, 6, 2, 33, 50, 7, 80),
    "wide head": (1, 2, 1, 45, 95, 1, 128),
    "long": (1, 2, 2, 150, 180, 130, 16),
    "prefix alone": (2, 2, 2, 9, 0, 6, 16),
    "grouped and long": (2, 4, 2, 20, 140, 7, 24),
    "three tiles": (2, 4, 2, 20, 60, 7, 24),
    "narrow and long": (1, 1, 1, 16, 1024, 3, 16),
    "zero rows": (0, 2, 2, 4, 4, 2, 16),
}


def plain(b, l, s):
    return {}


def causal(b, l, s):
    return {"causal": s >= l}


def padded_right(b, l, s):
    length = torch.arange(b) * 7 % max(1, s)
    return {"mask": (torch.arange(s) < s - length[:, None])[:, None, None]}


def everything(b, l, s):
    """Padded left, so that the first rows see nothing but the prefix, causal, and dropped."""
    length = torch.arange(b) * 7 % max(1, s)
    see = (torch.arange(s) >= length[:, None])[:, None, None].expand(-1, 1, l, -1)
    return causal(b, l, s) | {"mask": see, "dropout": 0.25, "scale": 0.2}


FORMS = {form.__name__: form for form in (plain, causal, padded_right, everything)}


def make_inputs(case, dtype, shared=True):
    b, h, g, l, s, p, d = CASES[case]
    generator = torch.Generator().manual_seed(1)
    prefix = (g, p, d) if shared else (b, g, p, d)
    shapes = {"q": (b, h, l, d), "do": (b, h, l, d), "k": (b, g, s, d), "v": (b, g, s, d)}
    shapes |= {"prefix_k": prefix, "prefix_v": prefix} if p else {}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def by_formula(inputs, dtype, **options):
    t = {name: inputs[name].detach().to(dtype).requires_grad_() for name in LEAVES if name in inputs}
    o = reference(**t, seed=SEED, **options)
    o.backward(inputs["do"].to(dtype))
    return {"o": o.detach()} | {f"d{name}": tensor.grad for name, tensor in t.items()}


def by_hand(hand, inputs, device, mask=None, causal=False, scale=None, dropout=0.0):
    t = [inputs[name].detach().to(device) if name in inputs else None for name in LEAVES]
    scale = inputs["q"].shape[3] ** -0.5 if scale is None else scale
    mask = None if mask is None else mask.to(device)
    call = Call(*t, mask, causal, scale, dropout, SEED if dropout else None, None)
    o, lse = hand.forward(call)
    found = hand.backward(call, o, lse, inputs["do"].to(device), [tensor is not None for tensor in t])
    gradients = {f"d{name}": g.detach().cpu() for name, g in zip(LEAVES, found, strict=True) if g is not None}
    return {"o": o.detach().cpu()} | gradients


def check(hand, inputs, device, **options):
    dtype = inputs["q"].dtype
    got = by_hand(hand, inputs, device, **options)
    near, exact = (by_formula(inputs, at, **options) for at in (dtype, torch.float64))
    assert got.keys() == exact.keys()
    for name in exact:
        assert_no_worse(name, got[name], near[name], exact[name])
