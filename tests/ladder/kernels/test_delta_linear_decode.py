"""A decoding step in Triton, on a GPU or in the interpreter: no worse than PyTorch, whoever each row asks."""

import pytest
import torch
from pefast.kernels import delta_linear_decode

from pefast.native.delta_linear_decode import RowDelta
from pefast.testing import assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# name: rows, K, N, the rank of each row's adapter in turn; None is the base model
STEPS = {
    "one row": (1, 64, 48, [8]),
    "ragged ranks": (5, 100, 70, [1, 3, 8, 16, 64]),
    "some without": (6, 129, 65, [4, None, 5, None]),
    "nobody": (3, 48, 40, [None]),
    "every row": (16, 256, 130, [16]),
    "strips of K": (16, 1100, 200, [3, None, 16]),
    "tiles of slots": (16, 300, 40, [64, 33, 17]),
}


def make(name, dtype, masters=None):
    """x, w, bias, gain and the deltas of a step."""
    m, k, n, ranks = STEPS[name]
    torch.manual_seed(1)
    distinct = {
        r: (torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5) for r in {*ranks} if r is not None
    }
    rows = [(row, ranks[row % len(ranks)]) for row in range(m)]
    kind = masters or dtype
    pairs = {r: (a.to(kind), b.to(kind)) for r, (a, b) in distinct.items()}
    deltas = [RowDelta(row, *pairs[r], 0.25 + r / 64) for row, r in rows if r is not None]
    x, w = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    return x, w, torch.randn(n).to(dtype), torch.randn(n).to(dtype), deltas


def by_formula(x, w, bias, gain, deltas, dtype):
    """(x wᵀ + each row's delta) ⊙ gain + bias in `dtype`."""
    y = x.to(dtype) @ w.to(dtype).t()
    for delta in deltas:
        h = x[delta.row].to(dtype) @ delta.a.to(dtype).t()
        y[delta.row] += delta.scale * (delta.b.to(dtype) @ h)
    y = y if gain is None else y * gain.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def check(x, w, bias, gain, deltas, device, hand=delta_linear_decode):
    """Fails unless a plan's step is as close to the formula as PyTorch's own."""
    # rows with one adapter share its tensors
    moved = {id(t): t.to(device) for delta in deltas for t in (delta.a, delta.b)}
    there = [delta._replace(a=moved[id(delta.a)], b=moved[id(delta.b)]) for delta in deltas]
    x_there, w_there, bias_there, gain_there = (
        None if t is None else t.to(device) for t in (x, w, bias, gain)
    )
    plan = hand.Plan(w_there, bias_there, there, len(x), gain_there)
    y = plan.run(x_there).cpu()
    near, exact = (by_formula(x, w, bias, gain, deltas, dtype) for dtype in (x.dtype, torch.float64))
    assert y.dtype == x.dtype
    assert_no_worse("y", y, near, exact)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_each_row_with_its_own_rank(device, nan_filled_empty, step, dtype):
    x, w, bias, gain, deltas = make(step, dtype)
    check(x, w, bias, None, deltas, device)
    check(x, w, None, gain, deltas, device)


@pytest.mark.parametrize("step", ["strips of K", "tiles of slots"])
def test_fp32_masters_beside_a_narrow_weight(device, step):
    x, w, bias, gain, deltas = make(step, torch.bfloat16, torch.float32)
    check(x, w, bias, gain, deltas, device)
