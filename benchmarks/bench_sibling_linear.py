"""Layers that read the same x, each with a LoRA: together, and one after another; forward and gradients.

python -m pytest benchmarks/bench_sibling_linear.py
"""

import pytest
import torch
from torch import nn

from benchmarks.shapes import LAYERS, ROWS
from pefast.ops import Part, Segment, delta_linear, sibling_linear

RANK = 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=("bf16", "fp32"))
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", ["minilm attention", "bert attention"])
def test_forward_and_backward(benchmark, in_turn, shape, count, rows, dropout, dtype):
    k, n = LAYERS[shape]
    parts = []
    for _ in range(count):
        w = nn.Parameter((torch.randn(n, k) * k**-0.5).to(dtype), requires_grad=False)
        a, b = torch.randn(RANK, k) * k**-0.5, torch.randn(n, RANK)
        parts.append(Part(w, (Segment(a.requires_grad_(), b.requires_grad_(), 2.0, dropout=dropout),)))
    x, dy = torch.randn(ROWS[rows], k).to(dtype), torch.randn(ROWS[rows], n).to(dtype)

    def step(function):
        torch.autograd.backward(function(x.detach().requires_grad_()), [dy] * count)

    calls = {
        "apart": lambda: step(lambda x: [delta_linear(x, part.w, part.segments) for part in parts]),
        "pefast": lambda: step(lambda x: sibling_linear(x, parts)),
    }
    in_turn(f"{count} siblings {shape} {tuple(x.shape)}, {dtype}, dropout {dropout}", calls, rounds=11)
    benchmark(calls["pefast"])
