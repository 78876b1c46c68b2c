"""The ladder's ground: where kernels can run, and how the interpreter is made right before they do.

kernels/ runs on a GPU, or in triton's interpreter, which must be chosen before triton is imported. Where this
process has neither, test_interpreter.py starts another one for that folder.
"""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

# the ladder's tools are scripts that lie beside its tests
sys.path.insert(0, str(Path(__file__).parent))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter_bf16
    import interpreter_guard

    interpreter_bf16.install()
    interpreter_guard.install()
elif not torch.cuda.is_available():
    collect_ignore = ["kernels"]


@pytest.fixture
def device() -> str:
    """Where this process can run kernels."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="session")
def nvcc() -> str:
    """CUDA's compiler; without it the test is skipped."""
    pytest.importorskip("setuptools")
    setup = runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))
    try:
        return setup["nvcc"]()
    except setup["CannotBuild"] as error:
        pytest.skip(str(error))
