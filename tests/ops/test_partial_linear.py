"""partial_linear: every hand against the formula, the result and every gradient."""

import pytest
import torch

from pefast.dispatch import backend as on_backend
from pefast.eager import partial_linear as eager
from pefast.ops import Index, partial_linear
from pefast.ops.partial_linear import OP, Call, mask, put, reference, take
from pefast.testing import assert_no_worse, make_inputs

# name: case of sizes, kind, share of the entries, tile
CASES = {
    "few rows": ("minilm", "rows", 0.01, (1, 1)),
    "one row of x": ("one row", "rows", 0.05, (1, 1)),
    "many rows": ("ragged", "rows", 0.6, (1, 1)),
    "all rows": ("tile multiple", "rows", 1.0, (1, 1)),
    "few columns": ("minilm", "columns", 0.01, (1, 1)),
    "ragged columns": ("ragged", "columns", 0.05, (1, 1)),
    "many columns": ("ragged", "columns", 0.6, (1, 1)),
    "few tiles": ("minilm", "tiles", 0.01, (16, 32)),
    "flat tiles": ("ragged", "tiles", 0.3, (5, 3)),
    "few elements": ("minilm", "elements", 0.01, (1, 1)),
    "ragged elements": ("ragged", "elements", 0.1, (1, 1)),
    "all elements": ("rank one", "elements", 1.0, (1, 1)),
    "no elements": ("ragged", "elements", 0.0, (1, 1)),
    "no rows": ("ragged", "rows", 0.0, (1, 1)),
    "no rows of x": ("zero rows", "rows", 0.2, (1, 1)),
    "no rows of x, elements": ("zero rows", "elements", 0.2, (1, 1)),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def choose(kind, share, n, k, tile=(1, 1), seed=0) -> Index:
    """A seeded index of about that share of [n, k]."""
    total = {"rows": n, "columns": k, "tiles": (n // tile[0]) * (k // tile[1]), "elements": n * k}[kind]
    count = max(1, round(share * total)) if share else 0
    generator = torch.Generator().manual_seed(seed)
    return Index(kind, torch.randperm(total, generator=generator)[:count].sort().values, tile)


def make(case, dtype, masters=None, seed=0):
    """x, w, bias, dy of a case, its index and values."""
    sizes, kind, share, tile = CASES[case]
    given = make_inputs(sizes, dtype, seed=seed)
    index = choose(kind, share, *given["w"].shape, tile, seed)
    generator = torch.Generator().manual_seed(seed + 7)
    shape = index.sizes(given["w"].shape)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64) * given["w"].shape[1] ** -0.5
    values = take(given["w"].double(), index) + noise
    return {
        **{name: given[name] for name in ("x", "w", "bias", "dy")},
        "values": values.to(masters or dtype),
        "index": index,
    }


def run(function, given, dtype, bias=True, **options):
    """y and the gradients of x, values and bias, in dtype where they are not wider."""
    wide = {name: given[name].to(dtype) for name in ("x", "w", "bias", "dy")}
    values = given["values"].to(dtype) if dtype == torch.float64 else given["values"]
    leaves = {"x": wide["x"].detach().requires_grad_(), "values": values.detach().requires_grad_()}
    if bias:
        leaves["bias"] = wide["bias"].detach().requires_grad_()
    y = function(leaves["x"], wide["w"], leaves["values"], given["index"], leaves.get("bias"), **options)
    y.backward(wide["dy"])
    return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def check(got, near, exact):
    for name in exact:
        if got[name].dtype == torch.float64:
            torch.testing.assert_close(got[name], exact[name], rtol=1e-11, atol=1e-11)
        else:
            assert_no_worse(name, got[name], near[name], exact[name])


def refused(backend, given) -> str:
    parts = ((given["values"], given["index"]),)
    return OP.why_not(backend, Call(given["x"], given["w"], given["bias"], parts))


@pytest.mark.parametrize("masters", [None, torch.float32], ids=["own dtype", "fp32 masters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", OP.backends)
def test_forward_and_gradients(backend, case, dtype, masters, nan_filled_empty):
    if masters and dtype != torch.bfloat16:
        pytest.skip("masters are wider than the weight")
    given = make(case, dtype, masters)
    if why := refused(backend, given):
        pytest.skip(why)
    for bias in (True, False):
        got = run(partial_linear, given, dtype, bias, backend=backend)
        assert got["dvalues"].dtype == given["values"].dtype
        check(got, run(reference, given, dtype, bias), run(reference, given, torch.float64, bias))


@pytest.mark.parametrize("kind", ["rows", "columns", "tiles", "elements"])
@pytest.mark.parametrize("backend", OP.backends)
def test_a_transposed_weight_and_leading_dimensions(backend, kind):
    """What a Conv1D holds, and what a transformer hands over."""
    case = {"rows": "few rows", "columns": "few columns", "tiles": "few tiles", "elements": "few elements"}
    for dtype in (torch.float32, torch.bfloat16):
        given = make(case[kind], dtype)
        if why := refused(backend, given):
            pytest.skip(why)
        near, exact = run(reference, given, dtype), run(reference, given, torch.float64)
        given["w"] = given["w"].t().contiguous().t()
        got = run(partial_linear, given, dtype, backend=backend)
        check(got, near, exact)

        def deep(x, w, values, index, bias, backend=backend):
            y = partial_linear(x.unflatten(0, (2, 4, -1)), w, values, index, bias, backend)
            return y.flatten(0, 2)

        same = run(deep, given, dtype)
        assert all(torch.equal(same[name], got[name]) for name in got)


def test_several_indices_of_one_weight():
    given = make("ragged elements", torch.float64)
    n, k = given["w"].shape
    rows = Index("rows", torch.tensor([0, 4, 9]))
    left = given["index"].at[~mask(rows, (n, k)).view(-1)[given["index"].at]]
    indices = [rows, Index("elements", left)]
    values = [torch.randn(at.sizes((n, k)), dtype=torch.float64, requires_grad=True) for at in indices]
    x = given["x"].requires_grad_()
    for these in (indices, indices[:1], indices[1:]):
        some = values[: len(these)] if these[0] is rows else values[1:]
        found = [
            torch.autograd.grad(function(x, given["w"], some, these).square().sum(), (x, *some))
            for function in (partial_linear, reference)
        ]
        for got, right in zip(*found, strict=True):
            torch.testing.assert_close(got, right)


def test_only_what_is_asked_for_and_a_weight_that_trains():
    given = make("few rows", torch.float64)
    x, w, values = given["x"], given["w"].requires_grad_(), given["values"]
    y = partial_linear(x, w, values, given["index"])
    (dw,) = torch.autograd.grad(y.square().sum(), w)
    (right,) = torch.autograd.grad(reference(x, w, values, given["index"]).square().sum(), w)
    torch.testing.assert_close(dw, right)
    assert not dw[given["index"].at].any()
    assert not partial_linear(x, w.detach(), values, given["index"]).requires_grad


def test_the_elements_of_a_wide_weight_come_some_rows_at_a_time(monkeypatch):
    given = make("ragged elements", torch.float64)
    right = run(partial_linear, given, torch.float64, backend="eager")
    n, k = given["w"].shape
    sizes = []
    product = torch.mm
    monkeypatch.setattr(eager, "_AT_ONCE", 7 * k)
    monkeypatch.setattr(torch, "mm", lambda *two: sizes.append(product(*two).numel()) or product(*two))
    got = run(partial_linear, given, torch.float64, backend="eager")
    torch.testing.assert_close(got["dvalues"], right["dvalues"])
    # dx is the only product as large as x; of dw at most seven rows live at once
    assert sorted(sizes)[-2] <= 7 * k and len(sizes) > n // 7


def test_gradcheck():
    for case in ("ragged columns", "flat tiles", "ragged elements", "many rows"):
        given = make(case, torch.float64)
        x, values, bias = (given[name][:5].requires_grad_() for name in ("x", "values", "bias"))
        values, bias = given["values"].requires_grad_(), given["bias"].requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, v, b, w=given["w"], at=given["index"]: partial_linear(x, w, v, at, b), (x, values, bias)
        )


@pytest.mark.parametrize("kind", ["rows", "columns", "tiles", "elements"])
def test_what_is_put_can_be_taken(kind):
    w = torch.randn(20, 24)
    index = choose(kind, 0.2, 20, 24, (4, 6) if kind == "tiles" else (1, 1))
    values = torch.randn(index.sizes(w.shape))
    full = put(w, values, index)
    assert torch.equal(take(full, index), values)
    chosen = mask(index, w.shape)
    assert int(chosen.sum()) == values.numel()
    assert torch.equal(full[~chosen], w[~chosen]) and not torch.equal(full, w)
    assert torch.equal(put(w, take(w, index), index), w)


@pytest.mark.parametrize("backend", OP.backends)
@pytest.mark.parametrize("case", ["few rows", "few columns", "few tiles", "few elements"])
def test_same_input_same_bits(case, backend):
    given = make(case, torch.bfloat16)
    if why := refused(backend, given):
        pytest.skip(why)
    first, second = (run(partial_linear, given, torch.bfloat16, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", ["few rows", "few columns", "few tiles", "few elements"])
@pytest.mark.parametrize("backend", OP.backends)
def test_it_compiles_in_one_graph(backend, case):
    torch.compiler.reset()
    given = make(case, torch.bfloat16, torch.float32)
    if why := refused(backend, given):
        pytest.skip(why)
    right = run(partial_linear, given, torch.bfloat16, backend=backend)
    compiled = torch.compile(partial_linear, fullgraph=True, backend="aot_eager")
    with on_backend(backend):
        got = run(compiled, given, torch.bfloat16)
    for name in right:
        torch.testing.assert_close(got[name], right[name])


def test_autocast_gives_both_one_dtype():
    given = make("few rows", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(partial_linear, given, torch.float32)
    assert got["y"].dtype == torch.bfloat16 and got["dx"].dtype == got["dvalues"].dtype == torch.float32
    half = {name: given[name].bfloat16() for name in ("x", "w", "bias", "dy")}
    near = run(reference, {**given, **half}, torch.bfloat16)
    assert_no_worse("y", got["y"], near["y"], run(reference, given, torch.float64)["y"])


@pytest.mark.parametrize("fault", ["a row moved", "one value lost", "old weight in dx"])
def test_planted_faults_are_caught(fault):
    given = make("few rows", torch.float32)
    near, exact = run(reference, given, torch.float32), run(reference, given, torch.float64)
    index, values = given["index"], given["values"]
    if fault == "a row moved":
        given["index"] = index._replace(at=(index.at + 1) % given["w"].shape[0])
    elif fault == "one value lost":
        values = values.clone()
        values[0] = given["w"][index.at[0]]
        given["values"] = values
    got = run(partial_linear, given, torch.float32)
    if fault == "old weight in dx":
        got["dx"] = given["dy"] @ given["w"]
    with pytest.raises(AssertionError, match="error"):
        check(got, near, exact)


def test_bad_calls_get_one_sentence():
    given = make("few rows", torch.float32)
    x, w, values, index = (given[name] for name in ("x", "w", "values", "index"))
    for wrong, said in (
        ((x[:, 1:], w, values, index), "x has 383 columns"),
        ((x, w.double(), values, index), "one dtype"),
        ((x, w, values[1:], index), r"\[4, 384\] would be right for these rows"),
        ((x, w, values, index._replace(kind="heads")), "there are rows, columns, tiles, elements"),
        ((x, w, values, Index("tiles", index.at, (5, 7))), "tiles of 5x7 do not divide"),
    ):
        with pytest.raises(ValueError, match=f"^partial_linear: .*{said}"):
            partial_linear(*wrong)
    with pytest.raises(IndexError):
        partial_linear(x, w, values, index._replace(at=index.at + 10_000))
    y = partial_linear(x.requires_grad_(), w, values.requires_grad_(), index)
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert dx.isfinite().all()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
