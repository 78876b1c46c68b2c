"""Every hand makes the mask that a Philox written here, in plain numbers, makes."""

import importlib
import math

import pytest
import torch

from pefast.native import C, through_the_registry
from pefast.native import dropout as native
from pefast.testing import assert_no_worse

# the package's attribute of this name is the function
op = importlib.import_module("pefast.ops.dropout")

SEED = 0x0123_4567_89AB_CDEF
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# M, K: no rows, one element, ends of a vector, of a word's columns, of a block and of a tile
SHAPES = [(0, 8), (1, 1), (3, 31), (5, 200), (2, 129), (4, 128), (1, 4096), (2, 4099)]
LEVELS = C.isas() if C else []
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def philox(counter, key, rounds=10):
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        # the remainder of a high word is for tensors, whose products wrap
        c0, c1, c2, c3 = (p1 >> 32) % 2**32 ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) % 2**32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def plain_mask(m, k, p, seed, stream):
    """The mask, element by element, in Python's own numbers."""
    key, threshold = (seed % 2**32, seed >> 32), min(round(p * 65536), 65535)
    keep = torch.empty(m, k, dtype=torch.bool)
    for row in range(m):
        for col in range(k):
            word = philox((col // 128 * 16 + col % 32 // 2, row, stream, 0), key)[col % 128 // 32]
            keep[row, col] = (word >> 16 * (col % 2)) % 65536 >= threshold
    return keep


def same_bits(one, other):
    """Equal to the sign of a zero; any NaN equals any other."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = BITS[one.element_size()]
    equal = one.contiguous().view(bits) == other.contiguous().view(bits)
    return bool((equal | (one.isnan() & other.isnan())).all())


def numbers(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def seed_of(value=SEED):
    return torch.tensor([value])


def hand_or_skip(backend, x):
    if why := op.OP.why_not(backend, op.Call(x, 0.5, seed_of(), 0)):
        pytest.skip(why)
    return op.OP.hands[backend]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request):
    before = C.isa()
    C.use_isa(request.param)
    yield request.param
    C.use_isa(before)


KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, key, words):
    assert philox(counter, key) == words
    as_tensors = [torch.tensor([v]) for v in counter], [torch.tensor([v]) for v in key]
    assert [int(word) for word in op.philox(*as_tensors)] == words


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999999])
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (SEED, 3), (2**63 - 1, 2**32 - 1)])
def test_the_reference_makes_the_mask_of_the_formula(p, seed, stream):
    assert torch.equal(op.keep_mask(3, 300, p, seed, stream), plain_mask(3, 300, p, seed, stream))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("backend", op.OP.backends)
def test_every_hand_makes_the_reference_bit_for_bit(backend, m, k, dtype):
    x = numbers(m, k, dtype=dtype)
    hand = hand_or_skip(backend, x)
    for p, stream in ((0.3, 0), (0.05, 7)):
        assert same_bits(hand.forward(x, p, seed_of(), stream), op.reference(x, p, SEED, stream))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_makes_the_same_bits_and_stays_inside(level, dtype):
    for m, k in SHAPES:
        wide = numbers(m, k + 9, dtype=dtype)
        x, t = wide[:, 4 : 4 + k], numbers(m + 1, k, dtype=dtype)[1:]
        # results lie between guards, on memory full of NaN
        out, sums = (torch.full((m * k + 64,), math.nan, dtype=dtype) for _ in range(2))
        y = numbers(m, k, dtype=dtype)
        sums[32 : 32 + m * k] = y.view(-1)
        at, size = 32 * out.element_size(), native._TYPES[dtype]
        ins, outs = (x.data_ptr(), k + 9), (t.data_ptr(), k, sums.data_ptr() + at, k)
        C.dropout(*ins, out.data_ptr() + at, *outs, m, k, size, 0.3, SEED, 5, 1)
        assert same_bits(out[32 : 32 + m * k].view(m, k), op.reference(x, 0.3, SEED, 5)), (m, k)
        keep, accurate = (
            op.keep_mask(m, k, 0.3, SEED, 5),
            torch.float64 if dtype == torch.float64 else torch.float32,
        )
        step = torch.where(keep, t.to(accurate) * (1 / 0.7), 0)
        assert torch.equal(sums[32 : 32 + m * k].view(m, k), (y.to(accurate) + step).to(dtype)), (m, k)
        for buffer in (out, sums):
            assert buffer[:32].isnan().all() and buffer[32 + m * k :].isnan().all(), "wrote outside"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_scaled_and_rounded_as_pytorch_does(level, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    for p in (0.0, 0.1, 0.75):
        assert same_bits(native.forward(x, p, seed_of(), 0), op.reference(x, p, SEED))


@pytest.mark.parametrize("backend", op.OP.backends)
@pytest.mark.parametrize("form", ["strided rows", "transposed", "expanded", "one column", "subclass"])
def test_inputs_of_any_layout(backend, form):
    forms = {
        "strided rows": numbers(8, 300)[::2, 3:203],
        "transposed": numbers(200, 5).t(),
        "expanded": numbers(1, 1).expand(6, 130),
        "one column": numbers(9, 4)[:, 2:3],
        "subclass": numbers(3, 140).as_subclass(type("Marked", (torch.Tensor,), {})),
    }
    x = forms[form]
    hand = hand_or_skip(backend, x)
    assert through_the_registry(x) == (form == "subclass")
    got = hand.forward(x, 0.3, seed_of(), 2)
    assert got.is_contiguous() and same_bits(got, op.reference(x, 0.3, SEED, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", op.OP.backends)
def test_adding_and_both_at_once_use_the_mask_of_forward(backend, dtype):
    x, t, y = (numbers(m, 333, dtype=dtype)[-5:] for m in (5, 6, 7))
    hand = hand_or_skip(backend, x)
    near, exact = y + op.reference(t, 0.3, SEED, 4), y.double() + op.reference(t.double(), 0.3, SEED, 4)
    added, with_x = y.clone(), y.clone()
    assert hand.add_(added, t, 0.3, seed_of(), 4) is None
    assert_no_worse("add_", added, near, exact)
    assert torch.equal(hand.both_(x, t, with_x, 0.3, seed_of(), 4), op.reference(x, 0.3, SEED, 4))
    assert torch.equal(with_x, added)


@pytest.mark.parametrize(("m", "k"), [(37, 5001), (1, 200_003), (4096, 48)])
def test_any_number_of_threads_makes_the_same_bits(threads, m, k):
    x = numbers(m, k, dtype=torch.bfloat16)
    hand_or_skip("native", x)
    threads(1)
    alone, summed = native.forward(x, 0.1, seed_of(), 0), x.clone()
    native.add_(summed, x, 0.1, seed_of(), 0)
    for count in (2, 3, 5):
        threads(count)
        assert same_bits(native.forward(x, 0.1, seed_of(), 0), alone)
        again = x.clone()
        native.add_(again, x, 0.1, seed_of(), 0)
        assert same_bits(again, summed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", op.OP.backends)
def test_what_is_dropped_is_zero_whatever_it_was(backend, value):
    x = torch.full((6, 150), value)
    hand = hand_or_skip(backend, x)
    keep, got = op.keep_mask(6, 150, 0.4, SEED), hand.forward(x, 0.4, seed_of(), 0)
    assert same_bits(got[~keep], torch.zeros_like(got[~keep]))
    assert same_bits(got[keep], x[keep])
    y = torch.ones_like(x)
    hand.add_(y, x, 0.4, seed_of(), 0)
    assert torch.equal(y[~keep], torch.ones_like(y[~keep]))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_and_the_neighbours_are_those_of_independent_draws(p):
    x = torch.ones(1024, 1024)
    keep = op.dropout(x, p, seed=SEED) != 0

    def within(hits, chance, draws):
        return abs(int(hits) - chance * draws) < 5 * math.sqrt(chance * (1 - chance) * draws)

    q = 1 - round(p * 65536) / 65536
    assert within(keep.sum(), q, keep.numel())
    assert all(within(row.sum(), q, 1024) for row in (*keep[:64], *keep.t()[:64]))
    pairs = {"columns": (keep[:, ::2], keep[:, 1::2]), "words": (keep[:, :512], keep[:, 512:])}
    pairs |= {"rows": (keep[::2], keep[1::2]), "lanes": (keep[:, 0::4], keep[:, 2::4])}
    for other in (
        op.dropout(x, p, seed=SEED + 1),
        op.reference(x, p, SEED, 1),
        op.dropout(x, p, seed=SEED + 2**32),
    ):
        pairs[len(pairs)] = (keep, other != 0)
    for name, (one, other) in pairs.items():
        assert within((one & other).sum(), q * q, one.numel()), name


@pytest.mark.parametrize("backend", [b for b in op.OP.backends if b != "triton"])
def test_gradients(backend):
    x = numbers(2, 3, 17, dtype=torch.float64).requires_grad_()
    hand_or_skip(backend, x.detach().view(6, 17))

    def run(x):
        return op.dropout(x, 0.3, seed=SEED, backend=backend)

    assert torch.autograd.gradcheck(run, x) and torch.autograd.gradgradcheck(run, x)
    assert torch.autograd.gradcheck(lambda x: op.reference(x, 0.3, SEED), x)


def test_backward_has_the_mask_of_forward_and_keeps_only_the_seed():
    x, kept = numbers(4, 8, 96, dtype=torch.bfloat16).requires_grad_(), []

    def keep_sizes(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep_sizes, lambda tensor: tensor):
        y = op.dropout(x, 0.3)
    # a gradient of one number repeated has strides of 0
    y.sum().backward()
    assert kept == [1]
    assert torch.equal(x.grad != 0, y != 0)


def test_a_seed_comes_from_pytorchs_generator():
    x = numbers(3, 64)
    torch.manual_seed(5)
    first, second = op.dropout(x, 0.5), op.dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(op.dropout(x, 0.5), first)
    assert not torch.equal(first, second)
    assert torch.equal(op.dropout(x, 0.5, seed=9), op.dropout(x, 0.5, seed=torch.tensor(9)))


def test_outside_of_training_and_at_rate_zero_x_comes_back():
    x = numbers(3, 5)
    assert op.dropout(x, 0.5, training=False) is x
    assert op.dropout(x, 0.0) is x
    assert op.dropout(torch.ones(2, 0, 4), 0.5).shape == (2, 0, 4)
    assert op.dropout(torch.tensor(2.0), 0.5, seed=0).shape == ()
    assert op.dropout(numbers(7), 0.5, seed=0).shape == (7,)


BAD = {
    "p of one": ({"p": 1.0}, "p is 1.0; a rate from 0 to below 1"),
    "p below zero": ({"p": -0.1}, "p is -0.1; a rate from 0 to below 1"),
    "p not a number": ({"p": math.nan}, "p is nan; a rate from 0 to below 1"),
    "whole numbers": ({"x": torch.arange(4)}, "x is torch.int64; a floating-point dtype"),
    "seed below zero": ({"seed": -1}, "seed is -1; 0 to 2^63 - 1"),
    "seed too large": ({"seed": 2**63}, "0 to 2^63 - 1"),
    "two seeds": ({"seed": torch.tensor([1, 2])}, "one int64 on the CPU"),
    "no such hand": ({"backend": "abacus"}, "there is no back end 'abacus'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_sentence(case):
    given, sentence = BAD[case]
    with pytest.raises(ValueError, match=r"^dropout: ") as error:
        op.dropout(**{"x": torch.ones(2, 2), "p": 0.5, **given})
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_the_native_hand_refuses_in_words(monkeypatch):
    call = op.Call(torch.ones(2, 2, device="meta"), 0.5, seed_of(), 0)
    monkeypatch.setattr(native, "C", object())
    assert native.refuse(call) == "needs a CPU, x is on meta"
    assert "x is float8_e5m2" in native.refuse(call._replace(x=torch.ones(2, 2).to(torch.float8_e5m2)))
    monkeypatch.setattr(native, "C", None)
    monkeypatch.setattr(native, "WHY_NOT", "the extension was not built: no compiler")
    assert native.refuse(call) == "the extension was not built: no compiler"
    with pytest.raises(RuntimeError, match="no compiler"):
        torch.ops.pefast.dropout(torch.ones(2, 2), 0.5, seed_of(), 0)
    assert op.OP.pick(call._replace(x=torch.ones(2, 2))) == "eager"


def test_the_native_door_checks_what_it_adds_to():
    hand_or_skip("native", torch.ones(2, 2))
    with pytest.raises(ValueError, match="one shape and dtype"):
        native.add_(torch.ones(2, 2), torch.ones(2, 3), 0.5, seed_of(), 0)
    with pytest.raises(ValueError, match="contiguous"):
        native.add_(torch.ones(3, 2).t(), torch.ones(2, 3), 0.5, seed_of(), 0)
    with pytest.raises(ValueError, match="a stride of at least the length"):
        C.dropout(1, 2, 1, 0, 0, 0, 0, 3, 4, 0, 0.5, 1, 0, 1)


def test_operators_pass_pytorchs_own_check():
    hand_or_skip("native", torch.ones(2, 2))
    x, t, y = (numbers(m, 40)[-5:] for m in (5, 6, 7))
    torch.library.opcheck(torch.ops.pefast.dropout, (x, 0.3, seed_of(), 1))
    torch.library.opcheck(torch.ops.pefast.dropout, (x.t(), 0.3, seed_of(), 1))
    torch.library.opcheck(torch.ops.pefast.dropout_add_, (y, t, 0.3, seed_of(), 1))
    torch.library.opcheck(torch.ops.pefast.dropout_both_, (x, t, y, 0.3, seed_of(), 1))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_compiles_cold_in_one_graph(backend, compiler):
    hand_or_skip(backend, torch.ones(2, 2))
    torch.compiler.reset()
    x = numbers(3, 5, 144).requires_grad_()

    def given(x):
        return op.dropout(x, 0.3, seed=SEED, backend=backend)

    def drawn(x):
        return op.dropout(x, 0.3, backend=backend)

    assert same_bits(torch.compile(given, fullgraph=True, backend=compiler)(x), op.reference(x, 0.3, SEED))
    y = torch.compile(drawn, fullgraph=True, backend=compiler)(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad != 0, y != 0)


FAULTS = {
    "words in another order": lambda m: m.view(-1, 4, 32)[:, [0, 2, 1, 3]],
    "halves swapped": lambda m: m.view(-1, 64, 2)[:, :, [1, 0]],
    "lanes in another order": lambda m: m.view(-1, 4, 16, 2).transpose(1, 2),
    "a row late": lambda m: m.roll(1, 0),
    "a column late": lambda m: m.roll(1, 1),
}


@pytest.mark.parametrize(
    "fault", [*FAULTS, "threshold off by one", "stream lost", "nine rounds", "high seed lost"]
)
def test_planted_faults_are_caught(fault, monkeypatch):
    m, k, p, stream = 256, 1024, 0.3, 1
    x = torch.ones(m, k)
    right = op.reference(x, p, SEED, stream)
    if fault == "threshold off by one":
        p += 2**-16
    elif fault == "stream lost":
        stream = 0
    elif fault == "nine rounds":
        monkeypatch.setattr(op, "philox", lambda counter, key: philox(counter, key, rounds=9))
    seed = SEED % 2**32 if fault == "high seed lost" else SEED
    keep = op.keep_mask(m, k, p, seed, stream)
    if fault in FAULTS:
        keep = FAULTS[fault](keep).reshape(m, k)
    assert not same_bits(torch.where(keep, x * (1 / 0.7), 0), right)
    for backend in ("native", "eager"):
        if not op.OP.why_not(backend, op.Call(x, p, seed_of(), 1)):
            assert same_bits(op.OP.hands[backend].forward(x, 0.3, seed_of(), 1), right)
