"""The kernels compile for GPUs that are not here, with tensor cores and no spills; the gate can say no."""

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
from compile_gate import _meta
hand = compile_gate.OPS["delta_linear"].hands["triton"]
wide = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}

def launch():
    x, w, h = (_meta(*shape, dtype=torch.bfloat16) for shape in ((4096, 4096), (4096, 4096), (4096, 16)))
    hand._product_tiles = lambda x: wide
    hand._launch_product(x, w, h, _meta(4096, 16), None, torch.empty_like(x), 0.5, 0.0, None)
    hand._launch_waist(x.float(), _meta(16, 4096), h.float(), 0.0, None)

compile_gate.launches = lambda full: [("planted", True, launch)]
compile_gate.gate(["sm80"], False)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not kernels.HAS_TRITON, reason=kernels.WHY_NOT),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


def run(*command: str) -> subprocess.CompletedProcess:
    # in a process of its own, for the gate puts another driver in triton's place
    return subprocess.run([sys.executable, *command], cwd=FOLDER, capture_output=True, text=True, timeout=400)


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
