"""Finding the layers that a method enters, and the deltas that it left there."""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from pefast.architectures import base_modules, heads
from pefast.formats import format_of
from pefast.layers.hosts import DeltaHost, EmbeddingHost
from pefast.layers.lowrank import LowRank


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer whose weight a format knows, by path; what a method or a head copy brought is left out."""
    return {path: module for path, module in base_modules(model) if format_of(module) is not None}


def pick_linears(
    model: nn.Module, targets, exclude=(), layers: Sequence[int] | None = None, needed: bool = True
) -> list[str]:
    """Paths of the linear layers that `targets` means. Raises ValueError where none matches but is needed."""
    for each in (targets, exclude):
        if isinstance(each, str):
            check_expression("attach", each)
    everything = linears(model)
    last = getattr(model, "get_output_embeddings", lambda: None)()
    closed = tuple(f"{head}." for head in heads(model))
    chosen = []
    for path, module in everything.items():
        if module is last or f"{path}.".startswith(closed):
            # named by its whole path, the output embedding can be meant; "all-linear" never means it
            if module is not last or _is_all(targets) or not matches(path, targets):
                continue
        if (
            (_is_all(targets) or matches(path, targets))
            and not (exclude and matches(path, exclude))
            and _in_layers(path, layers)
        ):
            chosen.append(path)
    if needed and not chosen:
        names = list(everything)
        shown = targets if isinstance(targets, str) or len(targets) <= 3 else [*targets[:2], "..."]
        raise ValueError(
            f"attach: no linear layer matches {shown!r}; names look like {', '.join(_some(names))}"
        )
    return chosen


def pick_embeddings(model: nn.Module, targets, exclude=()) -> list[str]:
    """Paths of the tables of embeddings that `targets` names; "all-linear" means none."""
    for each in (targets, exclude):
        if isinstance(each, str):
            check_expression("attach", each)
    tables = [path for path, module in base_modules(model) if type(module).forward is nn.Embedding.forward]
    hosts = [path for path, module in base_modules(model) if isinstance(module, EmbeddingHost)]
    return [
        path
        for path in tables + hosts
        if not _is_all(targets) and matches(path, targets) and not (exclude and matches(path, exclude))
    ]


def check_expression(who: str, text: str) -> None:
    """Raises ValueError for a text that is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{who}: {text!r} is no regular expression: {error}") from None


def _is_all(targets) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def matches(path: str, targets) -> bool:
    """Whether names, or a regular expression, mean this path, as they do in PEFT."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None or path.endswith(f".{targets}")
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _in_layers(path: str, layers: Sequence[int] | None) -> bool:
    return layers is None or block_number(path) in layers


def block_number(path: str) -> int | None:
    """The number of the block that a path leads into; None for one that leads into none."""
    number = re.search(r"\.(\d+)\.", f".{path}.")
    return None if number is None else int(number[1])


def pick_modules(model: nn.Module, names, layers: Sequence[int] | None, who: str) -> list[str]:
    """Paths of the modules of any kind that names or a regular expression mean. Raises ValueError where none
    matches."""
    if isinstance(names, str):
        check_expression(who, names)
    paths = [path for path, _ in base_modules(model) if path]
    chosen = [path for path in paths if matches(path, names) and _in_layers(path, layers)]
    if not chosen:
        raise ValueError(f"{who}: no module matches {names!r}; names look like {', '.join(_some(paths))}")
    return chosen


def _some(names: list[str]) -> list[str]:
    """A few names, one for each different ending."""
    return list({name.rsplit(".", 1)[-1]: name for name in reversed(names)}.values())[:-11:-1]


def hosts(model: nn.Module) -> Iterator[tuple[str, DeltaHost]]:
    """Every layer that carries deltas, by path."""
    for path, module in base_modules(model):
        if isinstance(module, DeltaHost):
            yield path, module


def deltas_of(model: nn.Module, name: str, key: str) -> Iterator[tuple[str, LowRank]]:
    """The deltas that one method of one adapter has on the model, by the path of their host."""
    for path, host in hosts(model):
        if name in host.deltas and key in host.deltas[name]:
            yield path, host.deltas[name][key]
