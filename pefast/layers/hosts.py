"""Layers that carry deltas. A layer becomes a host in place: it keeps its object, its weight and its names,
and changes its class; leaving gives the class back. So a model's own state dict, hooks and ties stay as they
are.
"""

import torch
from torch import Tensor, nn

from pefast.formats import FORMATS
from pefast.layers.bottleneck import After, Beside
from pefast.layers.decode import decoded, forget
from pefast.layers.gain import multiplied, output, product
from pefast.layers.in_place import mix_in, take_out
from pefast.layers.lowrank import LowRank
from pefast.layers.router import Router, row_mask
from pefast.ops.delta_linear import delta_linear


class DeltaHost(nn.Module):
    """A frozen linear layer with deltas by adapter name and key; `deltas[name][key]` is a LowRank."""

    hosts_deltas = True
    compute: str | None = None  # "bf16": products of fp32 numbers may be in bf16
    siblings = None  # a Group of pefast/layers/siblings.py that computes this layer beside others
    format: str  # its name in FORMATS, so that forward need not ask
    deltas: nn.ModuleDict
    router: Router
    merged: tuple[str, ...]
    unmerged: dict[str, Tensor]

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        if not torch.is_grad_enabled() and (y := decoded(self, x)) is not None:
            return y
        if self.siblings is not None and (y := self.siblings.take(self, x)) is not None:
            return y
        turns = [turn for turn in self.router.turns if turn[0] in self.deltas]
        if self.merged or not turns:
            return super().forward(x)
        segments, after, gains = [], [], {}
        weight = FORMATS[self.format].weight(self)
        for name, index in turns:
            for delta in self.deltas[name].values():
                if delta.gains:
                    gains.setdefault(delta.gains, []).append((delta.gain(weight), index))
                if delta.rides:
                    segments.append(delta.segment(index))
                elif not delta.gains:
                    after.append((delta, index))
        ids, bias, y = self.router.rows, self.bias, None
        if "input" in gains:
            x = multiplied(x, gains["input"], ids)
        if "product" in gains:
            y = product(x, weight, tuple(segments), gains["product"], ids, bias, self.compute)
        elif segments:
            y = delta_linear(x, weight, tuple(segments), bias, ids=ids, compute=self.compute)
        elif "output" in gains:
            y = output(x, weight, gains["output"], bias, self.compute)
            gains = {} if y is not None else gains
        y = super().forward(x) if y is None else y
        if "output" in gains:
            y = multiplied(y, gains["output"], ids)
        for delta, index in after:
            step = (delta(x) if isinstance(delta, Beside) else delta.step(y)).to(y.dtype)
            y = y + (step if index is None else step * row_mask(ids, index, step))
        return y


class ModuleHost(DeltaHost):
    """Any other module with deltas: they read what goes into it, or what comes out, and are added to that."""

    hosts_deltas = True

    def forward(self, *args, **kwargs):
        output = super(DeltaHost, self).forward(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        for name, index in self.router.turns:
            if name in self.deltas:
                for delta in self.deltas[name].values():
                    read = y if isinstance(delta, After) else args[0] if args else kwargs["hidden_states"]
                    step = delta(read).to(y.dtype)
                    y = y + (step if index is None else step * row_mask(self.router.rows, index, step))
        return (y, *output[1:]) if isinstance(output, tuple) else y


class EmbeddingHost(DeltaHost):
    """A frozen table of embeddings with deltas."""

    hosts_deltas = True

    def forward(self, ids: Tensor) -> Tensor:  # [...] -> [..., D]
        y = super(DeltaHost, self).forward(ids)
        for name, index in () if self.merged else self.router.turns:
            if name in self.deltas:
                for delta in self.deltas[name].values():
                    step = delta.look_up(ids, self.padding_idx).to(y.dtype)
                    y = y + (step if index is None else step * row_mask(self.router.rows, index, step))
        return y


def _kind(layer: nn.Module) -> type[DeltaHost]:
    if isinstance(layer, nn.Embedding):
        return EmbeddingHost
    return DeltaHost if any(form.knows(layer) for form in FORMATS.values()) else ModuleHost


def host(linear: nn.Module, router: Router) -> None:
    """Makes a layer a host, in place. Its own parameters stay what they are."""
    if not isinstance(linear, DeltaHost):
        linear.format = next((name for name, form in FORMATS.items() if form.knows(linear)), "")
        mix_in(linear, _kind(linear), "Delta")
        linear.deltas, linear.router, linear.merged, linear.unmerged = nn.ModuleDict(), router, (), {}


def add_delta(linear: nn.Module, router: Router, name: str, key: str, delta: LowRank) -> None:
    """Puts a delta on a layer, which becomes a host if it is none."""
    host(linear, router)
    if name not in linear.deltas:
        linear.deltas[name] = nn.ModuleDict()
    forget(linear)
    linear.deltas[name][key] = delta.train(linear.training)


def drop_deltas(linear: DeltaHost, name: str) -> None:
    """Takes an adapter's deltas off; the last one to go gives the layer its own class back."""
    forget(linear)
    if name in linear.deltas:
        del linear.deltas[name]
    if not linear.deltas:
        del linear.format, linear.deltas, linear.router, linear.merged, linear.unmerged
        kinds = (ModuleHost, EmbeddingHost)
        take_out(linear, next((kind for kind in kinds if isinstance(linear, kind)), DeltaHost))
        linear.__dict__.pop("siblings", None)
        if not hasattr(type(linear), "compute"):
            linear.__dict__.pop("compute", None)


@torch.no_grad()
def merge_deltas(linear: DeltaHost, names: tuple[str, ...]) -> None:
    """Puts adapters' deltas and gains into weight and bias, in fp32 or wider, rounded once; keeps what they
    were."""
    deltas = [delta for name in names if name in linear.deltas for delta in linear.deltas[name].values()]
    linear.merged = names
    if not deltas:
        return
    if isinstance(linear, EmbeddingHost):
        # an output embedding that shares the table keeps it as it was, so the sum needs a table of its own
        linear.unmerged = {"weight": linear.weight}
        total = linear.weight + sum(delta.delta_weight().t() for delta in deltas)
        linear.weight = nn.Parameter(total.to(linear.weight.dtype), requires_grad=False)
        return
    weight, bias = FORMATS[linear.format].weight(linear), linear.bias  # [N, K], [N]
    linear.unmerged = {
        name: own.detach().clone()
        for name, own in (("weight", linear.weight), ("bias", bias))
        if own is not None
    }
    gains = {
        at: [delta.gain(weight) for delta in deltas if delta.gains == at]
        for at in ("product", "output", "input")
    }
    total = weight + sum(delta.delta_weight().to(weight.device) for delta in deltas if delta.rides)
    for g in (*gains["product"], *gains["output"]):
        total = total * g[:, None]
    for g in gains["input"]:
        total = total * g
    weight.copy_(total.to(weight.dtype))
    for g in gains["output"] if bias is not None else ():
        bias.copy_((bias * g).to(bias.dtype))


@torch.no_grad()
def unmerge_deltas(linear: DeltaHost) -> None:
    """Gives weight and bias back as they were, bit for bit."""
    for name, value in linear.unmerged.items():
        if isinstance(linear, EmbeddingHost):
            linear.weight = value
        else:
            getattr(linear, name).copy_(value)
    linear.merged, linear.unmerged = (), {}
