"""The kernels compile for GPUs that are not here, with tensor cores and no spills; the gate can say no."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pefast.kernels import launch

from pefast import kernels

FOLDER = Path(__file__).parent
# a sum of 256 x 256 fills every register; float32 products run without tensor cores
PLANTED = """
import torch
import compile_gate
from compile_gate import FORMS, OPS, _both_ways, _meta, taking
hand = OPS["delta_linear"].hands["triton"]
wide = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 8, "num_stages": 2}

def launch(dtype):
    shapes = {"x": (4096, 4096), "w": (4096, 4096), "dy": (4096, 4096), "a": (16, 4096), "b": (4096, 16)}
    t = {name: _meta(*shape, dtype=dtype) for name, shape in shapes.items()} | {"bias": None}
    with taking(hand, "split"):
        _both_ways(hand, t, FORMS["lora"])

def both():
    launch(torch.float32)
    hand.tiles.product = lambda *sizes: wide
    launch(torch.bfloat16)

def rounded():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    launch(torch.float32)
    torch.backends.cuda.matmul.fp32_precision = "ieee"

compile_gate.launches = lambda full: [("planted tf32", False, rounded), ("planted", True, both)]
compile_gate.gate(["sm80"], False)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not kernels.HAS_TRITON, reason=kernels.WHY_NOT),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


def run(*command: str) -> subprocess.CompletedProcess:
    # in a process of its own, for the gate puts another driver in triton's place
    return subprocess.run([sys.executable, *command], cwd=FOLDER, capture_output=True, text=True, timeout=580)


# what each release of triton makes of the kernels
TABLES = {json.loads(path.read_text())["triton"]: path for path in FOLDER.glob("gate*.json")}


PINNED = "3.7.1"
TARGETS = ("sm80", "sm90", "sm100", "sm120", "gfx942")
# (release, target) where a release's compiler fails; kernels/launch.py refuses to run there
EXCEPTED = {
    (
        "3.6.0",
        "gfx942",
    ): "product on the way back: TritonAMDGPUConvertToBufferOps stops at a pointer that walks"
    " by a 64-bit step; 20 spills in towards_keys, 7 without that pass",
}
# CI has the time for two targets of the release that is pinned
EVERY = os.environ.get("LADDER") == "full" or (kernels.HAS_TRITON and kernels.triton.__version__ != PINNED)


@pytest.mark.parametrize("target", TARGETS if EVERY else TARGETS[:2])
def test_every_kernel_passes_as_the_table_says(target, tmp_path):
    file = tmp_path / "gate.json"
    done = run("compile_gate.py", "--targets", target, "--table", str(file))
    if (kernels.triton.__version__, target) in EXCEPTED:
        # an exception that is none any more has to go
        assert done.returncode != 0
        assert "ConvertToBufferOps" in done.stderr, done.stderr[-2000:]
        return
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    got = json.loads(file.read_text())
    table = json.loads(TABLES.get(got["triton"], FOLDER / "gate.json").read_text())
    assert got.keys() == {name for name in table if name.split()[0] in ("triton", "columns", target)}
    if got["triton"] == table["triton"]:
        assert got == {name: table[name] for name in got}


@pytest.mark.parametrize("release", TABLES)
def test_the_table_has_every_target_and_no_spills(release):
    table = json.loads(TABLES[release].read_text())
    rows = {name: value for name, value in table.items() if name not in ("triton", "columns")}
    assert {name.split()[0] for name in rows} == {t for t in TARGETS if (release, t) not in EXCEPTED}
    spills = table["columns"].index("spills")
    assert all(row[spills] == 0 for value in rows.values() for row in value)


@pytest.mark.parametrize(
    ("release", "hip", "refused"), [("3.6.0", "6.4", True), ("3.7.1", "7.0", False), ("3.6.0", None, False)]
)
def test_what_is_excepted_is_refused_on_such_a_gpu(release, hip, refused, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(launch.triton, "__version__", release)
    why = launch.why_not_here(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))
    assert why == (f"needs triton 3.7 or later on an AMD GPU, this is {release}" if refused else "")


def test_the_gate_rejects_what_spills_and_what_misses_the_tensor_cores():
    done = run("-c", PLANTED)
    assert done.returncode == 0, done.stderr[-2000:]
    rejected = [line for line in done.stdout.splitlines() if "REJECTED" in line]
    assert any("product" in line and "spills" in line for line in rejected)
    assert any("waist" in line and "no tensor-core instruction" in line for line in rejected)
    assert any("planted tf32" in line and "round fp32 to tf32" in line for line in rejected)
