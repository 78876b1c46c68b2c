"""Bytes that a LoRA layer keeps for backward, beside its rivals; the input x is the unit.

    python -m pytest benchmarks/bench_saved_bytes.py

Counts memory, not time: the same on any machine. Fails where pefast keeps more than x, the waist and a
seed.
"""

import pytest
import torch
from torch import nn

from benchmarks.rivals import RIVALS
from benchmarks.shapes import LAYERS
from tests.models import saved_bytes

RANK, ROWS = 16, 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_kept_for_backward(benchmark, capsys, dropout, dtype):
    k, n = LAYERS["bert attention"]
    base = nn.Linear(k, n, dtype=dtype).requires_grad_(False)
    x = torch.randn(ROWS, k).to(dtype).requires_grad_()
    nets = {name: make(base, RANK, dropout).train() for name, make in RIVALS.items()}
    kept = {
        # the weight itself is nobody's cost
        name: saved_bytes(lambda net=net: net(x), nn.ModuleList([net, base])) / x.nbytes
        for name, net in nets.items()
    }
    with capsys.disabled():
        ways = ", ".join(f"{name} {times:.2f}" for name, times in kept.items())
        print(f"\nkept for backward, {k} to {n}, rank {RANK}, dropout {dropout}, {dtype}, x is 1.00: {ways}")
    benchmark.extra_info["kept"] = kept
    benchmark.pedantic(lambda: nets["pefast"](x), rounds=3)
    assert kept["pefast"] * x.nbytes <= (k + RANK) * ROWS * dtype.itemsize + 8
