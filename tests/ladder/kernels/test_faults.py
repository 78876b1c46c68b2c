"""Faults planted in the kernels' source: the guard of the interpreter or the numbers must find each."""

import pytest
import torch
from delta_linear_check import activated, check, dropped, hybrid, lora, one_of_many, routed, taking
from pefast.kernels import delta_linear_gradients, delta_linear_products, waist
from planted_faults import mutant

from pefast.ops import OPS
from pefast.ops.dropout import keep_mask
from pefast.testing import make_inputs

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")

PRODUCTS, GRADIENTS, WAIST = "products", "gradients", "waist"
# name: (what finds it, the road taken, the form of the call, the file, the line, the line with its fault)
FAULTS = {
    "one row too many": (
        "bounds",
        "split",
        lora,
        PRODUCTS,
        "mask_m = (offs_m < M)[:, None]",
        "mask_m = (offs_m < M + 1)[:, None]",
    ),
    "inner mask dropped": (
        "bounds",
        "split",
        lora,
        PRODUCTS,
        "mask_k = offs_k < K - k",
        "mask_k = offs_k >= 0",
    ),
    "outer mask dropped": (
        "bounds",
        "split",
        lora,
        PRODUCTS,
        "mask_n = (offs_n < N)[None, :]",
        "mask_n = (offs_n >= 0)[None, :]",
    ),
    "rank mask dropped, whole": (
        "bounds",
        "whole",
        lora,
        PRODUCTS,
        "mask_r = offs_r < R\n",
        "mask_r = offs_r >= 0\n",
    ),
    "slots of the next tile": (
        "bounds",
        "split",
        lora,
        PRODUCTS,
        "in_tile = tl.arange(0, BLOCK_R) < count",
        "in_tile = tl.arange(0, BLOCK_R) >= 0",
    ),
    "rank mask dropped, db": (
        "race",
        "split",
        lora,
        GRADIENTS,
        "mask_n, mask_r = offs_n < N, offs_r < R",
        "mask_n, mask_r = offs_n < N, offs_r >= 0",
    ),
    "wrong column of tiles": (
        "race",
        "split",
        lora,
        PRODUCTS,
        "% group // rows",
        "% group // GROUP_M",
    ),
    "every strip stores the first": (
        "race",
        "split",
        lora,
        GRADIENTS,
        "db_ptr + (strip * R",
        "db_ptr + (0 * R",
    ),
    "every column stores the first": (
        "race",
        "split",
        lora,
        GRADIENTS,
        "(column * M.to(tl.int64)",
        "(0 * M.to(tl.int64)",
    ),
    "every tile stores the waist": (
        "race",
        "whole",
        lora,
        PRODUCTS,
        "    if pid_n == 0:\n        tl.store(h_ptr",
        "    if pid_n >= 0:\n        tl.store(h_ptr",
    ),
    "strips overlap": (
        "numbers",
        "split",
        lora,
        GRADIENTS,
        "x_first = x_ptr + strip * rows * stride_xm",
        "x_first = x_ptr + 0 * rows * stride_xm",
    ),
    "wrong stride": (
        "bounds",
        "split",
        lora,
        PRODUCTS,
        "near_n[None, :] * stride_wn",
        "near_n[None, :] * (stride_wn + 1)",
    ),
    "forgotten scale": (
        "numbers",
        "split",
        lora,
        PRODUCTS,
        "h.to(tl.float32) * scale[None, :]",
        "h.to(tl.float32)",
    ),
    "forgotten scale, whole": (
        "numbers",
        "whole",
        lora,
        PRODUCTS,
        "h = (h.to(tl.float32) * scale).to",
        "h = (h.to(tl.float32)).to",
    ),
    "forgotten bias": (
        "numbers",
        "split",
        lora,
        PRODUCTS,
        "    y += tl.load(bias_ptr",
        "    y += 0 * tl.load(bias_ptr",
    ),
    "gain after the bias": (
        "numbers",
        "split",
        routed,
        PRODUCTS,
        "y *= tl.load(gain_ptr",
        "y += tl.load(gain_ptr",
    ),
    "no gain on the way back": (
        "numbers",
        "split",
        routed,
        PRODUCTS,
        "x = (x.to(tl.float32) * gain[None, :])",
        "x = (x.to(tl.float32))",
    ),
    "sum not carried": (
        "numbers",
        "split",
        lora,
        PRODUCTS,
        "y = plus(y, x, w_t,",
        "y = plus(y * 0, x, w_t,",
    ),
    "mask of the next row": (
        "numbers",
        "split",
        dropped,
        PRODUCTS,
        "keep_tile(offs_m, k,",
        "keep_tile(offs_m + 1, k,",
    ),
    "mask of the first columns": (
        "numbers",
        "split",
        dropped,
        PRODUCTS,
        "keep_tile(offs_m, k,",
        "keep_tile(offs_m, 0,",
    ),
    "no mask on the way back": (
        "numbers",
        "split",
        dropped,
        PRODUCTS,
        "y += dropped(through,",
        "y += through + 0 * dropped(through,",
    ),
    "one mask for two segments": (
        "numbers",
        "split",
        hybrid,
        PRODUCTS,
        "tl.load(tile + 3), tl.load(tile + 2)",
        "tl.load(tile + 3), 0",
    ),
    "one activation for two segments": (
        "numbers",
        "split",
        activated,
        WAIST,
        "[kinds.index(outlines[i][2])",
        "[0 * kinds.index(outlines[i][2])",
    ),
    "rows of another adapter": (
        "numbers",
        "split",
        one_of_many,
        PRODUCTS,
        "(adapter == ids)",
        "(adapter >= ids)",
    ),
    "the slope of z forgotten": (
        "numbers",
        "split",
        activated,
        GRADIENTS,
        "        dz *= slope_slots",
        "        dz *= 1 + 0 * slope_slots",
    ),
    "the last part forgotten": (
        "numbers",
        "split",
        lora,
        GRADIENTS,
        "for part in range(parts)",
        "for part in range(parts - 1)",
    ),
    "scale 2 % wrong, back": (
        "numbers",
        "split",
        lora,
        GRADIENTS,
        "dz = dh * scale[None, :]",
        "dz = dh * (1.02 * scale[None, :])",
    ),
    "scale 2 % wrong": (
        "numbers",
        "split",
        lora,
        PRODUCTS,
        "h.to(tl.float32) * scale[None, :]",
        "h.to(tl.float32) * (scale[None, :] * 1.02)",
    ),
}


