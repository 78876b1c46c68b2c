"""What the tests of compiled PTX share: where they can run, and how long."""

import os

import pytest

from pefast import kernels

TARGETS = ("sm80", "sm90")
# the long version: every form, dtype and target; `make ladder` asks for it
FULL = os.environ.get("LADDER") == "full"

rung = [
    pytest.mark.slow,
    pytest.mark.skipif(not kernels.HAS_TRITON, reason=kernels.WHY_NOT),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
