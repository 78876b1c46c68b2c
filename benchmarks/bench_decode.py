"""One step of generation for eight rows, each with an adapter of its own, beside the base model alone.

    python -m pytest benchmarks/bench_decode.py

SmolLM2-135M's layer, six of them or all thirty, after 128 tokens. Hugging Face PEFT takes adapter_names.
"""

import copy

import pytest
import torch
import transformers
from torch import nn

import pefast

NAMES = [f"task {i}" for i in range(8)]
TOKENS = 128
RANKS = {"rank 16": [16] * 8, "ranks 4 to 32": [4, 8, 16, 32] * 2}


def llama(layers):
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 49152}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def by_peft(base, ranks):
    from peft import LoraConfig, get_peft_model

    configs = [LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") for rank in ranks]
    model = get_peft_model(copy.deepcopy(base), configs[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def by_pefast(base, ranks):
    model = copy.deepcopy(base)
    for name, rank in zip(NAMES, ranks, strict=True):
        pefast.attach(model, pefast.LoRA(rank=rank, alpha=2 * rank, targets="all-linear"), name=name)
        for path, parameter in model.named_parameters():
            if path.endswith(f"{name}.lora.b"):
                nn.init.normal_(parameter, std=0.02)
    return model.eval()


def step(model, past, tokens, **options):
    """One decoding step; the cache is then as long as before."""
    past = copy.deepcopy(past)

    def call():
        with torch.inference_mode():
            logits = model(input_ids=tokens, past_key_values=past, use_cache=True, **options).logits
            past.crop(-1)
        return logits

    return call


def routed(model, past, tokens):
    """A step that also enters its route, as a server does whose rows change."""
    inner = step(model, past, tokens)

    def call():
        with pefast.route(model, NAMES):
            return inner()

    return call


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("layers", [6, 30])
def test_decoding_step(benchmark, in_turn, layers, ranks):
    torch.manual_seed(0)
    base = llama(layers)
    with torch.no_grad():
        past = base(torch.randint(0, 49152, (8, TOKENS)), use_cache=True).past_key_values
    tokens = torch.randint(0, 49152, (8, 1))
    ours, theirs = by_pefast(base, RANKS[ranks]), by_peft(base, RANKS[ranks])
    calls = {
        "base model": step(base, past, tokens),
        "peft": step(theirs, past, tokens, adapter_names=NAMES),
        "pefast": routed(ours, past, tokens),
        "pefast, accelerated": routed(pefast.accelerate(copy.deepcopy(ours)), past, tokens),
        "pefast over peft": step(pefast.accelerate(copy.deepcopy(theirs)), past, tokens, adapter_names=NAMES),
        "base model, accelerated": step(pefast.accelerate(copy.deepcopy(base)), past, tokens),
    }
    in_turn(f"decoding step, {layers} layers, {ranks}", calls, rounds=21)
    benchmark.pedantic(calls["pefast"], rounds=5)
