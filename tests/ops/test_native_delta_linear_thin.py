"""The native hand of delta_linear without AMX: PyTorch's product and one pass beside it."""

import pytest
import torch

from pefast.native import C
from pefast.native import delta_linear_thin as native
from pefast.ops.dropout import keep_mask
from pefast.testing import assert_no_worse
from tests import one_lora

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

# M, K, N, R: one of each, no multiple of a register, all multiples, several stretches and shares of rows
SHAPES = [
    (1, 1, 1, 1),
    (1, 64, 48, 4),
    (3, 17, 33, 3),
    (33, 65, 63, 8),
    (17, 1100, 31, 24),
    (64, 384, 384, 16),
    (40, 33, 80, 63),
    (530, 130, 70, 16),
    (130, 96, 1100, 5),
]
LEVELS = [name for name in (C.isas() if C else []) if name in ("avx2", "avx512")]


@pytest.fixture(params=LEVELS or [None], autouse=True)
def _instructions(request):
    """Each test on AVX2 and on AVX-512, and on one thread."""
    if request.param is None:
        pytest.skip("csrc is not built, or this processor has no AVX2")
    threads, before = torch.get_num_threads(), C.isa()
    torch.set_num_threads(1)
    C.use_isa(request.param)
    yield
    C.use_isa(before)
    torch.set_num_threads(threads)


def make_call(shape, dtype, dropout=0.0, bias=True, apart=0, conv1d=False, masters=torch.float32) -> tuple:
    """A call that the hand takes, and a gradient of its result."""
    call, dy = one_lora.make(shape, dtype, dropout, bias, apart, conv1d, masters)
    assert native.why_not(call) == ""
    return call, dy


def run(call, dy) -> dict:
    return one_lora.results(native, call, dy)


def assert_close(got: dict, call, dy) -> None:
    dtype = call.x.dtype
    near, exact = one_lora.formula(call, dy, dtype), one_lora.formula(call, dy, torch.float64)
    for name in exact:
        assert_no_worse(name, got[name].to(dtype), near[name], exact[name])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, dropout):
    call, dy = make_call(shape, dtype, dropout)
    assert_close(run(call, dy), call, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"apart": 5}, {"apart": 32}, {"conv1d": True}],
    ids=str,
)
def test_every_form_of_input(options, dtype):
    call, dy = make_call((70, 130, 97, 16), dtype, 0.05, **options)
    got = run(call, dy)
    assert_close(got, call, dy)
    assert got["da"].dtype == call.segments[0].a.dtype and got["db"].dtype == call.segments[0].b.dtype


def test_masters_in_bf16():
    call, dy = make_call((70, 130, 97, 16), torch.bfloat16, 0.05, masters=torch.bfloat16)
    got = run(call, dy)
    assert_close(got, call, dy)
    assert got["da"].dtype == got["db"].dtype == torch.bfloat16


def test_columns_far_apart_are_copied():
    call, dy = make_call((20, 48, 40, 4), torch.float32)
    there = run(call, dy)
    here = run(call._replace(x=call.x.t().contiguous().t()), dy.t().contiguous().t())
    assert all(torch.allclose(there[name], here[name], atol=1e-5) for name in there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_rows(dtype):
    call, dy = make_call((0, 32, 24, 8), dtype, 0.05)
    got = run(call, dy)
    assert got["y"].shape == (0, 24) and got["dx"].shape == (0, 32)
    assert not got["da"].any() and not got["db"].any()


@pytest.mark.parametrize("fault", one_lora.FAULTS)
def test_the_measure_finds_planted_faults(fault):
    call, dy = make_call((64, 128, 96, 8), torch.bfloat16, 0.5)
    got = one_lora.planted(run, call, dy, fault)
    with pytest.raises(AssertionError):
        assert_close(got, call, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 40, 3), (700, 96, 130, 24), (1100, 64, 64, 4)], ids=str)
def test_same_bits_every_run_and_for_any_number_of_threads(shape, dtype):
    """What csrc computes; a library's product may differ with its own threads."""
    call, dy = make_call(shape, dtype, 0.05)
    # a weight of zeros: the library's part is zero whatever its order
    call = call._replace(w=torch.nn.Parameter(torch.zeros_like(call.w), requires_grad=False))
    one_lora.assert_same_bits(lambda: run(call, dy))


