"""The native hand of delta_linear in fp32 with all that stands beside a weight: several segments,
activations, biases, adapters of rows, waists from elsewhere."""

import pytest
import torch

from pefast.native import delta_linear_fp32 as native
from pefast.ops.delta_linear import Call, Segment, delta_linear, reference
from pefast.testing import assert_no_worse

pytestmark = [
    pytest.mark.usefixtures("nan_filled_empty"),
    pytest.mark.skipif(not native.HERE, reason="needs AMX"),
]

M, K, N, SEED = 70, 96, 130, 31
IDS = torch.arange(M) % 4 - 1


def normal(*size, by=1.0):
    return torch.randn(*size, dtype=torch.float64).mul_(by).float()


def segment(rank, biases="", scale=0.7, **more):
    c, d = normal(rank) if "c" in biases else None, normal(N) if "d" in biases else None
    return Segment(normal(rank, K, by=K**-0.5), normal(N, rank, by=rank**-0.5), scale, c=c, d=d, **more)


def given(rank, **more):
    return Segment(None, normal(N, rank, by=rank**-0.5), 1.3, h=normal(M, rank), **more)


# name: the segments of a call
CASES = {
    "an adapter": lambda: [segment(24, "cd", activation="relu")],
    "an adapter and a LoRA": lambda: [segment(24, "cd", activation="gelu"), segment(8, dropout=0.3)],
    "two that drop": lambda: [segment(3, dropout=0.5), segment(17, "c", activation="tanh", dropout=0.2)],
    "rows of their own": lambda: [segment(4, "d", adapter=0), segment(5, "cd", activation="silu", adapter=2)],
    "everything": lambda: [
        given(6, d=normal(N), adapter=1),
        segment(40, "cd", scale=-1.5, activation="quick_gelu", dropout=0.1, adapter=0),
        segment(1),
        given(2),
    ],
}


def made(name):
    """x, w, bias, dy and the segments of a case."""
    torch.manual_seed(sum(map(ord, name)))
    w = torch.nn.Parameter(normal(N, K, by=K**-0.5), requires_grad=False)
    return normal(M, K), w, normal(N), normal(M, N), CASES[name]()


def results(function, x, w, bias, dy, segments, wanted=None, gain=None):
    """y and the gradients of x, gain and every tensor of the segments that are wanted, by name."""
    x, leaves, own = x.detach().clone().requires_grad_(), {}, []
    for i, s in enumerate(segments):
        tensors = {name: getattr(s, name) for name in "abcdh" if getattr(s, name) is not None}
        tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        leaves |= {f"d{name}{i}": t for name, t in tensors.items()}
        own.append(s._replace(**tensors))
    leaves = {"dx": x, **leaves}
    if gain is not None:
        leaves["dgain"] = gain = gain.detach().clone().requires_grad_()
    y = function(x, w, own, bias) if gain is None else function(x, w, own, bias, gain)
    leaves = {name: t for name, t in leaves.items() if wanted is None or name in wanted}
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)
    )


def run(case, compute=None, wanted=None, seed=SEED, gain=None):
    def by_hand(x, w, segments, bias, gain=None):
        options = {"seed": torch.tensor([seed]), "compute": compute, "backend": "native"}
        return delta_linear(x, w, segments, bias, gain, IDS, **options)

    return results(by_hand, *case, wanted, gain)


def assert_close(got, case, gain=None):
    """Held to PyTorch's own error in fp32."""

    def formula(x, w, segments, bias, gain=None):
        return reference(x, w, segments, bias, gain, IDS, SEED)

    x, w, bias, dy, segments = case
    wide = [
        s._replace(**{n: getattr(s, n).double() for n in "abcdh" if getattr(s, n) is not None})
        for s in segments
    ]
    near = results(formula, *case, gain=gain)
    wide = (x.double(), w.detach().double(), bias.double(), dy.double(), wide)
    exact = results(formula, *wide, gain=None if gain is None else gain.double())
    assert set(got) == set(exact)
    for name in exact:
        assert_no_worse(name, got[name], near[name], exact[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("under", ["plain", "gain"])
def test_values_and_gradients(name, under):
    case = made(name)
    gain = normal(N) if under == "gain" else None
    assert_close(run(case, gain=gain), case, gain)


@pytest.mark.parametrize("fault", ["mask", "scale", "rows", "activation", "bias"])
def test_the_measure_finds_planted_faults(fault):
    x, w, bias, dy, segments = case = made("everything")
    first, second, *rest = segments
    wrong = {
        "scale": (first, second._replace(scale=second.scale * 1.0001)),
        "rows": (first, second._replace(adapter=1)),
        "activation": (first, second._replace(activation="silu")),
        "bias": (first._replace(d=first.d * (torch.arange(N) < N - 1)), second),
    }.get(fault, (first, second))
    got = run((x, w, bias, dy, [*wrong, *rest]), seed=SEED + (fault == "mask"))
    with pytest.raises(AssertionError):
        assert_close(got, case)


def test_only_the_gradients_asked_for():
    case = made("everything")
    whole = run(case)
    for wanted in (["dx"], ["da1"], ["db1"], ["dc1"], ["dd0", "dd1"], ["dh0"], ["db3", "dh3"]):
        alone = run(case, wanted=wanted)
        assert set(alone) == {"y", *wanted}
        for name, t in alone.items():
            # a product of another width sums in another order
            assert torch.allclose(t, whole[name], rtol=1e-4, atol=1e-5), (wanted, name)


def test_products_in_bf16_keep_fp32_sums():
    case = made("an adapter and a LoRA")
    got, whole = run(case, compute="bf16"), run(case)
    for name, right in whole.items():
        difference = (got[name] - right).abs().max() / right.abs().max()
        assert got[name].dtype == torch.float32 and difference < 0.02
    assert not torch.equal(got["y"], whole["y"]), "the products were not in bf16"


def test_the_automatic_choice_takes_it_and_it_compiles_in_one_graph():
    x, w, bias, dy, segments = made("an adapter and a LoRA")
    plain = [s._replace(dropout=0.0) for s in segments]
    call = Call(x, w, bias, None, None, None, plain)
    assert native.why_not(call) == native.why_slower(call) == ""
    torch.compiler.reset()

    def layer(x, w, segments, bias):
        return delta_linear(x, w, segments, bias)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    right = results(layer, x, w, bias, dy, plain)
    for name, got in results(compiled, x, w, bias, dy, plain).items():
        assert torch.allclose(got, right[name], rtol=1e-5, atol=1e-6), name


def test_dropout_without_its_hand_is_refused():
    x, w, bias, _, segments = made("two that drop")
    assert "dropout" in native.why_not(Call(x, w, bias, None, None, torch.tensor([1]), segments))
