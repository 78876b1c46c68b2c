"""Compiles the kernels for GPUs that are not here, and rejects what no GPU would run well.

    python tests/ladder/compile_gate.py [--targets sm80,sm90] [--full]

The hands' own launchers run on tensors of device "meta" at the shapes of real layers. A driver that answers
"which GPU is here?" and nothing else stands in for the missing one; every launch compiles just as it would
there (divisibility by 16, numbers equal to 1, dtypes) and is not carried out. The machine code then tells
registers, spills, shared memory and tensor-core instructions. Exit status 1 if a kernel is rejected.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# the interpreter compiles nothing, and triton reads this when it is imported
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pefast.ops import OPS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    name: GPUTarget("cuda", number, 32) for name, number in (("sm80", 80), ("sm90", 90), ("sm100", 100))
}
# bytes of shared memory that one block may have: CUDA's table of compute capabilities
SHARED = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")
REGISTERS_OF_A_BLOCK = 65536


class Gpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


class Made(NamedTuple):
    """What the compiler made of one launch."""

    kernel: str
    registers: int
    shared: int
    spills: int
    tensor_core: int
    warps: int

    def faults(self, target, dot):
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED[target]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED[target]} is the most")
        if self.registers * self.warps * 32 > REGISTERS_OF_A_BLOCK:
            found.append("more registers than one multiprocessor has")
        if dot and not self.tensor_core:
            found.append("no tensor-core instruction")
        return found


@contextlib.contextmanager
def compiling_for(target: str):
    """Inside, a launch compiles for the target and launches nothing. Yields the list of what was compiled."""
    compiled, run, active = [], JITFunction.run, driver._active

    def only_compile(self, *args, grid, warmup, **settings):
        # kernels are kept by device number, and device 0 was another target a moment ago
        self.device_caches.clear()
        compiled.append(run(self, *args, grid=grid, warmup=True, **settings))
        return compiled[-1]

    driver.set_active(Gpu(TARGETS[target]))
    JITFunction.run = only_compile
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


def read(kernel) -> Made:
    """What the machine code of a compiled kernel says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, local = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage).groups()
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code)) + int(local)
    tensor_core = len(TENSOR_CORES.findall(code))
    meta = kernel.metadata
    return Made(meta.name, int(registers), meta.shared, spills, tensor_core, meta.num_warps)


def _tool(name, *args):
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def launches(full: bool):
    """(name, whether its products want tensor cores, a function that launches) of each case of the gate."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if full else [torch.bfloat16]
    for dtype in dtypes:
        for rate in (0.0, 0.1) if full else (0.1,):
            for rank in (16, 64 if dtype == torch.float32 else 128) if full else (16,):
                for rows in (4096, 48, 4) if full else (4096, 4):
                    case = f"{str(dtype)[6:]} M={rows} R={rank} p={rate}"
                    yield case, dtype != torch.float32, lambda c=(dtype, rate, rank, rows): _both_ways(*c)
    yield "dropout", False, _dropout


def _both_ways(dtype, rate, rank, rows):
    """Forward and backward of Llama-7B's widest layer, with fp32 masters."""
    n, k, seed = 11008, 4096, torch.tensor([7])
    x, w, bias, dy, h = (
        _meta(*shape, dtype=dtype) for shape in ((rows, k), (n, k), (n,), (rows, n), (rows, rank))
    )
    a, b = _meta(rank, k), _meta(n, rank)
    hand = OPS["delta_linear"].hands["triton"]
    hand._forward(x, w, bias, a, b, 0.5, rate, seed)
    hand._backward(dy, x, w, a, b, h, 0.5, rate, seed, True, True, True)


def _dropout():
    hand = OPS["dropout"].hands["triton"]
    x, seed = _meta(4096, 4096, dtype=torch.bfloat16), torch.tensor([7])
    hand._forward(x, 0.1, seed, 0)
    hand._add_(x, x, 0.1, seed, 0)


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def gate(targets: list[str], full: bool) -> int:
    """Print a line for each compiled kernel; the number that is rejected."""
    rejected = 0
    for target in targets:
        for case, dot, launch in launches(full):
            begin = time.perf_counter()
            with compiling_for(target) as compiled:
                launch()
            for kernel in compiled:
                made = read(kernel)
                faults = made.faults(target, dot)
                rejected += bool(faults)
                verdict = "REJECTED: " + "; ".join(faults) if faults else "ok"
                size = f"{made.registers:4d} regs {made.shared:6d} B shared {made.tensor_core:3d} tensor-core"
                print(f"{target:6s}{case:34s}{made.kernel:17s}{size}  {verdict}", flush=True)
            print(f"{target:6s}{case:34s}{time.perf_counter() - begin:.1f} s", flush=True)
    return rejected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="sm80,sm90", help="of " + ", ".join(TARGETS))
    parser.add_argument("--full", action="store_true", help="every dtype, rank and size, some minutes")
    options = parser.parse_args()
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    rejected = gate(options.targets.split(","), options.full)
    print(f"{rejected} rejected")
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
