"""accelerate: the same numbers, names and switches, computed by pefast; all of it can be taken out again."""

import copy

import pytest
import torch
import transformers
from torch import nn

import pefast
from pefast.layers import attention
from pefast.layers.on_peft import PeftLinear
from pefast.testing import assert_no_worse
from tests.models import build

peft = pytest.importorskip("peft")


def bert(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.BertConfig(**sizes, vocab_size=100, max_position_embeddings=64)
    return transformers.BertForSequenceClassification(config).to(dtype).eval()


def wrapped(dtype=torch.float32, **options):
    """A PEFT model with two adapters whose b is not zero."""
    settings = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(bert(dtype), peft.LoraConfig(r=8, lora_alpha=16, **settings, **options))
    model.add_adapter("other", peft.LoraConfig(r=4, use_rslora=True, **settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1, 1])


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_keeps_its_numbers_and_switches(dtype):
    model = wrapped(dtype)
    fast = pefast.accelerate(copy.deepcopy(model), attention=False)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.01}
    names = ["other", "__base__", "default"]
    assert list(fast.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(logits(fast), logits(model), **close)
    torch.testing.assert_close(logits(fast, adapter_names=names), logits(model, adapter_names=names), **close)
    for each in (model, fast):
        each.set_adapter("other")
    torch.testing.assert_close(logits(fast), logits(model), **close)
    with model.disable_adapter(), fast.disable_adapter():
        assert torch.equal(logits(fast), logits(model))
    for each in (model, fast):
        each.merge_adapter()
    assert torch.equal(logits(fast), logits(model))


def test_peft_keeps_its_gradients():
    model = wrapped()
    fast = pefast.accelerate(copy.deepcopy(model))
    for each in (model, fast):
        each(input_ids=IDS, labels=LABELS).loss.backward()
    for (name, slow), quick in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert (slow.grad is None) == (quick.grad is None), name
        if slow.grad is not None:
            torch.testing.assert_close(quick.grad, slow.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_dora_goes_its_own_way_and_says_so():
    model = wrapped(use_dora=True)
    fast = pefast.accelerate(copy.deepcopy(model))
    assert torch.equal(logits(fast), logits(model))
    assert "default is a Dora" in pefast.explain(fast)


def test_explain_says_what_runs():
    said = pefast.explain(pefast.accelerate(wrapped()))
    assert "LoRA of PEFT: " in said and "dropout of 0.1 from a counter" in said


def test_explain_tells_the_memory_of_packs():
    model = pefast.attach(build("llama").to(torch.bfloat16), pefast.LoRA(rank=4))
    assert "packed copies" not in pefast.explain(model)
    if ": native" not in pefast.explain(model):
        pytest.skip(pefast.explain(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert "packed copies of frozen weights:" in pefast.explain(model)
    assert "packed copies of LoRA factors" not in pefast.explain(model)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert "packed copies of LoRA factors: " in pefast.explain(model)
    for module in model.modules():
        if hasattr(module, "deltas"):
            # a new storage: the packs went with the old one
            module.weight.data = module.weight.data.clone()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert "packed copies" not in pefast.explain(model)


def test_every_switch_can_be_taken_out():
    model = wrapped()
    before = [type(module) for module in model.modules()]
    pefast.accelerate(pefast.accelerate(model))
    assert any(isinstance(module, PeftLinear) for module in model.modules())
    pefast.accelerate(model, attention=False, dropout=False, loss=False, peft=False)
    assert model.config._attn_implementation == "sdpa"
    assert [type(module) for module in model.modules()] == before


def test_dropout_has_its_rate_and_is_fixed_by_the_seed():
    model = pefast.accelerate(bert()).train()
    x = torch.ones(1000, 64)
    drop = model.dropout
    torch.manual_seed(5)
    first = drop(x)
    torch.manual_seed(5)
    assert torch.equal(drop(x), first) and not torch.equal(drop(x), first)
    assert abs(float((first == 0).float().mean()) - drop.p) < 0.01
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("count", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_causal_loss_in_chunks(dtype, count):
    """Loss and gradients as with logits; labels of -100 do not count; in evaluation the logits are there."""
    model = pefast.attach(build("llama").to(dtype), pefast.LoRA(rank=4)).train()
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(3, 90, (5, 60), generator=torch.Generator().manual_seed(2))
    labels = torch.where(torch.rand(5, 60, generator=torch.Generator().manual_seed(3)) < 0.3, -100, ids)

    def step():
        model.zero_grad()
        output = model(input_ids=ids, labels=labels, num_items_in_batch=count)
        output.loss.backward()
        return output, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, slow = step()
    chunked, quick = pefast.accelerate(model) and step()
    assert plain.logits is not None and chunked.logits is None
    assert chunked.loss.dtype == torch.float32
    torch.testing.assert_close(chunked.loss, plain.loss.float(), rtol=1e-5, atol=1e-5)
    for got, near in zip(quick, slow, strict=True):
        size = near.abs().max()
        torch.testing.assert_close(
            got / size, near / size, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03
        )
    with torch.no_grad():
        assert model.eval()(input_ids=ids, labels=labels).logits.shape[:2] == ids.shape


def test_the_causal_loss_of_a_peft_model():
    """PEFT's own forward names options that nobody set; they do not bring the logits back."""
    model = peft.get_peft_model(
        build("llama"), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    plain = model(input_ids=IDS, labels=IDS)
    chunked = pefast.accelerate(model)(input_ids=IDS, labels=IDS)
    assert plain.logits is not None and chunked.logits is None
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=1e-5, atol=1e-5)
    assert model(input_ids=IDS, labels=IDS, return_dict=False)[1].shape[:2] == IDS.shape


def wide(family, dtype):
    """A tiny model whose weights are large enough for its attention to have opinions."""
    model = build(family).to(dtype).eval()
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            nn.init.normal_(parameter, std=0.25)
    return model.requires_grad_(False)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_attention_is_sdpas(family, padding):
    """Output and gradient of the embeddings in bf16, as close to float64 as sdpa's."""
    mask = torch.ones(3, 11, dtype=torch.int64)
    if padding != "none":
        mask[1, :4] = 0
    mask = mask.flip(1) if padding == "right" else mask
    results = []
    for dtype, fast in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = wide(family, dtype)
        if fast:
            pefast.accelerate(model)
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        decoder = {"decoder_input_ids": IDS} if family == "t5" else {}
        logits = model(inputs_embeds=embedded, attention_mask=mask, **decoder).logits
        shown = logits if logits.dim() == 2 or family == "t5" else logits[mask.bool()]
        shown.float().square().sum().backward()
        results.append((shown.detach(), embedded.grad[mask.bool()]))
    exact, near, got = results
    for i, name in enumerate(("logits", "gradient")):
        assert_no_worse(name, got[i], near[i], exact[i])


def test_generation_with_its_cache_is_sdpas():
    model = wide("llama", torch.float32)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, **options)
    assert torch.equal(pefast.accelerate(model).generate(IDS, **options), plain)


def test_the_kernel_is_really_called(monkeypatch):
    """A mask that transformers did not make, or a name it did not ask, would silently leave sdpa at work."""
    model = pefast.accelerate(wide("bert", torch.bfloat16))
    if "sdpa, not native" in pefast.explain(model):
        pytest.skip(pefast.explain(model))
    masks, real = [], attention.prefix_attention

    def seen(*tensors, **options):
        masks.append(options["mask"])
        return real(*tensors, **options)

    monkeypatch.setattr(attention, "prefix_attention", seen)
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    model(input_ids=IDS, attention_mask=mask)
    assert len(masks) == model.config.num_hidden_layers and all(m is not None for m in masks)


def test_a_model_that_pefast_attached_to():
    model = pefast.attach(bert(), pefast.LoRA(rank=4, dropout=0.1))
    plain = logits(model)
    pefast.accelerate(model)
    assert torch.equal(logits(model), plain)
    model.train()(input_ids=IDS, labels=LABELS).loss.backward()
    pefast.detach(model)
    assert torch.equal(logits(model.eval()), logits(bert()))
