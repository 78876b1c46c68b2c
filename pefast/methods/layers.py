"""Layer-wise fine-tuning: chosen layers train whole, the rest is frozen. Howard and Ruder 2018,
arXiv:1801.06146, section 3.3, for unfreezing from the end.

Files hold the chosen tensors under the model's own names, one that modules share once.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor, nn

from pefast.architectures import backbone, blocks
from pefast.methods.places import check_expression
from pefast.methods.replacing import Plan, Replacing, own_tensors


@dataclass
class Layers(Replacing):
    """Trained copies of all parameters of chosen blocks, and of what else is named.

    layers      numbers of the blocks: a list or a range; below zero they count from the end. An
                encoder-decoder's two stacks are numbered alike, and both are meant
    first, last so many blocks from the beginning, or from the end, of each stack
    names       modules or parameters, as a regular expression for whole paths or as whole paths and their
                ends ("pooler", "decoder.block.1"); this way every model can be chosen from
    embeddings  the input embeddings, with positions and their normalisation; an output embedding that shares
                its weight follows
    final_norm  the normalisation behind the last block

    Copies have the model's own dtype: load the model in float32 and train under autocast where bf16 steps
    would be too coarse.
    """

    layers: Sequence[int] | None = None
    first: int | None = None
    last: int | None = None
    names: str | Sequence[str] | None = None
    embeddings: bool = False
    final_norm: bool = False

    kind: ClassVar[str] = "layers"
    peft_types: ClassVar[tuple[str, ...]] = ("PEFAST_LAYERS",)

    def check(self) -> None:
        """Raises ValueError for settings that no model could take."""
        for what in ("first", "last"):
            count = getattr(self, what)
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise ValueError(f"Layers: {what} is {count!r}; a whole number from 1 up would be right")
        check_numbers("Layers", self.layers)
        if isinstance(self.names, str):
            check_expression("Layers", self.names)
        chosen = (
            self.layers is not None,
            self.first,
            self.last,
            self.names,
            self.embeddings,
            self.final_norm,
        )
        if not any(chosen):
            raise ValueError("Layers: nothing is chosen; last=2 or layers=[0, 1] would be right")

    def plan(self, model: nn.Module) -> Plan:
        """The parameters that train. Changes nothing; raises ValueError for layers that are not there."""
        own = own_tensors(model)
        chosen = set()
        if self.layers is not None or self.first or self.last:
            numbers = block_numbers(model, "Layers", self.layers, self.first, self.last)
            inside = in_blocks(model, "Layers", numbers)
            chosen |= {path for path in own if path.startswith(inside)}
        if self.names is not None:
            chosen |= _named(own, self.names)
        for wanted, what in ((self.embeddings, "embeddings"), (self.final_norm, "final norm")):
            if wanted:
                chosen |= _outside(model, own, what)
        return {path: None for path in own if path in chosen}

    def config(self, model: nn.Module, name: str, key: str) -> dict:
        """What adapter_config.json says of it."""
        names = self.names if self.names is None or isinstance(self.names, str) else list(self.names)
        return {
            "peft_type": "PEFAST_LAYERS",
            "layers": None if self.layers is None else list(self.layers),
            "first": self.first,
            "last": self.last,
            "names": names,
            "embeddings": self.embeddings,
            "final_norm": self.final_norm,
        }

    @classmethod
    def from_config(cls, config: dict, tensors: dict[str, Tensor]) -> "Layers":
        """The settings that `config` wrote."""
        return cls(**{field.name: config[field.name] for field in fields(cls)})


def check_numbers(who: str, layers) -> None:
    """Raises ValueError unless layers is None or whole numbers."""
    if layers is None:
        return
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"{who}: layers is {layers!r}; a list or a range of numbers would be right")
    if odd := [each for each in layers if not isinstance(each, int) or isinstance(each, bool)]:
        raise ValueError(f"{who}: layers has {odd[0]!r}; whole numbers would be right")


def block_numbers(model: nn.Module, who: str, layers, first=None, last=None) -> dict[str, set[int]]:
    """The chosen numbers in each stack of blocks, by the stack's path. Raises ValueError where there is no
    such block."""
    stacks: dict[str, int] = {}
    for block in blocks(model, who):
        stacks[_stack(block.path)] = block.number + 1
    chosen: dict[str, set[int]] = {stack: set() for stack in stacks}
    for stack, count in stacks.items():
        wanted = [*(layers or ()), *range(first or 0), *range(-(last or 0), 0)]
        if odd := [each for each in wanted if not -count <= each < count]:
            raise ValueError(
                f"{who}: there is no layer {odd[0]} in {stack}, which has {count};"
                f" {-count} to {count - 1} would be right"
            )
        chosen[stack] = {each % count for each in wanted}
    if not any(chosen.values()):
        raise ValueError(f"{who}: no layer is chosen; numbers from 0 would be right")
    return chosen


def in_blocks(model: nn.Module, who: str, numbers: dict[str, set[int]]) -> tuple[str, ...]:
    """What paths inside the chosen blocks begin with."""
    return tuple(
        f"{block.path}." for block in blocks(model, who) if block.number in numbers[_stack(block.path)]
    )


def _stack(path: str) -> str:
    return path.rpartition(".")[0]


def _named(own: Iterable[str], names: str | Sequence[str]) -> set[str]:
    """Parameters that are named, or lie in a module that is. Raises ValueError for a name that is nowhere."""
    found, lost = set(), [names] if isinstance(names, str) else list(names)
    for path in own:
        parts = path.split(".")
        above = [".".join(parts[: i + 1]) for i in range(len(parts))]
        for name in [names] if isinstance(names, str) else names:
            pattern = name if isinstance(names, str) else re.escape(name)
            if any(re.fullmatch(rf"(.*\.)?({pattern})", each) for each in above):
                found.add(path)
                lost = [each for each in lost if each != name]
    if lost:
        shown = ", ".join(sorted({path.rsplit(".", 2)[-2] for path in own if "." in path})[:12])
        raise ValueError(f"Layers: no parameter lies in {lost[0]!r}; names look like {shown}")
    return found


def _outside(model: nn.Module, own: Iterable[str], what: str) -> set[str]:
    """Parameters outside of the blocks: of the embeddings, or of the final norm."""
    closed = tuple(f"{block.path}." for block in blocks(model, "Layers"))
    body = backbone(model)
    prefix = next(name for name, module in model.named_modules() if module is body)
    prefix = f"{prefix}." if prefix else ""
    found = set()
    for path in own:
        if not path.startswith(prefix) or path.startswith(closed):
            continue
        owner = path.rpartition(".")[0]
        around = _widest(owner, prefix, closed)
        embeds = any(isinstance(module, nn.Embedding) for module in model.get_submodule(around).modules())
        norm = "norm" in type(model.get_submodule(owner)).__name__.lower()
        if embeds if what == "embeddings" else norm and not embeds:
            found.add(path)
    if not found:
        raise ValueError(f"Layers: this {type(model).__name__} has no {what} outside of its blocks")
    return found


def _widest(owner: str, prefix: str, closed: tuple[str, ...]) -> str:
    """The widest part of the backbone around a module that holds no block."""
    steps = owner.removeprefix(prefix).split(".")
    for i in range(len(steps)):
        part = prefix + ".".join(steps[: i + 1])
        if not any(block.startswith(f"{part}.") for block in closed):
            return part
    return owner
