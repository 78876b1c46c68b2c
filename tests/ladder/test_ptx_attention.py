"""prefix_attention's and dropout's compiled kernels for sm_80 and sm_90a, executed on the CPU."""

import itertools

import pytest
import torch
from planted_faults import mutant
from prefix_attention_check import CASES, FORMS, check, make_inputs
from ptx import PtxError, on_ptx
from ptx_rung import FULL, TARGETS, rung

from pefast.ops import OPS
from pefast.ops.dropout import keep_mask, reference

pytestmark = rung
hand, dropout = (OPS[name].hands["triton"] for name in ("prefix_attention", "dropout"))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REPRESENTATIVE = [
    ("sm80", "ragged", "everything", BF16),
    ("sm90", "grouped and long", "everything", BF16),
    ("sm80", "grouped", "causal", BF16),
    ("sm90", "long", "causal", BF16),
    ("sm90", "decode, grouped", "padded_right", FP16),
    ("sm80", "no prefix", "plain", FP16),
    ("sm80", "ragged", "everything", FP32),
    ("sm80", "wide head", "everything", BF16),  # half a block of the mask at a time
    ("sm90", "wide head", "everything", FP32),
    ("sm80", "narrow and long", "causal", FP32),  # one number a lane, 65 sums one after the other
]
EVERY = list(itertools.product(TARGETS, CASES, FORMS, (BF16, FP16, FP32)))


@pytest.mark.parametrize(("target", "case", "form", "dtype"), EVERY if FULL else REPRESENTATIVE, ids=str)
def test_forward_and_gradients(nan_filled_empty, target, case, form, dtype):
    b, _, _, l, s, _, _ = CASES[case]
    with on_ptx(target) as launched:
        check(hand, make_inputs(case, dtype), "cpu", **FORMS[form](b, l, s))
    names = [launch.name for launch in launched]
    assert names == ["attend", "towards_q", "towards_keys"] * (b > 0)


# name: (what finds it, the line, the line with its fault)
FAULTS = {
    "lanes of a row with sums of their own": (
        "race: lanes store different values",
        "products = tl.where(mask, products, 0.0)",
        "products = products",
    ),
    "one chain of all keys": (
        "o: largest error",
        "o = plus(o * shrink[:, None], w.to(v.dtype), v, PRECISION)",
        "o = tl.dot(w.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_fp32_is_found(tmp_path, monkeypatch, name):
    finder, line, fault = FAULTS[name]
    monkeypatch.setattr(hand, "kernels", mutant(hand.kernels, tmp_path, line, fault))
    with on_ptx("sm80"), pytest.raises((PtxError, AssertionError), match=finder):
        check(hand, make_inputs("narrow and long", FP32), "cpu", causal=True)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_dropout(nan_filled_empty, target, dtype):
    x, seed = torch.randn(11, 387).to(dtype), torch.tensor([2**63 - 1])
    y, sum_ = torch.ones_like(x), torch.randn(11, 387).to(dtype)
    kept = sum_.clone()
    with on_ptx(target):
        y = dropout.forward(x, 0.3, seed, 2)
        dropout.add_(sum_, x, 0.3, seed, 2)
    mask = keep_mask(11, 387, 0.3, seed, 2)
    assert torch.equal(y != 0, mask & (x != 0)) and torch.equal(y, reference(x, 0.3, seed, 2))
    assert torch.equal(sum_ != kept, mask & (sum_ != kept)) and (sum_ != kept).sum() > 0.6 * x.numel()
