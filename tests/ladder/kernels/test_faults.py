"""Faults planted in the kernels' source: the guard of the interpreter or the numbers must find each."""

import importlib.util
import itertools

import pytest
import torch
from delta_linear_check import check

from pefast.ops import OPS
from pefast.ops.dropout import keep_mask
from pefast.testing import make_inputs

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")
numbers = itertools.count()

# name: (what is found, the line, the line with its fault)
FAULTS = {
    "one row too many": ("bounds", "mask_m = (offs_m < M)[:, None]", "mask_m = (offs_m < M + 1)[:, None]"),
    "inner mask dropped": ("bounds", "mask_k = offs_k < K - k", "mask_k = offs_k >= 0"),
    "outer mask dropped": ("bounds", "mask_n = (offs_n < N)[None, :]", "mask_n = (offs_n >= 0)[None, :]"),
    "rank mask dropped, waist": ("bounds", "(offs_r < R)[None, :]", "(offs_r >= 0)[None, :]"),
    "rank mask dropped, product": ("bounds", "mask_r = offs_r < R\n", "mask_r = offs_r >= 0\n"),
    "rank mask dropped, parts": ("race", "(offs_r < R)[:, None]", "(offs_r >= 0)[:, None]"),
    "wrong column of tiles": ("race", "% group // rows", "% group // GROUP_M"),
    "every strip stores the first": ("race", "parts_ptr + (strip * R", "parts_ptr + (0 * R"),
    "strips overlap": ("numbers", "offs_m = strip * rows + m", "offs_m = m"),
    "forgotten scale": ("numbers", "(h.to(tl.float32) * scale)", "(h.to(tl.float32))"),
    "forgotten bias": ("numbers", "    y += tl.load(bias_ptr", "    y += 0 * tl.load(bias_ptr"),
    "sum not carried": ("numbers", "y = tl.dot(x, w_t, y,", "y = tl.dot(x, w_t, y * 0,"),
    "mask of the next row": ("numbers", "keep_tile(offs_m, k,", "keep_tile(offs_m + 1, k,"),
    "mask of the first columns": ("numbers", "keep_tile(offs_m, k,", "keep_tile(offs_m, 0,"),
    "no mask on the way back": ("numbers", "y = dropped(y, keep, keep_scale)", "y = y * keep_scale"),
    "kept without the factor": ("numbers", "x = dropped(x, keep, keep_scale)", "x = dropped(x, keep, 1.0)"),
    "scale 2 % wrong": ("numbers", "h.to(tl.float32) * scale", "h.to(tl.float32) * (scale * 1.02)"),
}


def mutant(module, folder, line, fault):
    """`module` with one line changed, under a name and a registry of its own."""
    name = f"{module.__name__}_mutant_{next(numbers)}"
    text = open(module.__file__, encoding="utf-8").read()
    assert line in text, f"no line {line!r} in {module.__file__}"
    text = text.replace(line, fault, 1).replace('Library("pefast"', f'Library("{name.replace(".", "_")}"')
    text = text.replace('register_fake("pefast::', f'register_fake("{name.replace(".", "_")}::')
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_linear_layer_is_found(device, tmp_path, name):
    if device == "cuda":
        pytest.skip("only the interpreter's guard sees bounds and races")
    finder, line, fault = FAULTS[name]
    hand = mutant(OPS["delta_linear"].hands["triton"], tmp_path, line, fault)
    inputs = {
        "x": torch.randn(150, 300),
        "w": torch.randn(270, 300) / 17,
        "a": torch.randn(5, 300) / 17,
        "b": torch.randn(270, 5),
        "bias": torch.randn(270),
        "dy": torch.randn(150, 270),
    }
    with pytest.raises((interpreter.InterpreterError, AssertionError)) as found:
        check(hand, inputs, 0.3, device)
    words = str(found.value.__cause__ if found.type is interpreter.InterpreterError else "numbers")
    assert words.startswith(finder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_2_percent_wrong_is_found_in_16_bits(device, tmp_path, dtype):
    _, line, fault = FAULTS["scale 2 % wrong"]
    hand = mutant(OPS["delta_linear"].hands["triton"], tmp_path, line, fault)
    with pytest.raises(AssertionError, match="error"):
        check(hand, make_inputs("minilm", dtype), 0.0, device)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("counter = first // 128 * 16", "counter = first // 128"),
        ("tl.join(word_0, word_2), tl.join(word_1,", "tl.join(word_0, word_1), tl.join(word_2,"),
        ("words & 0xFFFF, words >> 16", "words >> 16, words & 0xFFFF"),
        ("bits >= threshold", "bits > threshold"),
    ],
)
def test_a_fault_in_the_mask_is_found(device, tmp_path, line, fault):
    hand = mutant(OPS["dropout"].hands["triton"], tmp_path, line, fault)
    y = hand.forward(torch.ones(200, 515, device=device), 0.3, torch.tensor([7]), 0)
    assert not torch.equal(y.cpu() != 0, keep_mask(200, 515, 0.3, 7))
