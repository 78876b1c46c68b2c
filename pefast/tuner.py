"""Measures settings of delta_linear's kernels where they run, and keeps the fastest that compute right.

For each launch of a layer's forward and backward, by each form: every setting that kernels/tuning.py allows
for this GPU computes the layer once, y and all gradients are compared with the formula in float64 as the
tests do it, and only then is the launch timed, alone. One that computes wrong, or does not fit, is dropped
and said.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pefast.kernels import HAS_TRITON, delta_linear_gradients, delta_linear_products, forms, tuning
from pefast.kernels import delta_linear as hand
from pefast.ops.delta_linear import Call, Needs, Segment, reference
from pefast.testing import assert_no_worse

if HAS_TRITON:
    from triton.runtime.errors import OutOfResources
else:
    OutOfResources = RuntimeError

HOMES = dict.fromkeys(("waist", "product", "whole"), delta_linear_products)
HOMES |= dict.fromkeys(("back", "narrow", "down"), delta_linear_gradients)
# a setting must be this much faster than one before it in the list, or the machine's unrest would choose
MARGIN = 0.98


class Measured(NamedTuple):
    """One setting at one launch."""

    asked: tuning.Asked
    setting: dict
    seconds: float | None  # None where it was dropped
    fault: str = ""


class Layer(NamedTuple):
    """What is computed: y [M, N] of x [M, K] with a LoRA of rank R."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0


def measure(
    layer: Layer,
    device: str,
    target: str,  # of the compile gate, such as "sm90"
    timer: Callable[[Callable[[], object]], float],  # seconds of a call
) -> list[Measured]:
    """Every allowed setting of every launch of this layer, by each form, in the order of the list.

    Raises ValueError where the kernels cannot run on the device.
    """
    inputs = _inputs(layer, device)
    if why := hand.refuse(_call(layer, inputs)):
        raise ValueError(f"tune: {why}")
    near, exact = (_by_formula(layer, inputs, dtype) for dtype in (layer.dtype, torch.float64))
    found, seen = [], set()
    for road in ("split", "whole") if layer.r <= forms.WHOLE_RANK and not layer.dropout else ("split",):
        with forms.taking(road), tuning.noting() as notes:
            _by_hand(layer, inputs)
        for asked in dict.fromkeys(notes):
            if asked in seen:
                continue
            seen.add(asked)
            for setting in tuning.candidates(asked.kind, target):
                with forms.taking(road):
                    found.append(_try(layer, inputs, asked, setting, near, exact, timer))
    return found


def best(measured: list[Measured]) -> list[dict]:
    """For each launch a row of kernels/tuning.py with the fastest setting; none where all were dropped."""
    fastest: dict[tuning.Asked, Measured] = {}
    for one in measured:
        if one.seconds is None:
            continue
        before = fastest.get(one.asked)
        if before is None or one.seconds < MARGIN * before.seconds:
            fastest[one.asked] = one
    return [tuning.row_of(asked, one.setting) for asked, one in fastest.items()]


def _try(layer, inputs, asked, setting, near, exact, timer) -> Measured:
    kernel = asked.kind.kernel
    with tuning.trying(kernel, setting), tuning.noting() as notes, _recorded(kernel) as launches:
        try:
            got = _by_hand(layer, inputs)
        except (RuntimeError, OutOfResources) as error:
            return Measured(asked, setting, None, f"does not run: {str(error).splitlines()[0]}")
        # the launches of this kernel ask in the order in which they come
        own = [note for note in notes if note.kind.kernel == kernel]
        again = [launch for note, launch in zip(own, launches, strict=True) if note == asked]
    try:
        for name, right in exact.items():
            assert_no_worse(name, got[name], near[name], right)
    except AssertionError as error:
        return Measured(asked, setting, None, f"computes wrong: {error}")
    return Measured(asked, setting, sum(timer(launch) for launch in again))


class _Recorder:
    """A kernel whose launches can be made again."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **settings):
            self.launches.append(lambda: self.kernel[grid](*args, **settings))
            return self.launches[-1]()

        return launch


@contextlib.contextmanager
def _recorded(name: str):
    """Inside, the launches of this kernel are noted in the list that comes."""
    home, launches = HOMES[name], []
    kernel = getattr(home, name)
    setattr(home, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        setattr(home, name, kernel)


def _inputs(layer: Layer, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"x": (layer.m, layer.k), "w": (layer.n, layer.k), "dy": (layer.m, layer.n)}
    narrow = {"a": (layer.r, layer.k), "b": (layer.n, layer.r)}
    # each sum comes out at about the size of one term
    return {
        name: (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(device, layer.dtype)
        for name, shape in (sizes | narrow).items()
    }


def _call(layer: Layer, t: dict[str, Tensor]) -> Call:
    segment = Segment(t["a"], t["b"], 0.5, dropout=layer.dropout)
    return Call(t["x"], t["w"], None, None, None, torch.tensor([7]), (segment,))


def _by_hand(layer: Layer, t: dict[str, Tensor]) -> dict[str, Tensor]:
    call = _call(layer, t)
    y, saved = hand.forward(call)
    needs = Needs(True, False, False, False, [(True, True, False, False, False)])
    dx, _, _, _, ((da, db, *_),) = hand.backward(call, saved, t["dy"], needs)
    return {"y": y, "dx": dx, "da": da, "db": db}


def _by_formula(layer: Layer, t: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    x, a, b = (t[name].detach().to(dtype).requires_grad_() for name in ("x", "a", "b"))
    y = reference(x, t["w"].to(dtype), (Segment(a, b, 0.5, dropout=layer.dropout),), seed=torch.tensor([7]))
    dx, da, db = torch.autograd.grad(y, (x, a, b), t["dy"].to(dtype))
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}
