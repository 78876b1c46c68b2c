"""Where the blocks of each model family are, and where a block's sublayers begin and end."""

import re
from typing import NamedTuple

from torch import nn


class Sublayer(NamedTuple):
    """One sublayer of a block: its input is the input of `entry`, its output that of `exit`."""

    kind: str  # attention, feedforward or cross
    entry: str  # path inside the block; | parts alternatives, the first that is there counts
    exit: str


class Family(NamedTuple):
    """Blocks by a pattern of their path inside the backbone, and their sublayers."""

    blocks: str
    sublayers: tuple[Sublayer, ...]


_BERT = Family(
    r"encoder\.layer\.\d+",
    (
        Sublayer("attention", "attention.self.query", "attention.output.dense"),
        Sublayer("feedforward", "intermediate.dense", "output.dense"),
    ),
)
_LLAMA = Family(
    r"layers\.\d+",
    (
        Sublayer("attention", "self_attn.q_proj", "self_attn.o_proj"),
        Sublayer("feedforward", "mlp.gate_proj", "mlp.down_proj"),
    ),
)
_GPT2 = Family(
    r"h\.\d+",
    (Sublayer("attention", "attn.c_attn", "attn.c_proj"), Sublayer("feedforward", "mlp.c_fc", "mlp.c_proj")),
)
_T5 = Family(
    r"(encoder|decoder)\.block\.\d+",
    (
        Sublayer("attention", "layer.0.SelfAttention.q", "layer.0.SelfAttention.o"),
        Sublayer("cross", "layer.1.EncDecAttention.q", "layer.1.EncDecAttention.o"),
        Sublayer(
            "feedforward",
            "layer.2.DenseReluDense.wi|layer.2.DenseReluDense.wi_0|layer.1.DenseReluDense.wi|layer.1.DenseReluDense.wi_0",
            "layer.2.DenseReluDense.wo|layer.1.DenseReluDense.wo",
        ),
    ),
)
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3", "olmo2"), _LLAMA),
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
    prefix = next(name for name, module in model.named_modules() if module is body)
    found = []
    for path, _ in body.named_modules():
        if re.fullmatch(family.blocks, path):
            whole = f"{prefix}.{path}" if prefix else path
            names = {name for name, _ in body.get_submodule(path).named_modules()}
            found.append(
                Block(whole, int(path.rsplit(".", 1)[1]), tuple(_present(family.sublayers, whole, names)))
            )
    return found


def _present(sublayers: tuple[Sublayer, ...], whole: str, names: set[str]):
    for kind, entry, exit in sublayers:
        entry = next((path for path in entry.split("|") if path in names), None)
        exit = next((path for path in exit.split("|") if path in names), None)
        if entry and exit:
            yield Sublayer(kind, f"{whole}.{entry}", f"{whole}.{exit}")


def heads(model: nn.Module) -> list[str]:
    """Paths of the task head of a ...ForSequenceClassification and its kin; empty for models without one."""
    if not any(_TASK_MODELS.search(base.__name__) for base in type(model).__mro__):
        return []
    return [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
