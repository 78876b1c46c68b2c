"""Without triton, and with triton but no GPU, the room opens, and says why its kernels will not run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

HIDDEN = """
import sys
sys.modules["triton"] = None
"""
PRINT = """
import torch
from pefast import kernels, ops
from pefast.ops.delta_linear import OP, Call, Segment
x = torch.ones(2, 8)
print(kernels.HAS_TRITON, OP.why_not("triton", Call(x, x, None, None, None, None, (Segment(x, x),))))
try:
    torch.ops.pefast.dropout_triton(x, 0.5, torch.tensor([1]), 0)
except RuntimeError as error:
    print(error)
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_without_triton():
    said = run(HIDDEN + PRINT)
    assert said.startswith("False triton cannot be imported")
    assert "the Triton kernels cannot run: triton cannot be imported" in said


def test_with_triton_on_cpu_tensors():
    said = run("import os\nos.environ.pop('TRITON_INTERPRET', None)" + PRINT)
    assert "needs a GPU, x is on cpu" in said or "triton cannot be imported" in said
    assert "the Triton kernels cannot run" in said
