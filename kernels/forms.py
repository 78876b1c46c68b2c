"""What one delta_linear costs on a GPU by each road, and the choice among them: a model, not a measurement.

    seconds of a launch = max(FLOP / peak, bytes / bandwidth, integer operations / their rate) + gap

    whole    one launch: every column of tiles makes the waist again, R/BLOCK_N extra arithmetic; on the way
             back db is made of the same read of dy
    split    the waist first, then one product that begins with it
    library  the vendor's product, then the waist's part added to its result: y is read and written once more

Bytes are those of each tensor once a launch. What one launch leaves for the next in less than `cache` bytes
stays on the chip and counts for neither. Of a decoding step (`step`) what a program reads again counts too.

Sources. H100: 798 TFLOP/s of an 8192³ product in bf16 and 3.0 TB/s of a copy, both measured on one H100 SXM;
50 MB of cache and 14.8 T integer operations a second (132 multiprocessors, 64 lanes, 1.755 GHz) from its data
sheet. A100: data sheet. gap: a usual time between two launches of a stream. FUSED: Triton's product against
the vendor's, 0.95 to 0.98 on an H100 by lorafusion's issue 8. PHILOX: 10 rounds of 10 operations give bits
for 8 elements, 3 more choose.
"""

import contextlib
from typing import NamedTuple

FUSED = 0.96
PHILOX = 16
BLOCK_N = 128
# columns of a program in a decoding step
STEP_N = 128
# what is read again comes from the cache, at twice the memory's rate: 5.5 TB/s and more were seen on an H100
CACHE = 2.0
# the widest waist of the form that makes it in every tile
WHOLE_RANK = 64


class Rates(NamedTuple):
    """What a GPU can do."""

    flops: float  # a second, 16-bit inputs and fp32 sums
    bytes: float  # a second
    integers: float  # a second
    gap: float  # seconds a launch
    cache: float  # bytes


RATES = {
    "H100": Rates(798e12, 3.0e12, 14.8e12, 2e-6, 50e6),
    "H200": Rates(798e12, 4.3e12, 14.8e12, 2e-6, 50e6),
    "A100": Rates(312e12, 1.94e12, 19.5e12, 2e-6, 40e6),
}


class Launch(NamedTuple):
    """One kernel of a road."""

    name: str
    flops: float
    read: float  # bytes
    written: float  # bytes
    integers: float = 0
    speed: float = 1.0  # against the vendor's product

    def seconds(self, rates: Rates) -> float:
        """By the formula at the head of this file."""
        moved = (self.read + self.written) / rates.bytes
        return max(self.flops / (rates.flops * self.speed), moved, self.integers / rates.integers) + rates.gap


class Shape(NamedTuple):
    """y [M, N] = x [M, K] wᵀ beside a waist of R slots, in numbers of `size` bytes."""

    m: int
    n: int
    k: int
    r: int
    dropout: bool = False
    size: int = 2

    def bytes(self, *sides: str) -> float:
        """Bytes of the matrices with these sides, such as "mk" for x."""
        return sum(getattr(self, a) * getattr(self, b) for a, b in sides) * self.size


