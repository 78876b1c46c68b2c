"""partial_linear in Triton, on a GPU or in the interpreter: the gradient of chosen entries."""

import pytest
import torch

from pefast.ops import Index, partial_linear
from pefast.ops.partial_linear import OP, reference, take
from pefast.testing import assert_no_worse

hand = OP.hands["triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# name: M, N, K, kind, chosen, tile
CASES = {
    "rows": (70, 96, 130, "rows", 7, (1, 1)),
    "one row of x": (1, 40, 64, "rows", 2, (1, 1)),
    "all rows": (33, 100, 40, "rows", 100, (1, 1)),
    "columns": (70, 150, 96, "columns", 7, (1, 1)),
    "all columns": (33, 40, 70, "columns", 70, (1, 1)),
    "tiles": (50, 64, 96, "tiles", 5, (16, 32)),
    "flat tiles": (41, 60, 63, "tiles", 11, (5, 3)),
    "wide tiles": (20, 150, 140, "tiles", 1, (150, 140)),
    "elements": (50, 100, 150, "elements", 400, (1, 1)),
    "one element": (9, 70, 130, "elements", 1, (1, 1)),
    "all elements": (20, 66, 40, "elements", 66 * 40, (1, 1)),
    "nothing": (20, 30, 40, "elements", 0, (1, 1)),
    "no rows of x": (0, 30, 40, "rows", 3, (1, 1)),
    "strips of rows": (400, 30, 40, "columns", 3, (1, 1)),
    "strips of rows, elements": (300, 30, 40, "elements", 50, (1, 1)),
}


def make(case, dtype, masters=None):
    """x, w, bias, dy, values and index of a case."""
    m, n, k, kind, count, tile = CASES[case]
    torch.manual_seed(2)
    total = {"rows": n, "columns": k, "tiles": (n // tile[0]) * (k // tile[1]), "elements": n * k}[kind]
    index = Index(kind, torch.randperm(total)[:count].sort().values, tile)
    given = {"x": torch.randn(m, k), "w": torch.randn(n, k) / k**0.5, "bias": torch.randn(n)}
    given |= {"dy": torch.randn(m, n)}
    given = {name: t.to(dtype) for name, t in given.items()}
    values = take(given["w"].double(), index) + torch.randn(index.sizes((n, k))) / k**0.5
    return given | {"values": values.to(masters or dtype), "index": index}


def run(function, given, dtype, **options):
    """y and the gradients of x, values and bias, in dtype where they are not wider."""
    wide = {name: given[name].to(dtype) for name in ("x", "w", "bias", "dy")}
    values = given["values"].to(dtype) if dtype == torch.float64 else given["values"]
    leaves = {name: t.detach().requires_grad_() for name, t in (wide | {"values": values}).items()}
    y = function(leaves["x"], wide["w"], leaves["values"], given["index"], leaves["bias"], **options)
    y.backward(wide["dy"])
    return {"y": y.detach()} | {f"d{name}": leaves[name].grad for name in ("x", "values", "bias")}


def check(given, device):
    """Fails unless the hand's result and gradients are as close to the formula as PyTorch's own."""
    dtype = given["x"].dtype
    there = {name: t.to(device) for name, t in given.items() if name != "index"}
    index = given["index"]._replace(at=given["index"].at.to(device))
    got = run(partial_linear, there | {"index": index}, dtype, backend="triton")
    near, exact = run(reference, given, dtype), run(reference, given, torch.float64)
    assert got["dvalues"].dtype == given["values"].dtype
    for name in exact:
        assert_no_worse(name, got[name].cpu(), near[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_index(device, nan_filled_empty, case, dtype):
    check(make(case, dtype), device)
