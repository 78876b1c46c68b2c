"""The way back in one walk: dx, dz and db of one read of dy, and no byte that the roofline does not count."""

import interpreter_guard
import numpy as np
import pytest
import torch
from delta_linear_check import FORMS, by_hand, check, lora, taking
from pefast.kernels import delta_linear_gradients, forms
from planted_faults import mutant

from pefast.ops.delta_linear import OP, Segment
from pefast.testing import make_inputs

hand = OP.hands["triton"]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@pytest.fixture
def few_strips(monkeypatch):
    """Strips of several tiles of rows, as a tall x has them."""
    strips = hand.tiles.strips
    monkeypatch.setattr(
        hand.tiles, "strips", lambda m, columns, rows, _: strips(m, columns, rows, 2 * columns)
    )


def tall(dtype):
    """Inputs of 300 rows: two strips of several tiles, the last one cut."""
    inputs = make_inputs("ragged", dtype)
    inputs["x"], inputs["dy"] = torch.randn(300, 129).to(dtype), torch.randn(300, 65).to(dtype)
    return inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["lora", "dropped", "activated", "one_of_many"])
def test_strips_of_several_tiles(device, nan_filled_empty, few_strips, form, dtype):
    with taking(hand, "whole"):
        check(hand, FORMS[form], tall(dtype), device)


def test_same_input_same_bits(device, few_strips):
    inputs = tall(torch.float16)
    with taking(hand, "whole"):
        first, second = (by_hand(hand, lora, inputs, device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("finder", "line", "fault"),
    [
        ("numbers", "& (m > 0), other=0.0", "& (m > 2**30), other=0.0"),
        ("numbers", "first_n = column.to(tl.int64) * share + n", "first_n = column.to(tl.int64) * share"),
        ("numbers", "input_precision=PRECISION) * scale[:, None]", "input_precision=PRECISION)"),
        ("race", "(strip.to(tl.int64) * R + offs_r", "(0 * R + offs_r"),
        ("race", "        if column == 0:\n", "        if column >= 0:\n"),
        ("race", "mask_n = (offs_n < N)[None, :]", "mask_n = (offs_n < N + 1)[None, :]"),
    ],
)
def test_a_planted_fault_is_found(device, tmp_path, monkeypatch, few_strips, finder, line, fault):
    if device == "cuda":
        pytest.skip("only the interpreter's guard sees bounds and races")
    from triton.runtime.interpreter import InterpreterError

    monkeypatch.setattr(hand, "gradients", mutant(delta_linear_gradients, tmp_path, line, fault))
    sizes = {"x": (150, 300), "w": (270, 300), "a": (5, 300), "b": (270, 5), "bias": (270,), "dy": (150, 270)}
    inputs = {name: torch.randn(shape) / 9 for name, shape in sizes.items()}
    with pytest.raises((InterpreterError, AssertionError)) as found, taking(hand, "whole"):
        check(hand, lora, inputs, device)
    assert finder in str(found.value.__cause__ if found.type is InterpreterError else "numbers")


@pytest.fixture
def touched(monkeypatch):
    """Gives back, of each launch so far, bytes that it read and had not made itself, and bytes it wrote."""
    launches, register, check = [], interpreter_guard._register, interpreter_guard._check

    def begin(values):
        launches.append({False: {}, True: {}})
        register(values)

    def note(builder, pointers, mask, stores):
        check(builder, pointers, mask, stores)
        places, mask = np.broadcast_arrays(pointers.data, mask)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # tables of scales and slots, all of them smaller than any matrix here, are not counted
        for book in interpreter_guard._storages:
            if book.size <= 256:
                continue
            inside = places[mask & (places >= book.start) & (places < book.start + book.size)]
            launches[-1][stores].update(dict.fromkeys(inside.tolist(), width))

    monkeypatch.setattr(interpreter_guard, "_register", begin)
    monkeypatch.setattr(interpreter_guard, "_check", note)

    def counts():
        read_and_written = []
        for launch in launches:
            read = sum(width for place, width in launch[False].items() if place not in launch[True])
            read_and_written.append((read, sum(launch[True].values())))
        return read_and_written

    return counts


@pytest.mark.parametrize("road", ["whole", "split"])
def test_the_roofline_counts_what_the_kernels_touch(device, monkeypatch, touched, road):
    if device == "cuda":
        pytest.skip("only the interpreter's guard sees bytes")
    monkeypatch.setattr(forms, "_kept", lambda written: written)
    shape = forms.Shape(130, 384, 256, 16)
    sizes = {"x": (130, 256), "w": (384, 256), "a": (16, 256), "b": (384, 16), "dy": (130, 384)}
    inputs = {name: torch.randn(size).bfloat16() / 9 for name, size in sizes.items()}
    with taking(hand, road):
        by_hand(hand, lambda t: {"segments": (Segment(t["a"], t["b"]),)}, inputs, device)
    counted = [
        (launch.read, launch.written)
        for launch in forms.forward(road, shape) + forms.backward(road, shape)
        # sums of parts are PyTorch's
        if launch.name not in ("db", "da")
    ]
    assert touched() == counted
