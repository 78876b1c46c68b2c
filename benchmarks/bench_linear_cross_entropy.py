"""The causal loss of a language model with a frozen output embedding, forward and gradient, one thread.

python -m pytest benchmarks/bench_linear_cross_entropy.py
"""

import pytest
import torch
from torch.nn import functional as F

from pefast.ops import linear_cross_entropy

# rows, width, classes: SmolLM2's and GPT-2's output embedding, 4 texts of 256 tokens
SHAPES = {"smollm2": (1020, 576, 49152), "gpt2": (1020, 768, 50257)}


def as_models_do(x, w, target):
    """Logits, then fp32, then the loss: what transformers computes."""
    return F.cross_entropy(F.linear(x, w).float(), target)


def by_torch_in_chunks(x, w, target):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy="balanced")
    return F.linear_cross_entropy(x, w, target, options=options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(benchmark, in_turn, shape, dtype):
    m, k, v = SHAPES[shape]
    x, w = torch.randn(m, k).to(dtype).requires_grad_(), (torch.randn(v, k) * 0.02).to(dtype)
    target = torch.randint(0, v, (m,))

    def step(loss):
        x.grad = None
        loss(x, w, target).backward()

    rivals = {
        "as models do": as_models_do,
        "torch in chunks": by_torch_in_chunks,
        "pefast": linear_cross_entropy,
    }
    calls = {name: (lambda loss=loss: step(loss)) for name, loss in rivals.items()}
    in_turn(f"causal loss, {shape} {SHAPES[shape]}, {dtype}", calls, rounds=5, warm=1)
    benchmark.pedantic(calls["pefast"], rounds=3)
