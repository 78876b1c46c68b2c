"""Compiles the kernels for GPUs that are not here, and rejects what no GPU would run well.

    python tests/ladder/compile_gate.py [--targets sm80,sm90] [--full] [--table FILE]

The hands' own launchers run on tensors of device "meta" at the shapes of real layers. A driver that answers
"which GPU is here?" and nothing else stands in for the missing one; every launch compiles just as it would
there (divisibility by 16, numbers equal to 1, dtypes) and is not carried out. The machine code then tells
registers, spills, shared memory and tensor-core instructions. Exit status 1 if a kernel is rejected.
`--table` writes what was read of each kernel; test_gate.py compares the short list with gate.json.
"""

import argparse
import contextlib
import json
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
from delta_linear_check import FORMS, ROADS, SEED, taking
from pefast.kernels import delta_linear_decode, prefix_attention
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pefast.native.delta_linear_decode import RowDelta
from pefast.ops import OPS, Index
from pefast.ops.delta_linear import Call, Needs
from pefast.ops.prefix_attention import Call as AttentionCall

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {f"sm{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# bytes of shared memory that one block may have: CUDA's table of compute capabilities; CDNA 3's manual
SHARED = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "sm120": 99 << 10, "gfx942": 64 << 10}
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")
REGISTERS_OF_A_BLOCK = 65536
# how many entries of each kind are chosen, and the tile
PARTS = {
    "rows": (110, (1, 1)),
    "columns": (128, (1, 1)),
    "tiles": (400, (16, 32)),
    "elements": (450_000, (1, 1)),
}

AMD_COUNTS = ("vgpr_count", "vgpr_spill_count")


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
        if target != "gfx942" and self.registers * self.warps * 32 > REGISTERS_OF_A_BLOCK:
            found.append("more registers than one multiprocessor has")
        if dot and not self.tensor_core:
            found.append("no tensor-core instruction")
        # nvidia's have none for fp32 as it is
        if not dot and self.tensor_core and target != "gfx942":
            found.append("tensor cores round fp32 to tf32")
        return found


@contextlib.contextmanager
def compiling_for(target: str):
    """Inside, a launch compiles for the target and launches nothing. Yields the list of what was compiled."""
    compiled, run, active, hip = [], JITFunction.run, driver._active, torch.version.hip

    def only_compile(self, *args, grid, warmup, **settings):
        # kernels are kept by device number, and device 0 was another target a moment ago
        self.device_caches.clear()
        compiled.append(run(self, *args, grid=grid, warmup=True, **settings))
        return compiled[-1]

    driver.set_active(Gpu(TARGETS[target]))
    # as PyTorch's build for such a GPU has it
    torch.version.hip = "7.0" if TARGETS[target].backend == "hip" else None
    JITFunction.run = only_compile
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active, torch.version.hip = active, hip


def read(kernel) -> Made:
    """What the machine code of a compiled kernel says."""
    meta = kernel.metadata
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{name}: +(\d+)", code)[1]) for name in AMD_COUNTS)
        return Made(meta.name, registers, meta.shared, spills, code.count("v_mfma"), meta.num_warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, local = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage).groups()
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code)) + int(local)
    tensor_core = len(TENSOR_CORES.findall(code))
    return Made(meta.name, int(registers), meta.shared, spills, tensor_core, meta.num_warps)


def _tool(name, *args):
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def launches(full: bool):
    """(name, whether its products want tensor cores, a function that launches) of each case of the gate."""
    bf16 = torch.bfloat16
    cases = [(bf16, 4096, 16, case) for case in ("whole", "split", "library", "dropped", "routed")]
    cases += [(bf16, 4, 16, "whole"), (torch.float32, 4096, 16, "library")]
    if full:
        kinds = (*ROADS, "dropped", "hybrid", "routed")
        wide = [(bf16, rows, 16, case) for rows in (4096, 48, 4) for case in kinds]
        wide += [
            (bf16, rows, rank, case)
            for rows in (4096, 4)
            for rank in (64, 128)
            for case in ("split", "dropped")
        ]
        others = [(dtype, 4096, 16, case) for dtype in (torch.float16, torch.float32) for case in kinds]
        cases = [*wide, *others, (torch.float32, 4096, 64, "dropped")]
    every = [(dtype, wide) for dtype in (bf16, torch.float32) for wide in (64, 128)]
    for causal, dropped in ((True, False), (False, True), *([(True, True)] if full else [])):
        for dtype, wide in every if full else [(bf16, 64), (torch.float32, 64 if causal else 128)]:
            form = f"D={wide} {'causal' if causal else 'masked'}{' dropped' if dropped else ''}"
            name = f"attention {'' if dtype == bf16 else 'float32 '}{form}"
            yield name, dtype == bf16, lambda c=(dtype, wide, causal, dropped): _attention(*c)
    for dtype, rows, rank, case in cases:
        name = f"{case} {str(dtype)[6:]} M={rows} R={rank}"
        yield name, dtype != torch.float32, lambda c=(dtype, rows, rank, case): _linear(*c)
    steps = [(bf16, 4096, 4096, 1), (bf16, 4096, 11008, 16)]
    if full:
        steps += [(dtype, 4096, 4096, 4) for dtype in (bf16, torch.float16, torch.float32)]
        steps += [(torch.float32, 11008, 4096, 16), (bf16, 11008, 32000, 1)]
    for dtype, k, n, adapters in steps:
        name = f"step {str(dtype)[6:]} K={k} N={n} adapters={adapters}"
        yield name, dtype != torch.float32, lambda c=(dtype, k, n, adapters): _step(*c)
    entries = [(bf16, kind) for kind in PARTS]
    if full:
        entries += [(dtype, kind) for dtype in (torch.float16, torch.float32) for kind in PARTS]
    for dtype, kind in entries:
        yield f"partial {str(dtype)[6:]} {kind}", dtype != torch.float32, lambda c=(dtype, kind): _partial(*c)
    yield "dropout", False, _dropout


