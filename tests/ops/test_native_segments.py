"""The native hand of delta_linear with all that a layer can have at once: several segments, activations,
biases, adapters of rows, a gain, waists from elsewhere."""

import pytest
import torch

from pefast.eager.activations import ACTIVATIONS
from pefast.layers import gain
from pefast.native import delta_linear as native
from pefast.native import sibling_linear
from pefast.ops.delta_linear import Call, Segment, delta_linear, reference
from pefast.testing import assert_no_worse

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

SEED = torch.tensor([987654321])
# M, K, N, R
SHAPES = [(1, 64, 48, 4), (37, 129, 65, 3), (40, 96, 80, 40), (530, 130, 70, 16), (1100, 64, 96, 5)]


class Inputs:
    """Signed, seeded tensors by name; the same name is the same tensor, in float32 unless said otherwise."""

    def __init__(self, shape, masters=torch.float32):
        self.m, self.k, self.n, self.r = shape
        self.generator = torch.Generator().manual_seed(sum(shape))
        self.masters, self.made = masters, {}

    def __call__(self, name, *size, kind=None, by=1.0):
        if name not in self.made:
            t = torch.randn(*size, generator=self.generator, dtype=torch.float64) * by
            self.made[name] = t.to(kind or self.masters)
        return self.made[name]

    def segment(self, i, rank, scale=0.7, activation="identity", biases="", **more):
        a = self(f"a{i}", rank, self.k, by=self.k**-0.5)
        b = self(f"b{i}", self.n, rank, by=rank**-0.5)
        c = self(f"c{i}", rank) if "c" in biases else None
        d = self(f"d{i}", self.n) if "d" in biases else None
        return Segment(a, b, scale, activation, c, d, **more)

    def given(self, i, rank, scale=0.7, **more):
        h = self(f"h{i}", self.m, rank, kind=torch.bfloat16)
        d = self(f"d{i}", self.n)
        b = self(f"b{i}", self.n, rank, by=rank**-0.5)
        return Segment(None, b, scale, d=d, h=h, **more)

    def ids(self):
        return torch.arange(self.m) % 4 - 1


def several(t):
    """Two that share a step of the waist, and one that crosses into the next."""
    return {"segments": (t.segment(0, t.r), t.segment(1, 3, -1.5), t.segment(2, 40, 1.0))}


def dropped(t):
    """Each segment its own rate; one has none."""
    rates = (0.1, 0.5, 0.0)
    return {"segments": tuple(t.segment(i, t.r + i, dropout=p) for i, p in enumerate(rates)), "seed": SEED}


def hybrid(t):
    """A LoRA and two adapters with activation and biases."""
    return {
        "segments": (
            t.segment(0, t.r, dropout=0.1),
            t.segment(1, t.r, 2.0, "gelu", "cd"),
            t.segment(2, 7, 1.0, "silu", "cd", dropout=0.3),
        ),
        "seed": SEED,
        "bias": t("bias", t.n),
    }


def routed(t):
    """Adapters of rows, one for every row, and rows without any."""
    return {
        "segments": (
            t.segment(0, t.r, adapter=0),
            t.segment(1, t.r, 1.0, "tanh", "cd", adapter=1, dropout=0.2),
            t.segment(2, 5, 0.5, biases="d"),
            t.segment(3, 2, 3.0, adapter=7),
        ),
        "ids": t.ids(),
        "seed": SEED,
    }


def gained(t):
    """An output gain that trains, and a bias that does."""
    return {"segments": (t.segment(0, t.r, biases="d"),), "gain": t("gain", t.n), "bias": t("bias", t.n)}


def given(t):
    """A waist that was computed elsewhere, for all rows and for some, beside a LoRA."""
    segments = (t.given(0, t.r), t.segment(1, t.r), t.given(2, 3, adapter=1))
    return {"segments": segments, "ids": t.ids()}


def bare(t):
    """No segment at all."""
    return {"gain": t("gain", t.n), "bias": t("bias", t.n)}


def everything(t):
    first = hybrid(t)["segments"]
    more = (
        t.segment(3, 6, 1.0, "relu", "cd", adapter=1),
        t.given(4, 5),
        t.segment(5, 2, adapter=0, dropout=0.6),
    )
    return {"segments": first + more, "ids": t.ids(), "seed": SEED} | bare(t)


FORMS = {form.__name__: form for form in (several, dropped, hybrid, routed, gained, given, bare, everything)}


