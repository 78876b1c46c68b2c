"""The door to csrc. C is the extension, or None; WHY_NOT is "" or the reason in words.

The environment variable PEFAST_ISA (scalar, avx2, avx512, avx512_bf16 or amx) holds the kernels to one
instruction set.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType

# torch first: the extension then finds torch's own libgomp loaded, and there is one pool of threads
import torch  # noqa: F401


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