def _linear(dtype, rows, rank, case):
    """Forward and backward of Llama-7B's widest layer, with fp32 masters, by a road or of a form."""
    n, k = 11008, 4096
    wide = {"x": (rows, k), "w": (n, k), "bias": (n,), "gain": (n,), "dy": (rows, n)}
    masters = {"a": (rank, k), "b": (n, rank), "c": (rank,), "d": (n,)}
    t = {name: _meta(*shape, dtype=dtype) for name, shape in wide.items()}
    t |= {name: _meta(*shape) for name, shape in masters.items()}
    hand = OPS["delta_linear"].hands["triton"]
    if case in FORMS:
        _both_ways(hand, t, FORMS[case])
    else:
        with taking(hand, case):
            _both_ways(hand, t, FORMS["lora"])


def _both_ways(hand, t, form):
    wanted = form(t)
    call = Call(t["x"], t["w"], None, None, None, SEED, ())._replace(**wanted)
    _, saved = hand.forward(call)
    trains = [
        (s.a is not None, True, s.c is not None, s.d is not None, s.h is not None) for s in call.segments
    ]
    hand.backward(call, saved, t["dy"], Needs(True, False, False, False, trains))


def _step(dtype, k, n, adapters):
    """A decoding step of 16 rows, each with one of some adapters of mixed ranks, with fp32 masters."""
    ranks = [4 << i % 4 for i in range(adapters)]
    each = [(_meta(rank, k), _meta(n, rank)) for rank in ranks]
    deltas = [RowDelta(row, *each[row % adapters], 0.5 + row % adapters) for row in range(16)]
    x, w, bias = _meta(16, k, dtype=dtype), _meta(n, k, dtype=dtype), _meta(n, dtype=dtype)
    delta_linear_decode.Plan(w, bias, deltas, 16).run(x)


def _partial(dtype, kind):
    """The gradient of some entries of Llama-7B's widest layer."""
    hand, (count, tile) = OPS["partial_linear"].hands["triton"], PARTS[kind]
    x, dy, k = _meta(4096, 4096, dtype=dtype), _meta(4096, 11008, dtype=dtype), 4096
    at = _meta(count, dtype=torch.int64)
    if kind == "elements":
        # the tables depend on numbers, which "meta" has not
        block = hand.tiles.sampled(dtype)
        sizes = k, block["BLOCK_N"], block["BLOCK_K"]
        some = torch.arange(count) * (11008 * k // count)
        at.pefast_by_tile = (*sizes, 0), [t.to("meta") for t in hand._tables(some, *sizes)]
    hand.chosen_gradient(dy, x, Index(kind, at, tile))


def _attention(dtype, d, causal, dropped):
    """Forward and backward of 2048 keys behind a prefix of 32, 8 queries for each key head."""
    q, k = _meta(2, 32, 2048, d, dtype=dtype), _meta(2, 4, 2048, d, dtype=dtype)
    prefix, mask = _meta(4, 32, d, dtype=dtype), _meta(2, 1, 1, 2048, dtype=torch.bool)
    call = AttentionCall(
        q, k, k, prefix, prefix, None if causal else mask, causal, 0.125, 0.1 * dropped, SEED, None
    )
    o, lse = prefix_attention.forward(call)
    prefix_attention.backward(call, o, lse, o, [True] * 5)


def _dropout():
    hand = OPS["dropout"].hands["triton"]
    x, seed = _meta(4096, 4096, dtype=torch.bfloat16), torch.tensor([7])
    hand._forward(x, 0.1, seed, 0)
    hand._add_(x, x, 0.1, seed, 0)


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def gate(targets: list[str], full: bool, only: str = "") -> tuple[int, dict]:
    """Print a line for each compiled kernel; the number that is rejected, and what was read of each."""
    rejected, table = 0, {}
    for target in targets:
        for case, dot, launch in launches(full):
            if only not in case:
                continue
            begin = time.perf_counter()
            with compiling_for(target) as compiled:
                launch()
            for kernel in compiled:
                made = read(kernel)
                faults = made.faults(target, dot and "tt.dot" in kernel.asm["ttir"])
                rejected += bool(faults)
                table.setdefault(f"{target} {case}", []).append(list(made))
                verdict = "REJECTED: " + "; ".join(faults) if faults else "ok"
                size = f"{made.registers:4d} regs {made.shared:6d} B shared {made.tensor_core:3d} tensor-core"
                print(f"{target:7s}{case:32s}{made.kernel:14s}{size}  {verdict}", flush=True)
            print(f"{target:7s}{case:32s}{time.perf_counter() - begin:.1f} s", flush=True)
    return rejected, table


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="sm80,sm90", help="of " + ", ".join(TARGETS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--full", action="store_true", help="every dtype, rank and size, some minutes")
    parser.add_argument("--table", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    rejected, table = gate(options.targets.split(","), options.full, options.only)
    if options.table:
        head = {"triton": triton.__version__, "columns": Made._fields}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in (head | table).items()]
        options.table.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{rejected} rejected")
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
