"""Tiny seeded models of four families, what they are fed, and what the tests ask of models and of errors."""

import copy
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH, INNER, LAYERS = 96, 32, 56, 2
_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}


def _bert() -> nn.Module:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**_SIZES, **quiet, max_position_embeddings=48, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **_SIZES, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 48, "vocab_size": VOCABULARY}
    config = transformers.GPT2Config(**sizes, **quiet, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def _t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = transformers.T5Config(**sizes, **ends, vocab_size=VOCABULARY, dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(config)


_MAKERS = {"bert": _bert, "llama": _llama, "gpt2": _gpt2, "t5": _t5}
FAMILIES = tuple(_MAKERS)
DECODERS = ("llama", "gpt2", "t5")


@functools.cache
def _made(family: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return _MAKERS[family]().eval()


def build(family: str) -> nn.Module:
    """A model of that family in eval mode, in fp32; the same numbers each time, shared with nobody."""
    return copy.deepcopy(_made(family))


def inputs(family: str, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Seeded token ids [rows, length]; the second row's last three are padding."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[1, -3:], mask[1, -3:] = 0, 0
    fed = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        fed["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    return fed


def padded(family: str, side: str) -> dict[str, Tensor]:
    """Six rows, two of them padded on the side that is asked for; "none" is a batch without a mask."""
    fed = inputs(family, rows=6)
    fed["attention_mask"][1, -3:] = 1
    if side == "none":
        return {key: value for key, value in fed.items() if key != "attention_mask"}
    for row, count in ((1, 4), (2, 2)):
        cut = slice(None, count) if side == "left" else slice(-count, None)
        fed["input_ids"][row, cut] = fed["attention_mask"][row, cut] = 0
    return fed


class Numbers:
    """A tokenizer whose words are the numbers of its tokens."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def stir(model: nn.Module, seed: int = 3, size: float = 0.1) -> nn.Module:
    """Moves every parameter that trains, as training would: afterwards no delta is zero. In place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((size * noise).to(parameter.dtype))
    return model


def logits(model: nn.Module, **fed) -> Tensor:
    """The model's logits without gradients."""
    with torch.no_grad():
        return model(**fed).logits


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that trains, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model: nn.Module, fed: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss and the gradients of what trains, by name; leaves no gradient behind."""
    parameters = trained(model)
    loss = model(**fed).logits.float().square().mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


def saved_bytes(run: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward of run(), each piece of memory once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        # the tensor is held until the end, so that no address is used twice
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    sizes = [tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own]
    del result
    return sum(sizes)


def assert_close(got: Tensor, right: Tensor, relative: float = 1e-5) -> None:
    """Fails unless the largest difference is at most `relative` of the largest value."""
    got, right = got.detach(), right.detach()
    assert got.shape == right.shape, f"{tuple(got.shape)}, not {tuple(right.shape)}"
    difference, size = float((got - right).abs().max()), float(right.abs().max())
    assert difference <= relative * size, f"differs by {difference:.3g} where the largest value is {size:.3g}"


class Snapshot(NamedTuple):
    """All that a caller can see of a model between calls."""

    values: dict[str, Tensor]
    classes: dict[str, type]
    trains: dict[str, bool]
    hooks: dict[str, tuple[int, int]]
    attributes: dict[str, frozenset[str]]
    objects: dict[str, int]


def snapshot(model: nn.Module) -> Snapshot:
    """The model as it is now; its tensors are copied."""
    modules = dict(model.named_modules())
    return Snapshot(
        {key: value.detach().clone() for key, value in model.state_dict().items()},
        {path: type(module) for path, module in modules.items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {path: (len(m._forward_pre_hooks), len(m._forward_hooks)) for path, m in modules.items()},
        {path: frozenset(module.__dict__) for path, module in modules.items()},
        {path: id(module) for path, module in modules.items()}
        | {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)},
    )


def assert_as_it_was(model: nn.Module, before: Snapshot) -> None:
    """Fails unless the model is what it was, bit for bit and class for class."""
    now = snapshot(model)
    assert list(now.values) == list(before.values)
    changed = [key for key, value in before.values.items() if not torch.equal(now.values[key], value)]
    assert not changed, f"other values in {changed}"
    for field in Snapshot._fields[1:]:
        was, is_now = getattr(before, field), getattr(now, field)
        odd = [key for key in {**was, **is_now} if was.get(key) != is_now.get(key)]
        assert not odd, f"{field} differ at {odd}"


def assert_refused(action, *parts: str, error=ValueError) -> str:
    """Runs an action that must raise one sentence: who, what came, and each of `parts`."""
    with pytest.raises(error) as caught:
        action()
    text = str(caught.value)
    assert re.match(r"\w+: ", text), f"does not begin with who says it: {text}"
    assert "\n" not in text and len(text) < 500, text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
    return text
