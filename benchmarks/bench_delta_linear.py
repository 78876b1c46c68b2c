"""One LoRA layer beside its rivals, learning or not, one thread; the frozen layer is the unit.

python -m pytest benchmarks/bench_delta_linear.py
"""

import pytest
import torch
from torch import nn

from benchmarks.rivals import RIVALS
from benchmarks.shapes import LAYERS, ROWS

RANK = 16
SHAPES = ["minilm attention", "bert attention", "bert up", "llama-1b attention"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, in_turn, shape, rows, dropout, dtype):
    k, n = LAYERS[shape]
    base = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
    nets = {name: make(base, RANK, dropout).train() for name, make in RIVALS.items()}
    x, dy = torch.randn(ROWS[rows], k).to(dtype), torch.randn(ROWS[rows], n).to(dtype)

    def step(net):
        net(x.detach().requires_grad_()).backward(dy)

    calls = {name: (lambda net=net: step(net)) for name, net in nets.items()}
    in_turn(f"LoRA layer {shape} {tuple(x.shape)}, dropout {dropout}, {dtype}", calls, rounds=11)
    benchmark(calls["pefast"])


@pytest.mark.parametrize(("rank", "batches"), [(64, "several"), (64, "one"), (RANK, "one")])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_of_a_step(benchmark, in_turn, shape, rows, rank, batches):
    """With one batch a step a and b are new at each call: nothing that is kept of them can be used again."""
    k, n = LAYERS[shape]
    base = nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    nets = {name: make(base, rank, 0.0).train() for name, make in RIVALS.items()}
    x, dy = torch.randn(ROWS[rows], k).bfloat16(), torch.randn(ROWS[rows], n).bfloat16()
    pair = nets["pefast"].lora_a, nets["pefast"].lora_b

    def step(net):
        if batches == "one" and net is nets["pefast"]:
            # only their versions: an optimizer would leave both in the cache
            torch._C._autograd._unsafe_set_version_counter(pair, tuple(t._version + 1 for t in pair))
        net(x.detach().requires_grad_()).backward(dy)

    calls = {name: (lambda net=net: step(net)) for name, net in nets.items()}
    in_turn(f"LoRA layer {shape} {tuple(x.shape)}, rank {rank}, batches a step: {batches}", calls, rounds=11)
    benchmark(calls["pefast"])


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_alone(benchmark, in_turn, shape, rows):
    k, n = LAYERS[shape]
    base = nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    nets = {name: make(base, RANK, 0.0).eval() for name, make in RIVALS.items()}
    x = torch.randn(rows, k).bfloat16()

    def compute(net):
        with torch.no_grad():
            net(x)

    calls = {name: (lambda net=net: compute(net)) for name, net in nets.items()}
    in_turn(f"LoRA layer without gradients, {shape} {tuple(x.shape)}", calls)
    benchmark(calls["pefast"])
