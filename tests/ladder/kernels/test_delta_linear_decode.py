"""A decoding step in Triton, on a GPU or in the interpreter: no worse than PyTorch, whoever each row asks."""

import copy

import pytest
import torch
from pefast.kernels import delta_linear_decode, forms, tiles
from planted_faults import mutant
from torch import nn

import pefast
from pefast.native.delta_linear_decode import RowDelta
from pefast.testing import assert_no_worse

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# name: rows, K, N, the rank of each row's adapter in turn; None is the base model
STEPS = {
    "one row": (1, 64, 48, [8]),
    "ragged ranks": (5, 100, 70, [1, 3, 8, 16, 64]),
    "some without": (6, 129, 65, [4, None, 5, None]),
    "nobody": (3, 48, 40, [None]),
    "every row": (16, 256, 130, [16]),
    "strips of K": (16, 1100, 200, [3, None, 16]),
    "tiles of slots": (16, 300, 40, [64, 33, 17]),
}


def make(name, dtype, masters=None):
    """x, w, bias, gain and the deltas of a step."""
    m, k, n, ranks = STEPS[name]
    torch.manual_seed(1)
    distinct = {
        r: (torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5) for r in {*ranks} if r is not None
    }
    rows = [(row, ranks[row % len(ranks)]) for row in range(m)]
    kind = masters or dtype
    pairs = {r: (a.to(kind), b.to(kind)) for r, (a, b) in distinct.items()}
    deltas = [RowDelta(row, *pairs[r], 0.25 + r / 64) for row, r in rows if r is not None]
    x, w = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    return x, w, torch.randn(n).to(dtype), torch.randn(n).to(dtype), deltas


def by_formula(x, w, bias, gain, deltas, dtype):
    """(x wᵀ + each row's delta) ⊙ gain + bias in `dtype`."""
    y = x.to(dtype) @ w.to(dtype).t()
    for delta in deltas:
        h = x[delta.row].to(dtype) @ delta.a.to(dtype).t()
        y[delta.row] += delta.scale * (delta.b.to(dtype) @ h)
    y = y if gain is None else y * gain.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def check(x, w, bias, gain, deltas, device, hand=delta_linear_decode):
    """Fails unless a plan's step is as close to the formula as PyTorch's own."""
    # rows with one adapter share its tensors
    moved = {id(t): t.to(device) for delta in deltas for t in (delta.a, delta.b)}
    there = [delta._replace(a=moved[id(delta.a)], b=moved[id(delta.b)]) for delta in deltas]
    x_there, w_there, bias_there, gain_there = (
        None if t is None else t.to(device) for t in (x, w, bias, gain)
    )
    plan = hand.Plan(w_there, bias_there, there, len(x), gain_there)
    y = plan.run(x_there).cpu()
    near, exact = (by_formula(x, w, bias, gain, deltas, dtype) for dtype in (x.dtype, torch.float64))
    assert y.dtype == x.dtype
    assert_no_worse("y", y, near, exact)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_each_row_with_its_own_rank(device, nan_filled_empty, step, dtype):
    x, w, bias, gain, deltas = make(step, dtype)
    check(x, w, bias, None, deltas, device)
    check(x, w, None, gain, deltas, device)


@pytest.mark.parametrize("step", ["strips of K", "tiles of slots"])
def test_fp32_masters_beside_a_narrow_weight(device, step):
    x, w, bias, gain, deltas = make(step, torch.bfloat16, torch.float32)
    check(x, w, bias, gain, deltas, device)


def test_any_strides(device):
    _, w, bias, gain, deltas = make("ragged ranks", torch.bfloat16)
    wide = torch.randn(5, 200).bfloat16()
    w = w.t().contiguous().t()
    apart = [
        d._replace(a=torch.cat((d.a, d.a), 1)[:, :100], b=torch.cat((d.b, d.b), 1)[:, : d.b.shape[1]])
        for d in deltas
    ]
    check(wide[:, ::2], w, bias, gain, apart, device)
    check(torch.randn(100, 5).bfloat16().t(), w, bias, gain, apart, device)


