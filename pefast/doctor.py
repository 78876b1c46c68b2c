"""What this machine has for pefast, what is missing, and what that costs. Needs nothing that is optional.

`python -m pefast.doctor` prints it without the command line's own libraries.
"""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

# the instruction sets that csrc is written for, fastest first, as the kernel names them
LEVELS = {"AMX": "amx_bf16", "AVX-512 bf16": "avx512_bf16", "AVX-512": "avx512f", "AVX2": "avx2"}
# package: what needs it
EXTRAS = {
    "accelerate": "`pefast train` needs it",
    "sklearn": "accuracy and F1 in `pefast train` and `evaluate` need it",
    "yaml": "recipes need it",
    "peft": "comparisons with PEFT need it; checkpoints are read and written without it",
}
NAMES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
# benchmarks/bench_dropout.py's 4096x1536 bf16 on one thread of a Xeon with AVX-512, 2026-11
NATIVE_COST = "plain PyTorch computes the same numbers; dropout takes 280 ms where csrc takes 10"


class Line(NamedTuple):
    """One thing looked at."""

    name: str
    found: str
    meaning: str = ""


def look() -> list[Line]:
    """Everything that is looked at, in the order to read it."""
    lines = [Line("python", platform.python_version())]
    lines += [Line(name, _version(name)) for name in ("torch", "transformers", "safetensors", "numpy")]
    lines += [_native(), _instructions(), _threads(), _gpu(), _cuda(), _triton()]
    for module, meaning in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        name = NAMES.get(module, module)
        lines.append(Line(name, _version(name) if found else "missing", "" if found else meaning))
    return lines


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _native() -> Line:
    from . import native

    if native.C is not None:
        return Line(
            "native extension",
            "built",
            "dropout, bf16 LoRA layers and attention, and the causal loss run in csrc where they can",
        )
    return Line("native extension", "missing", f"{native.WHY_NOT}; {NATIVE_COST}")


def _instructions() -> Line:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return Line(
            "instruction sets", platform.machine(), "csrc takes what the processor reports when it is loaded"
        )
    text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    flags = next(
        (set(line.split()) for line in text.splitlines() if line.startswith(("flags", "Features"))), set()
    )
    found = [name for name, flag in LEVELS.items() if flag in flags]
    missing = [name for name in LEVELS if name not in found]
    return Line(
        "instruction sets",
        ", ".join(found) or "none of ours",
        f"without {', '.join(missing)}" if missing else "",
    )


def _threads() -> Line:
    import torch

    return Line("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}", "OMP_NUM_THREADS changes it")


def _gpu() -> Line:
    import torch

    if torch.cuda.is_available():
        return Line("GPU", torch.cuda.get_device_name(), "")
    return Line("GPU", "none", "layers run on the CPU")


def _cuda() -> Line:
    from .native import delta_linear_cuda

    kernels, why = delta_linear_cuda.library()
    if kernels is not None:
        return Line("CUDA kernels", "built", "on a GPU, decoding steps of LoRA layers run in one launch each")
    return Line("CUDA kernels", "missing", why)


def _triton() -> Line:
    import torch

    if importlib.util.find_spec("triton") is None:
        cost = (
            "GPU layers then run in plain PyTorch"
            if torch.cuda.is_available()
            else "nothing is lost without a GPU"
        )
        return Line("triton", "missing", cost)
    idle = "" if torch.cuda.is_available() else "idle without a GPU, but for tests in its interpreter"
    return Line("triton", _version("triton"), idle)


if __name__ == "__main__":
    for line in look():
        print(f"{line.name:18} {line.found:28} {line.meaning}".rstrip())
