"""The kernels compile for GPUs that are not here, without spills and with tensor cores; the gate can say no."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pefast import kernels

FOLDER = Path(__file__).parent
# a sum of 256 x 256 fills every register; float32 products run without tensor cores
PLANTED = """
import torch
import compile_gate
hand = compile_gate.OPS["delta_linear"].hands["triton"]
wide = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
hand._product_tiles = lambda x: wide if x.dtype == torch.bfloat16 else {**wide, "BLOCK_M": 16, "BLOCK_N": 64}
compile_gate.launches = lambda full: [
    ("planted", True, lambda: compile_gate._both_ways(torch.bfloat16, 0.0, 16, 4096)),
    ("planted", True, lambda: compile_gate._both_ways(torch.float32, 0.0, 16, 4)),
]
compile_gate.gate(["sm80"], False)
"""

pytestmark = [
    pytest.mark.skipif(not kernels.HAS_TRITON, reason=kernels.WHY_NOT),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


def run(*command: str) -> subprocess.CompletedProcess:
    # in a process of its own, for the gate puts another driver in triton's place
    return subprocess.run([sys.executable, *command], cwd=FOLDER, capture_output=True, text=True, timeout=170)


def test_every_kernel_passes_on_sm80_and_sm90():
    done = run("compile_gate.py")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    # two sizes of the layer with six kernels each, and two of dropout
    assert done.stdout.count("  ok\n") == 2 * (2 * 6 + 2)


def test_the_gate_rejects_what_spills_and_what_misses_the_tensor_cores():
    done = run("-c", PLANTED)
    assert done.returncode == 0, done.stderr[-2000:]
    rejected = [line for line in done.stdout.splitlines() if "REJECTED" in line]
    assert any("_product" in line and "spills" in line for line in rejected)
    assert any("_waist" in line and "no tensor-core instruction" in line for line in rejected)
