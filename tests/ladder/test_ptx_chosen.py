"""partial_linear's and the decoding step's compiled kernels for sm_80 and sm_90a, executed on the CPU.

What a call must satisfy is what the interpreter's tests ask, in kernels/.
"""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from ptx import on_ptx
from ptx_rung import FULL, TARGETS, rung

pytestmark = rung
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STEPS = [
    ("sm80", "ragged ranks", BF16),
    ("sm90", "strips of K", BF16),
    ("sm90", "some without", FP16),
    ("sm80", "tiles of slots", FP32),
]
CASES = [
    ("sm80", "rows", BF16),
    ("sm90", "columns", BF16),
    ("sm90", "tiles", FP16),
    ("sm80", "elements", BF16),
    ("sm90", "strips of rows, elements", FP32),
]


def interpreters_tests(name):
    """A module of kernels/, which nobody collects in this process."""
    path = Path(__file__).parent / "kernels" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"asked_of_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def every(names):
    """All of them, on both targets and in each dtype."""
    return list(itertools.product(TARGETS, names, (BF16, FP16, FP32)))


if FULL:
    STEPS = every(interpreters_tests("test_delta_linear_decode").STEPS)
    CASES = every(interpreters_tests("test_partial_linear").CASES)


@pytest.mark.parametrize(("target", "step", "dtype"), STEPS, ids=str)
def test_a_decoding_step(nan_filled_empty, target, step, dtype):
    asked = interpreters_tests("test_delta_linear_decode")
    x, w, bias, gain, deltas = asked.make(step, dtype)
    # adapters are reached by their distances from the first
    reached = [t for delta in deltas for t in (delta.a, delta.b)]
    with on_ptx(target, reaches=reached) as launched:
        asked.check(x, w, bias, gain, deltas, "cpu")
    assert launched


@pytest.mark.parametrize(("target", "case", "dtype"), CASES, ids=str)
def test_chosen_entries(monkeypatch, nan_filled_empty, target, case, dtype):
    asked = interpreters_tests("test_partial_linear")
    # the hand asks for a GPU, and the machine stands for it
    monkeypatch.setattr(asked.hand, "refuse", lambda call: "")
    given = asked.make(case, dtype)
    with on_ptx(target) as launched:
        asked.check(given, "cpu")
    assert launched or not (given["x"].numel() and given["values"].numel())


def test_a_decoding_step_along_a_wide_layer_in_fp32(monkeypatch, nan_filled_empty):
    # one chain of sums along K would be 3 times what is allowed; a wide layer has one strip
    asked = interpreters_tests("test_delta_linear_decode")
    monkeypatch.setitem(asked.STEPS, "wide", (16, 4096, 17, [3, 5]))
    monkeypatch.setattr(asked.tiles, "decode_strips", lambda n, k, dtype: (1, k))
    x, w, bias, gain, deltas = asked.make("wide", FP32)
    with on_ptx("sm80", reaches=[t for delta in deltas for t in (delta.a, delta.b)]) as launched:
        asked.check(x, w, bias, gain, deltas, "cpu")
    assert [launch.name for launch in launched] == ["step"]


@pytest.mark.parametrize("kind", ["columns", "elements"])
def test_chosen_entries_of_many_rows_in_fp32(monkeypatch, nan_filled_empty, kind):
    # one chain of sums along M would be 1.9 times what is allowed for columns
    asked = interpreters_tests("test_partial_linear")
    monkeypatch.setattr(asked.hand, "refuse", lambda call: "")
    monkeypatch.setattr(asked.hand, "_PROGRAMS", 1)
    monkeypatch.setitem(asked.CASES, "many", (2048, 30, 40, kind, 3, (1, 1)))
    with on_ptx("sm80") as launched:
        asked.check(asked.make("many", FP32), "cpu")
    assert len(launched) == 1
