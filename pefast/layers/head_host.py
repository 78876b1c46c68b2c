"""Task heads with a trained copy for each adapter, which may have another number of labels than the model.

In a batch of several adapters each row's logits come from its own head; where heads differ in their number of
labels, a row's missing ones are -inf: probability 0, and no gradient.
"""

import copy

import torch
from torch import Tensor, nn

from pefast.layers.in_place import mix_in, own_class, take_out
from pefast.layers.router import Router, row_mask


class HeadHost(nn.Module):
    """A task head with one trained copy for each adapter; the head's own parameters stay frozen."""

    hosts_deltas = True
    copies: nn.ModuleDict
    router: Router
    before: dict[tuple[str, str], nn.Parameter | None]  # while merged: the head's own, by path and name

    def forward(self, *args, **kwargs):
        if self.before:
            return super().forward(*args, **kwargs)
        turns = [(name, index) for name, index in self.router.turns if name in self.copies]
        rows = self.router.rows
        if not turns or rows is not None:
            y = super().forward(*args, **kwargs)
        if rows is None:
            # of several active adapters the last one's head answers
            return self.copies[turns[-1][0]](*args, **kwargs) if turns else y
        for name, index in turns:
            own = self.copies[name](*args, **kwargs)
            labels = max(y.shape[-1], own.shape[-1])
            own, y = _widened(own, labels), _widened(y, labels)
            y = torch.where(row_mask(rows, index, y).bool(), own, y)
        return y


def _widened(logits: Tensor, labels: int) -> Tensor:  # [..., C] -> [..., labels]
    if logits.shape[-1] == labels:
        return logits
    return nn.functional.pad(logits, (0, labels - logits.shape[-1]), value=float("-inf"))


def add_head(head: nn.Module, router: Router, name: str, copy: nn.Module) -> None:
    """Gives a task head a trained copy for this adapter; the head becomes a host if it is none."""
    if not isinstance(head, HeadHost):
        mix_in(head, HeadHost, "Head")
        head.copies, head.router, head.before = nn.ModuleDict(), router, {}
    head.copies[name] = copy


def head_copy(head: nn.Module, labels: int | None = None, spread: float = 0.02) -> nn.Module:
    """A deep copy of a head as it is without any adapter; with `labels`, a last layer of its own, drawn anew
    with that standard deviation."""
    if isinstance(head, HeadHost):
        bare = copy.copy(head)
        bare.__class__ = own_class(head, HeadHost)
        kept = {key: value for key, value in head.__dict__.items() if key not in ("router", "before")}
        bare.__dict__ = kept
        bare._modules = {key: value for key, value in head._modules.items() if key != "copies"}
        head = bare
    twin = copy.deepcopy(head)
    path = last_linear(twin)
    last = twin.get_submodule(path)
    if labels is None or labels == last.out_features:
        return twin
    new = nn.Linear(last.in_features, labels, last.bias is not None, last.weight.device, last.weight.dtype)
    nn.init.normal_(new.weight, std=spread)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    new.requires_grad_(last.weight.requires_grad)
    if not path:
        return new
    twin.set_submodule(path, new)
    return twin


def last_linear(head: nn.Module) -> str:
    """The path, inside a head, of the linear layer that gives the logits; empty for the head itself."""
    return [path for path, module in head.named_modules() if isinstance(module, nn.Linear)][-1]


def drop_head(head: HeadHost, name: str) -> None:
    """Takes an adapter's copy off; the last one to go gives the head its own class back."""
    if name in head.copies:
        del head.copies[name]
    if not head.copies:
        del head.copies, head.router, head.before
        take_out(head, HeadHost)


def merge_head(head: HeadHost, name: str) -> None:
    """Puts an adapter's copy in the place of the head's own parameters, which are kept for `unmerge_head`."""
    for path, twin in head.copies[name].named_modules():
        own = head.get_submodule(path)
        for tensor, value in twin._parameters.items():
            head.before[path, tensor] = own._parameters[tensor]
            # a tensor of its own: a file keeps only one of two names for the same memory
            merged = None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
            own._parameters[tensor] = merged
        if isinstance(own, nn.Linear):
            own.out_features = own.weight.shape[0]


def unmerge_head(head: HeadHost) -> None:
    """Gives the head its own parameters back."""
    for (path, tensor), value in head.before.items():
        own = head.get_submodule(path)
        own._parameters[tensor] = value
        if isinstance(own, nn.Linear):
            own.out_features = own.weight.shape[0]
    head.before.clear()
