"""The native hand of prefix_attention by itself: panels, chunks, bits, memory it may not touch, refusals."""

import ctypes
import mmap
from typing import NamedTuple

import pytest
import torch

from pefast.native import prefix_attention as native
from pefast.ops.prefix_attention import Call, reference
from pefast.testing import assert_no_worse

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

NAMES = ("q", "k", "v", "prefix_k", "prefix_v")
ALL = (True,) * 5


class Sizes(NamedTuple):
    """q [B, H, L, D], k and v [B, G, S, D], a prefix of P keys."""

    b: int
    h: int
    g: int
    l: int
    s: int
    p: int
    d: int


# several panels of queries, several chunks of keys, both; heads that end inside a strip; odd widths
SIZES = {
    "one of each": Sizes(1, 1, 1, 1, 2, 1, 1),
    "panels": Sizes(1, 4, 2, 300, 300, 3, 32),
    "chunks": Sizes(2, 1, 1, 20, 700, 9, 64),
    "panels and chunks": Sizes(1, 1, 1, 1030, 1100, 40, 16),
    "heads inside a strip": Sizes(2, 6, 1, 21, 40, 33, 48),
    "odd width": Sizes(2, 2, 2, 40, 65, 31, 33),
    "wide": Sizes(1, 2, 1, 50, 50, 32, 256),
}


# the dtype of the test that runs now
KIND = [torch.bfloat16]


@pytest.fixture(autouse=True, params=["bfloat16", "bfloat16 in float32", "float32"])
def _kind(request, monkeypatch):
    dtype, widens = getattr(torch, request.param.split()[0]), "in" in request.param
    if not native._HERE[torch.float32 if widens else dtype] or (
        native._WIDENS and request.param == "bfloat16"
    ):
        pytest.skip(
            f"needs {'AVX-512' if widens else 'AMX' if dtype is torch.bfloat16 else native._NEEDS[dtype]}"
        )
    monkeypatch.setattr(native, "_WIDENS", widens)
    KIND[0] = dtype


def make_call(sizes, seed=0, shared=True, size=1.0, **options) -> tuple[Call, torch.Tensor]:
    """A call and a gradient of its result."""
    z, generator = sizes, torch.Generator().manual_seed(seed + 1)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) * size).to(KIND[0])

    prefix_shape = (z.g, z.p, z.d) if shared else (z.b, z.g, z.p, z.d)
    prefix = [normal(*prefix_shape) if z.p else None for _ in "kv"]
    q, do = normal(z.b, z.h, z.l, z.d), normal(z.b, z.h, z.l, z.d)
    k, v = normal(z.b, z.g, z.s, z.d), normal(z.b, z.g, z.s, z.d)
    call = Call(q, k, v, *prefix, None, False, z.d**-0.5, 0.0, torch.tensor([7]), None)
    return call._replace(**options), do


