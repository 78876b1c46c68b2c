"""What every hand of this room asks before a launch: can a kernel run here, and who is watching."""

import functools

import torch
from torch import Tensor

from . import HAS_TRITON, WHY_NOT, triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# in the interpreter kernels run on CPU tensors; triton reads the variable once, when a kernel is defined
INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
# the release before fails on two of the kernels there: EXCEPTED in tests/ladder/test_gate.py
FIRST_ON_AMD = (3, 7)


def why_not_here(x: Tensor) -> str:
    """Why no kernel of this room can read x, or ""."""
    if not HAS_TRITON:
        return WHY_NOT
    if not (x.is_cuda or INTERPRETED):
        return f"needs a GPU, x is on {x.device}"
    if torch.version.hip and tuple(map(int, triton.__version__.split(".")[:2])) < FIRST_ON_AMD:
        return f"needs triton 3.7 or later on an AMD GPU, this is {triton.__version__}"
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, x is {str(x.dtype).removeprefix('torch.')}"
    return ""


def through_the_registry(x: Tensor) -> bool:
    """Whether somebody other than PyTorch's eager mode watches: a compiler, or a subclass of Tensor."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def checked(run):
    """`run` for the registry: raises in words where no kernel can read its first argument."""

    @functools.wraps(run)
    def with_reason(x, *rest):
        if why := why_not_here(x):
            raise RuntimeError(f"{run.__module__}: the Triton kernels cannot run: {why}")
        return run(x, *rest)

    return with_reason
