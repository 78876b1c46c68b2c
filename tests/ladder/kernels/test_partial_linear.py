"""partial_linear in Triton, on a GPU or in the interpreter: the gradient of chosen entries."""

import pytest
import torch
from planted_faults import mutant

from pefast.ops import Index, partial_linear
from pefast.ops.partial_linear import OP, Call, reference, take
from pefast.testing import assert_no_worse

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["rows", "tiles", "strips of rows", "strips of rows, elements"])
def test_strips_of_several_tiles(device, monkeypatch, case, dtype):
    monkeypatch.setattr(hand, "_PROGRAMS", 2)
    check(make(case, dtype), device)


@pytest.mark.parametrize("case", ["rows", "columns", "tiles", "elements"])
def test_fp32_masters_and_any_strides(device, case):
    given = make(case, torch.bfloat16, torch.float32)
    given["x"] = torch.cat((given["x"], given["x"]), 1)[:, ::2].contiguous().t().contiguous().t()
    given["dy"] = torch.randn(len(given["x"]), 1).bfloat16().expand_as(given["dy"])
    given["w"] = given["w"].t().contiguous().t()
    check(given, device)


@pytest.mark.parametrize("case", ["strips of rows", "strips of rows, elements"])
def test_same_input_same_bits(device, case):
    given = make(case, torch.bfloat16)
    dy, x, index = given["dy"].to(device), given["x"].to(device), given["index"]
    index = index._replace(at=index.at.to(device))
    first, second = (hand.chosen_gradient(dy, x, index) for _ in range(2))
    assert first.dtype == torch.float32 and torch.equal(first, second)


def test_the_tables_follow_an_index_that_is_written_to(device):
    given = make("elements", torch.float32)
    dy, x, at = (t.to(device) for t in (given["dy"], given["x"], given["index"].at))
    dense = (dy.double().t() @ x.double()).view(-1)
    for _ in range(2):
        found = hand.chosen_gradient(dy, x, Index("elements", at))
        torch.testing.assert_close(found.double(), dense[at], rtol=1e-4, atol=1e-4)
        at.sub_(at.min()).add_(3)


def test_offsets_beyond_31_bits(device):
    if device == "cuda":
        pytest.skip("wants memory that is only promised, 6 GiB a tensor")
    from interpreter_guard import paused

    far = torch.empty(3 * 2**30, dtype=torch.float16)
    x = far.as_strided((3, 40), (2**30, 1)).copy_(torch.randn(3, 40))
    dy = torch.randn(3, 50).half()
    with paused():
        for kind, at in (("rows", [1, 30]), ("elements", [0, 77, 1999])):
            index = Index(kind, torch.tensor(at))
            assert torch.equal(hand.chosen_gradient(dy, x, index), hand.chosen_gradient(dy, x.clone(), index))


@pytest.mark.parametrize("case", ["rows", "columns", "tiles", "elements"])
def test_compiles_in_one_graph(device, case):
    torch.compiler.reset()
    given = make(case, torch.float32)
    there = {name: t.to(device) for name, t in given.items() if name != "index"}
    there["index"] = given["index"]._replace(at=given["index"].at.to(device))
    step = torch.compile(partial_linear, fullgraph=True, backend="aot_eager")
    one, other = (run(f, there, torch.float32, backend="triton") for f in (partial_linear, step))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_operator_keeps_the_registrys_rules(device):
    given = make("elements", torch.float32)
    dy, x, at = (t.to(device) for t in (given["dy"], given["x"], given["index"].at))
    for kind, tile in (("elements", (1, 1)), ("tiles", (5, 3)), ("rows", (1, 1)), ("columns", (1, 1))):
        some = at if kind == "elements" else at[:4] % 60
        torch.library.opcheck(
            torch.ops.pefast.partial_linear_triton,
            (dy, x, some, kind, *tile),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_refuses_in_words(device):
    given = make("rows", torch.float32)
    index = given["index"]._replace(at=given["index"].at.to(device))
    x, w, bias, values = (given[name].to(device) for name in ("x", "w", "bias", "values"))
    call = Call(x, w, bias, ((values, index),))
    assert hand.refuse(call) == ""
    assert "float64" in hand.refuse(call._replace(x=x.double()))
    assert "one is on meta" in hand.refuse(call._replace(bias=bias.to("meta")))
    elsewhere = ((values, index._replace(at=index.at.to("meta"))),)
    assert "one is on meta" in hand.refuse(call._replace(parts=elsewhere))


# name: (what finds it, the case, the line, the line with its fault)
FAULTS = {
    "one row too many": ("bounds", "columns", "mask_m = (offs_m < end - m)", "mask_m = (offs_m <= end - m)"),
    "an entry too many": (
        "bounds",
        "rows",
        "mask_n, mask_k = near_n < height",
        "mask_n, mask_k = near_n <= height",
    ),
    "columns not masked": (
        "bounds",
        "rows",
        "near_n < height, near_k < width",
        "near_n < height, near_k >= 0",
    ),
    "not the columns that are wanted": (
        "numbers",
        "columns",
        "offs_k = tl.load(column_ptr",
        "offs_k += 0 * tl.load(column_ptr",
    ),
    "tile across": ("numbers", "tiles", "at // across * height", "at % across * height"),
    "tile of another width": ("numbers", "tiles", "at % across * width", "at % across * height"),
    "tiles in one place": ("race", "tiles", "((strip * tiles + tile) * height", "((strip * tiles) * height"),
    "strips in one place": ("race", "strips of rows", "((strip * tiles + tile)", "((tile)"),
    "strips overlap": (
        "numbers",
        "strips of rows",
        "x_ptr + strip * rows * stride_xm",
        "x_ptr + 0 * rows * stride_xm",
    ),
    "the last strip forgotten": ("numbers", "strips of rows", "else parts.sum(0)", "else parts[:-1].sum(0)"),
    "sum not carried": ("numbers", "rows", "dw = plus(dw, tl.trans(dy)", "dw = plus(dw * 0, tl.trans(dy)"),
    "elements of the next tile": ("race", "elements", "mask_e = offs_e < end", "mask_e = offs_e <= end"),
    "an element's neighbour": (
        "numbers",
        "elements",
        "i % height * width + j % width",
        "i % height * width + (j + 1) % width",
    ),
    "elements in order of tiles": ("numbers", "elements", "strip * count + out", "strip * count + offs_e"),
    "outer mask dropped": ("bounds", "elements", "offs_n < N, offs_k < K", "offs_n >= 0, offs_k >= 0"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(device, tmp_path, monkeypatch, name):
    if device == "cuda":
        pytest.skip("only the interpreter's guard sees bounds and races")
    finder, case, line, fault = FAULTS[name]
    changed = mutant(hand, tmp_path, line, fault)
    # few strips, of several tiles each
    monkeypatch.setattr(changed, "_PROGRAMS", 2)
    monkeypatch.setitem(OP.hands, "triton", changed)
    with pytest.raises((interpreter.InterpreterError, AssertionError)) as found:
        check(make(case, torch.float32), device)
    words = str(found.value.__cause__ if found.type is interpreter.InterpreterError else "numbers")
    assert finder in words
