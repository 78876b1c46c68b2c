"""prefix_attention in Triton, on a GPU or in the interpreter: no worse than PyTorch, forward and backward."""

import pytest
import torch
from pefast.kernels import tiles
from planted_faults import mutant
from prefix_attention_check import CASES, FORMS, LEAVES, SEED, by_hand, check, everything, make_inputs

from pefast.ops.prefix_attention import OP, Call, prefix_attention

hand = OP.hands["triton"]
interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(device, nan_filled_empty, case, form):
    b, _, _, l, s, _, _ = CASES[case]
    check(hand, make_inputs(case, torch.bfloat16), device, **FORMS[form](b, l, s))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_a_prefix_for_each_row(device, nan_filled_empty, dtype, shared):
    check(hand, make_inputs("ragged", dtype, shared), device, **everything(2, 37, 45))
    check(hand, make_inputs("ragged", dtype, shared), device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_a_block_of_the_mask_at_a_time(device, nan_filled_empty, dtype):
    assert tiles.attention_keys(dtype, 128, True)["BLOCK_C"] == 64
    check(hand, make_inputs("wide head", dtype), device, **everything(1, 45, 95))


def test_any_strides(device):
    inputs = make_inputs("ragged", torch.bfloat16)
    for name in ("q", "k", "v", "do"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["prefix_k"] = inputs["prefix_k"].mT.contiguous().mT
    inputs["do"] = inputs["do"][:, :, :, :1].expand(-1, -1, -1, 32)
    check(hand, inputs, device, **everything(2, 37, 45))


def test_a_row_that_sees_nothing_is_zero(device):
    inputs, mask = make_inputs("no prefix", torch.float32), torch.ones(2, 1, 70, 70, dtype=torch.bool)
    mask[0, :, 3], mask[1, :, :, 5:] = False, False
    got = by_hand(hand, inputs, device, mask=mask)
    assert not got["o"][0, :, 3].any() and not got["dq"][0, :, 3].any()
    assert not got["dk"][1, :, 5:].any() and not got["dv"][1, :, 5:].any()
    assert all(value.isfinite().all() for value in got.values())


def test_same_input_same_bits(device):
    inputs, options = make_inputs("ragged", torch.bfloat16), everything(2, 37, 45)
    first, second = (by_hand(hand, inputs, device, **options) for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiles_in_one_graph(device):
    inputs = make_inputs("ragged", torch.float32)
    t = [inputs[name].to(device).requires_grad_() for name in LEAVES]
    mask = everything(2, 37, 45)["mask"].to(device)

    def step(*t):
        return prefix_attention(*t, mask, True, dropout=0.25, seed=SEED, backend="triton")

    outs = [step(*t), torch.compile(step, fullgraph=True, backend="aot_eager")(*t)]
    grads = [torch.autograd.grad(o, t, inputs["do"].to(device)) for o in outs]
    assert torch.equal(*outs) and all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_refuses_in_words(device):
    t = [make_inputs("ragged", torch.float32)[name].to(device) for name in LEAVES]
    call = Call(*t, None, False, 1.0, 0.0, None, None)
    assert hand.refuse(call) == ""
    assert "q is float64" in hand.refuse(call._replace(q=t[0].double()))
    assert "up to 128 wide" in hand.refuse(call._replace(q=torch.empty(1, 1, 1, 129, device=device)))
    assert "one is on meta" in hand.refuse(call._replace(k=t[1].to("meta")))


# name: (what finds it, the line, the line with its fault)
FAULTS = {
    "one key too many": ("bounds", "(offs_c < P + S)[:, None]", "(offs_c < P + S + 1)[:, None]"),
    "exchanged": ("bounds", "tl.where(offs_c < P, of", "tl.where(offs_c >= P, of"),
    "every row's prefix in one place": ("race", "((b * G + g) * P + offs_c", "((0 * G + g) * P + offs_c"),
    "width of a head forgotten": ("race", "(offs_d < D)[None, :]", "(offs_d >= 0)[None, :]"),
    "triangle one to the right": ("numbers", "(after <= row + (S - L))", "(after <= row + (S - L) + 1)"),
    "padding not masked": ("numbers", "(allowed != 0)", "(allowed >= 0)"),
    "sum not shrunk": ("numbers", "total = total * shrink", "total = total"),
    "another head's keys": ("numbers", "g = (h // (H // G)).to(tl.int64)", "g = (h % G).to(tl.int64)"),
    "mask of the next row": ("numbers", "keep_tile(row, c,", "keep_tile(row + 1, c,"),
    "weights dropped too early": ("numbers", "dx = w * (dw - dot[None,", "dx = dropped_w * (dw - dot[None,"),
    "scale forgotten on the way back": ("numbers", "(dq * scale)", "(dq * 1.0)"),
    "one head of the group": ("numbers", "for number in range(H // G)", "for number in range(1)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(device, tmp_path, monkeypatch, name):
    if device == "cuda":
        pytest.skip("only the interpreter's guard sees bounds and races")
    finder, line, fault = FAULTS[name]
    monkeypatch.setattr(hand, "kernels", mutant(hand.kernels, tmp_path, line, fault))
    # more keys than a tile has, so that sums are carried on
    inputs = make_inputs("three tiles", torch.float32)
    with pytest.raises((interpreter.InterpreterError, AssertionError)) as found:
        check(hand, inputs, device, **everything(2, 20, 60))
    words = str(found.value.__cause__ if found.type is interpreter.InterpreterError else "numbers")
    assert finder in words
