"""The door to csrc. C is the extension, or None; WHY_NOT is "" or the reason in words.

The environment variable PEFAST_ISA (scalar, avx2, avx512, avx512_bf16 or amx) holds the kernels to one
instruction set.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType

# torch first: the extension then finds torch's own libgomp loaded, and there is one pool of threads
import torch
from torch import Tensor


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("pefast._C"), ""
    except ModuleNotFoundError:
        # setup.py leaves the note where csrc could not be compiled
        note = Path(__file__).with_name("why_not.txt")
        if note.is_file():
            return None, note.read_text(encoding="utf-8").strip()
        return (
            None,
            "the extension was not built: run `pip install .` or `python setup.py build_ext --inplace`",
        )
    except ImportError as error:
        return None, f"the extension was built but does not load: {error}"


C, WHY_NOT = _load()
if C is not None:
    C.use_isa(os.environ.get("PEFAST_ISA", ""))


def through_the_registry(x: Tensor) -> bool:
    """Whether somebody other than PyTorch's eager mode watches: a compiler, or a subclass of Tensor."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def rows_of(x: Tensor) -> Tensor:
    """x [M, K] as csrc reads it: columns are neighbours, rows do not overlap. A copy where x is not so."""
    m, k = x.shape
    return x if (x.stride(1) == 1 or k == 1) and (x.stride(0) >= k or m <= 1) else x.contiguous()
