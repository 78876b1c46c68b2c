"""The decoding step of csrc/cuda on a CPU: its source by a C++ compiler, with sanitizers."""

import cuda_builds
import pytest
import torch
from cuda_steps import DTYPES, NARROW, STEPS, WIDE, check, make

from pefast.native import delta_linear_cuda as hand
from pefast.ops.delta_linear import Call

pytestmark = pytest.mark.skipif(bool(cuda_builds.WHY_NOT), reason=cuda_builds.WHY_NOT)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    opened = hand.opened(cuda_builds.library(tmp_path_factory.mktemp("cuda")))
    assert opened[0] is not None, opened[1]
    return opened


@pytest.fixture
def step(library, monkeypatch):
    """One decoding step by the launcher of the hand, on a build for this CPU."""
    monkeypatch.setattr(hand, "_device", "cpu")
    monkeypatch.setattr(hand, "library", lambda: library)

    def run(call, processors=NARROW):
        monkeypatch.setattr(hand, "_processors", lambda device: processors)
        with torch.no_grad():
            assert hand.why_not(call) == ""
            y, saved = hand.forward(call)
        assert saved == [] and not any(counts.any() for counts in hand._counts.values())
        return y

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_as_the_formula_says(step, name, dtype):
    check(step, make(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_fp32_adapters_beside_a_half(step, dtype):
    check(step, make("each its own", dtype, torch.float32))
    check(step, make("long", dtype, torch.float32), WIDE)


def test_a_wide_block_computes_the_same_bits(step):
    for name in ("each its own", "long"):
        call = make(name, torch.bfloat16)
        assert torch.equal(check(step, call, WIDE), check(step, call, NARROW))


def test_a_row_does_not_depend_on_its_neighbours(step):
    call = make("each its own", torch.bfloat16)
    y = step(call)
    for row in (0, 5, 15):
        alone = call._replace(x=call.x[row : row + 1], ids=call.ids[row : row + 1])
        assert torch.equal(step(alone)[0], y[row])
    poisoned = call.x.clone()
    poisoned[3] = float("nan")
    rest = [row for row in range(16) if row != 3]
    assert torch.equal(step(call._replace(x=poisoned))[rest], y[rest])


def test_without_bias_gain_or_ids(step):
    call = make("ragged", torch.bfloat16)
    every = tuple(s._replace(adapter=None) for s in call.segments)
    check(step, call._replace(bias=None, gain=None, ids=None, segments=every))
    check(step, call._replace(gain=None))


def test_rows_that_lie_apart(step):
    call = make("each its own", torch.float16)
    wide = torch.randn(70, 104).half()
    columns = torch.randn(96, 16).half().t()
    check(step, call._replace(w=wide[:, 1:97]))
    check(step, call._replace(x=torch.randn(16, 3, 96).half()[:, 1], w=wide[:, 8:]))
    check(step, call._replace(x=columns))


REFUSED = {
    "a CPU tensor": (lambda c: c, "needs a GPU, x is on cpu"),
    "too many rows": (lambda c: c._replace(x=c.x.repeat(3, 1)), "16 rows of a decoding step at most"),
    "float64": (lambda c: c._replace(x=c.x.double(), w=c.w.double()), "x is float64"),
    "a transposed weight": (lambda c: c._replace(w=c.w.t().contiguous().t()), "neighbouring columns"),
    "another device": (lambda c: c._replace(w=c.w.to("meta")), "the weight is on meta"),
    "a gradient": (lambda c: c._replace(x=c.x.requires_grad_()), "computes no gradients"),
    "ids in int32": (lambda c: c._replace(ids=c.ids.int()), "int64"),
    "an activation": (lambda c: _first(c, activation="relu"), "takes LoRAs"),
    "dropout": (lambda c: _first(c, dropout=0.5), "has no dropout"),
    "a half in another half": (lambda c: _first(c, a=c.segments[0].a.half()), "takes a in bfloat16"),
    "too many adapters": (lambda c: c._replace(segments=c.segments * 17), "32 segments at most, here are 34"),
}  # fmt: skip


def _first(call: Call, **changes) -> Call:
    return call._replace(segments=(call.segments[0]._replace(**changes), *call.segments[1:]))


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_run_is_refused_in_words(library, monkeypatch, name):
    change, words = REFUSED[name]
    monkeypatch.setattr(hand, "_device", "cuda" if name == "a CPU tensor" else "cpu")
    monkeypatch.setattr(hand, "library", lambda: library)
    assert words in hand.why_not(change(make("ragged", torch.bfloat16)))


def test_a_missing_or_foreign_library_is_told_in_words(tmp_path, monkeypatch):
    kernels, why = hand.opened(tmp_path / "_cuda.so")
    assert kernels is None and "do not load" in why
    monkeypatch.setattr(hand, "_device", "cpu")
    monkeypatch.setattr(hand, "library", lambda: (None, "the CUDA kernels were not built"))
    assert hand.why_not(make("one row", torch.bfloat16)) == "the CUDA kernels were not built"


def test_sizes_that_do_not_fit_are_an_error_and_not_a_launch(step):
    call = make("one row", torch.bfloat16)
    long = call._replace(x=call.x.expand(17, -1), ids=call.ids.expand(17))
    with pytest.raises(RuntimeError, match=r"did not launch the kernel of a decoding step: error 1$"):
        hand.forward(long)


@pytest.mark.slow
@pytest.mark.parametrize("watch", cuda_builds.WATCHES)
def test_random_shapes_under_a_sanitizer(tmp_path, watch):
    program = cuda_builds.fuzzer(tmp_path, watch)
    done = cuda_builds.run(program, {"numbers": 20, "address": 5, "thread": 1}[watch])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
def test_blocks_may_begin_in_any_order_and_number(tmp_path):
    program = cuda_builds.fuzzer(tmp_path, "numbers")
    for blocks in ("1", "3", "16"):
        done = cuda_builds.run(program, 4, EMULATED_ORDER="1", EMULATED_BLOCKS=blocks)
        assert done.returncode == 0, done.stdout + done.stderr
