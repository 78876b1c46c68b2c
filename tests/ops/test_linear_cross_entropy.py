"""linear_cross_entropy: every hand against the formula, the loss and the gradient."""

import pytest
import torch

from pefast.ops import linear_cross_entropy
from pefast.ops.linear_cross_entropy import OP, Call, reference
from pefast.testing import assert_no_worse

# name: rows, width, classes
CASES = {
    "one row": (1, 16, 7),
    "ragged": (37, 33, 101),
    "one class": (5, 8, 1),
    "several turns": (600, 24, 257),
    "many classes": (9, 32, 5003),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make(case, dtype, seed=0):
    m, k, v = CASES[case]
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(m, k, generator=g), torch.randn(v, k, generator=g)
    return x.to(dtype), w.to(dtype), torch.randint(0, v, (m,), generator=g)


def run(function, x, w, target, dtype, **options):
    x = x.to(dtype).detach().requires_grad_()
    loss = function(x, w.to(dtype), target, **options)
    loss.backward()
    return {"loss": loss.detach().reshape(1), "dx": x.grad}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", OP.backends)
def test_loss_and_gradient(backend, case, dtype):
    if why := OP.why_not(backend, Call(*make(case, dtype))):
        pytest.skip(why)
    runs = []
    for seed in range(3):
        given = make(case, dtype, seed)
        each = [run(linear_cross_entropy, *given, dtype, backend=backend)]
        runs.append(each + [run(reference, *given, at) for at in (dtype, torch.float64)])
    for name in ("loss", "dx"):
        got, near, exact = (torch.cat([r[i][name].flatten() for r in runs]) for i in range(3))
        if dtype == torch.float64:
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
        elif name == "loss":
            # fp32 for every dtype; bf16 logits are rounded alike, so they agree to the sums' own error
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, near.float(), rtol=1e-5, atol=1e-5)
        else:
            assert_no_worse(name, got, near, exact)


@pytest.mark.parametrize("backend", OP.backends)
def test_rows_that_do_not_count(backend):
    x, w, target = make("ragged", torch.float32)
    target[::3] = -100
    got = run(linear_cross_entropy, x, w, target, torch.float32, backend=backend)
    near = run(reference, x, w, target, torch.float32)
    torch.testing.assert_close(got["loss"], near["loss"])
    torch.testing.assert_close(got["dx"], near["dx"])
    assert (got["dx"][::3] == 0).all()
    count = run(linear_cross_entropy, x, w, target, torch.float32, count=10, backend=backend)
    torch.testing.assert_close(count["loss"], near["loss"] * (target >= 0).sum() / 10)
    assert linear_cross_entropy(x, w, torch.full_like(target, -100), backend=backend).isnan()


@pytest.mark.parametrize("backend", OP.backends)
def test_sure_and_extreme_logits(backend):
    """A weight that rounds to 1, a loss of 1e4 and logits of -inf keep their numbers."""
    w = torch.eye(40, dtype=torch.float32)
    x = torch.zeros(4, 40)
    x[0, 3], x[1, 3], x[2, 3], x[3, 5] = 12.0, 1e4, -1e4, float("-inf")
    target = torch.tensor([3, 4, 3, 1])
    got = run(linear_cross_entropy, x, w, target, torch.float32, backend=backend)
    near = run(reference, x, w, target, torch.float32)
    torch.testing.assert_close(got["loss"], near["loss"], equal_nan=True)
    for dtype in (torch.float32, torch.bfloat16):
        first = x[:3].to(dtype), w.to(dtype), target[:3]
        got = run(linear_cross_entropy, *first, dtype, backend=backend)
        near = run(reference, *first, dtype)
        torch.testing.assert_close(got["loss"], near["loss"].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["dx"], near["dx"], rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", OP.backends)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(backend, dtype):
    given = make("several turns", dtype)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 3, 5):
            torch.set_num_threads(threads)
            runs.append(run(linear_cross_entropy, *given, dtype, backend=backend))
    finally:
        torch.set_num_threads(before)
    # the kernel between the products is ours; PyTorch's fp32 product may sum in another order
    same = runs[:2] if dtype == torch.float32 or backend == "eager" else runs
    assert all(torch.equal(same[0][name], other[name]) for other in same for name in ("loss", "dx"))


def test_gradcheck_and_leading_dimensions():
    x, w, target = make("ragged", torch.float64)
    x = x[:6].view(2, 3, -1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: linear_cross_entropy(x, w, target[:6].view(2, 3)), (x,))


def test_operator():
    x, w, target = make("ragged", torch.bfloat16)
    if OP.why_not("native", Call(x, w, target)):
        pytest.skip("no native hand here")
    torch.library.opcheck(torch.ops.pefast.linear_cross_entropy.default, (x, w, target, True))


@pytest.mark.parametrize("fault", ["target moved", "class dropped", "not divided"])
def test_planted_faults_are_caught(fault):
    x, w, target = make("ragged", torch.float32)
    exact, near = (run(reference, x, w, target, at)["dx"] for at in (torch.float64, torch.float32))
    wrong = {
        "target moved": lambda: run(linear_cross_entropy, x, w, (target + 1) % 101, torch.float32),
        "class dropped": lambda: run(linear_cross_entropy, x, w[:-1], target % 100, torch.float32),
        "not divided": lambda: run(linear_cross_entropy, x, w, target, torch.float32, count=1),
    }[fault]()["dx"]
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse("dx", wrong, near, exact)


def test_bad_calls_get_one_sentence():
    x, w, target = make("ragged", torch.float32)
    with pytest.raises(ValueError, match="one dtype and width"):
        linear_cross_entropy(x, w.double(), target)
    with pytest.raises(ValueError, match=r"int64 \(37,\) would be right"):
        linear_cross_entropy(x, w, target[:-1])
    with pytest.raises(ValueError, match="0 to 100 or -100"):
        linear_cross_entropy(x, w, target + 90)
    with pytest.raises(ValueError, match="a frozen output embedding"):
        linear_cross_entropy(x, w.clone().requires_grad_(), target)
