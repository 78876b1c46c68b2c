"""1 % of each linear layer trains, one thread; the unit is the frozen layer, or the frozen model's step.

    python -m pytest benchmarks/bench_partial_linear.py

Rivals: the whole weight trained, and its gradient masked, as one does without an operation for it; for a
model, full fine-tuning.
"""

import copy

import pytest
import torch

import pefast
from benchmarks.bench_model import frozen, gpt2, llama, minilm, trained
from benchmarks.shapes import LAYERS, ROWS
from pefast.ops import Index, partial_linear
from pefast.ops.partial_linear import OP, Call, mask, take

SHARE, TILE = 0.01, 16


def chosen(kind, n, k):
    """An index of 1 % of [n, k]."""
    tile = (TILE, TILE) if kind == "tiles" else (1, 1)
    total = {"rows": n, "columns": k, "tiles": n * k // TILE**2, "elements": n * k}[kind]
    return Index(kind, torch.randperm(total)[: max(1, round(SHARE * total))].sort().values, tile)


def both_ways(product, x, dy, *trained):
    """A call that computes product() and the gradients of x and what trains."""

    def step():
        product().backward(dy)
        for tensor in (x, *trained):
            tensor.grad = None

    return step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rows", ["a batch", "a long batch"])
@pytest.mark.parametrize("layer", ["minilm attention", "smollm2 up", "llama-1b attention"])
@pytest.mark.parametrize("kind", ["rows", "columns", "tiles", "elements"])
def test_partial_linear(benchmark, in_turn, kind, layer, rows, dtype):
    torch.manual_seed(0)
    (k, n), m = LAYERS[layer], ROWS[rows]
    x, w = torch.randn(m, k, dtype=dtype, requires_grad=True), torch.randn(n, k, dtype=dtype) * k**-0.5
    w = torch.nn.Parameter(w, requires_grad=False)
    dy, index = torch.randn(m, n, dtype=dtype), chosen(kind, n, k)
    values = take(w, index).float().requires_grad_()
    whole = w.detach().clone().requires_grad_()
    kept = mask(index, (n, k)).to(dtype)
    whole.register_hook(lambda dw: dw * kept)

    calls = {
        "frozen": both_ways(lambda: torch.nn.functional.linear(x, w), x, dy),
        "whole, masked": both_ways(lambda: torch.nn.functional.linear(x, whole), x, dy, whole),
    }
    for name in OP.backends:
        if not OP.why_not(name, Call(x, w, None, ((values, index),))):
            calls[name] = both_ways(
                lambda name=name: partial_linear(x, w, values, index, backend=name), x, dy, values
            )
    in_turn(f"{kind}, {layer}, {rows}, {str(dtype).removeprefix('torch.')}", calls, rounds=9)
    benchmark(calls[OP.pick(Call(x, w, None, ((values, index),)))])


@pytest.mark.parametrize("make", [minilm, llama, gpt2], ids=lambda make: make.__name__)
def test_training_step(benchmark, in_turn, make):
    torch.manual_seed(0)
    base, batch = make()
    base = base.to(torch.bfloat16).train()
    calls = {"frozen": frozen(copy.deepcopy(base), batch)}
    for unit in ("row", "column", "tile", "element"):
        method = pefast.Subnetwork(fraction=SHARE, unit=unit)
        calls[f"1 % {unit}s"] = trained(pefast.attach(copy.deepcopy(base), method), batch)
    calls["full"] = trained(copy.deepcopy(base), batch)
    in_turn(f"training step, {make.__doc__}", calls, rounds=5, warm=1)
    benchmark.pedantic(calls["1 % rows"], rounds=3)
