"""prefix_attention: every hand against the formula, for the result and each gradient."""

from typing import NamedTuple

import pytest
import torch

from pefast.ops import prefix_attention
from pefast.ops.prefix_attention import OP, Call, reference
from pefast.testing import assert_no_worse

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SEED = torch.tensor([20240917])
LEAVES = ("q", "k", "v", "prefix_k", "prefix_v")


class Sizes(NamedTuple):
    """q [B, H, L, D], k and v [B, G, S, D], a prefix of P keys."""

    b: int
    h: int
    g: int
    l: int
    s: int
    p: int
    d: int


CASES = {
    "one of each": Sizes(1, 1, 1, 1, 1, 1, 16),
    "ragged": Sizes(2, 3, 3, 37, 45, 5, 32),
    "bert": Sizes(2, 4, 4, 64, 64, 32, 64),
    "no prefix": Sizes(2, 2, 2, 70, 70, 0, 64),
    "decode, grouped": Sizes(3, 8, 2, 1, 77, 3, 64),
    "grouped": Sizes(2, 6, 2, 33, 50, 7, 80),
    "wide head": Sizes(1, 2, 1, 45, 95, 1, 128),
    "long": Sizes(1, 2, 2, 150, 333, 17, 32),
    "prefix alone": Sizes(2, 2, 2, 9, 0, 6, 16),
    "zero rows": Sizes(0, 2, 2, 4, 4, 2, 16),
}


def plain(sizes):
    return {}


def causal(sizes):
    return {"causal": sizes.s >= sizes.l}


def padded_right(sizes):
    """As a batch of texts of different lengths has it: [B, 1, 1, S]."""
    length = torch.arange(sizes.b) * 7 % max(1, sizes.s)
    return {"mask": (torch.arange(sizes.s) < sizes.s - length[:, None])[:, None, None]}


def padded_left(sizes):
    """[B, 1, L, S], causal: the first rows of a padded text see nothing but the prefix."""
    length = torch.arange(sizes.b) * 7 % max(1, sizes.s)
    see = torch.arange(sizes.s) >= length[:, None]
    return causal(sizes) | {"mask": see[:, None, None].expand(-1, 1, sizes.l, -1)}


def dropped(sizes):
    return {"dropout": 0.25, "seed": SEED, "scale": 0.2}


def everything(sizes):
    return dropped(sizes) | padded_left(sizes)


FORMS = {form.__name__: form for form in (plain, causal, padded_right, padded_left, dropped, everything)}


def make_inputs(case, dtype, seed=0, shared=True):
    """The tensors of a named case, and do; no prefix where P is 0."""
    z = CASES[case]
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {"q": normal(z.b, z.h, z.l, z.d), "do": normal(z.b, z.h, z.l, z.d)}
    inputs |= {"k": normal(z.b, z.g, z.s, z.d), "v": normal(z.b, z.g, z.s, z.d)}
    if z.p:
        shape = (z.g, z.p, z.d) if shared else (z.b, z.g, z.p, z.d)
        inputs |= {"prefix_k": normal(*shape), "prefix_v": normal(*shape)}
    return inputs


def run(function, inputs, dtype, **options):
    """The result and every gradient."""
    t = {name: inputs[name].detach().to(dtype).requires_grad_() for name in LEAVES if name in inputs}
    o = function(**t, **options)
    o.backward(inputs["do"].to(dtype))
    return {"o": o.detach()} | {f"d{name}": tensor.grad for name, tensor in t.items()}


def refusal(backend, inputs, **options):
    t = [inputs.get(name) for name in LEAVES]
    call = Call(*t, options.get("mask"), options.get("causal", False), 1.0, 0.0, None, None)
    return OP.why_not(backend, call._replace(dropout=options.get("dropout", 0.0)))


def pooled(function, case, dtype, at, shared=True, **options):
    """Results over three draws of the inputs in one row: one small draw says little about an error."""
    runs = [run(function, make_inputs(case, dtype, seed, shared), at, **options) for seed in range(3)]
    return {name: torch.cat([one[name].flatten() for one in runs]) for name in runs[0]}


