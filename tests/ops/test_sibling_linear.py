"""sibling_linear: every hand against the formula, for each result and gradient."""

import pytest
import torch

from pefast.native import sibling_linear as native_hand
from pefast.ops.delta_linear import Segment, delta_linear
from pefast.ops.sibling_linear import OP, Part, prepare, reference, sibling_linear
from pefast.testing import assert_no_worse

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# M, K
SHAPES = [(1, 64), (37, 129), (300, 96), (0, 32)]


def inputs(shape, dtype):
    """x, and three layers of different widths: a LoRA, an adapter with all it can have, nothing."""
    m, k = shape
    generator = torch.Generator().manual_seed(m + k)

    def normal(*size, by=1.0):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * by).to(dtype)

    def weight(n):
        return torch.nn.Parameter(normal(n, k, by=k**-0.5), requires_grad=False)

    def pair(r, n):
        return normal(r, k, by=k**-0.5), normal(n, r, by=r**-0.5)

    lora = Segment(*pair(8, 48), 0.5, dropout=0.2)
    adapter = Segment(*pair(5, 33), 1.5, "silu", normal(5), normal(33), adapter=1)
    parts = (
        Part(weight(48), (lora,), normal(48), seed=torch.tensor([11])),
        Part(
            weight(33),
            (adapter, Segment(*pair(3, 33), dropout=0.5)),
            gain=normal(33),
            seed=torch.tensor([12]),
        ),
        Part(weight(70)),
    )
    dys = [normal(m, part.w.shape[0]) for part in parts]
    return normal(m, k), parts, torch.arange(m) % 3 - 1, dys


def run(function, x, parts, ids, dys, dtype, **options):
    """Results and gradients by name, in one dtype."""
    leaves = {}

    def leaf(name, t):
        if t is None:
            return None
        leaves[name] = t.detach().to(dtype).requires_grad_()
        return leaves[name]

    x, own = leaf("x", x), []
    for i, part in enumerate(parts):
        segments = tuple(
            s._replace(**{k: leaf(f"{k}{i}{j}", getattr(s, k)) for k in "abcd"})
            for j, s in enumerate(part.segments)
        )
        # the same parameter where it has that dtype already: hands look at what it is
        w = part.w if part.w.dtype == dtype else part.w.to(dtype)
        own.append(part._replace(w=w, segments=segments, gain=leaf(f"gain{i}", part.gain)))
    ys = function(x, own, ids, **options)
    torch.autograd.backward(ys, [dy.to(dtype) for dy in dys])
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | {f"d{k}": t.grad for k, t in leaves.items()}


def skip_where_refused(backend, x, parts, ids):
    if why := OP.why_not(backend, prepare(x, parts, ids)):
        pytest.skip(why)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", OP.backends)