def test_only_the_gradients_asked_for():
    call, dy = make_call((50, 64, 48, 8), torch.float32, 0.05)
    one_lora.assert_only_what_is_asked_for(native, call, dy, run(call, dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_is_not_hidden_and_what_is_dropped_does_not_count(dtype):
    call, dy = make_call((40, 64, 48, 4), dtype, 0.5)
    keep = keep_mask(40, 64, 0.5, call.seed)
    plain = run(call, dy)
    for row, column in ((3, int(keep[3].nonzero()[0])), (4, int((~keep[4]).nonzero()[0]))):
        x = call.x.clone()
        x[row, column] = float("nan")
        got = run(call._replace(x=x, w=torch.nn.Parameter(call.w * 0, requires_grad=False), bias=None), dy)
        assert got["h"][row].isnan().all() == bool(keep[row, column])
        assert torch.equal(got["h"][:3], plain["h"][:3]) and got["db"].isnan().any() == bool(
            keep[row, column]
        )


def test_refusals_are_words():
    call, _ = make_call((14, 32, 24, 2), torch.float32)
    s = call.segments[0]
    cases = {
        "weight bfloat16": call._replace(w=call.w.bfloat16()),
        "one segment": call._replace(segments=(s, s)),
        "gain": call._replace(gain=torch.ones(24)),
        "activation": call._replace(segments=(s._replace(activation="relu"),)),
        "adapter": call._replace(segments=(s._replace(adapter=1),)),
        "trained biases": call._replace(segments=(s._replace(c=torch.ones(2)),)),
        "frozen": call._replace(w=torch.nn.Parameter(call.w)),
        "ranks from 1 to 63": call._replace(
            segments=(s._replace(a=torch.zeros(64, 32), b=torch.zeros(24, 64)),)
        ),
        "float32 or bfloat16": call._replace(segments=(s._replace(a=s.a.double()),)),
    }
    for word, other in cases.items():
        assert word in native.why_not(other)
    assert "PyTorch's own products" in native.why_slower(call)
    assert native.why_slower(call._replace(segments=(s._replace(dropout=0.1),))) == ""


def test_the_operators_pass_opcheck():
    call, dy = make_call((9, 33, 20, 3), torch.bfloat16, 0.05)
    s = call.segments[0]
    given = (call.x, call.w, call.bias, s.a, s.b, s.scale, s.dropout, call.seed)
    torch.library.opcheck(torch.ops.pefast.delta_linear_thin.default, given)
    h = native.forward(call)[1][0][0]
    given = (dy, call.x, call.w, s.a, s.b, h, s.scale, s.dropout, call.seed, True, True, False)
    torch.library.opcheck(torch.ops.pefast.delta_linear_thin_backward.default, given)


def frozen(m, k, n, bias=True):
    """A bf16 layer with nothing beside it, as a call, and a gradient of its result."""
    call, dy = one_lora.make((m, k, n, 1), torch.bfloat16, 0.0, bias, 0, False, torch.float32)
    return call._replace(segments=()), dy


def both_products(call, dy):
    """x wᵀ + bias and dy w, by csrc."""
    y, saved = native.forward(call)
    assert saved == []
    return {"y": y, "dx": native.backward(call, saved, dy, one_lora.ALL)[0]}


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 130, 49), (64, 257, 96), (200, 96, 500)], ids=str)
def test_a_frozen_layer_in_bf16(shape):
    call, dy = frozen(*shape)
    assert native.why_not(call) == ""
    got = both_products(call, dy)
    x, w, dy = call.x, call.w.detach(), dy
    near = {"y": torch.nn.functional.linear(x, w, call.bias.to(x.dtype)), "dx": dy @ w}
    exact = {"y": x.double() @ w.double().t() + call.bias.double(), "dx": dy.double() @ w.double()}
    for name in exact:
        assert_no_worse(name, got[name], near[name], exact[name])


def test_the_frozen_product_has_the_same_bits_for_any_number_of_threads():
    for m in (3, 64, 300):
        call, dy = frozen(m, 200, 150)
        one_lora.assert_same_bits(lambda call=call, dy=dy: both_products(call, dy))


@pytest.mark.parametrize(
    "write", [lambda w: w.data.zero_(), lambda w: w.detach().zero_()], ids=["data", "version"]
)
def test_the_frozen_product_sees_a_write_to_the_weight(write):
    call, dy = frozen(20, 64, 48, bias=False)
    assert both_products(call, dy)["y"].any()
    write(call.w)
    got = both_products(call, dy)
    assert not got["y"].any() and not got["dx"].any()


def test_a_library_that_multiplies_bf16_faster_computes_the_product(monkeypatch):
    call, dy = make_call((33, 65, 63, 8), torch.bfloat16)
    monkeypatch.setattr(native, "_multiplies", lambda dtype: False)
    assert_close(run(call, dy), call, dy)
    assert "one segment" in native.why_not(call._replace(segments=()))