def by_torch(q, k, v, prefix_k=None, prefix_v=None, mask=None, causal=False):
    """PyTorch's own attention over concatenated keys."""
    if prefix_k is not None:
        k, v = (torch.cat((p.expand(len(t), *p.shape[-3:]), t), 2) for p, t in ((prefix_k, k), (prefix_v, v)))
    l, keys = q.shape[2], k.shape[2]
    see = torch.ones(l, keys, dtype=torch.bool)
    if causal:
        see = see.tril(keys - l)
    if mask is not None:
        see = see & torch.nn.functional.pad(mask, (keys - mask.shape[3], 0), value=True)
    see = see.expand(q.shape[0], 1, l, keys)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, see, enable_gqa=True)


def allowed(case, dtype, exact, shared, **options):
    """What PyTorch gives in this dtype: its formula, or its fused attention where that is further off.

    In fp32 the largest error of the fused one is up to three times the formula's, its root-mean-square less.
    """
    near = pooled(reference, case, dtype, dtype, shared, **options)
    if options.get("dropout") or dtype != torch.float32:
        return near
    fused = pooled(by_torch, case, dtype, dtype, shared, **options)
    further = {name: (fused[name] - exact[name]).abs() > (near[name] - exact[name]).abs() for name in exact}
    return {name: torch.where(further[name], fused[name], near[name]) for name in exact}