def run(function, form, t, dtype=None, **options):
    """y and the gradient of everything that a form of the call has, as t has it or in one dtype."""
    x = t("x", t.m, t.k, kind=torch.bfloat16)
    w = t("w", t.n, t.k, kind=torch.bfloat16, by=t.k**-0.5)
    dy = t("dy", t.m, t.n, kind=torch.bfloat16)
    call, leaves = dict(form(t)), {}

    def leaf(name, v):
        if v is None:
            return None
        leaves[name] = v.detach().to(dtype or v.dtype).requires_grad_()
        return leaves[name]

    segments = tuple(
        s._replace(**{name: leaf(f"{name}{i}", getattr(s, name)) for name in "abcdh"})
        for i, s in enumerate(call.pop("segments", ()))
    )
    for name in ("gain", "bias"):
        if name in call:
            call[name] = leaf(name, call[name])
    y = function(leaf("x", x), w.to(dtype or w.dtype), segments, **call, **options)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": v.grad for name, v in leaves.items()}


def assert_close(got, form, t):
    near, exact = (run(reference, form, t, dtype) for dtype in (torch.bfloat16, torch.float64))
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_no_worse(name, value.to(torch.bfloat16), near[name], exact[name])


def skip_where_refused(t, form):
    call = Call(
        t("x", t.m, t.k, kind=torch.bfloat16), torch.ones(1, 1).bfloat16(), None, None, None, None, ()
    )
    if why := native.refuse(call):
        pytest.skip(why)


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_values_and_gradients(form, shape, masters):
    t = Inputs(shape, masters)
    skip_where_refused(t, form)
    got = run(delta_linear, form, t, backend="native")
    assert_close(got, form, t)
    assert all(value.dtype == masters for name, value in got.items() if name[:2] in ("da", "db", "dc"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    t = Inputs((70, 96, 40, 24))
    skip_where_refused(t, hybrid)

    def form(t):
        # from far below zero to far above
        t("c0", 24, by=8.0)
        return {"segments": (t.segment(0, 24, 0.5, activation, "cd"),)}

    assert_close(run(delta_linear, form, t, backend="native"), form, t)


@pytest.mark.parametrize("form", [hybrid, routed, everything])
@pytest.mark.parametrize("shape", [(1, 33, 40, 3), (700, 96, 130, 24), (1100, 64, 64, 4)], ids=str)
def test_same_bits_every_run_and_for_any_number_of_threads(form, shape):
    t = Inputs(shape)
    skip_where_refused(t, form)
    first = run(delta_linear, form, t, backend="native")
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        again = run(delta_linear, form, t, backend="native")
        different = [name for name in first if not torch.equal(first[name], again[name])]
        assert not different, f"{different} differ with {threads} threads"


def test_zero_rows():
    t = Inputs((0, 32, 24, 8))
    skip_where_refused(t, everything)
    got = run(delta_linear, everything, t, backend="native")
    assert got["y"].shape == (0, 24) and got["dx"].shape == (0, 32)
    assert not any(value.any() for value in got.values())


def changed(form, **changes):
    """A form with one segment's settings changed."""

    def wrong(t):
        call = dict(form(t))
        at = changes.pop("at", 1)
        segments = list(call["segments"])
        segments[at] = segments[at]._replace(**{k: v(segments[at]) for k, v in changes.items()})
        return call | {"segments": tuple(segments)}

    return wrong


FAULTS = {
    "scale": changed(routed, scale=lambda s: s.scale * 1.03),
    "activation": changed(hybrid, activation=lambda s: "quick_gelu"),
    "ids": lambda t: routed(t) | {"ids": t.ids().roll(1)},
    "bias of the waist": changed(hybrid, c=lambda s: s.c * (torch.arange(len(s.c)) > 0)),
    "bias of the delta": changed(hybrid, d=lambda s: s.d * (torch.arange(len(s.d)) > 0)),
    "gain": lambda t: gained(t) | {"gain": t("gain", t.n) * torch.linspace(1, 1.1, t.n)},
    "mask": lambda t: dropped(t) | {"seed": SEED + 1},
    "rate": changed(dropped, dropout=lambda s: 0.49),
}
HEALTHY = {"gain": gained, "mask": dropped, "rate": dropped, "ids": routed, "scale": routed}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_measure_finds_planted_faults(fault):
    t, healthy = Inputs((64, 128, 96, 8)), HEALTHY.get(fault, hybrid)
    skip_where_refused(t, healthy)
    assert_close(run(delta_linear, healthy, t, backend="native"), healthy, t)
    wrong = run(delta_linear, FAULTS[fault], t, backend="native")
    with pytest.raises(AssertionError):
        assert_close(wrong, healthy, t)


def test_only_what_is_asked_for_and_only_what_backward_needs():
    t = Inputs((50, 64, 48, 8))
    skip_where_refused(t, hybrid)
    whole = run(delta_linear, everything, t, backend="native")
    call = everything(t)
    x, w = (t(name, 50 if name == "x" else 48, 64) for name in ("x", "w"))
    for name in ("b1", "c2", "d1", "h4", "gain", "bias", "a5"):
        leaf = t.made[name].detach().clone().requires_grad_()
        segments = [
            s._replace(**{k: leaf for k in "abcdh" if getattr(s, k) is t.made[name]})
            for s in call["segments"]
        ]
        rest = {k: leaf if k == name else v for k, v in call.items() if k != "segments"}
        y = delta_linear(x, w, segments, **rest, backend="native")
        saved = sum(v.numel() for v in y.grad_fn.saved_tensors[-2:] if v is not None)
        assert saved == 50 * (8 + 8 + 7 + 6 + 2) + (50 * 48 if name == "gain" else 0)
        y.backward(t("dy", 50, 48))
        # the sum over u is rounded alike whatever else is asked for
        number = [k for k in whole if whole[k] is not None and k == f"d{name}"]
        assert number == [f"d{name}"] and torch.equal(leaf.grad, whole[f"d{name}"]), name


def test_the_operators_pass_opcheck():
    t = Inputs((9, 33, 20, 3))
    skip_where_refused(t, everything)
    call = everything(t)
    x, w = t("x", 9, 33, kind=torch.bfloat16), t("w", 20, 33, kind=torch.bfloat16)
    part = Call(x, w, call["bias"], call["gain"], call["ids"], SEED, call["segments"])
    given = (x, *sibling_linear._flat((part,)), [True])
    torch.library.opcheck(torch.ops.pefast.siblings_forward.default, given)
    (y,), (waist, _) = sibling_linear.forward(sibling_linear.Siblings(x, (part,)))
    asked = [True] * (2 + 5 * len(part.segments))
    for i, s in enumerate(part.segments):
        asked[2 + 5 * i : 7 + 5 * i] = [v is not None for v in (s.a, s.b, s.c, s.d, s.h)]
    given = ([y], x, *sibling_linear._flat((part,)), waist, [y], True, asked)
    torch.library.opcheck(torch.ops.pefast.siblings_backward.default, given)


@pytest.mark.parametrize("form", [hybrid, given])
def test_compiles_in_one_graph(form):
    t = Inputs((37, 64, 48, 8))
    skip_where_refused(t, form)
    torch._dynamo.reset()
    compiled = torch.compile(delta_linear, fullgraph=True, backend="aot_eager")
    plain, graph = (run(function, form, t, backend="native") for function in (delta_linear, compiled))
    for name in plain:
        torch.testing.assert_close(graph[name], plain[name])


def test_a_layers_gain_goes_inside_and_costs_no_bit(monkeypatch):
    """DoRA's gain as a layer multiplies it: inside the native hand, no worse than behind its product."""
    t = Inputs((70, 130, 96, 8))
    w = torch.nn.Parameter(t("w", 96, 130, kind=torch.bfloat16, by=130**-0.5), requires_grad=False)
    x, dy = t("x", 70, 130, kind=torch.bfloat16), t("dy", 70, 96, kind=torch.bfloat16)
    bias, s = t("bias", 96, kind=torch.bfloat16), t.segment(0, 8)
    g = 1 + t("gain", 96, by=0.01)

    def results(function, dtype=None):
        leaves = [n.detach().to(dtype or n.dtype).requires_grad_() for n in (x, s.a, s.b, g)]
        own = (s._replace(a=leaves[1], b=leaves[2]),)
        y = function(leaves[0], w.to(dtype or w.dtype), own, leaves[3], bias.to(dtype or bias.dtype))
        found = [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]
        return dict(zip(("y", "dx", "da", "db", "dg"), found, strict=True))

    def behind(x, w, segments, g, bias):
        return gain.multiplied(delta_linear(x, w, segments), [(g, None)], None, bias)

    near = results(behind)
    exact = results(lambda x, w, segments, g, bias: reference(x, w, segments, bias, g), torch.float64)
    monkeypatch.setattr(gain, "multiplied", None)
    got = results(lambda x, _, own, g, bias: gain.product(x, w, own, [(g, None)], None, bias, None))
    for name, right in exact.items():
        assert_no_worse(name, got[name], near[name], right)
        assert (got[name].double() - right).norm() <= 1.1 * (near[name].double() - right).norm(), name
