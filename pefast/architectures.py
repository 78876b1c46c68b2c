"""Where the blocks of each model family are, and where a block's sublayers begin and end."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


class Sublayer(NamedTuple):
    """One sublayer of a block: its input is the input of `entry`, its output that of `exit`."""

    kind: str  # attention, feedforward or cross
    entry: str  # path inside the block; | parts alternatives, the first that is there counts
    exit: str
    stream: str = ""  # its input is the residual stream that the sublayer is added to; empty: not known
    norm: str = ""  # what the sum goes through before it is the stream again; empty: nothing


class Family(NamedTuple):
    """Blocks by a pattern of their path inside the backbone, and their sublayers."""

    blocks: str
    sublayers: tuple[Sublayer, ...]


_BERT = Family(
    r"encoder\.layer\.\d+",
    (
        Sublayer(
            "attention",
            "attention.self.query",
            "attention.output.dense",
            "attention.self.query",
            "attention.output.LayerNorm",
        ),
        Sublayer(
            "feedforward", "intermediate.dense", "output.dense", "intermediate.dense", "output.LayerNorm"
        ),
    ),
)
_LLAMA = Family(
    r"layers\.\d+",
    (
        Sublayer("attention", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm"),
        Sublayer("feedforward", "mlp.gate_proj", "mlp.down_proj", "post_attention_layernorm"),
    ),
)
# a norm of their own between a sublayer and the sum: the stream cannot be read from one place
_GEMMA2 = Family(_LLAMA.blocks, tuple(each._replace(stream="") for each in _LLAMA.sublayers))
_GPT2 = Family(
    r"h\.\d+",
    (
        Sublayer("attention", "attn.c_attn", "attn.c_proj", "ln_1"),
        Sublayer("feedforward", "mlp.c_fc", "mlp.c_proj", "ln_2"),
    ),
)
_T5 = Family(
    r"(encoder|decoder)\.block\.\d+",
    (
        Sublayer("attention", "layer.0.SelfAttention.q", "layer.0.SelfAttention.o", "layer.0.layer_norm"),
        Sublayer("cross", "layer.1.EncDecAttention.q", "layer.1.EncDecAttention.o", "layer.1.layer_norm"),
        Sublayer(
            "feedforward",
            "layer.2.DenseReluDense.wi|layer.2.DenseReluDense.wi_0|layer.1.DenseReluDense.wi|layer.1.DenseReluDense.wi_0",
            "layer.2.DenseReluDense.wo|layer.1.DenseReluDense.wo",
            "layer.2.layer_norm|layer.1.layer_norm",
        ),
    ),
)
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"), _LLAMA),
    **dict.fromkeys(("gemma2", "olmo2"), _GEMMA2),
    "gpt2": _GPT2,
    **dict.fromkeys(("t5", "mt5"), _T5),
}
# the last parts of a model that a task trains from scratch, by the names that transformers gives them
HEADS = ("classifier", "score", "qa_outputs", "classification_head")
_TASK_MODELS = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice")


class Block(NamedTuple):
    """A block of a model: its path, its number, and the sublayers that it has, with whole paths."""

    path: str
    number: int
    sublayers: tuple[Sublayer, ...]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules without what adapters brought, so that a hundred adapters do not make a walk longer."""
    seen, stack = set(), [("", model)]
    while stack:
        path, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        host = getattr(module, "hosts_deltas", False)
        stack += [
            (f"{path}.{name}" if path else name, child)
            for name, child in reversed(module._modules.items())
            if child is not None and not (host and name in ("deltas", "copies"))
        ]


def backbone(model: nn.Module) -> nn.Module:
    """What maps tokens to hidden states in a transformers model; the model itself where no part does."""
    return getattr(model, "base_model", model)


def family_of(model: nn.Module, who: str) -> Family:
    """The family of a transformers model. Raises ValueError, naming the caller, for an unknown one."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"{who}: the blocks of model type {kind!r} are not known here; known are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def blocks(model: nn.Module, who: str) -> list[Block]:
    """Every block of the model in order, encoder before decoder."""
    family, body = family_of(model, who), backbone(model)
    prefix = next(name for name, module in base_modules(model) if module is body)
    found = []
    for path, _ in base_modules(body):
        if re.fullmatch(family.blocks, path):
            whole = f"{prefix}.{path}" if prefix else path
            names = {name for name, _ in base_modules(body.get_submodule(path))}
            found.append(
                Block(whole, int(path.rsplit(".", 1)[1]), tuple(_present(family.sublayers, whole, names)))
            )
    return found


def _present(sublayers: tuple[Sublayer, ...], whole: str, names: set[str]):
    for kind, *places in sublayers:
        # the first alternative that the block has, with its whole path; empty where there is none
        found = [
            next((f"{whole}.{path}" for path in each.split("|") if path and path in names), "")
            for each in places
        ]
        if found[0] and found[1]:
            yield Sublayer(kind, *found)


def heads(model: nn.Module) -> list[str]:
    """Paths of the task head of a ...ForSequenceClassification and its kin; empty for models without one."""
    if not any(_TASK_MODELS.search(base.__name__) for base in type(model).__mro__):
        return []
    return [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