def test_same_input_same_bits_whoever_else_is_in_the_batch(device):
    x, w, bias, _, deltas = make("strips of K", torch.bfloat16)
    y = check(x, w, bias, None, deltas, device)
    assert torch.equal(y, check(x, w, bias, None, deltas, device))
    # rows of the same adapter alone: same slots, same order of sums
    alone = [delta for delta in deltas if delta.a.shape[0] == 3]
    y_alone = check(x, w, bias, None, alone, device)
    rows = [delta.row for delta in alone]
    assert torch.equal(y[rows], y_alone[rows])


def test_an_adapter_that_rows_share_is_read_once(device):
    _, w, bias, _, deltas = make("every row", torch.bfloat16)
    there = [delta._replace(a=delta.a.to(device), b=delta.b.to(device)) for delta in deltas[:1]]
    there = [there[0]._replace(row=row) for row in range(16)]
    plan = delta_linear_decode.Plan(w.to(device), bias.to(device), there, 16)
    assert len(plan.slots) == 16 and set(plan.slots[:, 3].tolist()) == {2**16 - 1}


def test_offsets_beyond_31_bits(device):
    if device == "cuda":
        pytest.skip("wants memory that is only promised, 6 GiB a tensor")
    from interpreter_guard import paused

    far = torch.empty(3 * 2**30, dtype=torch.float16)
    w = far.as_strided((3, 64), (2**30, 1), 128).copy_(torch.randn(3, 64))
    x = torch.randn(2, 64).half()
    with paused():
        y = delta_linear_decode.Plan(w, None, [], 2).run(x)
        assert torch.equal(y, delta_linear_decode.Plan(w.clone(), None, [], 2).run(x))


