"""The deltas of bottleneck adapters: from one place of a block to another, around a module, or after a layer.

    s = norm_out(scale · (σ(dropout(norm_in(x)) aᵀ + c) bᵀ + d))     norms where there are any

Each says with `rides` whether the frozen product of its host can carry it; what cannot is added to the
product by `step`.
"""

import torch
from torch import Tensor, nn

from pefast.layers.lowrank import LowRank
from pefast.layers.router import Router
from pefast.ops.delta_linear import Segment


class Bottleneck(LowRank):
    """A delta with trained norms of its own before the way down and after the way up."""

    def __init__(
        self, size: int, k: int, n: int, *, norm_in: bool = False, norm_out: bool = False, **settings
    ):
        super().__init__(size, k, n, biases=True, **settings)
        place = {"device": self.a.device, "dtype": self.a.dtype}
        self.norm_in = nn.LayerNorm(k, **place) if norm_in else None
        self.norm_out = nn.LayerNorm(n, **place) if norm_out else None

    @property
    def rides(self) -> bool:
        """Its own linear's product carries it, unless a norm is in the way."""
        return self.norm_in is None and self.norm_out is None

    def waist(self, x: Tensor) -> Tensor:  # [..., K] -> [..., R]
        """The part before the waist, its norm included."""
        return super().waist(x if self.norm_in is None else _normed(self.norm_in, x))

    def up(self, h: Tensor) -> Tensor:  # [..., R] -> [..., N]
        """The part after the waist, its norm included."""
        d = None if self.d is None else self.d.to(h.dtype)
        s = self.scale * nn.functional.linear(h, self.b.to(h.dtype), d)
        return s if self.norm_out is None else _normed(self.norm_out, s)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return self.up(self.waist(x))


class Beside(Bottleneck):
    """From the input of a module to its output, where the module is a linear layer or any other."""


class Across(Bottleneck):
    """From the input of one module to the output of a linear layer behind it in the same block."""

    h: Tensor | None = None  # [..., R]  on its way from the entry to the exit

    @property
    def rides(self) -> bool:
        """The exit's product carries what is after the waist."""
        return self.norm_out is None

    def take(self, x: Tensor) -> None:
        """Computes the waist as the input passes by."""
        self.h = self.waist(x)

    def segment(self, adapter: int | None = None) -> Segment:
        """The part after the waist, as a segment of the exit's call."""
        h, self.h = _there(self.h), None
        return super().segment(adapter, h)

    def step(self, y: Tensor) -> Tensor:  # [..., N]
        """What the exit adds, where its product cannot carry it."""
        h, self.h = _there(self.h), None
        return self.up(h)


class After(Bottleneck):
    """A delta of a layer's own output y, or of norm(y + x): x the residual stream, the norm the block's."""

    rides = False
    stream: Tensor | None = None  # [..., N]  on its way from where the sublayer leaves the stream
    reads_stream = False
    block_norm: tuple[nn.Module, ...] = ()  # in a tuple, so that it does not become a part of this module

    def take(self, x: Tensor) -> None:
        """Keeps the residual stream as it passes by."""
        self.stream = x

    def step(self, y: Tensor) -> Tensor:  # [..., N]
        """What is added to y."""
        if self.reads_stream:
            stream, self.stream = _there(self.stream), None
            y = y + stream
            for norm in self.block_norm:
                y = norm(y)
        return self(y)


class Tap:
    """A forward pre-hook that shows a delta what goes into a module before the delta's own layer."""

    def __init__(self, delta: Across | After, name: str, router: Router):
        self.delta, self.name, self.router = delta, name, router

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if any(name == self.name for name, _ in self.router.turns):
            self.delta.take(args[0])


def _there(taken: Tensor | None) -> Tensor:
    if taken is None:
        raise RuntimeError(
            "pefast: an adapter's block ran its last layer without its first; its waist is not there"
        )
    return taken


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm in its own dtype, as transformers' models compute theirs; the result in x's."""
    return (
        norm(x.to(norm.weight.dtype)).to(x.dtype) if not torch.is_autocast_enabled(x.device.type) else norm(x)
    )
