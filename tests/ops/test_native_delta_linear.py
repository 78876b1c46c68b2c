"""The native hand of delta_linear by itself: values, gradients, bits, and the packs of the weight."""

import gc
import weakref

import pytest
import torch

from pefast.native import delta_linear as native
from pefast.native import sibling_linear
from pefast.testing import assert_no_worse
from tests import one_lora

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

# M, K, N, R: one of each, no multiple of a tile, all multiples, several panels and several blocks of rows
SHAPES = [
    (1, 1, 1, 1),
    (1, 64, 48, 4),
    (3, 17, 33, 3),
    (33, 65, 63, 8),
    (17, 1000, 31, 24),
    (64, 384, 384, 16),
    (63, 96, 1000, 64),
    (40, 33, 80, 256),
    (530, 130, 70, 16),
    (1100, 64, 96, 5),
    (96, 2048, 64, 16),
]


def make_call(
    shape, dropout=0.0, masters=torch.float32, bias=True, apart=0, conv1d=False, scale=1.5
) -> tuple:
    """A call and a gradient of its result, or a skip where the hand cannot run it."""
    call, dy = one_lora.make(shape, torch.bfloat16, dropout, bias, apart, conv1d, masters, scale)
    if why := native.refuse(call):
        pytest.skip(why)
    return call, dy


def run(call, dy) -> dict:
    return one_lora.results(native, call, dy)


def assert_close(got: dict, call, dy) -> None:
    near, exact = one_lora.formula(call, dy, torch.bfloat16), one_lora.formula(call, dy, torch.float64)
    for name in got:
        # fp32 gradients come from bf16 products: held to what bf16 allows
        assert_no_worse(name, got[name].to(torch.bfloat16), near[name], exact[name])


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dropout):
    call, dy = make_call(shape, dropout)
    assert_close(run(call, dy), call, dy)


@pytest.mark.parametrize(
    "options",
    [{"masters": torch.bfloat16}, {"bias": False}, {"apart": 5}, {"apart": 32}, {"conv1d": True}],
    ids=str,
)
def test_every_form_of_input(options):
    call, dy = make_call((70, 130, 97, 16), 0.05, **options)
    got = run(call, dy)
    assert_close(got, call, dy)
    assert got["da"].dtype == call.segments[0].a.dtype and got["db"].dtype == call.segments[0].b.dtype


def test_columns_far_apart_are_copied():
    call, dy = make_call((20, 48, 40, 4))
    there = run(call, dy)
    here = run(call._replace(x=call.x.t().contiguous().t()), dy.t().contiguous().t())
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_zero_rows():
    call, dy = make_call((0, 32, 24, 8), 0.05)
    got = run(call, dy)
    assert got["y"].shape == (0, 24) and got["dx"].shape == (0, 32)
    assert not got["da"].any() and not got["db"].any()


@pytest.mark.parametrize("fault", one_lora.FAULTS)
def test_the_measure_finds_planted_faults(fault):
    call, dy = make_call((64, 128, 96, 8), 0.5)
    got = one_lora.planted(run, call, dy, fault)
    with pytest.raises(AssertionError):
        assert_close(got, call, dy)


@pytest.mark.parametrize(
    "shape", [(1, 33, 40, 3), (64, 384, 384, 16), (700, 96, 130, 24), (1100, 64, 64, 4)], ids=str
)
def test_same_bits_every_run_and_for_any_number_of_threads(shape):
    call, dy = make_call(shape, 0.05)
    one_lora.assert_same_bits(lambda: run(call, dy))


def test_only_the_gradients_asked_for():
    call, dy = make_call((50, 64, 48, 8), 0.05)
    one_lora.assert_only_what_is_asked_for(native, call, dy, run(call, dy))


def test_packs_follow_writes_and_leave_with_the_weight():
    call, dy = make_call((8, 64, 96, 4))
    run(call, dy)
    assert native.packed_bytes(call.w) == 2 * 2 * 64 * 96
    before = native.forward(call)[0]
    with torch.no_grad():
        call.w.mul_(2)
    assert not torch.equal(native.forward(call)[0], before), "a write in place was not seen"
    call.w.data.mul_(0.5)
    assert torch.equal(native.forward(call)[0], before), "a write through .data was not seen"
    # a view of the same weight finds the same packs
    packed, _ = sibling_linear.packed_weight(call.w, False)
    assert sibling_linear.packed_weight(call.w.detach(), False)[0] is packed
    gone = weakref.ref(packed)
    del call, packed
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("at", [0, 1, 777, -1])
def test_a_write_of_one_number_is_seen(at):
    # most numbers are not among those by which a pack is known
    call, dy = make_call((8, 64, 96, 4))
    run(call, dy)
    with torch.no_grad():
        call.w.view(-1)[at] += 4
    anew = call._replace(w=torch.nn.Parameter(call.w.detach().clone(), requires_grad=False))
    seen, right = run(call, dy), run(anew, dy)
    assert all(torch.equal(seen[name], right[name]) for name in ("y", "dx"))


def test_refusals_are_words():
    call, _ = make_call((4, 32, 24, 2))
    s = call.segments[0]
    cases = {
        "bfloat16": call._replace(x=call.x.double()),
        "frozen": call._replace(w=torch.nn.Parameter(call.w)),
        "takes a in float32 or bfloat16": call._replace(segments=(s._replace(a=s.a.double()),)),
        "takes d in float32": call._replace(segments=(s, s._replace(d=torch.ones(24).double()))),
        "takes a gain in float32": call._replace(gain=torch.ones(24).half()),
        "waist from elsewhere": call._replace(segments=(s._replace(a=None, h=call.x[:, :2].float()),)),
        "rank of 1": call._replace(segments=(s._replace(a=s.a[:0], b=s.b[:, :0]),)),
    }
    for word, other in cases.items():
        assert word in native.refuse(other)
    assert native.decline(call) == "" and "parameter" in native.decline(call._replace(w=call.w.detach()))


def test_the_operators_pass_opcheck():
    call, dy = make_call((9, 33, 20, 3), 0.05)
    s = call.segments[0]
    given = (call.x, call.w, call.bias, s.a, s.b, s.scale, s.dropout, call.seed)
    torch.library.opcheck(torch.ops.pefast.delta_linear.default, given)
    h = native.forward(call)[1][0][0]
    given = (dy, call.x, call.w, s.a, s.b, h, s.scale, s.dropout, call.seed, True, True, False)
    torch.library.opcheck(torch.ops.pefast.delta_linear_backward.default, given)