def forward(form: str, s: Shape) -> list[Launch]:
    """The launches of y."""
    drawn = PHILOX * s.m * s.k if s.dropout else 0
    waist = Launch("waist", 2 * s.m * s.k * s.r, s.bytes("mk", "rk"), _kept(s.bytes("mr")), drawn)
    base, beside = 2 * s.m * s.n * s.k, 2 * s.m * s.n * s.r
    if form == "whole":
        again = 2 * s.m * s.k * s.r * -(-s.n // BLOCK_N)
        read = s.bytes("mk", "nk", "rk", "nr")
        drawn *= -(-s.n // BLOCK_N)
        return [Launch("whole", base + again + beside, read, s.bytes("mn", "mr"), drawn, FUSED)]
    if form == "split":
        read = s.bytes("mk", "nk", "nr") + _kept(s.bytes("mr"))
        return [waist, Launch("product", base + beside, read, s.bytes("mn"), 0, FUSED)]
    return [
        Launch("library product", base, s.bytes("mk", "nk"), s.bytes("mn")),
        waist,
        Launch("product beside", beside, s.bytes("mn", "nr") + _kept(s.bytes("mr")), s.bytes("mn")),
    ]


def backward(form: str, s: Shape) -> list[Launch]:
    """The launches of dx, da and db. A form of dx; da and db are made alike."""
    drawn = PHILOX * s.m * s.k if s.dropout else 0
    base, into_x = 2 * s.m * s.n * s.k, 2 * s.m * s.k * s.r
    h = s.bytes("mr")
    of_a = _kept(down_parts(s))
    down = [
        Launch("parts of da", 2 * s.m * s.k * s.r, s.bytes("mk") + h, of_a, drawn),
        Launch("da", 0, of_a, s.bytes("rk")),
    ]
    if form == "whole":
        again, of_b = 2 * s.m * s.n * s.r * -(-s.k // BLOCK_N), _kept(back_parts(s))
        read, written = s.bytes("mn", "nk", "rk", "nr") + h, s.bytes("mk") + h + of_b
        flops = base + again + into_x + 2 * s.m * s.n * s.r
        db = Launch("db", 0, of_b, s.bytes("nr"))
        return [Launch("back", flops, read, written, drawn, FUSED), db, *down]
    of_h, of_b = narrow_parts(s)
    # what is kept in the cache is kept together
    of_h, of_b = (part if _kept(of_h + of_b) else 0.0 for part in (of_h, of_b))
    both = Launch("dh and db", 4 * s.m * s.n * s.r, s.bytes("mn", "nr") + h, of_h + of_b)
    finish = [Launch("dz", 0, of_h, _kept(h)), Launch("db", 0, of_b, s.bytes("nr"))]
    if form == "split":
        read = s.bytes("mn", "nk", "rk") + _kept(h)
        return [both, *finish, Launch("dx", base + into_x, read, s.bytes("mk"), drawn, FUSED), *down]
    return [
        Launch("library product", base, s.bytes("mn", "nk"), s.bytes("mk")),
        both,
        *finish,
        Launch("dx beside", into_x, s.bytes("mk", "rk") + _kept(h), s.bytes("mk"), drawn),
        *down,
    ]


def back_parts(s: Shape) -> float:
    """Bytes of the parts of db that the strips of about 512 programs leave, in fp32."""
    return 4.0 * s.r * s.n * max(1, min(512 // -(-s.k // BLOCK_N), -(-s.m // 64)))


def narrow_parts(s: Shape) -> tuple[float, float]:
    """Bytes of the parts of dh and of db that blocks of 256 columns and about 128 strips leave, in fp32."""
    columns = -(-s.n // 256)
    strips = max(1, min(128 // columns, -(-s.m // 64)))
    return 4.0 * s.r * columns * s.m, 4.0 * s.r * strips * s.n


def down_parts(s: Shape) -> float:
    """Bytes of the parts of da that about 256 strips and blocks of 128 columns leave, in fp32."""
    return 4.0 * s.r * s.k * max(1, min(256 // max(1, -(-s.k // 128)), -(-s.m // 64)))


def _kept(written: float) -> float:
    """Bytes that leave the chip of what the next launch reads: none below a quarter of an H100's cache."""
    return written if written > RATES["H100"].cache / 4 else 0.0


def seconds(launches: list[Launch], rates: Rates) -> float:
    """Time of a road."""
    return sum(launch.seconds(rates) for launch in launches)


_taken: list[str] = []


@contextlib.contextmanager
def taking(form: str):
    """Inside, this form is chosen wherever it can compute the call, whatever it costs."""
    _taken.append(form)
    try:
        yield
    finally:
        _taken.pop()


def choose(direction, s: Shape, rates: Rates, whole: bool) -> str:
    """The form with the least time; `whole` where that form can compute the call at all."""
    if _taken:
        return _taken[-1] if whole or _taken[-1] != "whole" else "split"
    forms = ("whole", "split", "library") if whole and s.r <= WHOLE_RANK else ("split", "library")
    return min(forms, key=lambda form: seconds(direction(form, s), rates))


def library_only(s: Shape, rates: Rates) -> float:
    """Time of a forward by three products of the vendor's, as the eager hand does it; dropout before them."""
    mask = [Launch("dropout", 0, s.bytes("mk"), s.bytes("mk"), PHILOX * s.m * s.k)] if s.dropout else []
    return seconds([*mask, *forward("library", s._replace(dropout=False))], rates)


def step(s: Shape, strips: int) -> list[Launch]:
    """The launches of a decoding step: the layer and its deltas in one, with a second for several strips."""
    part = 4.0 * s.m * s.n * strips if strips > 1 else s.bytes("mn")
    flops = 2 * s.m * (s.n * s.k + s.n * s.r) + 2 * s.m * s.k * s.r * -(-s.n // STEP_N)
    # every program reads the a's and the x of its strip: from the cache, for all but the first
    again = s.bytes("rk", "mk") * (-(-s.n // STEP_N) - 1) + s.bytes("nr") * (strips - 1)
    read = s.bytes("mk", "nk", "rk", "nr") + again / CACHE
    first = Launch("step", flops, read, _kept(part) if strips > 1 else part)
    return [first, Launch("finish", 0, _kept(part), s.bytes("mn"))] if strips > 1 else [first]


def one_by_one(s: Shape, adapters: int) -> list[Launch]:
    """The launches of a step by the eager hand: the layer, then each adapter's waist, rows and part."""
    product, waist, beside = forward("library", s._replace(r=s.r / max(1, adapters)))
    rows = Launch("rows of an adapter", 0, 0, 0)
    return [product, *[waist, rows, beside][:: 2 if adapters == 1 else 1] * adapters]


def why_not_a_step(s: Shape, strips: int, adapters: int, rates: Rates) -> str:
    """Why the vendor's products, an adapter after the other, take a decoding step in less time, or ""."""
    ours, theirs = seconds(step(s, strips), rates), seconds(one_by_one(s, adapters), rates)
    if theirs <= ours:
        return f"{1e6 * ours:.0f} µs predicted, {1e6 * theirs:.0f} by the vendor's products"
    return ""


def rates_of(device_name: str) -> Rates:
    """The rates of a GPU by the name that CUDA gives it; an H100's where it is not in the table."""
    return next((rates for name, rates in RATES.items() if name in device_name), RATES["H100"])