def layer_with_loras(device):
    """A linear layer with three LoRAs of different ranks that do something."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(100, 70, dtype=torch.bfloat16))
    for name, rank in (("one", 4), ("two", 16), ("odd", 5)):
        pefast.attach(model, pefast.LoRA(rank=rank, targets=["0"]), name=name)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval().to(device)


def test_an_eager_models_step_is_one_plan(device, monkeypatch):
    # whatever the vendor's product would cost at this size
    monkeypatch.setattr(forms, "one_by_one", lambda s, adapters: [forms.Launch("slow", 0, 1e12, 0)])
    model, names = layer_with_loras(device), ["one", None, "odd", "two", "one"]
    x = torch.randn(5, 1, 100).bfloat16().to(device)

    def step():
        with pefast.route(model, names), pefast.backend("triton"), torch.no_grad():
            y = model(x)
        plan = model[0].remembered.plan
        assert isinstance(plan, delta_linear_decode.Plan)
        near, exact = (eager_step(dtype) for dtype in (torch.bfloat16, torch.float64))
        assert_no_worse("y", y.cpu(), near, exact)
        return y, plan

    def eager_step(dtype):
        other = copy.deepcopy(model).cpu().to(dtype)
        with pefast.route(other, names), pefast.backend("eager"), torch.no_grad():
            return other(x.cpu().to(dtype))

    y, plan = step()
    # the second step takes the plan of the first, and sees what was written past every version
    model[0].deltas["two"]["lora"].b.data.mul_(1.5)
    changed, same = step()
    assert same is plan and not torch.equal(y, changed)
    model[0].deltas["one"]["lora"].scale = 0.1
    assert step()[1] is not plan


def test_the_road_that_costs_less(device, monkeypatch):
    rates = forms.RATES["H100"]
    shape = forms.Shape(16, 4096, 4096, 16)
    strips, width = tiles.decode_strips(4096, 4096, torch.bfloat16)
    assert strips == 8 and width == 512 and tiles.decode_strips(32000, 4096, torch.bfloat16)[0] == 1
    first, second = forms.step(shape, strips)
    again = (2 * 16 * 4096 + 2 * 16 * 4096) * 31 + 2 * 4096 * 16 * 7
    assert first.read == 2 * (16 * 4096 + 4096 * 4096 + 2 * 16 * 4096) + again / forms.CACHE
    assert second.written == 2 * 16 * 4096 and len(forms.step(shape, 1)) == 1
    # an adapter costs two launches, several three each, for the rows of others
    assert [len(forms.one_by_one(shape, count)) for count in (0, 1, 2, 16)] == [1, 3, 7, 49]
    # sixteen rows, one adapter or sixteen: few slots are read again cheaply, a thousand are not
    assert forms.why_not_a_step(shape, strips, 1, rates) == ""
    assert forms.why_not_a_step(shape._replace(r=256), strips, 16, rates) == ""
    assert "predicted" in forms.why_not_a_step(shape._replace(r=1024), strips, 1, rates)
    assert "predicted" in forms.why_not_a_step(shape._replace(r=0), strips, 0, rates)


def test_refuses_in_words(device):
    _, w, bias, _, deltas = make("one row", torch.float32)
    w, bias, delta = w.to(device), bias.to(device), deltas[0]
    delta = delta._replace(a=delta.a.to(device), b=delta.b.to(device))

    def said(w=w, bias=bias, **changes):
        return delta_linear_decode.why_not(w, bias, [delta._replace(**changes)])

    assert "float64" in said(w=w.double()) and "weight" in said(w=w.double())
    assert "here is" in said(bias=bias.to("meta")) and "on meta" in said(bias=bias.to("meta"))
    assert "side by side" in said(a=delta.a.t().contiguous().t())
    assert "float64" in said(b=delta.b.double())
    assert "with numbers in it" in said(w=w[:0])
    with torch.inference_mode():
        assert "inference" in said(a=delta.a.clone())
    two = [delta, delta._replace(row=1, a=delta.a.half())]
    assert "one dtype" in delta_linear_decode.why_not(w, bias, two)


# name: (what finds it, the line, the line with its fault)
FAULTS = {
    "rows of another adapter": (
        "numbers",
        "(bits[:, None] >> tl.arange(0, 16)[None, :]) & 1",
        "bits[:, None]",
    ),
    "scale forgotten": ("numbers", "own != 0, z_t * scale[:, None]", "own != 0, z_t"),
    "another adapter's stride": ("numbers", "offs_n[:, None] * stride[None, :]", "offs_n[:, None] * 5"),
    "one slot too many": ("bounds", "mask_r = slots < count\n", "mask_r = slots <= count\n"),
    "a place too many": ("bounds", "slots * 4, slots < count, other", "slots * 4, slots <= count, other"),
    "inner mask dropped": ("bounds", "mask_k = offs_k < end - k", "mask_k = offs_k >= 0"),
    "outer mask dropped": (
        "bounds",
        "(offs_m < M)[None, :], offs_n < N",
        "(offs_m < M)[None, :], offs_n >= 0",
    ),
    "one row too many": ("bounds", "mask_m, mask_n = (offs_m < M)", "mask_m, mask_n = (offs_m < M + 1)"),
    "strip too long": ("numbers", "end = min(length, K - first_k)", "end = K - first_k"),
    "every strip stores the first": ("race", "(strip.to(tl.int64) * M +", "(0 * strip.to(tl.int64) * M +"),
    "the last strip forgotten": ("numbers", "for strip in range(strips)", "for strip in range(strips - 1)"),
    "bias in every strip": ("numbers", "    if not PARTS:\n", "    if PARTS:\n"),
    "gain after the bias": ("numbers", "y_t *= tl.load(gain_ptr", "y_t += tl.load(gain_ptr"),
    "the second tile of slots": (
        "numbers",
        "range(BLOCK_R, count, BLOCK_R)",
        "range(BLOCK_R, BLOCK_R, BLOCK_R)",
    ),
    "sum not carried": ("numbers", "y_t = plus(y_t, w,", "y_t = plus(y_t * 0, w,"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(device, tmp_path, name):
    if device == "cuda":
        pytest.skip("only the interpreter's guard sees bounds and races")
    finder, line, fault = FAULTS[name]
    hand = mutant(delta_linear_decode, tmp_path, line, fault)
    # two strips of K, two tiles of slots, neither whole
    torch.manual_seed(4)
    pairs = [(torch.randn(r, 600) / 24, torch.randn(130, r) / r**0.5) for r in (33, 5)]
    deltas = [RowDelta(row, *pairs[row % 2], 0.5 + row % 2) for row in range(4)]
    x, w = torch.randn(5, 600), torch.randn(130, 600) / 24
    with pytest.raises((interpreter.InterpreterError, AssertionError)) as found:
        check(x, w, torch.randn(130), torch.randn(130), deltas, device, hand)
    words = str(found.value.__cause__ if found.type is interpreter.InterpreterError else "numbers")
    assert finder in words