def assert_close(case, dtype, backend, shared=True, **options):
    if why := refusal(backend, make_inputs(case, dtype, 0, shared), **options):
        pytest.skip(why)
    got = pooled(prefix_attention, case, dtype, dtype, shared, backend=backend, **options)
    exact = pooled(reference, case, dtype, torch.float64, shared, **options)
    near = allowed(case, dtype, exact, shared, **options)
    assert got.keys() == exact.keys()
    for name in exact:
        if dtype == torch.float64:
            # the formula has no wider dtype to be compared in: two orders of the same sums
            torch.testing.assert_close(got[name], exact[name], rtol=1e-11, atol=1e-11, msg=name)
        else:
            assert_no_worse(name, got[name], near[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", OP.backends)
def test_forward_and_gradients(backend, form, case, dtype):
    assert_close(case, dtype, backend, **FORMS[form](CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("case", ["ragged", "grouped", "decode, grouped"])
@pytest.mark.parametrize("backend", OP.backends)
def test_a_prefix_for_each_row(backend, case, form, dtype):
    assert_close(case, dtype, backend, shared=False, **FORMS[form](CASES[case]))


@pytest.mark.parametrize("backend", OP.backends)
def test_the_prefix_is_as_good_as_concatenated(backend):
    """The same numbers as keys of the sequence give the same result and gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs("grouped", dtype, shared=False)
        if why := refusal(backend, inputs):
            continue
        got = run(prefix_attention, inputs, dtype, backend=backend)
        whole = dict(inputs)
        for name in ("k", "v"):
            whole[name] = torch.cat((whole.pop(f"prefix_{name}"), inputs[name]), 2)
        there = run(prefix_attention, whole, dtype, backend=backend)
        for name in ("k", "v"):
            here = torch.cat((got[f"dprefix_{name}"], got[f"d{name}"]), 2)
            torch.testing.assert_close(here, there[f"d{name}"], rtol=0.02, atol=0.02)
        torch.testing.assert_close(got["o"], there["o"], rtol=0.02, atol=0.02)
    assert dtype == torch.bfloat16 and why == refusal(backend, inputs)


@pytest.mark.parametrize("backend", OP.backends)
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_heads_as_transformers_gives_them(backend, form):
    """[B, L, H, D] transposed, slices of one product, rows apart, an expanded gradient."""
    z = CASES["ragged"]
    options = FORMS[form](z)
    fits = {dtype: make_inputs("ragged", dtype) for dtype in (torch.float32, torch.bfloat16)}
    refused = {dtype: why for dtype, inputs in fits.items() if (why := refusal(backend, inputs, **options))}
    if len(refused) == len(fits):
        pytest.skip("; ".join(refused.values()))
    for dtype in fits.keys() - refused:
        inputs = fits[dtype]
        dense = run(prefix_attention, inputs, dtype, backend=backend, **options)
        leaves = []
        for name in ("q", "k", "v"):
            wide = torch.full((z.b, inputs[name].shape[2], z.h, z.d + 8), float("nan"), dtype=dtype)
            wide[..., : z.d] = inputs[name].transpose(1, 2)
            leaves.append(wide[..., : z.d].transpose(1, 2).requires_grad_())
        prefix = [inputs[name].mT.contiguous().mT for name in ("prefix_k", "prefix_v")]
        o = prefix_attention(*leaves, *prefix, backend=backend, **options)
        torch.testing.assert_close(o, dense["o"], rtol=0, atol=1e-6)
        o.backward(inputs["do"].transpose(1, 2).contiguous().transpose(1, 2))
        for name, leaf in zip(("dq", "dk", "dv"), leaves, strict=True):
            torch.testing.assert_close(leaf.grad, dense[name], rtol=0, atol=1e-6)
        ones = torch.autograd.grad(
            prefix_attention(*leaves, *prefix, backend=backend, **options).sum(), leaves[2]
        )
        assert ones[0].isfinite().all()
    assert dense["o"].isfinite().all()


@pytest.mark.parametrize("backend", OP.backends)
def test_a_row_that_sees_nothing_is_zero(backend):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs("no prefix", dtype)
        mask = torch.ones(2, 1, 70, 70, dtype=torch.bool)
        mask[0, :, 3], mask[1, :, :, 5:] = False, False
        if refusal(backend, inputs, mask=mask):
            continue
        got = run(prefix_attention, inputs, dtype, mask=mask, backend=backend)
        assert not got["o"][0, :, 3].any() and not got["dq"][0, :, 3].any()
        assert not got["dk"][1, :, 5:].any() and not got["dv"][1, :, 5:].any()
        assert all(value.isfinite().all() for value in got.values())


def test_gradcheck():
    z = Sizes(2, 4, 2, 3, 5, 2, 4)
    shapes = [(z.b, z.h, z.l, z.d), (z.b, z.g, z.s, z.d), (z.b, z.g, z.s, z.d)]
    tensors = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    mask = torch.rand(2, 1, 3, 5) < 0.7
    for shape in ((z.g, z.p, z.d), (z.b, z.g, z.p, z.d)):
        prefix = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for _ in range(2)]
        for options in ({"mask": mask}, {"causal": True}, {"dropout": 0.25, "seed": SEED}):
            for function, more in ((reference, {}), (prefix_attention, {"backend": "eager"})):
                assert torch.autograd.gradcheck(
                    lambda *t, f=function, o=options | more: f(*t, **o), (*tensors, *prefix)
                )


@pytest.mark.parametrize("backend", OP.backends)
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_same_bits_run_to_run(backend, form):
    for dtype in (torch.float32, torch.bfloat16):
        inputs, options = make_inputs("bert", dtype), FORMS[form](CASES["bert"])
        if not refusal(backend, inputs, **options):
            first, second = (run(prefix_attention, inputs, dtype, backend=backend, **options) for _ in "ab")
            assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", OP.backends)
def test_no_output_is_left_unwritten(backend, nan_filled_empty):
    for dtype in (torch.float32, torch.bfloat16):
        for case in ("ragged", "long", "decode, grouped"):
            inputs, options = make_inputs(case, dtype), everything(CASES[case])
            if not refusal(backend, inputs, **options):
                got = run(prefix_attention, inputs, dtype, backend=backend, **options)
                assert all(value.isfinite().all() for value in got.values())


def test_inputs_are_never_written_to():
    inputs = make_inputs("ragged", torch.bfloat16)
    before = {name: value.clone() for name, value in inputs.items()}
    run(prefix_attention, inputs, torch.bfloat16, **everything(CASES["ragged"]))
    assert all(torch.equal(before[name], inputs[name]) for name in inputs)


def last_key_twice(t):
    t = dict(t)
    t["k"] = torch.cat((t["k"][:, :, :-2], t["k"][:, :, -1:], t["k"][:, :, -1:]), 2)
    return t


FAULTS = {
    "scale 1 % wrong": lambda t: t | {"q": t["q"] * 1.01},
    "last key forgotten": last_key_twice,
    "last value forgotten": lambda t: t | {"v": torch.cat((t["v"][:, :, :-1], 0 * t["v"][:, :, -1:]), 2)},
    "prefix of another head": lambda t: t | {"prefix_k": t["prefix_k"].roll(1, 0)},
    "last column of the prefix dropped": lambda t: (
        t | {"prefix_v": torch.cat((t["prefix_v"][..., :-1], 0 * t["prefix_v"][..., -1:]), -1)}
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    """The measure of closeness must see each of these in fp32, or it would not see them in a kernel."""
    inputs = make_inputs("ragged", torch.float32)
    exact, near = (run(reference, inputs, at)["o"] for at in (torch.float64, torch.float32))
    assert_no_worse("healthy", run(prefix_attention, inputs, torch.float32)["o"], near, exact)
    wrong = run(prefix_attention, FAULTS[fault](inputs), torch.float32)["o"]
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse(fault, wrong, near, exact)


@pytest.mark.parametrize("change", [{"causal": False}, {"mask": None}, {"seed": SEED + 1}], ids=str)
def test_wrong_settings_are_caught(change):
    """A triangle or a mask that is not the formula's would be seen in the result and in gradients."""
    inputs = make_inputs("ragged", torch.float32)
    right = everything(CASES["ragged"])
    exact, near = (run(reference, inputs, at, **right) for at in (torch.float64, torch.float32))
    wrong = run(prefix_attention, inputs, torch.float32, **right | change)
    for name in ("o", "dq", "dk", "dprefix_v"):
        with pytest.raises(AssertionError, match="error"):
            assert_no_worse(name, wrong[name], near[name], exact[name])


@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("backend", OP.backends)
def test_compiles_in_one_graph_cold(backend, form):
    torch._dynamo.reset()
    dtype = torch.float32 if backend == "eager" else torch.bfloat16
    inputs, options = make_inputs("ragged", dtype), FORMS[form](CASES["ragged"])
    if why := refusal(backend, inputs, **options):
        pytest.skip(why)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    plain_run = run(prefix_attention, inputs, dtype, backend=backend, **options)
    graph_run = run(compiled, inputs, dtype, backend=backend, **options)
    for name in plain_run:
        torch.testing.assert_close(graph_run[name], plain_run[name])


def test_autocast_gives_all_its_dtype():
    inputs = make_inputs("ragged", torch.float32)
    prefix = [inputs[name].requires_grad_() for name in ("prefix_k", "prefix_v")]
    with torch.autocast("cpu", torch.bfloat16):
        o = prefix_attention(inputs["q"], inputs["k"], inputs["v"], *prefix)
        assert o.dtype == torch.bfloat16
        o.float().sum().backward()
    assert prefix[0].grad.dtype == prefix[1].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: {"q": t["q"][0]}, "q is .*; .B, H, L, D. and twice .B, G, S, D. would be right"),
        (lambda t: {"v": t["v"][:, :, 1:]}, "and twice"),
        (lambda t: {"k": t["k"][:, :2], "v": t["v"][:, :2]}, "H a multiple of G"),
        (lambda t: {"q": t["q"].double()}, "one floating dtype"),
        (lambda t: {"dropout": 1.0}, "dropout is 1.0"),
        (lambda t: {"causal": True, "k": t["k"][:, :, :9], "v": t["v"][:, :, :9]}, "37 queries and 9 keys"),
        (lambda t: {"mask": torch.ones(2, 1, 37, 45)}, "mask is torch.float32"),
        (lambda t: {"mask": torch.ones(2, 3, 37, 45, dtype=torch.bool)}, r"a bool \[2, 1, 37, 45\]"),
        (lambda t: {"prefix_v": None}, "prefix_v is missing"),
        (lambda t: {"prefix_k": t["prefix_k"][:, :4]}, r"\[3, P, 32\] or \[2, 3, P, 32\]"),
        (lambda t: {"backend": "abacus"}, "there is no back end 'abacus'"),
    ],
)
def test_bad_calls_get_one_sentence(change, text):
    inputs = make_inputs("ragged", torch.float32)
    del inputs["do"]
    with pytest.raises(ValueError, match=text):
        prefix_attention(**inputs | change(inputs))
