"""What a LoRA layer must compute and move on a GPU, by our forms and by other people's roads: a prediction.

    seconds of a road = Σ over its launches of max(FLOP / peak, bytes / bandwidth, ...) + gap

The formula, its constants and our own forms: kernels/forms.py. A road is forward and backward of one layer
y [M, N] = x [M, K] wᵀ with a waist of R slots, in 16 bits; w gets no gradient. Each tensor counts once a
launch. Roads of others, from their code and papers:

    peft        dropout with a stored mask, two products, a product with the scale, a sum; autograd's way back
    by hand     an autograd.Function over library products, without dropout
    unsloth     its fast LoRA: the delta added in place, h made again on the way back, no dropout
    lorafusion  Zhu et al. 2025, arXiv:2510.00206: dropout with the first product, x̂ and the mask stored

Nothing here was measured on a GPU.
"""

from typing import NamedTuple

from pefast.kernels import forms
from pefast.kernels.forms import Launch, Rates, Shape


def _block(width: int, inner: int, keys: int) -> dict[str, tuple[int, int]]:
    attention = {
        "q_proj": (width, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, width),
    }
    return attention | {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}


def _encoder(width: int) -> dict[str, tuple[int, int]]:
    names = ("query", "key", "value", "output")
    return dict.fromkeys(names, (width, width)) | {"up": (4 * width, width), "down": (width, 4 * width)}


# (N, K) of every linear layer of a block
MODELS = {
    "llama3-8b": _block(4096, 14336, 1024),
    "llama3-70b": _block(8192, 28672, 1024),
    "llama2-7b": _block(4096, 11008, 4096),
    "llama3.2-1b": _block(2048, 8192, 512),
    "smollm2-135m": _block(576, 1536, 192),
    "bert-base": _encoder(768),
    "bert-large": _encoder(1024),
    "minilm": _encoder(384),
}


class Road(NamedTuple):
    """One way to compute the layer, forward and backward."""

    name: str
    launches: list[Launch]

    @property
    def flops(self) -> float:
        """Of all launches."""
        return sum(launch.flops for launch in self.launches)

    @property
    def read(self) -> float:
        """Bytes."""
        return sum(launch.read for launch in self.launches)

    @property
    def written(self) -> float:
        """Bytes."""
        return sum(launch.written for launch in self.launches)

    def seconds(self, rates: Rates) -> float:
        """Predicted."""
        return forms.seconds(self.launches, rates)


def layer(name: str) -> tuple[int, int]:
    """(N, K) of a layer by name, such as llama3-8b.q_proj. Raises ValueError for one that is not known."""
    model, _, part = name.rpartition(".")
    if model not in MODELS:
        raise ValueError(f"roofline: no model {model!r} in {name!r}; there are {', '.join(MODELS)}")
    if part not in MODELS[model]:
        raise ValueError(f"roofline: {model} has no layer {part!r}; it has {', '.join(MODELS[model])}")
    return MODELS[model][part]


def roads(s: Shape) -> list[Road]:
    """Every road of this shape, the frozen layer alone first."""
    ours = [
        Road(f"pefast, {form}", forms.forward(form, s) + forms.backward(form, s))
        for form in ("split", "library")
    ]
    # a mask in every column of tiles would cost more than the layer, so this form runs without one
    plain = s._replace(dropout=False)
    whole = Road("pefast, whole, no dropout", forms.forward("whole", plain) + forms.backward("whole", plain))
    others = [_unsloth(s), _by_hand(s), _lorafusion(s), _peft(s)]
    return [Road("frozen layer alone", _frozen(s)), whole, *ours, *others]


def _product(name: str, s: Shape, sides: str, read=(), written=()) -> Launch:
    """A library product over three sides, such as "mnk", and the matrices it reads and writes."""
    m, n, k = (getattr(s, side) for side in sides)
    return Launch(name, 2 * m * n * k, s.bytes(*read), s.bytes(*written))


def _frozen(s: Shape) -> list[Launch]:
    forward = _product("x wᵀ", s, "mnk", ("mk", "nk"), ("mn",))
    return [forward, _product("dy w", s, "mnk", ("mn", "nk"), ("mk",))]


