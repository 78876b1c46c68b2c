"""Attention over [prefix ; sequence] beside PyTorch's over concatenated keys, one thread.

python -m pytest benchmarks/bench_prefix_attention.py
"""

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from pefast.ops import prefix_attention


class Heads(NamedTuple):
    """q [B, H, L, D], k and v [B, G, S, D], a prefix of P keys."""

    b: int
    h: int
    g: int
    l: int
    s: int
    p: int
    d: int


SHAPES = {
    "bert, prefix 32": Heads(8, 12, 12, 128, 128, 32, 64),
    "minilm, no prefix": Heads(32, 12, 12, 128, 128, 0, 32),
    "llama-1b, long": Heads(1, 32, 8, 1024, 1024, 32, 64),
    "decode": Heads(8, 32, 8, 1, 512, 32, 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMS = {"plain": {}, "causal": {"causal": True}, "dropout 0.1": {"dropout": 0.1}}


def by_torch(q, k, v, prefix_k, prefix_v, causal=False, dropout=0.0):
    """The keys and values concatenated, as PEFT does by a cache; without a prefix nothing is copied."""
    b, l, s, p = q.shape[0], q.shape[2], k.shape[2], prefix_k.shape[1]
    if p:
        k = torch.cat((prefix_k.expand(b, -1, -1, -1), k), 2)
        v = torch.cat((prefix_v.expand(b, -1, -1, -1), v), 2)
    see = torch.ones(l, s + p, dtype=torch.bool).tril(s + p - l) if causal and p and l > 1 else None
    plain = causal and see is None and l > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, see, dropout, plain, enable_gqa=grouped)


def make(heads, dtype):
    """q, k, v as transformers lays them out, the prefix and do."""
    z = heads
    q, do = (torch.randn(z.b, z.l, z.h, z.d).to(dtype).transpose(1, 2) for _ in "qo")
    k, v = (torch.randn(z.b, z.s, z.g, z.d).to(dtype).transpose(1, 2) for _ in "kv")
    prefix = [torch.randn(z.g, z.p, z.d).to(dtype) for _ in "kv"]
    return [t.requires_grad_() for t in (q, k, v, *prefix)], do


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["bert, prefix 32", "minilm, no prefix", "llama-1b, long"])
def test_forward_and_backward(benchmark, in_turn, shape, form, dtype):
    leaves, do = make(SHAPES[shape], DTYPES[dtype])

    def step(attend):
        torch.autograd.grad(attend(*leaves, **FORMS[form]), leaves, do, allow_unused=True)

    calls = {"torch": lambda: step(by_torch), "pefast": lambda: step(prefix_attention)}
    in_turn(f"attention {shape}, {form}, forward and backward, {dtype}", calls, rounds=11)
    benchmark(calls["pefast"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, in_turn, shape, dtype):
    leaves, _ = make(SHAPES[shape], DTYPES[dtype])
    leaves = [t.detach() for t in leaves]
    calls = {"torch": lambda: by_torch(*leaves), "pefast": lambda: prefix_attention(*leaves)}
    in_turn(f"attention {shape}, forward, {dtype}", calls)
    benchmark(calls["pefast"])
