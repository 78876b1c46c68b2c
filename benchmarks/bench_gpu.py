"""LoRA layers and the loss on a GPU beside their rivals: forward and gradients, rounds interleaved.

python -m pytest benchmarks/bench_gpu.py        with PEFAST_ROWS=FILE each comparison is a line of JSON there

Before each timed call a buffer larger than the second cache is written: no rival finds its input there.
"""

import json
import os
import statistics
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from benchmarks.rivals import RIVALS
from benchmarks.shapes import LAYERS

SHAPES = ["bert up", "llama-7b attention", "llama-7b up"]
FLUSHED = 256 << 20
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees none")


def rivals(k, n, rank, dropout, dtype, device):
    """Modules by name that compute one layer, those whose packages are there."""
    base = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
    nets = {name: make(base, rank, dropout).to(device).train() for name, make in RIVALS.items()}
    if device == "cuda":
        nets["peft, compiled"] = torch.compile(RIVALS["peft"](base, rank, dropout).to(device).train())
        if find_spec("bitsandbytes"):
            nets["peft over bitsandbytes' int8"] = _over_int8(base, rank, dropout).to(device).train()
    return nets


def _over_int8(base, rank, dropout):
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    frozen = bitsandbytes.nn.Linear8bitLt(
        base.in_features, base.out_features, bias=False, has_fp16_weights=False
    )
    frozen.load_state_dict({"weight": base.weight.detach().clone()})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["0"])
    return inject_adapter_in_model(config, nn.Sequential(frozen))


def in_turn(calls, clock, rounds):
    """{name: median seconds} of calls timed in turn, A B C A B C, after three rounds that do not count."""
    spans = {name: [] for name in calls}
    for _ in range(rounds + 3):
        for name, call in calls.items():
            spans[name].append(clock(call))
    return {name: statistics.median(span[3:]) for name, span in spans.items()}


def gpu_clock(call):
    """Seconds of one call by the GPU's own events, the cache cold."""
    torch.empty(FLUSHED, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_layer(shape, rows, rank, dropout, dtype, device, clock, rounds=21):
    """One line of results: a layer's forward and gradients by every rival."""
    k, n = LAYERS[shape]
    x, dy = torch.randn(rows, k).to(device, dtype), torch.randn(rows, n).to(device, dtype)

    def step(net):
        net(x.detach().requires_grad_()).backward(dy)

    nets = rivals(k, n, rank, dropout, dtype, device)
    medians = in_turn({name: lambda net=net: step(net) for name, net in nets.items()}, clock, rounds)
    sizes = {"m": rows, "k": k, "n": n, "rank": rank, "dropout": dropout, "dtype": str(dtype)[6:]}
    return {"what": f"LoRA layer, {shape}", **sizes, "rounds": rounds, "seconds": medians}


def measure_loss(rows, width, classes, dtype, device, clock, rounds=21):
    """One line of results: the loss over a vocabulary and the gradient of its input."""
    from pefast.ops import linear_cross_entropy

    x, w = torch.randn(rows, width).to(device, dtype), torch.randn(classes, width).to(device, dtype)
    target = torch.randint(0, classes, (rows,)).to(device)
    losses = {
        "pefast": lambda leaf: linear_cross_entropy(leaf, w, target),
        "torch": lambda leaf: nn.functional.cross_entropy((leaf @ w.t()).float(), target),
    }
    if device == "cuda" and find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        losses["liger"] = lambda leaf: fused(w, leaf, target)
    calls = {name: lambda f=f: f(x.detach().requires_grad_()).backward() for name, f in losses.items()}
    sizes = {"m": rows, "k": width, "n": classes, "dtype": str(dtype)[6:]}
    return {"what": "loss", **sizes, "rounds": rounds, "seconds": in_turn(calls, clock, rounds)}


def note(line):
    """Prints a line of results and adds it to the file PEFAST_ROWS."""
    first = line["seconds"].get("frozen") or next(iter(line["seconds"].values()))
    each = ", ".join(f"{name} {1e6 * s:.0f} µs ({s / first:.2f})" for name, s in line["seconds"].items())
    print(f"\n{line['what']} {line['m']}x{line['k']}x{line['n']} {line['dtype']}: {each}")
    if path := os.environ.get("PEFAST_ROWS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("rows", [16, 512, 8192])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer(shape, rows, dropout, rank):
    line = measure_layer(shape, rows, rank, dropout, torch.bfloat16, "cuda", gpu_clock)
    note(line)
    assert all(seconds > 0 for seconds in line["seconds"].values())


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("classes", [32_000, 128_256])
def test_loss(classes):
    line = measure_loss(4096, 4096, classes, torch.bfloat16, "cuda", gpu_clock)
    note(line)
    assert all(seconds > 0 for seconds in line["seconds"].values())
