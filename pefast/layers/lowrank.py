"""One delta's own parameters: the down and up halves of a segment of the waist."""

import math
from numbers import Real

import torch
from torch import Tensor, nn

from pefast.eager.activations import ACTIVATIONS
from pefast.ops.delta_linear import Segment
from pefast.ops.dropout import dropout


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that trained parameters have beside a frozen weight of this dtype: fp32 beside halves, as
    PEFT has it."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def lora_scale(who: str, rank: int, alpha: float | None, rslora: bool) -> float:
    """alpha / rank, or alpha / √rank for rsLoRA; alpha None means rank. Raises ValueError for rank < 1."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{who}: rank is {rank!r}; a whole number from 1 up would be right")
    alpha = rank if alpha is None else alpha
    if not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise ValueError(f"{who}: alpha is {alpha!r}; a number, or None for alpha = rank, would be right")
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def check_rate(who: str, rate: float) -> None:
    """Raises ValueError unless 0 <= rate < 1."""
    if not isinstance(rate, Real) or not 0 <= rate < 1:
        raise ValueError(f"{who}: dropout is {rate!r}; a rate from 0 to below 1 would be right")


def check_activation(who: str, activation: str) -> None:
    """Raises ValueError for a name that no hand knows."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{who}: no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")


class LowRank(nn.Module):
    """h = σ(dropout(x) aᵀ + c), delta = scale · (h bᵀ + d), with a [R, K], b [N, R], c [R] and d [N].

    A LoRA has σ = identity and neither c nor d. b and d start at zero, so a new delta changes nothing.
    """

    rides = True  # whether a frozen product can carry it; otherwise its host adds what `step` gives
    gains = ""  # what its `gain` multiplies: input, product or output; empty: it has none

    def __init__(
        self,
        rank: int,
        in_features: int,
        out_features: int,
        *,
        scale: float = 1.0,
        activation: str = "identity",
        dropout: float = 0.0,
        biases: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.scale, self.activation, self.dropout = scale, activation, float(dropout)
        place = {"device": device, "dtype": dtype}
        self.a = nn.Parameter(torch.empty(rank, in_features, **place))
        self.b = nn.Parameter(torch.zeros(out_features, rank, **place))
        self.c = nn.Parameter(torch.zeros(rank, **place)) if biases else None
        self.d = nn.Parameter(torch.zeros(out_features, **place)) if biases else None
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def segment(self, adapter: int | None = None, h: Tensor | None = None) -> Segment:
        """This delta as a segment of a call; with `h` [..., R], the part after the waist alone."""
        rate = self.dropout if self.training else 0.0
        if h is None:
            return Segment(self.a, self.b, self.scale, self.activation, self.c, self.d, rate, adapter)
        return Segment(None, self.b, self.scale, "identity", None, self.d, 0.0, adapter, h)

    def waist(self, x: Tensor) -> Tensor:  # [..., K] -> [..., R]
        """The part before the waist alone, for a delta that begins at one linear and ends at another."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x_hat = dropout(x, self.dropout, self.training)
        c = None if self.c is None else self.c.to(x.dtype)
        return ACTIVATIONS[self.activation].forward(nn.functional.linear(x_hat, self.a.to(x.dtype), c))

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        """The delta alone, for a place where there is no frozen product to ride on."""
        h = self.waist(x)
        d = None if self.d is None else self.d.to(h.dtype)
        return self.scale * nn.functional.linear(h, self.b.to(h.dtype), d)

    def factors(self) -> tuple[Tensor, Tensor]:  # [R, K], [N, R]
        """The two matrices whose product, times the scale, is the delta's weight; without an activation."""
        return self.a, self.b

    def delta_weight(self) -> Tensor:  # [N, K]
        """scale · b a, for a delta without an activation."""
        a, b = self.factors()
        return self.scale * (b @ a)

    def extra_repr(self) -> str:
        shape = f"rank={self.a.shape[0]}, scale={self.scale:g}"
        return f"{shape}, activation={self.activation}, dropout={self.dropout}"


class Shifted(LowRank):
    """A LoRA that starts at factors a₀ and b₀ and counts from there: scale · (x aᵀ bᵀ − x a₀ᵀ b₀ᵀ)."""

    def __init__(self, a: Tensor, b: Tensor, **settings):
        super().__init__(a.shape[0], a.shape[1], b.shape[0], **settings)
        with torch.no_grad():
            self.a.copy_(a)
            self.b.copy_(b)
        # made again from the weight when an adapter is loaded
        self.register_buffer("a_start", self.a.detach().clone(), persistent=False)
        self.register_buffer("b_start", self.b.detach().clone(), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:  # [2R, K], [N, 2R]
        """Its own and the start's, side by side."""
        return torch.cat((self.a, self.a_start)), torch.cat((self.b, -self.b_start), 1)

    def segment(self, adapter: int | None = None, h: Tensor | None = None) -> Segment:
        """Both pairs as one segment of twice the rank."""
        a, b = self.factors()
        return Segment(a, b, self.scale, dropout=self.dropout if self.training else 0.0, adapter=adapter)


class Lookup(LowRank):
    """A LoRA beside a table of embeddings [V, D]: a [R, V] is zero and b [D, R] random at the start."""

    rides = False

    def __init__(self, rank: int, words: int, width: int, **settings):
        super().__init__(rank, words, width, **settings)
        nn.init.zeros_(self.a)
        nn.init.normal_(self.b)

    def look_up(self, ids: Tensor, padding: int | None) -> Tensor:  # [...] -> [..., D]
        """scale · a's columns of these words, bᵀ; the padding word gets no gradient."""
        h = nn.functional.embedding(ids, self.a.t(), padding)  # [..., R]
        return self.scale * nn.functional.linear(h, self.b)
