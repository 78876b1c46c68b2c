"""csrc/cuda compiles for GPUs that are not here, without spills; its library loads, and launches nothing."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_builds import SOURCE, planted

from pefast.native import delta_linear_cuda as hand
from pefast.ops.delta_linear import Call, Segment

ROOT = Path(__file__).parents[2]
# 90a is 90 with its own instructions, which a kernel may come to use
TARGETS = ("80", "90a", "100", "120")
# what a block may have on every target without asking for more, and registers for two blocks of 256 threads
SHARED, REGISTERS = 48 << 10, 128
KERNELS = 5

pytestmark = pytest.mark.slow

# what an older CUDA says, which knows no GPU after the H100; and one that fails
OLD = """#!/bin/sh
[ "$1" = --list-gpu-code ] && { echo sm_80; echo sm_90; exit; }
echo "$@" > "$OUT"
"""
FULL = """#!/bin/sh
[ "$1" = --list-gpu-code ] && { echo sm_80; exit; }
echo "decode.cu(1): error: the disk is full"; exit 1
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory, nvcc):
    """The library, and what ptxas says of every kernel: {(target, kernel): its numbers}."""
    target = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    setup = runpy.run_path(str(ROOT / "setup.py"))
    command = setup["nvcc_command"](nvcc, [str(SOURCE)], target, TARGETS)
    made = subprocess.run([*command, "-Xptxas=-v"], capture_output=True, text=True, timeout=400)
    assert made.returncode == 0, made.stdout + made.stderr
    return target, resources(made.stdout + made.stderr)


def resources(said: str) -> dict[tuple[str, str], dict[str, int]]:
    """Bytes of stack, of spills and of shared memory, and registers, by target and kernel."""
    found = {}
    for part in said.split("Compiling entry function")[1:]:
        kernel, target = re.search(r"'(\w+)' for 'sm_(\w+)'", part).groups()
        numbers = {"shared": 0}
        for name, pattern in (("stack", r"(\d+) bytes stack"), ("stores", r"(\d+) bytes spill stores"),
                              ("loads", r"(\d+) bytes spill loads"), ("registers", r"Used (\d+) registers"),
                              ("shared", r"(\d+) bytes smem")):  # fmt: skip
            if match := re.search(pattern, part):
                numbers[name] = int(match[1])
        found[target, kernel] = numbers
    return found


def too_much(numbers: dict[str, int]) -> bool:
    """Whether a kernel keeps numbers in memory that belong on chip, or leaves no room for a second block."""
    spilled = numbers["stack"] or numbers["stores"] or numbers["loads"]
    return bool(spilled) or numbers["shared"] > SHARED or numbers["registers"] > REGISTERS


def test_every_kernel_stays_on_chip(built):
    _, kernels = built
    assert len(kernels) == KERNELS * len(TARGETS)
    assert {target for target, _ in kernels} == set(TARGETS)
    assert not {name: numbers for name, numbers in kernels.items() if too_much(numbers)}


def test_the_gate_says_no_to_spills(tmp_path, nvcc):
    source = tmp_path / SOURCE.name
    # eight blocks on a processor leave each thread 32 registers
    source.write_text(planted(SOURCE.read_text(), ("(THREADS, 2)", "(THREADS, 8)")))
    words = ("-std=c++17", "-O3", "-cubin", "-arch=sm_80", f"-I{SOURCE.parent}", "-Xptxas=-v")
    command = [nvcc, *words, str(source), "-o", str(tmp_path / "spills.cubin")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=400)
    found = resources(made.stdout + made.stderr)
    assert len(found) == KERNELS and all(too_much(numbers) for numbers in found.values())


def test_the_library_shows_its_two_doors_and_nothing_of_the_cuda_runtime(built):
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", built[0]], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert {name for name in names if "pefast" in name or "cuda" in name} == {
        "pefast_delta_linear_decode",
        "pefast_delta_linear_decode_layout",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU, which would read what is not its own")
def test_without_a_gpu_the_library_loads_and_launches_nothing(built, monkeypatch):
    opened = hand.opened(built[0])
    assert opened[0] is not None and opened[1] == ""
    monkeypatch.setattr(hand, "library", lambda: opened)
    segment = Segment(torch.randn(4, 32), torch.randn(24, 4))
    call = Call(torch.randn(2, 32), torch.randn(24, 32), None, None, None, None, (segment,))
    assert hand.why_not(call) == "needs a GPU, x is on cpu"
    # 35: no driver that is new enough; 100: no device
    with pytest.raises(RuntimeError, match=r"CUDA did not launch .* error (35|100)$"):
        hand.forward(call)


def built_by(script: str, folder: Path, monkeypatch) -> Path:
    """What setup.py leaves in folder/pefast with this nvcc."""
    dist = pytest.importorskip("setuptools").dist.Distribution
    setup = runpy.run_path(str(ROOT / "setup.py"))
    compiler = folder / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.setenv("OUT", str(folder / "said"))
    extension = setup["Extension"](setup["CUDA"], ["csrc/cuda/delta_linear_decode.cu"])
    command = setup["BuildNative"](dist({"ext_modules": [extension], "packages": ["pefast"]}))
    command.build_lib = str(folder)
    command.ensure_finalized()
    command.run()
    return folder


def test_an_older_nvcc_is_asked_for_what_it_knows(tmp_path, monkeypatch):
    said = (built_by(OLD, tmp_path, monkeypatch) / "said").read_text().split()
    codes = [word for word in said if word.startswith("-gencode")]
    assert [code.split(",")[1] for code in codes] == ["code=sm_80", "code=sm_90", "code=compute_90"]
    assert not (tmp_path / "pefast" / "native" / "why_no_cuda.txt").exists()


def test_where_nvcc_fails_its_own_error_is_kept(tmp_path, monkeypatch):
    note = built_by(FULL, tmp_path, monkeypatch) / "pefast" / "native" / "why_no_cuda.txt"
    assert note.read_text() == "the CUDA kernels were not built: decode.cu(1): error: the disk is full\n"
