"""What each method adds to a training step of all-MiniLM-L6-v2: one table, the frozen model is the unit.

    python -m pytest benchmarks/bench_methods.py

bf16, one thread, 16 texts of 64 tokens, AdamW included. Every method of METHODS is here; `hybrid` is LoRA,
adapter and prefix in one pass. "frozen" is forward and the gradient of the embedded input, nothing trained.
"""

import copy

import torch

import pefast
from benchmarks.bench_model import frozen, minilm
from pefast.methods import METHODS

ROWS, LENGTH = 16, 64


def gradient_of(model, seed: int) -> torch.Tensor:
    """A loss for methods that look at gradients before they enter."""
    torch.manual_seed(seed)
    ids = torch.randint(1000, 30000, (4, LENGTH))
    return model(input_ids=ids, labels=torch.zeros(4, dtype=torch.long)).loss


# name: its methods; the first word is the kind, so that no method is forgotten
SETTINGS = {
    "full": lambda: pefast.Full(),
    "layers, the last two": lambda: pefast.Layers(last=2),
    "bias": lambda: pefast.Bias(),
    "heads, two of each layer": lambda: pefast.Heads({layer: [0, 1] for layer in range(6)}),
    "subnetwork, 1 % of the rows": lambda: pefast.Subnetwork(fraction=0.01, unit="row"),
    "importance, 1 % of the rows": lambda: pefast.Importance(
        batches=[1, 2], loss=gradient_of, fraction=0.01, unit="row"
    ),
    "prompt, 5 tokens": lambda: pefast.Prompt(tokens=5),
    "prefix, 16 tokens": lambda: pefast.Prefix(tokens=16),
    "lora, rank 16": lambda: pefast.LoRA(rank=16),
    "lora, rank 16, dropout": lambda: pefast.LoRA(rank=16, dropout=0.05),
    "lora, DoRA": lambda: pefast.LoRA(rank=16, dora=True),
    "lora, PiSSA": lambda: pefast.LoRA(rank=16, init="pissa"),
    "ia3": lambda: pefast.IA3(),
    "adapter, parallel": lambda: pefast.Adapter(size=24),
    "adapter, serial": lambda: pefast.Adapter(size=24, parallel=False),
    "hybrid": lambda: [pefast.LoRA(rank=16), pefast.Adapter(size=24), pefast.Prefix(tokens=16)],
}


def training_step(model, batch):
    """Forward, backward and AdamW on what trains."""
    optimizer = torch.optim.AdamW(pefast.parameter_groups(model, lr=1e-4))

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_no_method_is_forgotten():
    assert set(METHODS) <= {name.split(",")[0] for name in SETTINGS}


def test_the_cost_of_each_method(benchmark, in_turn, capsys):
    torch.manual_seed(0)
    base, batch = minilm()
    batch = {
        name: value[:ROWS, :LENGTH] if value.dim() > 1 else value[:ROWS] for name, value in batch.items()
    }
    base = base.to(torch.bfloat16).train()
    calls = {"frozen": frozen(copy.deepcopy(base), batch)}
    counts = {"frozen": 0}
    for name, methods in SETTINGS.items():
        model = pefast.attach(copy.deepcopy(base), methods())
        calls[name] = training_step(model, batch)
        counts[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    medians = in_turn("training step of each method", calls, rounds=9)
    if medians:
        lines = [f"{'':30}{'parameters that train':>22}{'of the frozen step':>20}"]
        for name, median in medians.items():
            lines.append(f"{name:30}{counts[name]:>22,}{median / medians['frozen']:>20.2f}")
        with capsys.disabled():
            print("\n" + "\n".join(lines))
    benchmark.extra_info["parameters"] = counts
    benchmark.pedantic(calls["hybrid"], rounds=3)
