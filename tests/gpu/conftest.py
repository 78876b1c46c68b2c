"""The same tests on the CPU and on a GPU: "cpu" shows that a test is sound, "cuda" is for `make gpu`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.ladder import interpreter_bf16

    interpreter_bf16.install()

WHY = "needs a GPU, and torch sees none: `make gpu` on a machine that has one runs it"
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=WHY)]
)


@pytest.fixture(params=["cpu", GPU])
def device(request) -> str:
    """Where this test computes."""
    return request.param
