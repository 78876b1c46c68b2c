"""The door to csrc. C is the extension, or None; WHY_NOT is "" or the reason in words.

The environment variable PEFAST_ISA (scalar, avx2, avx512, avx512_bf16 or amx) holds the kernels to one
instruction set.
"""

import importlib
import os
from collections.abc import Callable
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
# what this process may use, for reasons in words: a compiler that traces a refusal cannot call csrc
ISA = "" if C is None else C.isa()


def through_the_registry(x: Tensor) -> bool:
    """Whether somebody other than PyTorch's eager mode watches: a compiler, or a subclass of Tensor."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def is_plain(s) -> bool:
    """Whether a segment is a LoRA and nothing more."""
    return s.activation == "identity" and s.c is s.d is s.adapter is s.h is None


def is_one_lora(call) -> bool:
    """Whether the call, or a part of one, is one plain LoRA beside a frozen layer."""
    if len(call.segments) != 1 or call.gain is not None or not is_plain(call.segments[0]):
        return False
    return call.bias is None or not call.bias.requires_grad


def rows_of(x: Tensor) -> Tensor:
    """x [M, K] as csrc reads it: columns are neighbours, rows do not overlap. A copy where x is not so."""
    m, k = x.shape
    return x if (x.stride(1) == 1 or k == 1) and (x.stride(0) >= k or m <= 1) else x.contiguous()


def register_one_lora(name: str, forward: Callable, backward: Callable) -> torch.library.Library:
    """Registers one LoRA beside a frozen layer as operators `name` and `name`_backward, with their shapes.

    The operators live as long as the library that comes back.
    """
    library = torch.library.Library("pefast", "FRAGMENT")
    library.define(
        f"{name}(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, float scale, float p, Tensor? seed)"
        " -> (Tensor, Tensor)"
    )
    library.define(
        f"{name}_backward(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor h, float scale, float p,"
        " Tensor? seed, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)"
    )
    library.impl(name, forward, "CPU")
    library.impl(f"{name}_backward", backward, "CPU")

    @torch.library.register_fake(f"pefast::{name}", lib=library)
    def _(x, w, bias, a, b, scale, p, seed):
        return x.new_empty((x.shape[0], w.shape[0])), x.new_empty((x.shape[0], a.shape[0]))

    @torch.library.register_fake(f"pefast::{name}_backward", lib=library)
    def _(dy, x, w, a, b, h, scale, p, seed, need_x, need_a, need_b):
        dx = dy.new_empty((x.shape[0], x.shape[1]) if need_x else 0)
        da = a.new_empty((a.shape[0], a.shape[1]) if need_a else 0)
        return dx, da, b.new_empty((b.shape[0], b.shape[1]) if need_b else 0)

    return library
