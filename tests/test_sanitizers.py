"""csrc under the address and undefined-behaviour sanitizers: a plain C++ fuzzer over random shapes.

More cases by hand: PEFAST_FUZZ=100000 python -m pytest tests/test_sanitizers.py
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pefast.native import WHY_NOT, C

ROOT = Path(__file__).parents[1]
CASES = os.environ.get("PEFAST_FUZZ", "200")
FLAGS = (
    "-std=c++17 -O1 -g -fopenmp -fsanitize=address,undefined"
    " -DPEFAST_HAVE_AVX2 -DPEFAST_HAVE_AVX512 -DPEFAST_HAVE_AMX -mavx2 -mbmi2 -mfma -mf16c"
    " -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mamx-tile -mamx-bf16"
)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    """The fuzzer of delta_linear, compiled."""
    if C is None or not C.delta_linear_here():
        pytest.skip(
            WHY_NOT or "delta_linear's kernels need AMX tiles for bfloat16, which this processor lacks"
        )
    if not shutil.which("g++"):
        pytest.skip("no g++ on this machine")
    program = tmp_path_factory.mktemp("fuzz") / "delta_linear"
    names = [
        "isa.cpp",
        "pack_amx.cpp",
        "parts_amx.cpp",
        *(path.name for path in (ROOT / "csrc/cpu").glob("delta_linear*.cpp")),
    ]
    sources = ["csrc/tests/delta_linear.cpp", *(f"csrc/cpu/{name}" for name in sorted(names))]
    made = subprocess.run(
        ["g++", *FLAGS.split(), *sources, "-o", str(program)], cwd=ROOT, capture_output=True, text=True
    )
    if "asan" in made.stderr and "cannot find" in made.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert made.returncode == 0, made.stderr[-2000:]
    return program


@pytest.mark.slow
def test_no_byte_outside_and_no_undefined_behaviour(fuzzer):
    ran = subprocess.run([str(fuzzer), CASES], capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
