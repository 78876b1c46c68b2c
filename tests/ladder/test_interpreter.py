"""Starts the tests of kernels/ in triton's interpreter, in a process of their own.

The interpreter is chosen by a variable that triton reads once, when it is imported; transformers has long
imported it here. Where there is a GPU kernels/ has been collected in this process and runs there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pefast import kernels

FOLDER = Path(__file__).parent / "kernels"


@pytest.mark.slow
@pytest.mark.skipif(not kernels.HAS_TRITON, reason=kernels.WHY_NOT)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, in this process")
@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    root = FOLDER.parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=400)
    counts = dict(re.findall(r"(\d+) (\w+)", done.stdout.strip().splitlines()[-1]))
    assert done.returncode == 0, done.stdout[-4000:]
    # a run that skipped everything also ends with 0
    assert "passed" in counts.values() and "skipped" not in counts.values(), done.stdout[-1000:]
