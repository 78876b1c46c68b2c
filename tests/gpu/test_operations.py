"""Every operation by every hand that a device has: no worse than PyTorch on the CPU, and the same masks."""

import importlib

import pytest
import torch
from pefast.kernels.launch import INTERPRETED

from pefast.ops import OPS, Index, delta_linear, linear_cross_entropy, partial_linear, prefix_attention
from pefast.ops.delta_linear import Segment
from pefast.ops.partial_linear import reference as partial_reference
from pefast.ops.sibling_linear import Part, sibling_linear
from pefast.testing import assert_no_worse, make_inputs
from tests.gpu.conftest import GPU
from tests.ladder import delta_linear_check, prefix_attention_check

dropout_op = importlib.import_module("pefast.ops.dropout")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 2**40 + 11
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def places(name: str):
    """(device, backend) of an operation: csrc's hands are for CPUs, Triton's for GPUs and its interpreter."""
    hands = [hand for hand in OPS[name].hands if hand in ("triton", "eager")]
    on_cpu = [("cpu", hand) for hand in hands if hand == "eager" or INTERPRETED]
    return pytest.mark.parametrize(
        ("device", "backend"),
        [*on_cpu, *(pytest.param(*GPU.values, hand, marks=GPU.marks) for hand in hands)],
    )


@every_dtype
@pytest.mark.parametrize("form", delta_linear_check.FORMS)
@places("delta_linear")
def test_delta_linear(device, backend, form, dtype):
    inputs = make_inputs("minilm" if device == "cuda" else "ragged", dtype)

    def by_name(t):
        t = {name: value.detach().requires_grad_(name not in ("w", "dy")) for name, value in t.items()}
        y = delta_linear(t["x"], t["w"], **delta_linear_check.FORMS[form](t), seed=SEED, backend=backend)
        y.backward(t["dy"])
        return {"y": y.detach().cpu()} | {f"d{n}": v.grad.cpu() for n, v in t.items() if v.grad is not None}

    got = by_name({name: t.to(device) for name, t in inputs.items()})
    near, exact = (
        delta_linear_check.by_formula(delta_linear_check.FORMS[form], inputs, at)
        for at in (dtype, torch.float64)
    )
    assert got.keys() == exact.keys()
    for name in exact:
        assert_no_worse(name, got[name], near[name], exact[name])


@every_dtype
@pytest.mark.parametrize("form", prefix_attention_check.FORMS)
@pytest.mark.parametrize("case", ["ragged", "decode, grouped", "grouped"])
@places("prefix_attention")
def test_prefix_attention(device, backend, case, form, dtype):
    inputs = prefix_attention_check.make_inputs(case, dtype)
    b, _, _, l, s, _, _ = prefix_attention_check.CASES[case]
    options = prefix_attention_check.FORMS[form](b, l, s)
    t = {name: inputs[name].to(device).requires_grad_() for name in prefix_attention_check.LEAVES}
    there = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    o = prefix_attention(**t, seed=SEED, backend=backend, **there)
    o.backward(inputs["do"].to(device))
    got = {"o": o.detach()} | {f"d{name}": leaf.grad for name, leaf in t.items()}
    near, exact = (prefix_attention_check.by_formula(inputs, at, **options) for at in (dtype, torch.float64))
    for name in exact:
        assert_no_worse(name, got[name].cpu(), near[name], exact[name])


@every_dtype
@places("dropout")
def test_the_mask_is_the_same_bits_on_every_device(device, backend, dtype):
    x = torch.ones(70, 515, dtype=dtype)
    y = dropout_op.dropout(x.to(device), 0.3, seed=SEED, backend=backend)
    kept = dropout_op.keep_mask(70, 515, 0.3, SEED)
    assert 0.6 < kept.float().mean() < 0.8
    assert torch.equal(y.cpu() != 0, kept)
    assert torch.equal(y.cpu(), dropout_op.reference(x, 0.3, SEED))


@every_dtype
@pytest.mark.parametrize("kind", ["rows", "columns", "tiles", "elements"])
@places("partial_linear")
def test_partial_linear(device, backend, kind, dtype):
    inputs = make_inputs("tile multiple", dtype)
    count = {"rows": 96, "columns": 128, "tiles": 12 * 16, "elements": 96 * 128}[kind]
    index = Index(kind, torch.arange(0, count, 3), (8, 8) if kind == "tiles" else (1, 1))
    values = torch.randn(index.sizes((96, 128))) * 0.1

    def run(function, at, where, **options):
        x, w, dy = (inputs[name].to(where, at) for name in ("x", "w", "dy"))
        x, held = (t.detach().requires_grad_() for t in (x, values.to(where, at)))
        y = function(x, w, held, index._replace(at=index.at.to(where)), **options)
        y.backward(dy)
        return {"y": y.detach().cpu(), "dx": x.grad.cpu(), "dvalues": held.grad.cpu()}

    got = run(partial_linear, dtype, device, backend=backend)
    near, exact = (run(partial_reference, at, "cpu") for at in (dtype, torch.float64))
    for name in exact:
        assert_no_worse(name, got[name], near[name], exact[name])


@every_dtype
def test_the_loss_over_a_vocabulary(device, dtype):
    x, w = torch.randn(37, 33).to(dtype), (torch.randn(101, 33) / 6).to(dtype)
    target = torch.arange(37) % 101
    target[::5] = -100

    def run(at, where):
        leaf = x.to(where, at).detach().requires_grad_()
        loss = linear_cross_entropy(leaf, w.to(where, at), target.to(where))
        loss.backward()
        return loss.detach().cpu(), leaf.grad.cpu()

    loss, dx = run(dtype, device)
    (near, dx_near), (exact, dx_exact) = run(dtype, "cpu"), run(torch.float64, "cpu")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=0)
    assert_no_worse("dx", dx, dx_near, dx_exact)
    assert loss.dtype == near.dtype


def test_siblings(device):
    inputs = make_inputs("ragged", torch.float32)

    def run(where):
        t = {name: value.to(where) for name, value in inputs.items()}
        lora, seed = Segment(t["a"], t["b"], 0.5, dropout=0.3), torch.tensor([SEED])
        parts = (Part(t["w"], (lora,), t["bias"], seed=seed), Part(t["w"] * 0.5))
        return sibling_linear(t["x"], parts), [
            delta_linear(t["x"], t["w"], lora, t["bias"], seed=seed), delta_linear(t["x"], t["w"] * 0.5)
        ]  # fmt: skip

    together, apart = run(device)
    for got, right, cpu in zip(together, apart, run("cpu")[1], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.cpu(), cpu, rtol=1e-4, atol=1e-4)
