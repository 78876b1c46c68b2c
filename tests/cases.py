"""The settings under which every promise of the methods is tested: tests/test_methods.py runs over them."""

import itertools

import pytest
import torch

import pefast
from tests.models import FAMILIES, Numbers, inputs

LoRA, Adapter, Prompt, Prefix = pefast.LoRA, pefast.Adapter, pefast.Prompt, pefast.Prefix


def probe(model, seed: int) -> torch.Tensor:
    """A loss on a batch of its own for each seed, for methods that look at gradients before they enter."""
    fed = inputs(model.config.model_type)
    generator = torch.Generator().manual_seed(seed)
    fed["input_ids"] = fed["input_ids"][:, torch.randperm(9, generator=generator)]
    return model(**fed).logits.float().square().mean()


CASES = {
    "lora": [LoRA(rank=4, alpha=6)],
    "lora of ranks": [
        LoRA(
            rank=4,
            rslora=True,
            targets=["query", "q_proj", "c_attn", "q"],
            ranks={"0.*": 2},
            alphas={"1.*": 3},
        )
    ],
    "dora": [LoRA(rank=4, alpha=6, dora=True)],
    "lora with a bias": [LoRA(rank=2, bias=True)],
    "pissa": [LoRA(rank=4, init="pissa")],
    "lora of words": [LoRA(rank=3, targets=["word_embeddings", "embed_tokens", "wte", "query", "o_proj"])],
    "ia3": [pefast.IA3()],
    "adapter parallel": [Adapter(size=6, scale=1.5)],
    "adapter serial": [Adapter(size=6, parallel=False, activation="gelu")],
    "adapter on the stream": [
        Adapter(size=6, parallel=False, reads="stream", norm="both", sizes={1: 3}, activation="silu")
    ],
    "adapter around modules": [
        Adapter(size=5, modules=["attention", "mlp", "DenseReluDense", "v_proj", "value", "wi"], norm="in"),
        Adapter(size=4, modules=["mlp", "v_proj", "value", "c_attn", "wi"]),
    ],
    "prompt": [Prompt(tokens=3)],
    "prompt after first": [Prompt(tokens=3, place="after_first")],
    "prompt template": [Prompt(init="template", text="5 7 {text} 9", tokenizer=Numbers(), place="inside")],
    "hybrid": [LoRA(rank=4), Adapter(size=6), Adapter(size=3, parallel=False), Prompt(tokens=3)],
    "full": [pefast.Full()],
    "layers": [pefast.Layers(last=1, embeddings=True)],
    "bias": [pefast.Bias()],
    "layers and lora": [pefast.Layers(layers=[-1]), LoRA(rank=4)],
    "prefix": [Prefix(tokens=3)],
    "prefix of a network": [Prefix(tokens=3, reparameterize=5)],
    "prefix without positions": [Prefix(tokens=2, positions="none")],
    "hybrid with prefix": [LoRA(rank=4), Adapter(size=6), Prefix(tokens=3)],
    "heads": [pefast.Heads({0: [1], -1: [0, -1]})],
    "subnetwork of elements": [pefast.Subnetwork(fraction=0.1, targets="all")],
    "subnetwork of tiles": [pefast.Subnetwork(fraction=0.1, unit="tile", tile=8, by="magnitude")],
    "importance": [pefast.Importance(batches=[4, 5], loss=probe, fraction=0.05)],
    "columns and lora": [pefast.Subnetwork(fraction=0.1, unit="column"), LoRA(rank=4)],
}
DROPPING = {
    "lora": [LoRA(rank=4, dropout=0.3)],
    "adapter parallel": [Adapter(size=6, dropout=0.3)],
    "adapter serial": [Adapter(size=6, dropout=0.3, parallel=False)],
    "dora": [LoRA(rank=4, dropout=0.3, dora=True)],
    "pissa": [LoRA(rank=4, dropout=0.3, init="pissa")],
    "adapter on the stream": [
        Adapter(size=6, dropout=0.3, parallel=False, reads="stream", norm="in", activation="silu")
    ],
    "adapter around modules": [Adapter(size=5, dropout=0.3, modules=["attention", "mlp", "DenseReluDense"])],
    "hybrid": [LoRA(rank=4, dropout=0.3), Adapter(size=6, dropout=0.3), Prompt(tokens=3)],
    "hybrid with prefix": [LoRA(rank=4, dropout=0.3), Adapter(size=6), Prefix(tokens=3, reparameterize=4)],
}


def why_declined(family: str, methods) -> str:
    """Why a method does not know a family (tests/test_selection.py has its sentence); empty where all do."""
    if family in ("llama", "t5") and any(method.kind == "bias" for method in methods):
        return "there is no bias in this family"
    return ""


def pairs(families=FAMILIES, cases=tuple(CASES), table=CASES) -> list:
    """family, case of every pair; one that a method declines is skipped with its reason."""
    found = []
    for family, case in itertools.product(families, cases):
        why = why_declined(family, table[case])
        marks = [pytest.mark.skip(reason=why)] if why else []
        found.append(pytest.param(family, case, marks=marks, id=f"{family}, {case}"))
    return found