def plant(monkeypatch, folder, file, line, fault):
    """The hand of delta_linear, with one line of one of its files changed."""
    hand = OPS["delta_linear"].hands["triton"]
    changed = mutant({PRODUCTS: delta_linear_products, GRADIENTS: delta_linear_gradients, WAIST: waist}[file],
                     folder, line, fault)  # fmt: skip
    if file == WAIST:
        monkeypatch.setattr(hand, "arrange", changed.arrange)
    else:
        monkeypatch.setattr(hand, file, changed)
    return hand


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_linear_layer_is_found(device, tmp_path, monkeypatch, name):
    if device == "cuda":
        pytest.skip("only the interpreter's guard sees bounds and races")
    finder, road, form, file, line, fault = FAULTS[name]
    hand = plant(monkeypatch, tmp_path, file, line, fault)
    inputs = {
        "x": torch.randn(150, 300),
        "w": torch.randn(270, 300) / 17,
        "a": torch.randn(5, 300) / 17,
        "b": torch.randn(270, 5),
        "c": torch.randn(5),
        "d": torch.randn(270),
        "gain": torch.randn(270),
        "bias": torch.randn(270),
        "dy": torch.randn(150, 270),
    }
    with pytest.raises((interpreter.InterpreterError, AssertionError)) as found, taking(hand, road):
        check(hand, form, inputs, device)
    words = str(found.value.__cause__ if found.type is interpreter.InterpreterError else "numbers")
    assert finder in words


@pytest.mark.parametrize("way", ["scale 2 % wrong", "scale 2 % wrong, back"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_2_percent_wrong_is_found_in_16_bits(device, tmp_path, monkeypatch, dtype, way):
    hand = plant(monkeypatch, tmp_path, *FAULTS[way][3:])
    inputs = make_inputs("minilm", dtype)
    # the waist's part is as large as the layer's
    inputs["w"], inputs["bias"] = inputs["w"] * 0.25, inputs["bias"] * 0
    with pytest.raises(AssertionError, match="error"), taking(hand, "split"):
        check(hand, lora, inputs, device)


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