def test_results_and_gradients(backend, shape, dtype):
    given = inputs(shape, dtype)
    skip_where_refused(backend, *given[:3])
    got = run(sibling_linear, *given, dtype, backend=backend)
    near, exact = (run(reference, *given, at) for at in (dtype, torch.float64))
    assert got.keys() == exact.keys()
    for name in exact:
        if dtype == torch.float64:
            torch.testing.assert_close(got[name], exact[name], rtol=1e-11, atol=1e-11, msg=name)
        else:
            assert_no_worse(name, got[name], near[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", OP.backends)
def test_as_each_layer_alone(backend, dtype):
    """The same results, bit for bit, and the same gradients of the parts, as by calls of delta_linear."""
    x, parts, ids, dys = inputs((300, 96), dtype)
    skip_where_refused(backend, x, parts, ids)

    def alone(x, parts, ids, backend):
        return [
            delta_linear(x, p.w, p.segments, p.bias, p.gain, ids, seed=p.seed, backend=backend) for p in parts
        ]

    together, apart = (run(f, x, parts, ids, dys, dtype, backend=backend) for f in (sibling_linear, alone))
    for name in together:
        # dx is rounded once instead of three times
        if name != "dx":
            assert torch.equal(together[name], apart[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", OP.backends)
def test_same_bits_for_any_number_of_threads(backend, dtype):
    given = inputs((700, 96), dtype)
    skip_where_refused(backend, *given[:3])
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 5) if backend == "native" else (1, 1):
            torch.set_num_threads(threads)
            runs.append(run(sibling_linear, *given, dtype, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], runs[0][name]) for one in runs for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", OP.backends)
def test_rows_that_lie_apart_and_weights_that_lie_otherwise(backend, dtype):
    x, parts, ids, dys = inputs((45, 70), dtype)

    def apart(t):
        return torch.cat([t, t], 1)[:, : t.shape[1]]

    def upright(w):
        return torch.nn.Parameter(w.detach().t().contiguous(), requires_grad=False).t()

    x, dys = apart(x), [apart(dys[0]), dys[1], dys[2].t().contiguous().t()]
    parts = (parts[0]._replace(w=upright(parts[0].w)), *parts[1:])
    skip_where_refused(backend, x, parts, ids)
    got = run(sibling_linear, x, parts, ids, dys, dtype, backend=backend)
    near, exact = (run(reference, x, parts, ids, dys, at) for at in (dtype, torch.float64))
    for name in exact:
        assert_no_worse(name, got[name], near[name], exact[name])


@pytest.mark.parametrize("backend", OP.backends)
@pytest.mark.parametrize("fault", ["order", "seed", "one forgotten"])
def test_planted_faults_are_caught(fault, backend):
    x, parts, ids, dys = inputs((64, 64), torch.float32)
    skip_where_refused(backend, x, parts, ids)
    exact, near = (run(reference, x, parts, ids, dys, at) for at in (torch.float64, torch.float32))

    def wrong(x, parts, ids):
        if fault == "order":
            parts = [parts[0]._replace(w=parts[0].w.flip(0)), *parts[1:]]
        if fault == "seed":
            parts = [parts[0]._replace(seed=12), *parts[1:]]
        if fault == "one forgotten":
            parts = [parts[0], parts[1], parts[2]._replace(w=parts[2].w.detach() * 0 + 1)]
        return sibling_linear(x, parts, ids, backend=backend)

    got = run(wrong, x, parts, ids, dys, torch.float32)
    with pytest.raises(AssertionError, match="error"):
        for name in exact:
            assert_no_worse(name, got[name], near[name], exact[name])


def test_leading_dimensions_and_unused_results():
    x, parts, ids, _ = inputs((36, 64), torch.float64)
    x = x.view(4, 9, 64).requires_grad_()
    y, _, z = sibling_linear(x, parts, ids.view(4, 9)[:, 0])
    assert y.shape == (4, 9, 48) and z.shape == (4, 9, 70)
    z.sum().backward()
    torch.testing.assert_close(x.grad, parts[2].w.sum(0).expand(4, 9, 64))


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    given = inputs((37, 64), torch.bfloat16)
    compiled = torch.compile(sibling_linear, fullgraph=True, backend="aot_eager")
    plain, graph = (run(function, *given, torch.bfloat16) for function in (sibling_linear, compiled))
    for name in plain:
        torch.testing.assert_close(graph[name], plain[name])


def test_compiles_where_the_kernel_cannot_run(monkeypatch):
    """The reason in words is traced as well."""
    torch._dynamo.reset()
    monkeypatch.setattr(native_hand, "_HERE", False)
    monkeypatch.setattr(native_hand.fp32, "HERE", False)
    for dtype in (torch.float32, torch.bfloat16):
        x, parts, ids, _ = inputs((37, 64), dtype)
        compiled = torch.compile(sibling_linear, fullgraph=True, backend="eager")
        for one, other in zip(compiled(x, parts, ids), sibling_linear(x, parts, ids), strict=True):
            torch.testing.assert_close(one, other)


def test_gradcheck():
    x, parts, ids, _ = inputs((5, 16), torch.float64)
    leaves = [x.requires_grad_(), *(t.requires_grad_() for s in parts[1].segments for t in (s.a, s.b))]

    def of(x, a, b, a2, b2):
        first, second = parts[1].segments
        own = (first._replace(a=a, b=b), second._replace(a=a2, b=b2))
        return sibling_linear(x, (parts[0], parts[1]._replace(segments=own)), ids)

    assert torch.autograd.gradcheck(of, leaves)


def test_bad_calls_get_one_sentence():
    x, parts, ids, _ = inputs((5, 16), torch.float32)
    with pytest.raises(ValueError, match="there are no parts"):
        sibling_linear(x, ())
    with pytest.raises(ValueError, match="x has 15 columns"):
        sibling_linear(x[:, :-1], parts, ids)


def test_too_wide_together_is_left_to_each_alone():
    x, parts, ids, _ = inputs((5, 16), torch.bfloat16)
    wide = Part(torch.nn.Parameter(torch.ones(2500, 16).bfloat16(), requires_grad=False))
    native = OP.hands["native"]
    assert native.decline(prepare(x, parts, ids)) == ""
    assert "2651 columns" in native.decline(prepare(x, (*parts, wide), ids))


def test_fp32_products_in_bf16_where_every_layer_allows_it():
    x, parts, ids, dys = inputs((64, 64), torch.float32)
    fast = [part._replace(compute="bf16") for part in parts]
    skip_where_refused("native", x, fast, ids)
    got, whole = (
        run(sibling_linear, x, own, ids, dys, torch.float32, backend="native") for own in (fast, parts)
    )
    for name, right in whole.items():
        difference = (got[name] - right).abs().max() / right.abs().max()
        assert got[name].dtype == torch.float32 and difference < 0.03, name
    assert not torch.equal(got["dx"], whole["dx"]), "the products were not in bf16"
    mixed = prepare(x, (fast[0], *parts[1:]), ids)
    assert "one compute" in OP.why_not("native", mixed) and OP.pick(mixed) == "eager"


@pytest.mark.parametrize("backend", OP.backends)
def test_results_may_be_written_to(backend):
    """As those of nn.Linear: an activation in place is common."""
    x, parts, _, _ = inputs((36, 64), torch.bfloat16)
    parts = (parts[0], parts[2])
    skip_where_refused(backend, x, parts, None)
    x = x.view(4, 9, 64).requires_grad_()
    both = sibling_linear(x, parts, backend=backend)
    alone = delta_linear(x, parts[0].w, parts[0].segments, parts[0].bias, seed=11, backend=backend)
    for y in (*both, alone):
        y.relu_()
    torch.autograd.backward([y.float().sum() for y in (*both, alone)])
    assert torch.equal(both[0], alone) and x.grad.isfinite().all()
