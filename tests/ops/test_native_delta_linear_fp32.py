"""The native hand of delta_linear in fp32: products of bf16 parts, closer than PyTorch's, or of one part."""

import pytest
import torch

from pefast.layers import gain as layers_gain
from pefast.native import delta_linear_fp32 as native
from pefast.native import packs
from pefast.ops.delta_linear import Call, Needs, Segment, delta_linear, reference
from pefast.testing import assert_no_worse
from tests import one_lora

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

# M, K, N, R: one of each, no multiple of a tile, all multiples, several panels, stretches and blocks of rows
SHAPES = [
    (1, 1, 1, 1),
    (1, 64, 48, 4),
    (3, 17, 33, 3),
    (33, 65, 63, 8),
    (17, 1100, 31, 24),
    (64, 384, 384, 16),
    (63, 96, 1700, 64),
    (40, 33, 80, 256),
    (530, 130, 70, 16),
    (1100, 64, 96, 5),
    (96, 2048, 64, 16),
    (300, 600, 1200, 40),
]
ALL = Needs(True, False, False, False, ((True, True, False, True, True),))


def make_call(
    shape, dropout=0.0, bias=True, apart=0, form="linear", given=False, compute=None, gain=False
) -> tuple:
    """A call and a gradient of its result; rows of x and dy have `apart` numbers between them.

    A gain trains, and the bias beside it.
    """
    m, k, n, r = shape
    generator = torch.Generator().manual_seed(m * 7 + k * 3 + n + r)

    def normal(*size, by=1.0):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * by).float()

    w = {"linear": (n, k), "conv1d": (k, n), "strided": (2 * n, 3 * k)}[form]
    w = normal(*w, by=k**-0.5)
    w = torch.nn.Parameter(w, requires_grad=False)
    w = {"linear": w, "conv1d": w.t(), "strided": w[::2, ::3]}[form]
    segment = Segment(normal(r, k, by=k**-0.5), normal(n, r, by=r**-0.5), 1.5, dropout=dropout)
    if given:
        segment = Segment(None, segment.b, 1.5, d=normal(n), h=normal(m, r))
    x, dy = normal(m, k + apart)[:, :k], normal(m, n + apart)[:, :n]
    seed = torch.tensor([123456789012345])
    bias, gain = normal(n) if bias else None, normal(n) if gain else None
    if gain is not None:
        gain.requires_grad_(), bias is None or bias.requires_grad_()
    call = Call(x, w, bias, gain, None, seed, (segment,), None, compute)
    if why := native.why_not(call):
        pytest.skip(why)
    return call, dy


def run(call, dy) -> dict:
    y, saved = native.forward(call)
    dx, _, dbias, dgain, [(da, db, _, dd, dh)] = native.backward(call, saved, dy, needs_of(call))
    found = {"y": y, "h": saved[0][0], "dx": dx, "da": da, "db": db, "dd": dd, "dh": dh}
    found |= {"dbias": dbias, "dgain": dgain}
    return {name: t.detach() for name, t in found.items() if t is not None}


def needs_of(call) -> Needs:
    s, train = call.segments[0], call.gain is not None
    own = (s.a is not None, True, False, s.d is not None, s.h is not None)
    return Needs(True, False, train and call.bias is not None, train, (own,))


