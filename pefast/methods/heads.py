"""Chosen attention heads train: their rows of q, k and v, with the biases, and their columns of o.

Heads do different work and most can be left alone: Michel et al. 2019, arXiv:1905.10650.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from pefast.architectures import blocks
from pefast.formats import format_of
from pefast.methods.choosing import Choosing
from pefast.methods.layers import block_numbers, check_numbers, in_blocks
from pefast.methods.replacing import Plan, own_tensors
from pefast.ops.partial_linear import Index

# q's name, and those of k and v beside it
_BESIDE = {"query": ("key", "value"), "q_proj": ("k_proj", "v_proj"), "q": ("k", "v")}


@dataclass
class Heads(Choosing):
    """Trained copies of some attention heads.

    heads       {layer: numbers of heads}, or numbers for each layer; below zero both count from the end
    layers      where heads is no mapping: numbers of the blocks; None: all
    groups      which heads of k and v train, where several query heads share one: "any", those of which a
                chosen head reads; "all", those whose readers are all chosen; "none"
    kinds       "attention", "cross" (an encoder-decoder's cross-attention), or both
    """

    heads: Mapping[int, Sequence[int]] | Sequence[int] = ()
    layers: Sequence[int] | None = None
    groups: str = "any"
    kinds: Sequence[str] = ("attention",)
    saved: Plan | None = None

    kind: ClassVar[str] = "heads"
    peft_types: ClassVar[tuple[str, ...]] = ("PEFAST_HEADS",)

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        if self.saved is not None:
            return
        if self.groups not in ("any", "all", "none"):
            raise ValueError(f"Heads: groups is {self.groups!r}; any, all or none would be right")
        if not self.kinds or set(self.kinds) - {"attention", "cross"}:
            raise ValueError(f"Heads: kinds is {self.kinds!r}; attention, cross or both would be right")
        if not self.heads:
            raise ValueError("Heads: no head is chosen; heads={0: [1, 3]} would be right")
        check_numbers("Heads", self.layers)
        by_layer = self.heads if isinstance(self.heads, Mapping) else {0: self.heads}
        if isinstance(self.heads, Mapping) and self.layers is not None:
            raise ValueError("Heads: heads names its layers already; layers=None would be right")
        for layer, numbers in by_layer.items():
            for each in (layer, *(numbers if isinstance(numbers, Sequence) else [numbers])):
                if not isinstance(each, int) or isinstance(each, bool):
                    raise ValueError(f"Heads: heads has {each!r}; whole numbers would be right")

    def choose(self, model: nn.Module) -> Plan:
        """The rows of q, k, v and the columns of o. Raises ValueError for a head that is not there."""
        by_layer = self.heads if isinstance(self.heads, Mapping) else None
        wanted: dict[Attention, set[int]] = {}
        for layer in by_layer or (None,):
            layers = self.layers if by_layer is None else [layer]
            numbers = block_numbers(model, "Heads", layers) if layers is not None else None
            inside = None if numbers is None else in_blocks(model, "Heads", numbers)
            for each in attentions(model, self.kinds):
                if inside is None or each.q.startswith(inside):
                    heads = self.heads if by_layer is None else by_layer[layer]
                    wanted.setdefault(each, set()).update(_numbers(each, heads))
        plan: Plan = {}
        for attention, heads in wanted.items():
            plan |= entries(model, attention, heads, self.groups)
        if not plan:
            raise ValueError(f"Heads: this {type(model).__name__} has no {' or '.join(self.kinds)} there")
        return {path: plan[path] for path in own_tensors(model) if path in plan}

    def settings(self) -> dict[str, Any]:
        """How the heads were chosen."""
        heads = self.heads
        shown = {str(k): list(v) for k, v in heads.items()} if isinstance(heads, Mapping) else list(heads)
        return {"heads": shown, "groups": self.groups}


class Attention(NamedTuple):
    """One attention: paths of its linears, the number of heads, of key heads, and a head's width."""

    q: str
    k: str  # q's own path where one linear holds all three
    v: str
    o: str
    heads: int
    shared: int
    width: int


def attentions(model: nn.Module, kinds: Sequence[str] = ("attention",)) -> list[Attention]:
    """Every attention of a model of a known family, in order. Raises ValueError for an unknown one."""
    found = []
    for block in blocks(model, "Heads"):
        for sublayer in block.sublayers:
            if sublayer.kind not in kinds:
                continue
            around, _, name = sublayer.entry.rpartition(".")
            paths = [sublayer.entry, *(f"{around}.{other}" for other in _BESIDE.get(name, (name, name)))]
            q, k = (_weight(model, path) for path in paths[:2])
            count = model.config.num_attention_heads
            # a fused linear holds q, k and v below each other
            width = q.shape[0] // (3 * count if paths[0] == paths[1] else count)
            shared = count if paths[0] == paths[1] else k.shape[0] // width
            found.append(Attention(*paths, sublayer.exit, count, shared, width))
    return found


def _weight(model: nn.Module, path: str) -> torch.Tensor:
    linear = model.get_submodule(path)
    return format_of(linear).weight(linear)


def _numbers(attention: Attention, heads: Sequence[int]) -> set[int]:
    count = attention.heads
    if odd := [each for each in heads if not -count <= each < count]:
        raise ValueError(
            f"Heads: there is no head {odd[0]} in {attention.q}, which has {count};"
            f" {-count} to {count - 1} would be right"
        )
    return {each % count for each in heads}


def entries(model: nn.Module, attention: Attention, heads: set[int], groups: str = "any") -> Plan:
    """The entries of an attention's linears that belong to some of its heads."""
    several = attention.heads // attention.shared
    readers = {group: {group * several + i for i in range(several)} for group in range(attention.shared)}
    rule = {"any": lambda own: own & heads, "all": lambda own: own <= heads, "none": lambda own: False}[
        groups
    ]
    below = {group for group, own in readers.items() if rule(own)}
    q, shared = _run(heads, attention.width), _run(below, attention.width)
    if attention.q == attention.k:
        third = attention.heads * attention.width
        rows = {attention.q: torch.cat((q, shared + third, shared + 2 * third))}
    else:
        rows = {attention.q: q, attention.k: shared, attention.v: shared}
    plan: Plan = {}
    for path, at in rows.items():
        if len(at):
            plan[f"{path}.weight"] = Index("rows", at)
            if model.get_submodule(path)._parameters.get("bias") is not None:
                plan[f"{path}.bias"] = Index("elements", at)
    return plan | {f"{attention.o}.weight": Index("columns", q)}


def _run(heads: set[int], width: int) -> torch.Tensor:
    """The rows of some heads, rising."""
    starts = torch.tensor(sorted(heads), dtype=torch.int64)[:, None] * width
    return (starts + torch.arange(width)).flatten()