def _peft(s: Shape) -> Road:
    x, y, mask = s.bytes("mk"), s.bytes("mn"), s.m * s.k
    base, into_x = _frozen(s)
    return Road(
        "PEFT, dropout" if s.dropout else "PEFT",
        [
            base,
            *([Launch("dropout", 0, x, x + mask)] if s.dropout else []),
            _product("x̂ aᵀ", s, "mrk", ("mk", "rk"), ("mr",)),
            _product("h bᵀ", s, "mnr", ("mr", "nr"), ("mn",)),
            Launch("· s", s.m * s.n, y, y),
            Launch("y +", s.m * s.n, 2 * y, y),
            Launch("dy · s", s.m * s.n, y, y),
            _product("dh", s, "mnr", ("mn", "nr"), ("mr",)),
            _product("db", s, "mnr", ("mn", "mr"), ("nr",)),
            _product("dh a", s, "mrk", ("mr", "rk"), ("mk",)),
            _product("da", s, "mrk", ("mr", "mk"), ("rk",)),
            *([Launch("dropout's way back", s.m * s.k, x + mask, x)] if s.dropout else []),
            into_x,
            Launch("dx +", s.m * s.k, 2 * x, x),
        ],
    )


def _by_hand(s: Shape) -> Road:
    base, into_x = _frozen(s)
    return Road(
        "by hand, no dropout",
        [
            base,
            _product("x aᵀ", s, "mrk", ("mk", "rk"), ("mr",)),
            _product("y += h bᵀ", s, "mnr", ("mr", "nr", "mn"), ("mn",)),
            into_x,
            _product("dh", s, "mnr", ("mn", "nr"), ("mr",)),
            _product("db", s, "mnr", ("mn", "mr"), ("nr",)),
            _product("dx += dh a", s, "mrk", ("mr", "rk", "mk"), ("mk",)),
            _product("da", s, "mrk", ("mr", "mk"), ("rk",)),
        ],
    )


def _unsloth(s: Shape) -> Road:
    again = _product("dh", s, "mnr", ("mn", "nr"), ("mr",))
    h = _product("x aᵀ", s, "mrk", ("mk", "rk"), ("mr",))
    hand = _by_hand(s).launches
    return Road("Unsloth, no dropout", [*hand, h, again])


def _lorafusion(s: Shape) -> Road:
    mask = s.m * s.k if s.dropout else 0
    x_hat = ("mk",) if s.dropout else ()
    down = _product("dropout, x̂ aᵀ", s, "mrk", ("mk", "rk"), ("mr", *x_hat))
    y = _product("y", s, "mnk", ("mk", "nk", "mr", "nr"), ("mn",))
    dx = _product("dx", s, "mnk", ("mn", "nk", "mr", "rk"), ("mk",))
    return Road(
        "LoRAFusion's split",
        [
            down._replace(written=down.written + mask),
            y._replace(flops=y.flops + 2 * s.m * s.n * s.r, speed=forms.FUSED),
            _product("dh", s, "mnr", ("mn", "nr"), ("mr",)),
            _product("db", s, "mnr", ("mn", "mr"), ("nr",)),
            _product("da", s, "mrk", ("mr", "mk"), ("rk",)),
            dx._replace(flops=dx.flops + 2 * s.m * s.k * s.r, read=dx.read + mask, speed=forms.FUSED),
        ],
    )


def losses(s: Shape, rates: Rates) -> list[str]:
    """Where the prediction says that our kernels lose, in words."""
    plain = s._replace(dropout=False)

    def share(form: str, rank: int) -> float:
        """Its time, of that of library products by hand."""
        at = plain._replace(r=rank)
        ours = forms.seconds(forms.forward(form, at) + forms.backward(form, at), rates)
        return ours / _by_hand(at).seconds(rates)

    found = []
    lost = [rank for rank in (1, 2, 4, 8, 16, 32, 64) if share("whole", rank) > 1]
    if lost:
        extra = 100 * 64 / forms.BLOCK_N
        found.append(
            f"whole loses to library products by hand from rank {lost[0]} on: at rank 64 it takes"
            f" {share('whole', 64):.2f} of their time, for every tile of {forms.BLOCK_N} columns makes the"
            f" waist again, {extra:.0f} % extra arithmetic"
        )
    speed = _even_speed(plain, rates)
    found.append(f"split loses to them where its product is slower than {speed:.2f} of the vendor's")
    return found


def _even_speed(s: Shape, rates: Rates) -> float:
    """The speed of the fused product, against the vendor's, at which split takes as long as by hand."""
    wanted, launches = _by_hand(s).seconds(rates), forms.forward("split", s) + forms.backward("split", s)
    low, high = 0.01, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        tried = [x._replace(speed=middle) if x.speed != 1.0 else x for x in launches]
        low, high = (middle, high) if forms.seconds(tried, rates) > wanted else (low, middle)
    return high