def full(sizes) -> dict:
    """Every option at once: a mask that leaves some rows and some blocks empty, causal, dropout."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(sizes.b, 1, sizes.l, sizes.s, generator=generator) < 0.8
    mask[..., : sizes.s // 3] = False
    return {"mask": mask, "causal": sizes.s >= sizes.l, "dropout": 0.2}


def run(call, do) -> dict:
    o, lse = native.forward(call)
    found = native.backward(call, o, lse, do, tuple(t is not None for t in call[:5]))
    return {"o": o} | {f"d{name}": t for name, t in zip(NAMES, found, strict=True) if t is not None}


def formula(call, do, dtype) -> dict:
    t = [None if t is None else t.detach().to(dtype).requires_grad_() for t in call[:5]]
    o = reference(*t, call.mask, call.causal, call.scale, call.dropout, call.seed)
    there = {f"d{name}": one for name, one in zip(NAMES, t, strict=True) if one is not None}
    found = torch.autograd.grad(o, list(there.values()), do.to(dtype))
    return {"o": o.detach()} | dict(zip(there, found, strict=True))


def pooled(function, sizes, *more, **options) -> dict:
    runs = [function(*make_call(sizes, seed, **options), *more) for seed in range(3)]
    return {name: torch.cat([one[name].flatten() for one in runs]) for name in runs[0]}


def assert_close(sizes, **options) -> None:
    got = pooled(run, sizes, **options)
    near, exact = (pooled(formula, sizes, at, **options) for at in (KIND[0], torch.float64))
    assert got.keys() == exact.keys()
    for name in exact:
        assert_no_worse(name, got[name], near[name], exact[name])


@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients(name):
    assert_close(SIZES[name])
    assert_close(SIZES[name], shared=False, **full(SIZES[name]))


@pytest.mark.parametrize("dropout", [0.5, 0.999])
def test_rates_of_dropout(dropout):
    assert_close(SIZES["heads inside a strip"], dropout=dropout)


def test_one_mask_for_the_whole_batch():
    sizes = SIZES["odd width"]
    assert_close(sizes, mask=torch.rand(1, 1, 1, sizes.s) < 0.5)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_large_numbers_stay_finite(shift):
    """Every x far below or above zero: powers of two of x itself would be 0 or infinite."""
    call, do = make_call(SIZES["odd width"])
    one = torch.zeros_like(call.q[..., :1])
    call = call._replace(q=torch.cat((call.q[..., 1:], one + shift), 3), prefix_k=None, prefix_v=None)
    call = call._replace(k=torch.cat((call.k[..., 1:], torch.ones_like(call.k[..., :1])), 3), scale=1.0)
    got, exact = run(call, do), formula(call, do, torch.float64)
    for name in exact:
        assert got[name].isfinite().all(), name
    torch.testing.assert_close(got["o"].double(), exact["o"], rtol=0.02, atol=0.02)


def test_a_nan_shows():
    call, _ = make_call(SIZES["odd width"])
    call.q[0, 0, 3, 5] = float("nan")
    o = native.forward(call)[0]
    assert o[0, 0, 3].isnan().all() and o[0, 0, 4:].isfinite().all() and o[1].isfinite().all()


@pytest.mark.parametrize("name", ["panels", "panels and chunks", "heads inside a strip", "odd width"])
@pytest.mark.parametrize("shared", [True, False])
def test_same_bits_every_run_and_for_any_number_of_threads(name, shared):
    call, do = make_call(SIZES[name], shared=shared, **full(SIZES[name]))
    first = run(call, do)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        again = run(call, do)
        different = [key for key in first if not torch.equal(first[key], again[key])]
        assert not different, f"{different} differ with {threads} threads"


def test_only_the_gradients_asked_for():
    call, do = make_call(SIZES["odd width"], dropout=0.1)
    whole = run(call, do)
    o, lse = native.forward(call)
    for chosen in range(5):
        needs = tuple(i == chosen for i in range(5))
        found = native.backward(call, o, lse, do, needs)
        assert torch.equal(found[chosen], whole[f"d{NAMES[chosen]}"])
        assert all(t is None for i, t in enumerate(found) if i != chosen)


def test_layouts_are_those_of_the_inputs():
    """Heads as transformers gives them come back so; columns far apart are copied."""
    call, do = make_call(SIZES["odd width"])
    dense = run(call, do)
    for swap in ((1, 2), (2, 3)):
        q, k, v = (t.transpose(*swap).contiguous().transpose(*swap) for t in call[:3])
        got = run(call._replace(q=q, k=k, v=v), do.transpose(*swap).contiguous().transpose(*swap))
        assert all(torch.equal(got[name], dense[name]) for name in dense)
    q = call.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert native.forward(call._replace(q=q))[0].stride() == q.stride()
    # one prefix written out for the batch has a gradient for each row
    rows = [t.expand(2, *t.shape) for t in call[3:5]]
    assert run(call._replace(prefix_k=rows[0], prefix_v=rows[1]), do)["dprefix_k"].shape == rows[0].shape
    expanded = torch.ones(1, 1, 1, 33, dtype=KIND[0]).expand_as(do)
    assert torch.equal(run(call, expanded)["dq"], run(call, expanded.contiguous())["dq"])


FAULTS = {
    "scale": lambda call: call._replace(scale=call.scale * 1.02),
    "mask": lambda call: call._replace(seed=call.seed + 1),
    "key": lambda call: call._replace(k=call.k.roll(1, 2)),
    "prefix": lambda call: call._replace(prefix_v=call.prefix_v * 0.98),
    "causal": lambda call: call._replace(causal=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_measure_finds_planted_faults(fault):
    call, do = make_call(SIZES["heads inside a strip"], dropout=0.1)
    near, exact = formula(call, do, KIND[0]), formula(call, do, torch.float64)
    got = run(FAULTS[fault](call), do)
    caught = 0
    for name in exact:
        try:
            assert_no_worse(name, got[name], near[name], exact[name])
        except AssertionError:
            caught += 1
    assert caught


def test_refusals_are_words():
    call, _ = make_call(SIZES["odd width"])
    assert native.refuse(call) == ""
    assert "takes bfloat16 and float32, q is float64" in native.refuse(call._replace(q=call.q.double()))
    assert "scale above 0" in native.refuse(call._replace(scale=-1.0))
    assert "needs a CPU" in native.refuse(call._replace(q=call.q.to("meta")))


def at_the_edge(t: torch.Tensor, first: bool) -> torch.Tensor:
    """A copy of t that ends where a page begins that nobody may touch, or begins where such a page ends."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    room = -(-size // page) * page
    block = mmap.mmap(-1, room + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(block))
    libc = ctypes.CDLL(None, use_errno=True)
    for edge in (base, base + page + room):
        assert libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(
        block, dtype=t.dtype, count=t.numel(), offset=page if first else page + room - size
    )
    return copy.view(t.shape).copy_(t)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["one of each", "heads inside a strip", "odd width"])