def formula(call, dy, dtype, products=None) -> dict:
    """The reference in dtype, its factors rounded to `products` first."""
    s = call.segments[0]

    def leaf(t):
        return None if t is None else t.detach().to(products or dtype).to(dtype).requires_grad_()

    x, w, a, b, d, h = (leaf(t) for t in (call.x, call.w, s.a, s.b, s.d, s.h))
    bias, gain = (None if t is None else t.detach().to(dtype) for t in (call.bias, call.gain))
    leaves = {"dx": x, "da": a, "db": b, "dd": d, "dh": h}
    if gain is not None:
        leaves |= {"dgain": gain.requires_grad_(), "dbias": None if bias is None else bias.requires_grad_()}
    y = reference(x, w, (s._replace(a=a, b=b, d=d, h=h),), bias, gain, seed=call.seed)
    leaves = {name: t for name, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(products or dtype).to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_close(got: dict, call, dy) -> None:
    near, exact = formula(call, dy, torch.float32), formula(call, dy, torch.float64)
    for name in exact:
        assert_no_worse(name, got[name], near[name], exact[name])


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dropout):
    call, dy = make_call(shape, dropout)
    assert_close(run(call, dy), call, dy)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"apart": 5},
        {"apart": 32},
        {"form": "conv1d"},
        {"form": "strided"},
        {"given": True},
        {"given": True, "bias": False, "apart": 3},
    ],
    ids=str,
)
def test_every_form_of_input(options):
    call, dy = make_call((70, 130, 97, 16), 0.0 if "given" in options else 0.05, **options)
    assert_close(run(call, dy), call, dy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gain_and_a_bias_that_train(shape):
    call, dy = make_call(shape, 0.05, gain=True)
    got = run(call, dy)
    assert got["dgain"].shape == got["dbias"].shape == call.gain.shape
    assert_close(got, call, dy)


@pytest.mark.parametrize(
    "options",
    [{"given": True}, {"bias": False, "apart": 5}, {"form": "strided"}, {"form": "conv1d"}],
    ids=str,
)
def test_a_gain_with_every_form_of_input(options):
    call, dy = make_call((70, 130, 97, 16), 0.0 if "given" in options else 0.05, gain=True, **options)
    assert_close(run(call, dy), call, dy)


@pytest.mark.parametrize("compute", [None, "bf16"])
def test_a_layers_gain_goes_inside(monkeypatch, compute):
    """DoRA's gain as a layer multiplies it is the native hand's: nothing walks over the product again."""
    call, dy = make_call((70, 130, 96, 8), compute=compute, gain=True)
    s, leaves = call.segments[0], {"dx": call.x, "da": call.segments[0].a, "db": call.segments[0].b}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    monkeypatch.setattr(layers_gain, "multiplied", None)
    segments = (s._replace(a=leaves["da"], b=leaves["db"]),)
    leaves |= {"dgain": call.gain, "dbias": call.bias}
    gains = [(call.gain, None)]
    y = layers_gain.product(leaves["dx"], call.w, segments, gains, None, call.bias, compute)
    got = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    whole = run(call, dy)
    assert all(torch.equal(t, whole[name]) for name, t in {"y": y.detach(), **got}.items())


def test_a_gain_alone():
    """As (IA)³ has it: nothing beside the frozen layer, and only the gain trains."""
    call, dy = make_call((530, 96, 70, 3), bias=False, gain=True)
    call = call._replace(segments=())
    y, saved = native.forward(call)
    dx, _, dbias, dgain, deltas = native.backward(call, saved, dy, Needs(True, False, False, True, ()))
    assert dbias is None and deltas == []
    got = {"y": y.detach(), "dx": dx, "dgain": dgain}
    x, gain = call.x, call.gain.detach()
    for name, f in {
        "y": lambda t: (x.to(t) @ call.w.to(t).t()) * gain.to(t),
        "dx": lambda t: (dy.to(t) * gain.to(t)) @ call.w.to(t),
        "dgain": lambda t: (dy.to(t) * (x.to(t) @ call.w.to(t).t())).sum(0),
    }.items():
        assert_no_worse(name, got[name].detach(), f(torch.float32), f(torch.float64))
    fixed = call._replace(gain=gain)
    assert torch.equal(native.forward(fixed)[0], got["y"]) and native.forward(fixed)[1] == []


@pytest.mark.parametrize("shape", [(64, 384, 384, 16), (33, 65, 63, 8), (530, 1700, 70, 16)], ids=str)
def test_a_frozen_layer_alone(shape):
    call, dy = make_call(shape)
    call = call._replace(segments=())
    y, saved = native.forward(call)
    dx, *_, deltas = native.backward(call, saved, dy, Needs(True, False, False, False, ()))
    assert saved == [] and deltas == []
    for name, got, f in (
        ("y", y, lambda t: call.x.to(t) @ call.w.to(t).t() + call.bias.to(t)),
        ("dx", dx, lambda t: dy.to(t) @ call.w.to(t)),
    ):
        assert_no_worse(name, got, f(torch.float32), f(torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_in_bf16(shape):
    """With compute="bf16" results are fp32, and held to what bf16 products allow, not to fp32."""
    call, dy = make_call(shape, 0.05, compute="bf16")
    got, exact = run(call, dy), formula(call, dy, torch.float64)
    near = formula(call, dy, torch.bfloat16)
    for name in exact:
        assert got[name].dtype == torch.float32
        assert_no_worse(name, got[name].to(torch.bfloat16), near[name], exact[name])
    if shape[1] > 1:
        three = run(call._replace(compute=None), dy)
        assert not torch.equal(got["y"], three["y"]), "the products were not in bf16"


def test_products_in_bf16_round_nothing_but_the_factors():
    """Without a delta: the frozen product of rounded factors, summed in fp32."""
    call, _ = make_call((130, 700, 96, 8), bias=False, compute="bf16")
    y, _ = native.forward(call._replace(segments=()))
    x, w = call.x.bfloat16(), call.w.bfloat16()
    assert_no_worse("y", y, x.float() @ w.float().t(), x.double() @ w.double().t())


@pytest.mark.parametrize("gain", [False, True])
def test_zero_rows(gain):
    call, dy = make_call((0, 32, 24, 8), 0.05, gain=gain)
    got = run(call, dy)
    assert got["y"].shape == (0, 24) and got["dx"].shape == (0, 32)
    assert not any(got[name].any() for name in ("da", "db", *(("dgain", "dbias") if gain else ())))


@pytest.mark.parametrize("fault", ["scale", "rank", "column", "element", "mask", "bf16", "gain", "sum"])
def test_the_measure_finds_planted_faults(fault):
    call, dy = make_call((64, 128, 96, 8), 0.5, gain=True)
    s = call.segments[0]
    wrong = {
        "scale": s._replace(scale=s.scale * 1.00001),
        "rank": s._replace(b=s.b * (torch.arange(8) < 7)),
        "column": s._replace(a=s.a * (torch.arange(128) < 127)),
    }.get(fault, s)
    other = call._replace(segments=(wrong,), seed=call.seed + (fault == "mask"))
    if fault == "gain":
        other = other._replace(gain=(call.gain * 1.00001).detach().requires_grad_())
    got = run(other._replace(compute="bf16" if fault == "bf16" else None), dy)
    if fault == "element":
        got["dx"][5, 7] += 1e-4
    if fault == "sum":
        got["dgain"] -= 1e-5 * dy[-1]
    with pytest.raises(AssertionError):
        assert_close(got, call, dy)


@pytest.mark.parametrize("compute", [None, "bf16"])
@pytest.mark.parametrize(
    "shape", [(1, 33, 40, 3), (64, 384, 384, 16), (700, 96, 1730, 24), (1100, 600, 64, 4)], ids=str
)
def test_same_bits_every_run_and_for_any_number_of_threads(shape, compute):
    call, dy = make_call(shape, 0.05, compute=compute, gain=True)
    one_lora.assert_same_bits(lambda: run(call, dy))


def test_only_the_gradients_asked_for():
    call, dy = make_call((50, 64, 48, 8), 0.05)
    one_lora.assert_only_what_is_asked_for(native, call, dy, run(call, dy))


def test_extreme_values():
    """Near the largest number nothing overflows on the way; what is not finite is never hidden."""
    call, _ = make_call((40, 64, 48, 4), bias=False)
    for size in (1e-30, 1e30, 3.4e38 / 64):
        x = call.x / call.x.abs().max() * size
        y, _ = native.forward(call._replace(x=x, segments=()))
        assert_no_worse("y", y / size, x / size @ call.w.t(), x.double() / size @ call.w.double().t())
    most = torch.full((40, 64), torch.finfo(torch.float32).max)
    half = call._replace(x=most, w=torch.nn.Parameter(torch.eye(64)[:48] * 0.5, requires_grad=False))
    assert torch.equal(native.forward(half._replace(segments=(), bias=None))[0], most[:, :48] * 0.5)
    for worst in (float("nan"), float("inf"), -float("inf")):
        x = call.x.clone()
        x[3, 5] = worst
        bad = ~native.forward(call._replace(x=x, segments=()))[0].isfinite()
        assert bad[3].all() and not bad[:3].any() and not bad[4:].any()


def test_packs_follow_the_weight_and_are_counted():
    call, dy = make_call((20, 64, 96, 4))
    run(call, dy)
    assert packs.packed_bytes(call.w) == 2 * 3 * 2 * 64 * 96
    run(call._replace(compute="bf16"), dy)
    assert packs.packed_bytes(call.w) == 2 * 3 * 2 * 64 * 96 + 2 * 2 * 64 * 96
    for write in (lambda: call.w.mul_(2), lambda: call.w.data.mul_(2)):
        with torch.no_grad():
            write()
        assert_close(run(call, dy), call, dy)


def test_memory_is_left_free(monkeypatch):
    call, dy = make_call((20, 64, 96, 4))
    monkeypatch.setattr(packs, "_memory", lambda: (300_000, 1_000_000))
    assert "memory" in native.why_slower(call)
    monkeypatch.setattr(packs, "_memory", lambda: (900_000, 1_000_000))
    assert native.why_slower(call) == ""
    run(call, dy)
    monkeypatch.setattr(packs, "_memory", lambda: (0, 1_000_000))
    assert native.why_slower(call) == "", "it is packed already"


def test_refusals_are_words():
    call, _ = make_call((14, 32, 24, 2))
    s = call.segments[0]
    cases = {
        "float32": call._replace(w=call.w.bfloat16()),
        "a gain in float32": call._replace(gain=torch.ones(24).double()),
        "a bias in float32": call._replace(bias=torch.ones(24).bfloat16()),
        "frozen": call._replace(w=torch.nn.Parameter(call.w)),
        "a, b, c, d and h in float32": call._replace(segments=(s._replace(a=s.a.double()),)),
    }
    for word, other in cases.items():
        assert word in native.why_not(other)
    assert native.why_slower(call) == "" and "parameter" in native.why_slower(
        call._replace(w=call.w.detach())
    )
    assert "rows" in native.why_slower(call._replace(x=call.x[:2]))


def test_through_autograd_and_any_leading_dimensions():
    call, dy = make_call((60, 96, 80, 8), 0.3)
    s = call.segments[0]
    x = call.x.reshape(4, 15, 96).clone().requires_grad_()
    a, b = s.a.clone().requires_grad_(), s.b.clone().requires_grad_()
    y = delta_linear(x, call.w, s._replace(a=a, b=b), call.bias, seed=call.seed, backend="native")
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy.reshape(4, 15, 80))
    assert dx.shape == x.shape and y.shape == (4, 15, 80)
    assert_close({"y": y.detach().view(60, 80), "dx": dx.view(60, 96), "da": da, "db": db}, call, dy)


def test_the_operators_pass_opcheck():
    for given in (False, True):
        call, dy = make_call((9, 33, 20, 3), 0.0 if given else 0.05, given=given)
        s, gain = call.segments[0], torch.rand(20)
        waist = ([s.scale] * 2, [s.dropout] * 2, [call.seed if s.dropout else None] * 2)
        # two layers that read x, the first with a gain
        shared = ([call.w] * 2, [gain, None], [call.bias] * 2, [s.a] * 2, [s.b] * 2)
        inputs = (call.x, *shared, [s.h] * 2, *waist, [True, False], 3)
        torch.library.opcheck(torch.ops.pefast.delta_linear_fp32.default, inputs)
        *_, u, _, h, _ = torch.ops.pefast.delta_linear_fp32(*inputs)
        asked = [given, not given, True, True, True, given, not given, True, False, False]
        inputs = ([dy] * 2, call.x, *shared, [s.h if given else h] * 2, *waist, [u, None], 3, True, asked)
        torch.library.opcheck(torch.ops.pefast.delta_linear_fp32_backward.default, inputs)