def test_reads_stay_inside(name, first):
    """One number outside a tensor would end the process."""
    call, do = make_call(SIZES[name], **full(SIZES[name]))
    whole = run(call, do)
    o, lse = native.forward(call)
    call = call._replace(**{f: at_the_edge(getattr(call, f), first) for f in (*NAMES, "mask", "seed")})
    assert torch.equal(native.forward(call)[0], whole["o"])
    found = native.backward(call, *(at_the_edge(t.contiguous(), first) for t in (o, lse, do)), ALL)
    assert all(torch.equal(t, whole[f"d{f}"]) for f, t in zip(NAMES, found, strict=True))


def test_a_single_query_is_left_to_others():
    if native._WIDENS:
        pytest.skip("without tiles bf16 declines whatever has no gradient")
    call, _ = make_call(Sizes(2, 8, 8, 1, 200, 0, 64))
    assert "1 for each key head and no gradient" in native.decline(call)
    assert native.decline(call._replace(q=call.q.requires_grad_())) == ""
    assert native.decline(make_call(Sizes(2, 8, 8, 1, 200, 4, 64))[0]) == ""
    enough = 4 if KIND[0] == torch.bfloat16 else 16
    assert native.decline(make_call(Sizes(2, 2 * enough, 2, 1, 200, 0, 64))[0]) == ""


def test_without_tiles_bf16_is_for_training():
    call, _ = make_call(SIZES["panels"])
    assert ("a gradient to come" in native.decline(call)) == native._WIDENS
    assert native.decline(call._replace(prefix_k=call.prefix_k.requires_grad_())) == ""


def test_the_operators_pass_opcheck():
    call, do = make_call(Sizes(2, 4, 2, 9, 12, 3, 16), dropout=0.1)
    call = call._replace(mask=torch.rand(2, 1, 9, 12) < 0.7)
    torch.library.opcheck(torch.ops.pefast.prefix_attention.default, call[:10])
    o, lse = native.forward(call)
    given = (do, o, lse, *call[:10], True, True, False, True, True)
    torch.library.opcheck(torch.ops.pefast.prefix_attention_backward.default, given)


def test_a_processor_without_the_kernel_is_refused_in_words(monkeypatch):
    call, _ = make_call(SIZES["odd width"])
    monkeypatch.setitem(native._HERE, KIND[0], False)
    assert f"needs {native._NEEDS[KIND[0]]}" in native.refuse(call)
    with pytest.raises(RuntimeError, match="prefix_attention: the native kernel cannot run"):
        native.forward(call)
